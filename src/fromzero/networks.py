"""Networks: from a description to layers, to a module, to the summary table.

`layers` spells a description out, one entry a layer, with every shape and parameter count; `build` makes the module
of exactly these layers and `summary` prints them. Images are (N, C, H, W) in channels-last memory; a flattened image
is in the order H, W, C, as in Keras. Weights are drawn as in Keras: Glorot uniform (Glorot and Bengio, 2010), zero
biases.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fromzero import modules
from fromzero.errors import InputError
from fromzero.recipe import NetworkRecipe
from fromzero.rng import generator

ImageShape = tuple[int, int, int]


class Layer(NamedTuple):
    """One row of the summary: `shape` is the output's, (H, W, C) or (units,), without the batch. Of `parameters`,
    `fixed` are not trained. `kernel` is the side of a convolution's window. Rows with the same `branch` above 0 are
    the residual branch of one block. A pooling that is `activated` has a ReLU behind it."""

    kind: str
    name: str
    shape: tuple[int, ...]
    parameters: int = 0
    rate: float = 0.0
    pool: int = 1
    padding: str = "same"
    shown: bool = True
    fixed: int = 0
    kernel: int = 3
    branch: int = 0
    activated: bool = False


STEMS = {
    "Conv2D": "conv2d",
    "MaxPooling2D": "max_pooling2d",
    "BatchNormalization": "batch_normalization",
    "GlobalMaxPooling2D": "global_max_pooling2d",
    "GlobalAveragePooling2D": "global_average_pooling2d",
}
HEADS = {"flatten": "Flatten", "max": "GlobalMaxPooling2D", "mean": "GlobalAveragePooling2D"}


def layers(network: NetworkRecipe, image_shape: ImageShape, num_classes: int) -> list[Layer]:
    """The layers of `network` for images of `image_shape` (H, W, C), in the order Keras would list them.

    Raises InputError when a valid convolution or a pooling leaves no pixel.
    """
    rows: list[Layer] = []
    counts: Counter[str] = Counter()
    height, width, channels = image_shape

    def add(kind: str, shape: tuple[int, ...], **more: Any) -> None:
        stem = STEMS.get(kind, kind.lower())
        if more.get("shown", True):
            counts[stem] += 1
        rows.append(Layer(kind, f"{stem}_{counts[stem]}", shape, **more))

    def pool(size: int, where: str) -> None:
        nonlocal height, width
        if size > 1:
            height, width = height // size, width // size
            _check_size(height, width, image_shape, where)
            add("MaxPooling2D", (height, width, channels), pool=size)

    if side := network.whitening:
        _check_size(height - side + 1, width - side + 1, image_shape, "the whitening")
        if network.whitening_padding == "valid":
            height, width = height - side + 1, width - side + 1
        inputs = side * side * channels
        directions = network.whitening_directions or inputs
        if directions > inputs:
            raise InputError(
                f"network.whitening_directions: {directions} is more than the {inputs} that patches of {side}×{side}"
                f" pixels of {channels} channels have"
            )
        channels = 2 * directions
        fixed = inputs * channels
        shape = (height, width, channels)
        padding = network.whitening_padding
        rows.append(Layer("Conv2D", "whitening", shape, fixed, padding=padding, fixed=fixed, kernel=side))
        add("Activation", shape, shown=False)
    for i, block in enumerate(network.blocks()):
        for j, out in enumerate(block.channels):
            branch = i + 1 if network.residual and j > 0 else 0
            shrink = 2 if block.padding == "valid" else 0
            height, width = height - shrink, width - shrink
            _check_size(height, width, image_shape, f"a {block.padding} convolution of block {i + 1}")
            parameters = 9 * channels * out + (0 if network.batch_norm else out)
            add("Conv2D", (height, width, out), parameters=parameters, padding=block.padding, branch=branch)
            channels = out
            if network.pool_after == "first" and j == 0:
                pool(block.pool, f"the pooling of block {i + 1}")
            if network.batch_norm:
                shape = (height, width, channels)
                add("BatchNormalization", shape, parameters=3 * channels, fixed=2 * channels, branch=branch)
            if branch and j == len(block.channels) - 1:
                add("Add", (height, width, channels), branch=branch)
                branch = 0
            add("Activation", (height, width, channels), shown=block.activation_layers, branch=branch)
        if network.pool_after == "last":
            pool(block.pool, f"the pooling of block {i + 1}")
        if block.dropout > 0:
            add("Dropout", (height, width, channels), rate=block.dropout)
    features = height * width * channels if network.head == "flatten" else channels
    add(HEADS[network.head], (features,))
    for units, rate in network.dense_layers():
        add("Dense", (units,), parameters=features * units + units)
        add("Activation", (units,), shown=network.dense_activation_layers)
        if rate > 0:
            add("Dropout", (units,), rate=rate)
        features = units
    rows.append(Layer("Dense", "predictions", (num_classes,), features * num_classes + num_classes))
    if network.logit_scale != 1:
        rows.append(Layer("Rescaling", "rescaling", (num_classes,), rate=network.logit_scale))
    return rows


def num_parameters(network: NetworkRecipe, image_shape: ImageShape, num_classes: int) -> int:
    """How many weights, biases and statistics the network has, as Keras counts them."""
    return sum(row.parameters for row in layers(network, image_shape, num_classes))


def num_multiply_adds(network: NetworkRecipe, image_shape: ImageShape, num_classes: int) -> int:
    """Multiplications (each with its addition) of the forward pass of one image, in convolutions and dense layers. A
    training step costs about three times as many: forward, gradient of the inputs, gradient of the weights."""
    total, channels = 0, image_shape[2]
    for row in layers(network, image_shape, num_classes):
        if row.kind == "Conv2D":
            total += math.prod(row.shape) * row.kernel**2 * channels
        elif row.kind == "Dense":
            total += row.shape[0] * channels
        channels = row.shape[-1]
    return total


def build(
    network: NetworkRecipe, image_shape: ImageShape, num_classes: int, seed: int = 0, device: str = "cpu"
) -> modules.Network:
    """The network as a module on `device`, its weights drawn from `seed` (on the CPU, the same for every device). A
    whitening layer is zero until `whiten` sets it.

    A layer's weights depend on the seed and on the layer's name and shape alone, so two networks with the same seed
    start equal wherever their layers agree.
    """
    parts: dict[str, nn.Module] = {}
    masks = modules.Masks()
    channels, features = image_shape[2], 0
    for row in _activated_by_pooling(layers(network, image_shape, num_classes), network.activation):
        into = parts
        if row.branch:
            into = parts.setdefault(f"residual_{row.branch}", modules.Residual())._modules  # type: ignore[assignment]
        match row.kind:
            case "Conv2D":
                same = row.padding == "same"
                if row.name == "whitening":
                    into[row.name] = modules.Whitening(channels, row.shape[-1], row.kernel, same)
                else:
                    into[row.name] = modules.Convolution(channels, row.shape[-1], int(same), not network.batch_norm)
                channels = row.shape[-1]
            case "MaxPooling2D":
                pooling = modules.MaxPool(row.pool, row.activated)
                before = next(reversed(into.values()), None)
                if isinstance(before, modules.Convolution):
                    before.pooling = pooling
                else:
                    into[row.name] = pooling
            case "BatchNormalization":
                into[row.name] = modules.BatchNorm(channels)
            case "Flatten":
                into[row.name] = modules.Flatten()
                features = row.shape[0]
            case "GlobalMaxPooling2D" | "GlobalAveragePooling2D":
                into[row.name] = modules.GlobalPool(torch.amax if row.kind == "GlobalMaxPooling2D" else torch.mean)
                features = row.shape[0]
            case "Dense":
                into[row.name] = modules.Linear(features, row.shape[0])
                features = row.shape[0]
            case "Dropout":
                dropout = modules.Dropout(row.rate, masks)
                before = next(reversed(into.values()), None)
                if isinstance(before, modules.Convolution) and before.pooling:
                    before.dropout = dropout
                else:
                    into[row.name] = dropout
            case "Activation":
                before = next(reversed(into.values()), None)
                if isinstance(before, modules.Residual) and isinstance(before[-1], modules.BatchNorm):
                    before = before[-1]
                if isinstance(before, modules.BatchNorm | modules.Whitening):
                    before.activation = network.activation
                elif isinstance(before, modules.Convolution) and network.activation == "relu":
                    (before.pooling or before).relu = True
                else:
                    into[f"{network.activation}_{len(into)}"] = modules.Activation(network.activation)
            case "Rescaling":
                into[row.name] = modules.Scale(row.rate)
    masks.words = masks.words.to(device)
    model = modules.Network(parts, masks)
    _draw_weights(model, network.initial, seed)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.to(device)


def summary(network: NetworkRecipe, image_shape: ImageShape, num_classes: int) -> str:
    """The table that Keras's `summary()` prints: layer and type, output shape, parameters, totals."""
    rows = [row for row in layers(network, image_shape, num_classes) if row.shown]
    total, fixed = sum(row.parameters for row in rows), sum(row.fixed for row in rows)
    titles = [f"{row.name} ({row.kind})" for row in rows]
    width = max(32, *(len(title) + 2 for title in titles))
    rule = width + 34
    lines = [f"{'Layer (type)':<{width}}{'Output Shape':<24}Param #", "=" * rule]
    for title, row in zip(titles, rows, strict=True):
        shape = "(" + ", ".join(["None", *map(str, row.shape)]) + ")"
        lines += [f"{title:<{width}}{shape:<24}{row.parameters}", "_" * rule]
    lines[-1] = "=" * rule
    lines += [f"Total params: {total:,}", f"Trainable params: {total - fixed:,}", f"Non-trainable params: {fixed:,}"]
    return "\n".join(lines)


