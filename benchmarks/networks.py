"""The notes' networks as plain data, so that every side builds the same one, and the work that they are.

Needs nothing but Python: the Keras side runs where fromzero is not installed.
"""

from typing import NamedTuple

IMAGE_SHAPE = (32, 32, 3)
NUM_CLASSES = 10
NUM_IMAGES = 50_000  # train images in memory, as many as CIFAR-10 has


class Layer(NamedTuple):
    """One layer: `inputs` and `outputs` are channels or units; `shape` is the output's (H, W, C) or (units,)."""

    kind: str  # conv (3×3, then ReLU), pool, dropout, flatten, dense (then ReLU), predictions
    shape: tuple
    inputs: int = 0
    outputs: int = 0
    padding: str = "same"
    pool: int = 1
    rate: float = 0.0


def describe(network):
    """A fromzero.recipe.NetworkRecipe as data that JSON can carry."""
    fields = ("channels", "padding", "pool", "dropout")
    blocks = [{field: getattr(block, field) for field in fields} for block in network.blocks()]
    return {"blocks": blocks, "dense": [list(layer) for layer in network.dense_layers()]}


def layers(description):
    """The layers of a description, in Keras's order, for images of IMAGE_SHAPE."""
    height, width, channels = IMAGE_SHAPE
    found = []
    for block in description["blocks"]:
        for outputs in block["channels"]:
            if block["padding"] == "valid":
                height, width = height - 2, width - 2
            found.append(Layer("conv", (height, width, outputs), channels, outputs, padding=block["padding"]))
            channels = outputs
        if block["pool"] > 1:
            height, width = height // block["pool"], width // block["pool"]
            found.append(Layer("pool", (height, width, channels), pool=block["pool"]))
        if block["dropout"] > 0:
            found.append(Layer("dropout", (height, width, channels), rate=block["dropout"]))
    features = height * width * channels
    found.append(Layer("flatten", (features,)))
    for units, rate in description["dense"]:
        found.append(Layer("dense", (units,), features, units))
        if rate > 0:
            found.append(Layer("dropout", (units,), rate=rate))
        features = units
    return [*found, Layer("predictions", (NUM_CLASSES,), features, NUM_CLASSES)]


def num_parameters(description):
    """Weights and biases."""
    windows = {"conv": 9, "dense": 1, "predictions": 1}
    return sum((x.inputs * windows[x.kind] + 1) * x.outputs for x in layers(description) if x.kind in windows)


def training_flop(description):
    """Floating-point operations of training on one image: two a multiply-add, and three products a layer (forward,
    gradient of the inputs, gradient of the weights); the first layer has no gradient of its inputs. Products alone:
    what pooling, dropout and the optimizer cost is not counted."""
    products = [multiply_adds(layer) for layer in layers(description)]
    products = [count for count in products if count]
    return 2 * (3 * sum(products) - products[0])


def multiply_adds(layer):
    """Multiply-adds of one layer forward, on one image."""
    match layer.kind:
        case "conv":
            height, width, outputs = layer.shape
            return height * width * outputs * 9 * layer.inputs
        case "dense" | "predictions":
            return layer.inputs * layer.outputs
        case _:
            return 0
