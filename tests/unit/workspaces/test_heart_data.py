import csv
import hashlib
import importlib.util
from collections import Counter

import pytest

# site: sha256, training rows, test rows (the sizes of FLamby's Fed-Heart-Disease)
FILES = {
    "cleveland": ("20cf5f823c79f00d051cb75ccb2b9c0da21e5b52bb382559cdef59a74568e3cf", 199, 104),
    "hungary": ("208babef4a0a86836129679428f88db8b51d1914b6d9b2239071efb1a5c5788d", 172, 89),
    "switzerland": ("c49178b9bcd0282f07d975b7eba63ab59e985e42b0e8363ff75ed41392df2b13", 30, 16),
    "va": ("750a63f9fd166314b90e55efcc292ed7f0e931063c876bed1b2d79f0d80e0715", 85, 45),
}


def rows(workspaces, site):
    with (workspaces / "heart" / "data" / f"{site}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("site", FILES)
def test_the_files_are_the_published_data(workspaces, site):
    digest, train, test = FILES[site]
    content = (workspaces / "heart" / "data" / f"{site}.csv").read_bytes()
    assert hashlib.sha256(content).hexdigest() == digest
    assert Counter(row["split"] for row in rows(workspaces, site)) == {"train": train, "test": test}


def test_the_mislabelled_row_is_hungarys_first(workspaces):
    assert rows(workspaces, "hungary")[0]["age"] == "28"
    assert "28" not in {row["age"] for row in rows(workspaces, "cleveland")}


@pytest.mark.sklearn
@pytest.mark.parametrize("site", FILES)
def test_the_split_can_be_recomputed(workspaces, site):
    path = workspaces / "heart" / "prepare_data.py"
    spec = importlib.util.spec_from_file_location("prepare_data", path)
    assert spec is not None
    assert spec.loader is not None
    prepare_data = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare_data)
    found = rows(workspaces, site)
    assert prepare_data.split([int(row["num"]) for row in found]) == [r["split"] for r in found]
