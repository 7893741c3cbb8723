"""The job heart in TensorFlow, with a Keras model."""

import numpy as np
import tensorflow as tf
from heart_data import FEATURES, load

from flplatform.client.api import Context, TrainResult, ValidateResult
from flplatform.frameworks.tensorflow import arrays_of, load_arrays


def build(model: dict[str, np.ndarray]) -> tf.keras.Model:
    """Returns a Keras model, (rows, 13) to logits (rows, 1), that holds the given arrays."""
    # The layer has a name of its own because tensors are called by it: "linear/kernel".
    layers = [tf.keras.Input((len(FEATURES),)), tf.keras.layers.Dense(1, name="linear")]
    keras_model = tf.keras.Sequential(layers)
    load_arrays(keras_model, model)
    return keras_model


def train(model: dict[str, np.ndarray], context: Context) -> TrainResult:
    """Takes `local_updates` steps of minibatch SGD from the model it is given."""
    keras_model = build(model)
    examples, _ = load(context.data["heart"])
    rows = len(examples.labels)
    # Shuffled by the task's seed: the same task gives the same update.
    batches = (
        tf.data.Dataset.from_tensor_slices((examples.features, examples.labels[:, np.newaxis]))
        .shuffle(rows, seed=context.seed, reshuffle_each_iteration=True)
        .batch(int(context.args["batch_size"]))
        .repeat()
        .take(int(context.args["local_updates"]))
    )
    keras_model.compile(
        optimizer=tf.keras.optimizers.SGD(float(context.args["learning_rate"])),
        loss=tf.keras.losses.BinaryCrossentropy(from_logits=True),
    )
    keras_model.fit(batches, shuffle=False, verbose=0)  # they are shuffled already
    return TrainResult(arrays_of(keras_model), rows)


def validate(model: dict[str, np.ndarray], context: Context) -> ValidateResult:
    """Measures the model on the site's test rows."""
    _, examples = load(context.data["heart"])
    logits = build(model)(examples.features).numpy()[:, 0]
    labels = examples.labels
    accuracy = float(np.mean((logits > 0) == (labels > 0)))
    loss = float(np.mean(np.logaddexp(0, logits) - labels * logits))
    return ValidateResult({"accuracy": accuracy, "loss": loss}, len(labels))
