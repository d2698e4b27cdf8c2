"""Keras on a folder of pictures as TensorFlow's own tutorial does it: a worker, run by the Python of the peers'
environment.

Layers, sizes, augmentation, optimizer and epochs are those of tensorflow.org/tutorials/images/classification, in its
second half (github.com/tensorflow/docs, site/en/tutorials/images/classification.ipynb): three convolutions of 16, 32
and 64 filters, each with max pooling, dropout 0.2, a dense layer of 128, Adam, 15 epochs of batches of 32 at 180×180
pixels, images mirrored, turned and zoomed by a tenth.
"""

import json
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import tensorflow as tf

from benchmarks.timing import main_of_worker

SIDE, BATCH_SIZE = 180, 32


def build(num_classes):
    layers = [keras.layers.Input((SIDE, SIDE, 3))]
    layers += [keras.layers.RandomFlip("horizontal"), keras.layers.RandomRotation(0.1), keras.layers.RandomZoom(0.1)]
    layers.append(keras.layers.Rescaling(1 / 255))
    for filters in (16, 32, 64):
        layers += [keras.layers.Conv2D(filters, 3, padding="same", activation="relu"), keras.layers.MaxPooling2D()]
    layers += [keras.layers.Dropout(0.2), keras.layers.Flatten(), keras.layers.Dense(128, activation="relu")]
    return keras.Sequential([*layers, keras.layers.Dense(num_classes)])


def pictures(files, labels):
    """The pictures in these files with their labels, decoded once, as `image_dataset_from_directory` scales them."""

    def read(path, label):
        pixels = tf.io.decode_image(tf.io.read_file(path), channels=3, expand_animations=False)
        return tf.image.resize(pixels, (SIDE, SIDE)), label

    return tf.data.Dataset.from_tensor_slices((files, labels)).map(read, tf.data.AUTOTUNE).cache()


def measure(parts, seed, epochs):
    """`parts` names a JSON file: of train and test each the files and labels. Accuracy on test after the last epoch."""
    parts = json.loads(Path(parts).read_text("utf-8"))
    keras.utils.set_random_seed(seed)
    train, test = pictures(*parts["train"]), pictures(*parts["test"]).batch(BATCH_SIZE)
    train = train.shuffle(len(parts["train"][0])).batch(BATCH_SIZE).prefetch(tf.data.AUTOTUNE)  # they come by class
    model = build(1 + max(parts["train"][1]))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    model.fit(train, epochs=epochs, verbose=0)
    _, accuracy = model.evaluate(test, verbose=0)
    return {"accuracy": accuracy, "parameters": model.count_params()}


if __name__ == "__main__":
    main_of_worker(measure)
