"""Reads one hospital's CSV file and makes the 13 features, all within the hospital.

The jobs heart, heart_loop, heart_torch and heart_tensorflow carry the same copy of this file:
a job is a folder that needs no other.
"""

import csv
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

NUMBERS = ("age", "sex", "trestbps", "chol", "fbs", "thalach", "exang", "oldpeak")
# Codes that get a column of zeros and ones each; the lowest code of each is the reference.
CODES = {"cp": (1, 2, 3, 4), "restecg": (0, 1, 2)}
LABEL, SPLIT = "num", "split"
FEATURES = (*NUMBERS, *(f"{name}_{code}" for name, codes in CODES.items() for code in codes[1:]))


class Examples(NamedTuple):
    """Rows of one split.

    Attributes:
        features: float32 (rows, 13), in the order of `FEATURES`, normalised.
        labels: float32 (rows,), 1.0 where heart disease is present.
    """

    features: np.ndarray
    labels: np.ndarray


def load(path: Path) -> tuple[Examples, Examples]:
    """Reads a hospital's file.

    Features are z-scores by the hospital's own training rows: their mean and their standard
    deviation (ddof 1).

    Returns:
        The training and the test examples.

    Raises:
        ValueError: a missing column, a cell that is no number or no known code, or a split
            without rows (training needs two). It names file, line and column but never the
            value: an error travels to the server, a patient's value must not.
    """
    features, labels, in_train = [], [], []
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        for column in (*NUMBERS, *CODES, LABEL, SPLIT):
            if column not in (reader.fieldnames or ()):
                raise ValueError(f"{path.name}: column {column!r} is missing")
        for row in reader:
            where = f"{path.name}, line {reader.line_num}"
            if row[SPLIT] not in ("train", "test"):
                raise ValueError(f"{where}, column {SPLIT!r}: neither 'train' nor 'test'")
            in_train.append(row[SPLIT] == "train")
            labels.append(_number(row, LABEL, where) > 0)
            codes = {name: _number(row, name, where) for name in CODES}
            for name, code in codes.items():
                if code not in CODES[name]:
                    raise ValueError(f"{where}, column {name!r}: not one of {CODES[name]}")
            one_hot = [float(codes[name] == code) for name in CODES for code in CODES[name][1:]]
            features.append([_number(row, name, where) for name in NUMBERS] + one_hot)
    train = np.array(in_train, dtype=bool)
    if train.sum() < 2 or train.all():
        raise ValueError(f"{path.name}: needs at least two training rows and one test row")
    raw = np.array(features, dtype=np.float64)
    mean, std = raw[train].mean(axis=0), raw[train].std(axis=0, ddof=1)
    # A feature that never varies says nothing and stays 0 (Switzerland measured no chol).
    x = ((raw - mean) / np.where(std > 1e-9, std, 1.0)).astype(np.float32)
    y = np.array(labels, dtype=np.float32)
    return Examples(x[train], y[train]), Examples(x[~train], y[~train])


def _number(row: dict[str, str], column: str, where: str) -> float:
    try:
        value = float(row[column])
    except (TypeError, ValueError):  # TypeError: the line ends before this column
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where}, column {column!r}: not a number")
    return value
