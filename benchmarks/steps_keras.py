"""Training steps of Keras on TensorFlow: a worker, run by the Python of the peers' environment.

Written as a Keras user writes it: Sequential, compile, then fit on arrays (shuffled) or train_on_batch, the last layer
in float32 under mixed_bfloat16 as Keras's guide to mixed precision says, the running accuracy as a metric.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow as tf

from benchmarks import networks
from benchmarks.timing import Stopwatch, main_of_worker

# How a Keras user can train: what to call, and whether XLA compiles it, which compile's default leaves on a processor.
WAYS = {
    "fit, XLA": ("fit", True),
    "fit": ("fit", False),
    "train_on_batch, XLA": ("train_on_batch", True),
    "train_on_batch": ("train_on_batch", False),
}


def build(description):
    """The network, written from its description as a user would write it."""
    model = keras.Sequential([keras.layers.Input(networks.IMAGE_SHAPE)])
    for layer in description:  # activations are those of the layers before them
        match layer["kind"]:
            case "Conv2D":
                model.add(keras.layers.Conv2D(layer["shape"][-1], 3, padding=layer["padding"], activation="relu"))
            case "MaxPooling2D":
                model.add(keras.layers.MaxPooling2D(layer["pool"]))
            case "Dropout":
                model.add(keras.layers.Dropout(layer["rate"]))
            case "Flatten":
                model.add(keras.layers.Flatten())
            case "Dense" if layer["name"] == "predictions":
                model.add(keras.layers.Dense(layer["shape"][-1], dtype="float32"))
            case "Dense":
                model.add(keras.layers.Dense(layer["shape"][-1], activation="relu"))
    return model


class Watch(keras.callbacks.Callback):
    """Ends the training when the stopwatch has seen enough."""

    def __init__(self, stopwatch, batch_size):
        super().__init__()
        self.stopwatch, self.batch_size = stopwatch, batch_size

    def on_train_batch_end(self, batch, logs=None):
        self.model.stop_training = self.stopwatch.tick(self.batch_size)


def measure(description, policy, way, batch_size, threads, optimizer):
    make = {"sgd": keras.optimizers.SGD, "adam": keras.optimizers.Adam}[optimizer.pop("name")]
    method, jit = WAYS[way]
    if threads:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.random((networks.NUM_IMAGES, *networks.IMAGE_SHAPE), dtype=np.float32)
    y = rng.integers(0, networks.NUM_CLASSES, networks.NUM_IMAGES)
    model = build(description)
    model.compile(
        optimizer=make(**optimizer),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=jit,
    )
    stopwatch = Stopwatch()
    if method == "fit":
        watch = Watch(stopwatch, batch_size)
        model.fit(x, y, batch_size=batch_size, epochs=1000, verbose=0, callbacks=[watch])
    else:
        order, start, enough = rng.permutation(len(x)), 0, False
        while not enough:
            batch = order[start : start + batch_size]
            model.train_on_batch(x[batch], y[batch])
            enough = stopwatch.tick(len(batch))
            start = (start + batch_size) % (len(x) - batch_size)
    return {
        "images_per_second": stopwatch.images_per_second,
        "parameters": model.count_params(),
        "versions": {"keras": keras.__version__, "tensorflow": tf.__version__},
    }


if __name__ == "__main__":
    main_of_worker(measure)
