import pytest

from flplatform.core.control import MatrixView
from tests.support.control import ENDED, run

VALUES = {
    ("cleveland", "cleveland"): 0.746,
    ("cleveland", "hungary"): 0.760,
    ("cleveland", "switzerland"): 0.725,
    ("hungary", "cleveland"): 0.746,
    ("hungary", "hungary"): 0.746,
    ("hungary", "switzerland"): 0.525,
    ("switzerland", "cleveland"): 0.481,
    ("switzerland", "hungary"): 0.391,
    ("global", "cleveland"): 0.750,
    ("global", "hungary"): 0.750,
    ("global", "switzerland"): 0.730,
}


@pytest.fixture
def matrix(control):
    control.run_views = {7: run(7, **ENDED)}
    control.matrices[7] = MatrixView(
        owners=("cleveland", "hungary", "switzerland", "global"),
        sites=("cleveland", "hungary", "switzerland"),
        cells={key: {"accuracy": value, "loss": 1 - value} for key, value in VALUES.items()},
        gaps={
            ("*", "va"): "declined: policy byoc",
            ("switzerland", "switzerland"): "deadline",
            ("basel", "*"): "no local model: gone",
        },
        global_round=12,
        complete=True,
        metric="accuracy",
        mode="max",
    )
    return control


def test_the_matrix_has_every_gap_and_marks_the_best(console, matrix):
    reply = console("cross_val 7", "max")
    assert reply.table["columns"] == [
        *("model owner \\ data", "cleveland", "hungary", "switzerland", "worst")
    ]
    assert reply.table["rows"] == [
        ["cleveland", 0.746, 0.76, 0.725, 0.725],
        ["hungary", 0.746, 0.746, 0.525, 0.525],
        ["switzerland", 0.481, 0.391, None, 0.391],
        ["global (r12, best)", 0.75, 0.75, 0.73, 0.73],
    ]
    assert {tuple(mark) for mark in reply.table["marks"]} == {
        (0, 2, "best"),
        (0, 3, "worst"),
        (1, 3, "worst"),
        (2, 2, "worst"),
        (3, 1, "best"),
        (3, 3, "best"),
    }
    assert reply.text.splitlines() == [
        "accuracy (max is best); * is the best at that site",
        "va declined run 7: no row and no column (policy byoc)",
        "basel: no row (no local model: gone)",
        "switzerland at switzerland: deadline",
        "switzerland's own model falls to .391 at hungary; "
        "the global model's worst is .730, at switzerland",
    ]


def test_the_data(console, matrix):
    data = console("cross_val", run=7).data("cross_validation")
    assert data["owners"]["switzerland"] == {
        "cleveland": 0.481,
        "hungary": 0.391,
        "switzerland": None,
    }
    assert data["gaps"][0] == {"owner": "*", "site": "va", "reason": "declined: policy byoc"}
    assert data["sentence"].startswith("switzerland's own model")


def test_csv_has_the_numbers_and_no_formula(console, matrix):
    view = matrix.matrices[7]
    matrix.matrices[7] = MatrixView(
        ("=cmd()", "global"),
        ("cleveland",),
        {("=cmd()", "cleveland"): {"accuracy": -0.5}, ("global", "cleveland"): {"accuracy": 1 / 3}},
        {},
        0,
        False,
        view.metric,
        view.mode,
    )
    assert console("cross_val 7 --csv").text.splitlines() == [
        "owner,cleveland,worst",
        "'=cmd(),-0.5,-0.5",
        '"global (r0, best)",0.3333333333333333,0.3333333333333333',
    ]


def test_when_less_is_better_the_worst_is_the_highest(console, matrix):
    view = matrix.matrices[7]
    matrix.matrices[7] = MatrixView(
        view.owners, view.sites, view.cells, view.gaps, 12, False, "loss", "min"
    )
    reply = console("cross_val 7")
    assert reply.table["rows"][2] == ["switzerland", 0.519, 0.609, None, 0.609]
    assert reply.table["rows"][3] == ["global (r12, best)", 0.25, 0.25, 0.27, 0.27]
    assert "the validation is not complete yet" in reply.text


def test_of_a_metric_that_nobody_watches_nothing_is_best(console, matrix):
    reply = console("cross_val 7 --metric loss")
    assert reply.table["rows"][0] == ["cleveland", 0.254, 0.24, 0.275, None]
    assert reply.text.splitlines()[0] == "loss"
    assert "falls to" not in reply.text


def test_no_results(console, matrix):
    assert console("cross_val 7 --metric auc").error["hint"] == "reported: accuracy, loss"
    matrix.matrices[7] = MatrixView((), (), {}, {}, 0, False, "accuracy", "max")
    assert console("cross_val 7").error["message"] == "there are no results yet"
    assert console("cross_val 8").error["code"] == "not_found"


def test_one_owner_alone_makes_no_sentence(console, matrix):
    matrix.matrices[7] = MatrixView(
        ("global",), ("a",), {("global", "a"): {"accuracy": 12.5}}, {}, 1, True, "accuracy", "max"
    )
    reply = console("cross_val 7")
    assert reply.table["rows"] == [["global (r1, best)", 12.5, 12.5]]
    assert reply.data("cross_validation")["sentence"] == ""
