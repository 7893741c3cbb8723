import dataclasses

import numpy as np
import pytest

SITES = ("cleveland", "hungary", "switzerland", "va")


@pytest.fixture
def heart(job_module):
    return job_module("heart", "heart")


@pytest.fixture
def heart_data(job_module):
    return job_module("heart", "heart_data")


def with_line(workspaces, tmp_path, number, change):
    """Returns a copy of Cleveland's file in which line `number` (from 1) is changed."""
    lines = (workspaces / "heart" / "data" / "cleveland.csv").read_text().splitlines()
    lines[number - 1] = change(lines[number - 1])
    path = tmp_path / "hospital.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_features_are_normalised_by_the_training_rows(heart_data, workspaces):
    train, test = heart_data.load(workspaces / "heart" / "data" / "cleveland.csv")
    assert train.features.shape == (199, 13)
    assert test.features.shape == (104, 13)
    assert train.features.dtype == train.labels.dtype == np.float32
    np.testing.assert_allclose(train.features.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(train.features.std(axis=0, ddof=1), 1, rtol=1e-5)
    assert set(train.labels) == {0.0, 1.0}


def test_a_feature_that_never_varies_is_zero(heart_data, workspaces):
    train, test = heart_data.load(workspaces / "heart" / "data" / "switzerland.csv")
    chol = heart_data.FEATURES.index("chol")
    assert not train.features[:, chol].any()
    assert not test.features[:, chol].any()


def test_codes_become_columns(heart_data, workspaces):
    train, _ = heart_data.load(workspaces / "heart" / "data" / "cleveland.csv")
    assert heart_data.FEATURES[8:] == ("cp_2", "cp_3", "cp_4", "restecg_1", "restecg_2")
    # The first row is a training row with cp 1 and restecg 2: only restecg_2 is set.
    assert list(train.features[0, 8:] > 0) == [False, False, False, False, True]


@pytest.mark.parametrize(
    ("line", "change", "message"),
    [
        (1, lambda t: t.replace("chol", "cholesterol"), "hospital.csv: column 'chol' is missing"),
        (3, lambda t: t.replace("286", "high"), "hospital.csv, line 3, column 'chol': not a num"),
        (3, lambda t: t.replace("286", ""), "hospital.csv, line 3, column 'chol': not a number"),
        (3, lambda t: t.replace("286", "nan"), "hospital.csv, line 3, column 'chol': not a number"),
        (4, lambda t: t.replace("67,1,4", "67,1,5"), "line 4, column 'cp': not one of"),
        (5, lambda t: t.replace("train", "valid"), "line 5, column 'split': neither"),
        (5, lambda _: "37,1", "line 5, column 'split': neither"),
        (5, lambda _: "37,1,3,130,250,0,0,187,0,,0,train", "line 5, column 'oldpeak'"),
    ],
)
def test_bad_data_is_named_by_file_line_and_column(
    heart_data, workspaces, tmp_path, line, change, message
):
    with pytest.raises(ValueError, match=message) as error:
        heart_data.load(with_line(workspaces, tmp_path, line, change))
    # A patient's value must not travel to the server in an error.
    assert "high" not in str(error.value)


def test_a_file_without_test_rows_is_refused(heart_data, workspaces, tmp_path):
    text = (workspaces / "heart" / "data" / "va.csv").read_text()
    path = tmp_path / "va.csv"
    path.write_text(text.replace(",test\n", ",train\n"))
    with pytest.raises(ValueError, match="one test row"):
        heart_data.load(path)


def test_the_initial_model_follows_from_the_seed(heart):
    model = heart.initial_model({}, 42)
    assert {name: (a.shape, a.dtype.name) for name, a in model.items()} == {
        "linear.weight": ((1, 13), "float32"),
        "linear.bias": ((1,), "float32"),
    }
    # The first weight that torch draws after manual_seed(42).
    assert model["linear.weight"][0, 0] == pytest.approx(0.2120, abs=1e-4)
    assert np.abs(model["linear.weight"]).max() <= 1 / np.sqrt(13)
    assert not np.array_equal(model["linear.bias"], heart.initial_model({}, 43)["linear.bias"])
    np.testing.assert_array_equal(
        model["linear.bias"], heart.initial_model({}, 42 + 2**32)["linear.bias"]
    )


@pytest.mark.torch
@pytest.mark.parametrize("seed", [0, 42, 2**62])
def test_the_initial_model_is_torchs(heart, seed):
    import torch

    torch.manual_seed(seed)
    linear = torch.nn.Linear(13, 1)
    model = heart.initial_model({}, seed)
    np.testing.assert_array_equal(model["linear.weight"], linear.weight.detach().numpy())
    np.testing.assert_array_equal(model["linear.bias"], linear.bias.detach().numpy())


def test_training_is_a_function_of_model_seed_data_and_args(heart, heart_context):
    model = heart.initial_model({}, 42)
    for array in model.values():
        array.flags.writeable = False  # as the platform hands them out
    first = heart.train(model, heart_context())
    again = heart.train(model, dataclasses.replace(heart_context(), round=9, run=3))
    other = heart.train(model, heart_context(seed=8))
    assert first.examples == 199
    for name, array in model.items():
        assert first.model[name].shape == array.shape
        assert first.model[name].dtype == np.float32
        np.testing.assert_array_equal(first.model[name], again.model[name])
        assert not np.array_equal(first.model[name], other.model[name])
        assert not np.array_equal(first.model[name], array)


def test_one_step_follows_the_gradient(heart, heart_data, heart_context):
    # With one batch of all rows the step is known: rate times the mean of (p - y) x.
    args = {"learning_rate": 0.5, "local_updates": 1, "batch_size": 10_000}
    context = heart_context(args=args)
    model = heart.initial_model({}, 1)
    rows, _ = heart_data.load(context.data["heart"])
    logits = rows.features @ model["linear.weight"][0] + model["linear.bias"]
    error = 1 / (1 + np.exp(-logits)) - rows.labels
    result = heart.train(model, context)
    np.testing.assert_allclose(
        result.model["linear.weight"][0],
        model["linear.weight"][0] - 0.5 * (error[:, np.newaxis] * rows.features).mean(axis=0),
        atol=1e-6,
    )
    np.testing.assert_allclose(
        result.model["linear.bias"], model["linear.bias"] - 0.5 * error.mean(), atol=1e-6
    )
    loss = -np.mean(np.log(np.where(rows.labels > 0, error + rows.labels, 1 - error)))
    assert result.metrics["train_loss"] == pytest.approx(loss, abs=1e-5)


def test_batches_pass_every_row_once_an_epoch(heart):
    found = list(heart.batches(10, 4, 7, np.random.default_rng(0)))
    assert [len(batch) for batch in found] == [4, 4, 2, 4, 4, 2, 4]
    first, second = np.concatenate(found[:3]), np.concatenate(found[3:6])
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(first) != list(second)


def test_validation_counts_right_answers_on_test_rows(heart, heart_context):
    zero = {"linear.weight": np.zeros((1, 13), np.float32), "linear.bias": np.zeros(1, np.float32)}
    result = heart.validate(zero, heart_context())
    # A probability of exactly one half says "no disease": 56 of Cleveland's 104 test rows.
    assert result.metrics == pytest.approx({"accuracy": 56 / 104, "loss": np.log(2)})
    assert result.examples == 104


def test_averaging_learns(heart, heart_context):
    model = heart.initial_model({}, 42)
    for number in range(7):
        results = [heart.train(model, heart_context(site, seed=number)) for site in SITES]
        total = sum(result.examples for result in results)
        model = {
            name: sum(r.model[name] * (r.examples / total) for r in results).astype(np.float32)
            for name in model
        }
    scores = [heart.validate(model, heart_context(site)).metrics["accuracy"] for site in SITES]
    assert np.mean(scores) > 0.70


def test_a_huge_logit_is_no_overflow(heart, heart_context):
    model = {
        "linear.weight": np.full((1, 13), 1e4, np.float32),
        "linear.bias": np.zeros(1, np.float32),
    }
    assert np.isfinite(heart.train(model, heart_context()).model["linear.weight"]).all()
    assert np.isfinite(heart.validate(model, heart_context()).metrics["loss"])
