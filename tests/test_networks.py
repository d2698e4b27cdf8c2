"""The notes' three networks: their tables, their functions, their weights."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fromzero import kernels, machine, modules, networks, rng
from fromzero.errors import InputError
from fromzero.recipe import NetworkRecipe, load_recipe

# The notes' own tables: type, output shape without the batch, parameters.
C, A, P, D, L = "Conv2D", "Activation", "MaxPooling2D", "Dropout", "Dense"
TABLES = {
    "train1": [
        (C, (32, 32, 32), 896), (A, (32, 32, 32), 0), (P, (16, 16, 32), 0),
        (C, (16, 16, 64), 18496), (A, (16, 16, 64), 0), (P, (8, 8, 64), 0),
        (C, (8, 8, 128), 73856), (A, (8, 8, 128), 0), (P, (4, 4, 128), 0),
        (C, (4, 4, 256), 295168), (A, (4, 4, 256), 0), (P, (2, 2, 256), 0),
        (C, (2, 2, 512), 1180160), (A, (2, 2, 512), 0), (P, (1, 1, 512), 0),
        ("Flatten", (512,), 0), (L, (64,), 32832), (A, (64,), 0), (D, (64,), 0), (L, (10,), 650),
    ],
    "train2": [
        (C, (30, 30, 32), 896), (C, (28, 28, 64), 18496), (P, (14, 14, 64), 0), (D, (14, 14, 64), 0),
        (C, (14, 14, 128), 73856), (A, (14, 14, 128), 0), (P, (7, 7, 128), 0), (D, (7, 7, 128), 0),
        (C, (7, 7, 256), 295168), (A, (7, 7, 256), 0), (P, (3, 3, 256), 0), (D, (3, 3, 256), 0),
        (C, (3, 3, 512), 1180160), (A, (3, 3, 512), 0), (P, (1, 1, 512), 0), (D, (1, 1, 512), 0),
        ("Flatten", (512,), 0), (L, (64,), 32832), (D, (64,), 0), (L, (10,), 650),
    ],
    "train3": [
        (C, (32, 32, 32), 896), (C, (32, 32, 64), 18496), (P, (16, 16, 64), 0), (D, (16, 16, 64), 0),
        (C, (16, 16, 128), 73856), (A, (16, 16, 128), 0), (P, (8, 8, 128), 0), (D, (8, 8, 128), 0),
        (C, (8, 8, 256), 295168), (A, (8, 8, 256), 0), (P, (4, 4, 256), 0), (D, (4, 4, 256), 0),
        (C, (4, 4, 512), 1180160), (A, (4, 4, 512), 0), ("Flatten", (8192,), 0),
        (L, (1024,), 8389632), (D, (1024,), 0), (L, (1024,), 1049600), (D, (1024,), 0), (L, (10,), 10250),
    ],
}  # fmt: skip
TOTALS = {"train1": 1_602_058, "train2": 1_602_058, "train3": 11_018_058}
CIFAR = (32, 32, 3)


def test_each_pass_of_a_training_that_is_ones_own_has_masks_of_its_own():
    recipe = load_recipe("train1").override({"network.channels": [[4], [8]], "network.pool": 4, "network.dense": [16]})
    model = networks.build(recipe.network, (16, 16, 3), 5)
    x = torch.rand(8, 3, 16, 16)
    passes = [model(x) for _ in range(3)]
    assert not any(torch.equal(one, other) for one, other in itertools.pairwise(passes))
    model.reseed(3, 5)
    fifth, sixth = model(x), model(x)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    for step, expected in ((5, fifth), (6, sixth)):
        model.reseed(3, step)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", TABLES)
def test_the_summary_is_the_notes_table(name):
    network = load_recipe(name).network
    rows = [(row.kind, row.shape, row.parameters) for row in networks.layers(network, CIFAR, 10) if row.shown]
    assert rows == TABLES[name]
    text = networks.summary(network, CIFAR, 10)
    assert f"Total params: {TOTALS[name]:,}" in text
    assert "predictions (Dense)             (None, 10)" in text


@pytest.mark.parametrize("name", TABLES)
def test_the_modules_are_what_the_table_says(name):
    network = load_recipe(name).network
    rows = {row.name: row for row in networks.layers(network, CIFAR, 10)}
    model = networks.build(network, CIFAR, 10).eval()
    assert sum(p.numel() for p in model.parameters()) == TOTALS[name]
    pooling = iter([name for name in rows if name.startswith("max_pooling")])
    dropout = iter([name for name in rows if name.startswith("dropout")])
    x, seen = torch.randn(2, 3, 32, 32), set()
    for layer_name, module in model.named_children():
        x = module(x)
        if (row := rows.get(layer_name)) and row.kind != "Activation":
            # A convolution has the pooling behind it with it, and the dropout behind that.
            last = rows[next(pooling)] if getattr(module, "pooling", None) else row
            if row.kind == "Dropout" or getattr(module, "dropout", None):
                seen.add(next(dropout))
            shape = (*x.shape[2:], x.shape[1]) if x.dim() == 4 else tuple(x.shape[1:])
            assert shape == last.shape
            assert sum(p.numel() for p in module.parameters()) == row.parameters
            seen |= {layer_name, last.name}
    assert {row.name for row in rows.values() if row.kind != "Activation"} == seen


@pytest.mark.parametrize("name", TABLES)
def test_pooling_before_relu_is_the_same_function_with_the_same_gradients(name):
    network = load_recipe(name).network
    model = networks.build(network, CIFAR, 10).double().eval()
    modules = dict(model.named_children())
    x = torch.randn(4, 3, 32, 32, dtype=torch.double)
    fast = model(x)
    fast.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    y = x
    for row in networks.layers(network, CIFAR, 10):  # the order in which Keras computes
        match row.kind:
            case "Activation":
                y = torch.relu(y)
            case "MaxPooling2D":
                y = torch.nn.functional.max_pool2d(y, row.pool)
            case "Conv2D":
                modules[row.name].pooling = None  # which comes in its turn
                y = modules[row.name](y)
            case "Dropout":
                pass  # when evaluating, wherever it is
            case _:
                y = modules[row.name](y)
    y.square().sum().backward()
    assert torch.equal(fast, y)
    for ours, plain in zip(gradients, (p.grad for p in model.parameters()), strict=True):
        assert torch.equal(ours, plain)


def test_weights_are_glorot_uniform_with_zero_biases():
    model = networks.build(load_recipe("train3").network, CIFAR, 10, seed=1)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            area = math.prod(module.weight.shape[2:])
            fan_out, fan_in = module.weight.shape[0] * area, module.weight.shape[1] * area
            limit = math.sqrt(6 / (fan_in + fan_out))
            assert module.weight.abs().max() <= limit
            assert module.weight.abs().max() > 0.98 * limit
            assert module.weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.05)
            assert not module.bias.any()


def test_same_seed_same_weights_wherever_layers_agree():
    recipe = load_recipe("train3")
    ours = networks.build(recipe.network, CIFAR, 10, seed=5).state_dict()
    other = networks.build(recipe.override({"network.dense": [512]}).network, CIFAR, 10, seed=5).state_dict()
    shared = [name for name in ours if name in other and ours[name].shape == other[name].shape]
    assert "conv2d_5.weight" in shared
    assert all(torch.equal(ours[name], other[name]) for name in shared)
    assert not torch.equal(
        ours["conv2d_1.weight"], networks.build(recipe.network, CIFAR, 10, seed=6).state_dict()["conv2d_1.weight"]
    )


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(64, 33, 5, 7), (301, 77)])
def test_dropout_drops_its_rate_keeps_the_mean_and_repeats_by_seed(rate, shape):
    layer = modules.Dropout(rate, modules.Masks())
    layer.masks.reseed(3, 0)
    x = torch.ones(shape)
    first = layer(x)
    dropped = (first == 0).float().mean().item()
    assert dropped == pytest.approx(round(rate * 256) / 256, abs=5 * math.sqrt(rate * (1 - rate) / x.numel()))
    assert first.max().item() == pytest.approx(256 / (256 - round(rate * 256)))
    assert torch.equal(layer(x), first)
    assert not torch.equal(modules.Dropout(rate, layer.masks)(x), first)
    layer.masks.reseed(3, 1)
    assert not torch.equal(layer(x), first)
    layer.masks.reseed(3, 0)
    assert torch.equal(layer(x), first)
    assert torch.equal(layer.eval()(x), x)


def threefry(key, a, b):
    """Threefry-2x32 of 20 rounds as Salmon et al. (2011) write it, one pair of integers at a time."""
    keys, mask = (*key, key[0] ^ key[1] ^ 0x1BD11BDA), 0xFFFFFFFF
    a, b = a + keys[0] & mask, b + keys[1] & mask
    for round in range(20):
        turn = (13, 15, 26, 6, 17, 29, 16, 24)[round % 8]
        a = a + b & mask
        b = (b << turn | b >> 32 - turn) & mask ^ a
        if round % 4 == 3:
            turns = round // 4 + 1
            a, b = a + keys[turns % 3] & mask, b + keys[(turns + 1) % 3] + turns & mask
    return a, b


def test_random_bytes_are_threefrys():
    # Known answers: those of Random123, the authors' library.
    assert threefry((0, 0), 0, 0) == (0x6B200159, 0x99BA4EFE)
    assert threefry((0xFFFFFFFF,) * 2, 0xFFFFFFFF, 0xFFFFFFFF) == (0x1CB996FC, 0xBB002BE7)
    for key, layer in ((0, 0), (0x9E3779B97F4A7C15, 2), (2**64 - 1, 7)):
        halves = torch.tensor(rng.words(key), dtype=torch.int32)
        drawn = rng.random_bytes(halves, layer, 1280)
        # Of 128 bytes at a time, 16 i + j is byte i of pair j.
        pairs = drawn.view(10, 8, 16).transpose(1, 2).flatten(0, 1)
        for number in (0, 1, 17, 159):
            low, high = threefry((key & 0xFFFFFFFF, key >> 32), number, layer)
            assert bytes(pairs[number].tolist()) == (high << 32 | low).to_bytes(8, "little")
        assert torch.equal(drawn[:77], rng.random_bytes(halves, layer, 77))


def test_masks_drawn_ahead_are_those_drawn_step_by_step(monkeypatch):
    """As on a GPU: of steps in order with a smaller batch among them, left out, again, and of another seed."""
    places = [
        (0, 5, 64),
        (0, 6, 64),
        (0, 7, 9),
        (0, 8, 80),
        (0, 9, 64),
        (0, 40, 64),
        (0, 5, 64),
        (1, 6, 64),
        (1, 7, 64),
    ]

    def drawn():
        masks = modules.Masks()
        layers = [modules.Dropout(rate, masks) for rate in (0.25, 0.5)]
        kept = []
        for seed, step, images in places:
            masks.reseed(seed, step)
            kept += [layer(torch.ones(images, 3, 5, 7, dtype=torch.float64)) for layer in layers]  # by PyTorch
        assert not copy.deepcopy(masks).ahead
        return kept, masks.ahead

    one_by_one, nothing = drawn()
    monkeypatch.setattr(modules, "steps_ahead", lambda device, count: 4)
    ahead, blocks = drawn()
    assert not nothing
    assert {layer: block.drawn.shape for layer, block in blocks.items()} == dict.fromkeys((0, 1), (4, 64 * 105))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(one_by_one, ahead, strict=True))


def test_the_dropout_mask_does_not_depend_on_memory_format_or_precision():
    layer = modules.Dropout(0.4, modules.Masks())
    x = torch.ones(8, 16, 6, 6)
    masks = [layer(y) == 0 for y in (x, x.to(memory_format=torch.channels_last), x.bfloat16())]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


@pytest.mark.parametrize(("shape", "classes"), [((28, 20, 1), 7), ((47, 64, 3), 200)])
def test_any_image_shape_and_number_of_classes(shape, classes):
    network = load_recipe("train3").network
    model = networks.build(network, shape, classes)
    assert model(torch.randn(3, shape[2], *shape[:2])).shape == (3, classes)
    assert sum(p.numel() for p in model.parameters()) == networks.num_parameters(network, shape, classes)


def test_images_that_are_too_small_are_refused_by_name():
    with pytest.raises(InputError, match=r"pooling of block 4 leaves no pixel of 8×8 images"):
        networks.layers(load_recipe("train1").network, (8, 8, 3), 10)


@pytest.mark.parametrize(
    ("height", "width", "padding"), [(4, 4, 1), (2, 2, 1), (3, 5, 1), (1, 1, 1), (5, 4, 0), (3, 3, 0)]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.04)])
def test_small_maps_as_matrix_products_are_the_same_convolution(height, width, padding, dtype, tolerance):
    torch.manual_seed(0)
    if dtype == torch.bfloat16 and height * width <= modules.TINY_MAP_PIXELS:
        tolerance = 0.0625  # gradients of about 9 are rounded once a pair of pixels: bfloat16's step there
    layer = modules.Convolution(6, 7, padding, bias=True).to(dtype).to(memory_format=torch.channels_last)
    weights = [layer.weight, layer.bias]
    x = torch.randn(5, 6, height, width, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    fast, plain = layer(x), F.conv2d(x, *weights, padding=padding)
    assert type(fast.grad_fn) is not type(plain.grad_fn)
    torch.testing.assert_close(fast, plain, rtol=0, atol=tolerance)
    gradient = torch.randn_like(plain)
    ours, theirs = (torch.autograd.grad(y, [x, *weights], gradient) for y in (fast, plain))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=tolerance)
    layer(x).sum().backward()
    assert layer.weight.grad.stride() == layer.weight.stride()  # fused optimizers walk the two side by side


FAST = {
    "channels": [[6, 6, 6], [12, 12]],
    "pool_after": "first",
    "activation": "gelu",
    "batch_norm": True,
    "residual": True,
    "whitening": 2,
    "initial": "dirac",
    "head": "max",
    "logit_scale": 0.125,
    "dense": [],
}


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("head", ["max", "mean", "flatten"])
def test_a_fast_network_is_what_its_fields_say(head, activation, kernel):
    """Against the same written out with torch.nn.functional, in training mode."""
    network = NetworkRecipe(**{**FAST, "head": head, "activation": activation})
    model = networks.build(network, (20, 18, 3), 7, seed=3).train()
    here = machine.prepare("float32", device="cpu", threads=1)
    kernels.use(here.kernels if kernel else kernels.NONE, torch.float32)
    activated = getattr(F, activation)
    images = torch.randn(6, 3, 20, 18)
    modules.whiten(model, images)
    weights = {name.removeprefix("residual_1.").removeprefix("residual_2."): t for name, t in model.named_parameters()}

    def norm(x, n):
        return F.batch_norm(x, None, None, None, weights[f"batch_normalization_{n}.bias"], True)

    def conv(x, n):
        return F.conv2d(x, weights[f"conv2d_{n}.weight"], padding=1)

    for name, bias in model.named_parameters():
        if "normalization" in name:
            torch.nn.init.normal_(bias)
    x = activated(F.conv2d(images, weights["whitening.weight"]))
    x = activated(norm(F.max_pool2d(conv(x, 1), 2), 1))
    x = activated(x + norm(conv(activated(norm(conv(x, 2), 2)), 3), 3))
    x = activated(norm(F.max_pool2d(conv(x, 4), 2), 4))
    x = activated(x + norm(conv(x, 5), 5))
    features = {"max": x.amax((2, 3)), "mean": x.mean((2, 3)), "flatten": x.permute(0, 2, 3, 1).flatten(1)}[head]
    logits = F.linear(features, weights["predictions.weight"], weights["predictions.bias"]) / 8
    found = model(images)
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for ours, theirs in zip(*(torch.autograd.grad(y.square().sum(), trained) for y in (found, logits)), strict=True):
        assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max()
    rows = networks.layers(network, (20, 18, 3), 7)
    parameters = dict(model.named_parameters())
    statistics = sum(t.numel() for name, t in model.state_dict().items() if name not in parameters)  # no scale of ones
    assert sum(row.parameters for row in rows) == sum(t.numel() for t in model.parameters()) + statistics
    assert sum(row.fixed for row in rows) == weights["whitening.weight"].numel() + statistics
    by_hand = 19 * 17 * 24 * 12 + 19 * 17 * 6 * 24 * 9 + 2 * 9 * 8 * 6 * 6 * 9
    by_hand += 9 * 8 * 12 * 6 * 9 + 4 * 4 * 12 * 12 * 9 + features.shape[1] * 7
    assert networks.num_multiply_adds(network, (20, 18, 3), 7) == by_hand
    assert "Non-trainable params: " + f"{sum(row.fixed for row in rows):,}" in networks.summary(network, (20, 18, 3), 7)


@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_a_whitening_layer_with_same_padding_keeps_the_size(side):
    network = NetworkRecipe(channels=[[6]], whitening=side, whitening_padding="same")
    model = networks.build(network, (20, 18, 3), 7)
    images = torch.randn(2, 3, 20, 18)
    modules.whiten(model, images)
    before, after = (side - 1) // 2, side // 2
    expected = F.conv2d(F.pad(images, (before, after, before, after)), model.whitening.weight)
    torch.testing.assert_close(model.whitening(images), F.relu(expected))
    assert expected.shape == (2, 6 * side**2, 20, 18)
    assert networks.layers(network, (20, 18, 3), 7)[0].shape == (20, 18, 6 * side**2)


def test_a_window_larger_than_the_images_is_refused():
    for padding in ("same", "valid"):
        network = NetworkRecipe(channels=[[6]], whitening=4, whitening_padding=padding)
        with pytest.raises(InputError, match=r"the whitening leaves no pixel of 9×3 images; use .*whitening_padding"):
            networks.layers(network, (3, 9, 3), 10)


def test_a_whitening_layer_makes_patches_uncorrelated_with_variance_one():
    images = torch.randn(50, 3, 12, 12).cumsum(2).cumsum(3) / 8
    model = networks.build(NetworkRecipe(**FAST), (12, 12, 3), 7)
    modules.whiten(model, images)
    model.whitening.activation = ""
    seen = model.whitening(images)[:, :12].permute(0, 2, 3, 1).flatten(0, 2).double()
    covariance = seen.T @ seen / len(seen)
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-3
    assert covariance.diag()[0] == pytest.approx(1, abs=0.01)
    assert torch.equal(model.whitening.weight[:12], -model.whitening.weight[12:])
    assert not model.whitening.weight.requires_grad


def grey_images(count, seed=0):
    """Images (N, 3, 12, 12) that are the same in all channels."""
    one = torch.randn(count, 1, 12, 12, generator=torch.Generator().manual_seed(seed)).cumsum(2).cumsum(3) / 8
    return one.expand(-1, 3, -1, -1).contiguous()


def test_a_whitening_layer_of_grey_images_takes_directions_again():
    """Patches of 2×2 grey pixels differ in four directions of twelve; no output is constant."""
    model = networks.build(NetworkRecipe(**FAST), (12, 12, 3), 7)
    modules.whiten(model, grey_images(50))
    weight = model.whitening.weight
    for repeat in (1, 2):
        assert torch.equal(weight[4 * repeat : 4 * repeat + 4], weight[:4])
    assert torch.equal(weight[:12], -weight[12:])
    model.whitening.activation = ""
    assert model.whitening(grey_images(50)).std((0, 2, 3)).min() > 0.5
    modules.whiten(model, torch.zeros(5, 3, 12, 12))  # as little as there is
    assert weight.isfinite().all()


def test_whitening_is_not_rounded_to_bfloat16():
    """Nearly grey images have directions of little variance, whose filters are large and nearly cancel."""
    images = grey_images(50) + 0.01 * torch.randn(50, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    model = networks.build(NetworkRecipe(**FAST), (12, 12, 3), 7)
    modules.whiten(model, images)
    expected = F.gelu(F.conv2d(images, model.whitening.weight))
    kernels.use(kernels.NONE, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.whitening(images)
    assert (found.float() - expected).abs().max() < 0.02  # a result of 4 rounded to bfloat16 is off by 0.008


def test_a_whitening_layer_of_some_directions_keeps_the_largest():
    images = torch.randn(50, 3, 12, 12).cumsum(2).cumsum(3) / 8
    every, some = (
        networks.build(NetworkRecipe(**FAST, whitening_directions=directions), (12, 12, 3), 7) for directions in (0, 5)
    )
    for model in (every, some):
        modules.whiten(model, images)
    assert torch.equal(some.whitening.weight, every.whitening.weight[[*range(5), *range(12, 17)]])
    rows = networks.layers(NetworkRecipe(**FAST, whitening_directions=5), (12, 12, 3), 7)
    assert (rows[0].shape, rows[0].fixed) == ((11, 11, 10), some.whitening.weight.numel())
    with pytest.raises(InputError, match=r"network.whitening_directions: 13 is more than the 12 .* 2×2 pixels of 3"):
        networks.layers(NetworkRecipe(**FAST, whitening_directions=13), (12, 12, 3), 7)


@pytest.mark.parametrize("kernel", [True, False])
def test_a_relu_stays_where_it_is(kernel):
    """Behind a convolution, behind the pooling behind one, within a residual branch and behind it."""
    changes = {"activation": "relu", "batch_norm": False, "whitening": 0, "channels": [[16, 16, 16], [32, 32]]}
    model = networks.build(NetworkRecipe(**{**FAST, **changes}), (20, 18, 3), 7, seed=3)
    here = machine.prepare("float32", device="cpu", threads=1)
    kernels.use(here.kernels if kernel else kernels.NONE, torch.float32)
    weights = {name.removeprefix("residual_1.").removeprefix("residual_2."): t for name, t in model.named_parameters()}

    def conv(x, n):
        return F.conv2d(x, weights[f"conv2d_{n}.weight"], weights[f"conv2d_{n}.bias"], padding=1)

    images = torch.randn(6, 3, 20, 18)
    for weight in weights.values():
        torch.nn.init.normal_(weight, std=0.1)
    x = F.relu(F.max_pool2d(conv(images, 1), 2))
    x = F.relu(x + conv(F.relu(conv(x, 2)), 3))
    x = F.relu(F.max_pool2d(conv(x, 4), 2))
    x = F.relu(x + conv(x, 5))
    logits = F.linear(x.amax((2, 3)), weights["predictions.weight"], weights["predictions.bias"]) / 8
    torch.testing.assert_close(model(images), logits, rtol=1e-4, atol=1e-4)


def test_filters_that_start_as_the_identity_hand_their_input_on():
    model = networks.build(NetworkRecipe(**FAST), (12, 12, 3), 7)
    x = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(model.residual_1.conv2d_2(x), x)
    model.conv2d_4.pooling = None
    wide = model.conv2d_4(x)
    torch.testing.assert_close(wide[:, :6], x)
    assert wide[:, 6:].abs().max() > 0


def test_batch_norm_takes_a_batch_of_one_value():
    layer = modules.BatchNorm(4).train()
    x = torch.randn(1, 4, 1, 1)
    torch.testing.assert_close(layer(x), x, rtol=1e-4, atol=1e-4)  # by its statistics: mean 0, variance 1
    assert layer.running_mean.abs().max() == 0
    layer(torch.randn(5, 4, 2, 2) + 3)
    assert layer.running_mean.min() > 0.5


def test_a_residual_branch_has_the_shape_of_what_it_is_added_to():
    with pytest.raises(ValueError, match="residual adds"):
        NetworkRecipe(**{**FAST, "channels": [[6, 8]]})
    with pytest.raises(ValueError, match="residual adds"):
        NetworkRecipe(**{**FAST, "padding": "valid"})


@pytest.mark.parametrize("wide", [False, True])
def test_a_dense_layer_computes_under_autocast_what_pytorchs_does(wide):
    """The same bits; the gradient of its weights stays in bfloat16 where an optimizer asked for it so."""
    torch.manual_seed(0)
    ours, theirs = modules.Linear(24, 10), nn.Linear(24, 10)
    theirs.load_state_dict(ours.state_dict())
    if not wide:
        ours.weight.grad_dtype = None
    xs = [torch.randn(7, 24).requires_grad_() for _ in range(2)]
    xs[1].data.copy_(xs[0].data)
    for layer, x in zip((ours, theirs), xs, strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
    assert ours.weight.grad.dtype == (torch.float32 if wide else torch.bfloat16)
    for a, b in zip((xs[0], *ours.parameters()), (xs[1], *theirs.parameters()), strict=True):
        assert torch.equal(a.grad.float(), b.grad)


@pytest.mark.parametrize("size", [20, 5, 1])
def test_batch_norm_follows_a_small_batch_by_its_share(size, tiny_images, tmp_path):
    """An epoch of 180 images in batches of 175 + 5, so that the last batch is a few images."""
    network = NetworkRecipe(channels=((16,),), batch_norm=True, dense=())
    model = networks.build(network, (8, 8, 3), 4)
    norm = next(module for module in model.modules() if isinstance(module, modules.BatchNorm))
    model.train()
    x = torch.randn(20, 3, 8, 8).to(memory_format=torch.channels_last)
    moved = {}
    for share in (1.0, size / 20):
        norm.running_mean.zero_()
        model.weigh_batch(share)
        model(x)
        moved[share] = norm.running_mean.clone()
    expected = moved[1.0] / 0.4 * (1 - 0.6 ** (size / 20))
    torch.testing.assert_close(moved[size / 20], expected)
