import numpy as np
import pytest

from flplatform.frameworks.sklearn import arrays_of, load_arrays

pytestmark = pytest.mark.sklearn

X = np.array([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0], [3.0, 1.0]])
Y = np.array([0, 0, 1, 1])


def test_a_fitted_classifier_goes_there_and_back():
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression().fit(X, Y)
    arrays = arrays_of(fitted)
    assert {name: a.shape for name, a in arrays.items()} == {"coef_": (1, 2), "intercept_": (1,)}
    for array in arrays.values():
        array.flags.writeable = False  # as the platform hands them out
    fresh = LogisticRegression(warm_start=True)
    load_arrays(fresh, arrays)
    fresh.classes_ = np.array([0, 1])
    np.testing.assert_array_equal(fresh.predict(X), fitted.predict(X))
    fresh.fit(X, 1 - Y)  # goes on from what was loaded, and into copies of its own
    np.testing.assert_array_equal(arrays_of(fitted)["coef_"], arrays["coef_"])


def test_a_regressor_has_a_scalar_intercept():
    from sklearn.linear_model import LinearRegression

    fitted = LinearRegression().fit(X, Y)
    arrays = arrays_of(fitted)
    assert arrays["intercept_"].shape == ()
    fresh = LinearRegression()
    load_arrays(fresh, arrays)
    np.testing.assert_allclose(fresh.predict(X), fitted.predict(X))


def test_partial_fit_goes_on_from_loaded_arrays():
    from sklearn.linear_model import SGDClassifier

    def start():
        return SGDClassifier(loss="log_loss", random_state=1).partial_fit(X, Y, classes=[0, 1])

    model = start()
    arrays = {name: array * 2 for name, array in arrays_of(model).items()}
    load_arrays(model, arrays)
    np.testing.assert_array_equal(model.coef_, arrays["coef_"])
    model.partial_fit(X, Y)
    assert not np.array_equal(model.coef_, arrays["coef_"])


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("intercept_", None),
        ("classes_", np.zeros(2)),
        ("coef_", np.zeros((1, 3))),
        ("coef_", np.zeros((1, 2), np.float32)),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_loaded(name, array):
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression().fit(X, Y)
    before = arrays_of(model)
    arrays = {n: a + 1 for n, a in before.items() if n != name}
    if array is not None:
        arrays[name] = array
    with pytest.raises(ValueError, match=name):
        load_arrays(model, arrays)
    for n, a in arrays_of(model).items():
        np.testing.assert_array_equal(a, before[n])


def test_a_fresh_model_needs_both_names():
    from sklearn.linear_model import LogisticRegression

    with pytest.raises(ValueError, match="'intercept_' of the model is missing"):
        load_arrays(LogisticRegression(), {"coef_": np.zeros((1, 2))})


def test_what_is_not_fitted_or_not_dense_is_refused():
    from sklearn.linear_model import SGDClassifier

    with pytest.raises(ValueError, match="SGDClassifier has no 'coef_': it is not fitted"):
        arrays_of(SGDClassifier())
    with pytest.raises(ValueError, match="'coef_' of SGDClassifier is no dense array"):
        arrays_of(SGDClassifier().fit(X, Y).sparsify())
