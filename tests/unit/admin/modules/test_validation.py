from dataclasses import replace

import pytest

from flplatform.core.control import MatrixView
from flplatform.core.events import SourceModel
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
        "owner,cleveland,worst,gaps",
        "'=cmd(),-0.5,-0.5,",
        '"global (r0, best)",0.3333333333333333,0.3333333333333333,',
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
    error = console("cross_val 7").error
    assert error["message"] == "run 7 finished without a cross-validation"
    assert error["hint"].startswith("validate all --run 7")
    matrix.run_views[7] = run(7)
    assert console("cross_val 7").error["message"] == "there are no results yet"
    assert console("cross_val 8").error["code"] == "not_found"


def test_one_owner_alone_makes_no_sentence(console, matrix):
    matrix.matrices[7] = MatrixView(
        ("global",), ("a",), {("global", "a"): {"accuracy": 12.5}}, {}, 1, True, "accuracy", "max"
    )
    reply = console("cross_val 7")
    assert reply.table["rows"] == [["global (r1, best)", 12.5, 12.5]]
    assert reply.data("cross_validation")["sentence"] == ""


def test_every_row_says_which_model_it_is(console, matrix):
    kinds = {
        "cleveland": ("local", 15),
        "hungary": ("update", 12),
        "switzerland": ("local", 15),
        "r5": ("round", 5),
        "last": ("latest", 15),
        "best": ("best", 9),
        "global": ("latest", 15),
    }
    view = matrix.matrices[7]
    matrix.run_views[9] = run(9, **ENDED, source_run=7)
    matrix.run_views[11] = run(11, **ENDED, source_run=9)
    matrix.matrices[9] = replace(
        view,
        owners=tuple(kinds),
        cells={**view.cells, ("r5", "cleveland"): {"accuracy": 0.1}},
        gaps={("*", "va"): "declined: no", ("b", "*"): "no local model: gone"},
        models={
            owner: SourceModel(digest="blake3:1", size=1, kind=kind, round=number)
            for owner, (kind, number) in kinds.items()
        },
        source_run=7,
    )
    reply = console("cross_val 9")
    assert [row[0] for row in reply.table["rows"]] == [
        *("cleveland", "hungary (update r12)", "switzerland"),
        *("r5", "last (r15, latest)", "best (r9)", "global (r15, latest)"),
    ]
    assert reply.text.splitlines() == [
        "models of run 7, validated again as run 9",
        "accuracy (max is best); * is the best at that site",
        "va declined run 9: no column (no)",
        "b: no row (no local model: gone)",
        "hungary: local model of round 12's update",
        "validated again as run 11",
        "switzerland's own model falls to .391 at hungary; "
        "the global model's worst is .730, at switzerland",
    ], "global models of other rounds are nobody's own"
    data = reply.data("cross_validation")
    assert data["models"]["hungary"] == {"kind": "update", "round": 12}
    assert (data["source_run"], data["validations"]) == (7, [11])
    assert data["metrics"] == ["accuracy", "loss"]
    assert {"owner": "r5", "site": "cleveland", "metrics": {"accuracy": 0.1}} in data["cells"]
    lines = console("cross_val 9 --csv").text.splitlines()
    assert lines[2].startswith("hungary (update r12),0.746,0.746,0.525,0.525,va: declined")
    assert lines[-1] == "b,,,,,va: declined: no; no local model: gone"
    assert "validated again as run 9" in console("cross_val 7").text


def test_a_matrix_of_nothing_but_gaps_says_why(console, matrix):
    gaps = {("global", site): "deadline passed" for site in "abcd"}
    view = replace(matrix.matrices[7], cells={}, gaps=gaps)
    matrix.matrices[7] = view
    error = console("cross_val 7").error
    assert error["message"] == "there are no results"
    assert error["hint"].endswith("global at c: deadline passed; and 1 more")
