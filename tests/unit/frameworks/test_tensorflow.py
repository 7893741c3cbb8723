import numpy as np
import pytest

from flplatform.frameworks.tensorflow import arrays_of, load_arrays

pytestmark = pytest.mark.tensorflow


def network():
    import tensorflow as tf

    keras = tf.keras
    return keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(2, name="hidden"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dropout(0.5, name="drop"),
        ]
    )


def test_arrays_go_there_and_back():
    # Two models in one process get different names from Keras; their tensors must not.
    first, second = network(), network()
    assert first.name != second.name
    arrays = arrays_of(first)
    assert list(arrays) == [
        "hidden/kernel",
        "hidden/bias",
        "norm/gamma",
        "norm/beta",
        "norm/moving_mean",
        "norm/moving_variance",
    ]
    assert arrays["hidden/kernel"].shape == (3, 2)
    assert arrays["hidden/kernel"].dtype == np.float32
    for array in arrays.values():
        array.flags.writeable = False  # as the platform hands them out
    load_arrays(second, arrays)
    for name, array in arrays_of(second).items():
        np.testing.assert_array_equal(array, arrays[name])


def test_arrays_are_copies():
    model = network()
    arrays = arrays_of(model)
    load_arrays(model, {name: array + 1 for name, array in arrays.items()})
    np.testing.assert_array_equal(arrays["hidden/bias"], 0)


def test_functional_models_have_the_same_names():
    import tensorflow as tf

    inputs = tf.keras.Input((3,))
    outputs = tf.keras.layers.Dense(2, name="hidden")(inputs)
    assert list(arrays_of(tf.keras.Model(inputs, outputs))) == ["hidden/kernel", "hidden/bias"]


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("hidden/bias", None),
        ("other/bias", np.zeros(2, np.float32)),
        ("hidden/bias", np.zeros(3, np.float32)),
        ("hidden/bias", np.zeros(2)),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_loaded(name, array):
    model = network()
    before = arrays_of(model)
    arrays = {n: a + 1 for n, a in before.items() if n != name}
    if array is not None:
        arrays[name] = array
    with pytest.raises(ValueError, match=name):
        load_arrays(model, arrays)
    for n, a in arrays_of(model).items():
        np.testing.assert_array_equal(a, before[n])


def test_a_model_without_weights_is_refused():
    import tensorflow as tf

    with pytest.raises(ValueError, match="'lazy' has no weights yet"):
        arrays_of(tf.keras.Sequential([tf.keras.layers.Dense(1)], name="lazy"))


def test_two_variables_of_one_name_are_refused():
    import tensorflow as tf

    class Twins(tf.keras.Model):
        def __init__(self):
            super().__init__()
            self.one = tf.keras.layers.Dense(1, name="same")
            self.two = tf.keras.layers.Dense(1, name="same")

        def call(self, x):
            return self.one(x) + self.two(x)

    model = Twins()
    model(np.zeros((1, 2), np.float32))
    with pytest.raises(ValueError, match="two variables are called 'same/kernel'"):
        arrays_of(model)
