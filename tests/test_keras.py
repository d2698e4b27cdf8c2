"""The three networks against Keras itself, layer by layer. Runs where Keras is installed: make test-keras."""

import os

import numpy as np
import pytest
import torch

from fromzero import networks
from fromzero.recipe import load_recipe

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras", reason="Keras is not installed (make test-keras installs it)")
pytestmark = pytest.mark.filterwarnings("ignore")  # Keras's own

CIFAR = (32, 32, 3)


def keras_network(network):
    """The network written as a Keras user would, from the same description."""
    model = keras.Sequential([keras.layers.Input(CIFAR)])
    for block in network.blocks():
        for channels in block.channels:
            model.add(keras.layers.Conv2D(channels, 3, padding=block.padding))
            model.add(keras.layers.Activation("relu"))
        if block.pool > 1:
            model.add(keras.layers.MaxPooling2D(block.pool))
        if block.dropout:
            model.add(keras.layers.Dropout(block.dropout))
    model.add(keras.layers.Flatten())
    for units, rate in network.dense_layers():
        model.add(keras.layers.Dense(units))
        model.add(keras.layers.Activation("relu"))
        if rate:
            model.add(keras.layers.Dropout(rate))
    model.add(keras.layers.Dense(10))
    return model


@pytest.mark.parametrize("name", ["train1", "train2", "train3"])
def test_layers_shapes_parameters_and_outputs_equal_keras(name):
    network = load_recipe(name).network
    theirs, rows = keras_network(network), networks.layers(network, CIFAR, 10)
    assert [(type(x).__name__, tuple(x.output.shape[1:]), x.count_params()) for x in theirs.layers] == [
        (row.kind, row.shape, row.parameters) for row in rows
    ]
    ours = networks.build(network, CIFAR, 10, seed=3).eval()
    modules = dict(ours.named_children())
    for layer, row in zip(theirs.layers, rows, strict=True):
        if row.kind == "Conv2D":
            kernel = modules[row.name].weight.detach().permute(2, 3, 1, 0)
        elif row.kind == "Dense":
            kernel = modules[row.name].weight.detach().T
        else:
            continue
        assert layer.get_weights()[1].any() == modules[row.name].bias.detach().any().item()  # both all zeros
        layer.set_weights([kernel.numpy(), modules[row.name].bias.detach().numpy()])
    # The outputs after every layer, the images (N, H, W, C) for Keras. Of ours a convolution has its pooling with it,
    # before the ReLU, or the ReLU: layers are compared one by one, in Keras's order, and at the end the network as
    # it is.
    convolutions = [modules[row.name] for row in rows if row.kind == "Conv2D"]
    behind = [(module.pooling, module.relu) for module in convolutions]
    x = np.random.default_rng(0).random((4, *CIFAR), dtype=np.float32)
    expected, actual = x, torch.from_numpy(x).permute(0, 3, 1, 2)
    for layer, row in zip(theirs.layers, rows, strict=True):
        expected = keras.ops.convert_to_numpy(layer(expected, training=False))
        match row.kind:
            case "Activation":
                actual = torch.relu(actual)
            case "MaxPooling2D":
                actual = torch.nn.functional.max_pool2d(actual, row.pool)
            case "Conv2D":
                modules[row.name].pooling, modules[row.name].relu = None, False
                actual = modules[row.name](actual)
            case "Dropout":
                pass  # when evaluating, wherever it is
            case _:
                actual = modules[row.name](actual)
        channels_last = actual.permute(0, 2, 3, 1) if actual.dim() == 4 else actual
        np.testing.assert_allclose(channels_last.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    for module, (pooling, relu) in zip(convolutions, behind, strict=True):
        module.pooling, module.relu = pooling, relu
    np.testing.assert_allclose(
        ours(torch.from_numpy(x).permute(0, 3, 1, 2)).detach().numpy(), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["train1", "train3"])
def test_first_weights_are_spread_as_in_keras(name):
    network = load_recipe(name).network
    keras.utils.set_random_seed(0)
    theirs = [layer for layer in keras_network(network).layers if layer.count_params()]
    ours = [m for m in networks.build(network, CIFAR, 10).children() if any(True for _ in m.parameters())]
    for layer, module in zip(theirs, ours, strict=True):
        kernel, bias = layer.get_weights()
        assert not bias.any()
        assert module.weight.std().item() == pytest.approx(kernel.std(), rel=0.1)
        assert module.weight.abs().max().item() == pytest.approx(np.abs(kernel).max(), rel=0.05)


def test_adam_moves_as_keras_adam_does():
    """Keras and PyTorch place epsilon differently; at 1e-7 the paths agree closely."""
    import fromzero.optim as optim
    from fromzero.recipe import OptimizerRecipe

    rng = np.random.default_rng(1)
    start, gradients = rng.standard_normal(50).astype("float32"), rng.standard_normal((20, 50)).astype("float32")
    weight = torch.nn.Parameter(torch.from_numpy(start.copy()))
    holder = torch.nn.Module()
    holder.weight = weight
    ours = optim.make_optimizer(OptimizerRecipe(name="adam", learning_rate=1e-2), holder)
    variable = keras.Variable(start)
    theirs = keras.optimizers.Adam(learning_rate=1e-2)
    theirs.build([variable])
    for gradient in gradients:
        weight.grad = torch.from_numpy(gradient)
        ours.step()
        theirs.apply([keras.ops.convert_to_tensor(gradient)], [variable])
    np.testing.assert_allclose(weight.detach().numpy(), keras.ops.convert_to_numpy(variable), rtol=1e-4, atol=1e-5)
