"""The notes' networks as plain data, so that every side builds the same one, and the work that they are.

Workers need nothing but Python for it: the Keras side runs where fromzero is not installed.
"""

import math

IMAGE_SHAPE = (32, 32, 3)
NUM_CLASSES = 10
NUM_IMAGES = 50_000  # train images in memory, as many as CIFAR-10 has


def describe(network):
    """The layers of a fromzero.recipe.NetworkRecipe that has 3×3 convolutions and dense layers alone, as data that JSON
    can carry: those of fromzero.networks.layers, in Keras's order, for images of IMAGE_SHAPE."""
    from fromzero import networks  # which sets the environment that workers are not to inherit

    return [layer._asdict() for layer in networks.layers(network, IMAGE_SHAPE, NUM_CLASSES)]


def num_parameters(description):
    """Weights and biases."""
    return sum(layer["parameters"] for layer in description)


def training_flop(description):
    """Floating-point operations of training on one image: two a multiply-add, and three products a layer (forward,
    gradient of the inputs, gradient of the weights); the first layer has no gradient of its inputs. Products alone:
    what pooling, dropout and the optimizer cost is not counted."""
    # Every weight of a convolution or a dense layer is multiplied once for each place of the output; biases are not.
    products = [
        (layer["parameters"] - layer["shape"][-1]) * math.prod(layer["shape"][:-1])
        for layer in description
        if layer["parameters"]
    ]
    return 2 * (3 * sum(products) - products[0])