def differing_layers(model: nn.Module, weights: Mapping[str, Tensor]) -> list[tuple[str, str, str]]:
    """(weight, shape in `weights`, shape in `model`), "–" where absent, for every weight that does not fit."""
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    names = [*ours, *sorted(theirs.keys() - ours.keys())]
    return [
        (name, str(theirs.get(name, "–")), str(ours.get(name, "–")))
        for name in names
        if ours.get(name) != theirs.get(name)
    ]


def _check_size(height: int, width: int, image_shape: ImageShape, where: str) -> None:
    if height < 1 or width < 1:
        size = f"{image_shape[1]}×{image_shape[0]}"
        use = "same padding, less pooling or fewer blocks"
        if where == "the whitening":
            use = "same padding there (whitening_padding) or a smaller window"
        raise InputError(f"network: {where} leaves no pixel of {size} images; use {use}")


def _activated_by_pooling(rows: Iterable[Layer], activation: str) -> list[Layer]:
    """The rows with each ReLU before a pooling drawn behind it and into it: max(relu(x)) = relu(max(x)), so values and
    gradients are the same, and the ReLU has a quarter of the work. GELU falls before it rises, so it stays."""
    found: list[Layer] = []
    for row in rows:
        if activation == "relu" and row.kind == "MaxPooling2D" and found and found[-1].kind == "Activation":
            found[-1] = row._replace(activated=True)
        else:
            found.append(row)
    return found


@torch.no_grad()
def _draw_weights(model: nn.Module, initial: str, seed: int) -> None:
    for path, module in model.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        name = path.rpartition(".")[2]
        fan_out, fan_in = module.weight.shape[:2]
        receptive_field = math.prod(module.weight.shape[2:])
        match initial:
            case "glorot":
                limit = math.sqrt(6 / ((fan_in + fan_out) * receptive_field))
            case "dirac":  # outputs of unit variance, filters as PyTorch draws them
                limit = math.sqrt(3) if name == "predictions" else math.sqrt(1 / (fan_in * receptive_field))
        module.weight.uniform_(-limit, limit, generator=generator(seed, f"weights/{name}"))
        if module.bias is not None:
            module.bias.zero_()
        if name == "whitening":
            module.weight.zero_().requires_grad_(False)
        elif initial == "dirac" and isinstance(module, nn.Conv2d):
            nn.init.dirac_(module.weight[:fan_in])
