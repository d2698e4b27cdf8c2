"""Compiled kernels: the same functions as PyTorch's, whatever the shapes, the threads and the instruction set."""

import os
import platform
import shutil
import subprocess
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fromzero import FromzeroError, kernels, load_recipe, machine, modules, networks, new_training, rng
from fromzero.display import header
from fromzero.evaluate import Normalise
from fromzero.kernels import building

ELEMENTS = [torch.float32, torch.bfloat16]
# Images, rows, columns, channels in and out, padding: tiles cut off on either side, channels that fill no vector.
SHAPES = [
    (3, 9, 7, 24, 40, 1),
    (2, 8, 8, 64, 128, 1),
    (5, 6, 6, 17, 33, 0),
    (1, 3, 3, 16, 16, 1),
    (4, 16, 13, 32, 16, 0),
    (130, 4, 4, 70, 50, 1),
    (70, 2, 2, 40, 70, 1),  # the tiles of maps of 2×2
    (20, 30, 33, 16, 20, 1),  # the gradient of the filters in parts, and in chunks
    (19, 33, 33, 137, 130, 1),  # in chunks that are staged, where there are tiles; the last unit is half empty
]
# The same of few channels; strips of eight rows cut off.
FEW = [(3, 19, 12, 3, 32, 1), (2, 9, 7, 1, 70, 0), (4, 5, 6, 4, 16, 0), (70, 10, 9, 2, 17, 1), (1, 3, 40, 3, 130, 1)]
ERRORS = {torch.float32: 1e-5, torch.bfloat16: 0.02}  # root mean square over standard deviation


@pytest.fixture(params=ELEMENTS, ids=str)
def made(request):
    """The kernels for an element type, in use."""
    here = machine.prepare("bfloat16" if request.param == torch.bfloat16 else "float32", device="cpu", threads=2)
    if here.kernels == kernels.NONE:
        # A compiler that is there compiles them, in bfloat16 where the processor has that.
        expected = request.param == torch.float32 or "avx512_bf16" in here.instructions
        expected = expected and os.name == "posix" and any(map(shutil.which, ("cc", "gcc", "clang")))
        assert not expected or os.environ.get("FROMZERO_KERNELS") == "off", here.why_no_kernels
        pytest.skip(f"no kernels for {request.param} on this machine")
    return kernels._chosen.kernels


def error(ours, exact):
    return ((ours.double() - exact).square().mean().sqrt() / exact.std()).item()


@pytest.mark.parametrize(("images", "height", "width", "inputs", "outputs", "padding"), SHAPES)
def test_a_convolution_and_its_gradients_are_those_of_pytorch(made, images, height, width, inputs, outputs, padding):
    torch.manual_seed(0)
    x = torch.randn(images, inputs, height, width).to(made.element).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(outputs, inputs, 3, 3) / (9 * inputs) ** 0.5, torch.randn(outputs)
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = F.conv2d(*exact, padding=padding)
    gradient = torch.randn(expected.shape).to(made.element)
    expected.backward(gradient.double())
    ours = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = kernels.Convolve3x3.apply(*ours, padding, False, False, None, made)
    y.backward(gradient)
    assert y.dtype == made.element
    assert error(y, expected.detach()) < ERRORS[made.element]
    for a, b in zip(ours, exact, strict=True):
        assert a.grad.dtype == a.dtype
        assert error(a.grad, b.grad) < ERRORS[made.element]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize(("images", "height", "width", "inputs", "outputs", "padding"), FEW)
def test_a_convolution_of_few_channels(made, images, height, width, inputs, outputs, padding, pooled, relu):
    """Beside PyTorch's in float64; its gradients from the pixels that are picked here: near a tie others are there."""
    torch.manual_seed(0)
    x = torch.randn(images, inputs, height, width).to(made.element).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(outputs, inputs, 3, 3) / (9 * inputs) ** 0.5, torch.randn(outputs)
    ours = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = kernels.ConvolveDirectly.apply(*ours, padding, pooled, relu, made)
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    whole = F.conv2d(*exact, padding=padding)
    expected = F.max_pool2d(whole, 2) if pooled else whole
    assert error(y, (F.relu(expected) if relu else expected).detach()) < ERRORS[made.element]
    gradient = torch.randn(y.shape).to(made.element)
    y.backward(gradient)
    spread = torch.zeros_like(whole)
    if pooled:
        filters = weight.permute(0, 2, 3, 1).contiguous()
        z, picked = made.forward_directly(x.permute(0, 2, 3, 1).contiguous(), filters, bias, padding, pooled, relu)
        assert torch.equal(z.permute(0, 3, 1, 2), y)
        for pixel in range(4):
            window = spread[..., pixel // 2 :: 2, pixel % 2 :: 2][..., : y.shape[2], : y.shape[3]]
            window.copy_(torch.where(picked.permute(0, 3, 1, 2) == pixel, gradient, 0))
    else:
        spread.copy_(torch.where(y > 0, gradient, 0) if relu else gradient)
    whole.backward(spread)
    for a, b in zip(ours, exact, strict=True):
        assert a.grad.dtype == a.dtype
        assert error(a.grad, b.grad) < ERRORS[made.element]


def test_threads_do_not_change_the_bits(made):
    torch.manual_seed(0)
    x, gradient = torch.randn(7, 11, 10, 48).to(made.element), torch.randn(7, 11, 10, 80).to(made.element)
    filters, image, few = torch.randn(80, 3, 3, 48), x[..., :3].contiguous(), torch.randn(80, 3, 3, 3)
    # The gradient of filters: of one part in several chunks, of several, of several blocks and pieces, of 2×2, staged.
    maps = [(torch.randn(shape).to(made.element), o) for shape, o in (((7, 11, 10, 48), 80), ((40, 20, 20, 64), 128))]
    maps += [(torch.randn(shape).to(made.element), o) for shape, o in (((20, 32, 32, 16), 20), ((50, 2, 2, 130), 150))]
    normal = torch.zeros(80), torch.ones(80), torch.ones(80)
    maps += [(torch.randn(19, 33, 33, 130).to(made.element), 140)]
    gradients = [torch.randn(*images.shape[:3], outputs).to(made.element) for images, outputs in maps]
    found = []
    for threads in (1, 2, 3, 5, 2):
        torch.set_num_threads(threads)
        found.append(
            (
                made.forward(x, filters, None, 1),
                made.input_gradient(gradient, filters, 1, x.shape),
                *(made.filter_gradient(images, of_y, 1) for (images, _), of_y in zip(maps, gradients, strict=True)),
                made.channel_sums(gradient),
                made.forward_directly(image, few, None, 1, False, True)[0],
                *made.forward_directly(image, few, None, 1, True, True),
                *made.gradients_directly(image, gradient, 1, gradient, None),
                made.convolve_pixels(image.float(), few.permute(1, 2, 3, 0).contiguous(), "gelu"),
                *(made.orthogonalise(torch.ones(m, 300).tril(7), (3.0, -4.0, 2.0), 3) for m in (7, 130)),
                *made.moments(gradient),
                *made.normalise_gradient(gradient, gradient, *normal, "gelu")[:2],
                *made.normalise_gradient(gradient, gradient, *normal, "gelu", gradient),
            )
        )
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("pooled", ["pool", "relu"])
@pytest.mark.parametrize(("images", "height", "width", "inputs", "outputs", "padding"), [*SHAPES, (2, 4, 5, 16, 16, 0)])
def test_a_convolution_with_the_pooling_behind_it(made, images, height, width, inputs, outputs, padding, pooled):
    """The same as the convolution and then the pooling; in gradients to the bit, once the same pixels are picked."""
    torch.manual_seed(0)
    x = torch.randn(images, height, width, inputs).to(made.element)
    filters, bias = torch.randn(outputs, 3, 3, inputs) / (9 * inputs) ** 0.5, torch.randn(outputs) / 4
    whole = made.forward(x, filters, bias, padding)
    y, picked = made.forward_pooled(x, filters, bias, padding, pooled == "relu")
    assert torch.equal(y, made.max_pool(whole, pooled == "relu"))
    assert picked.unique().tolist() == [0, 1, 2, 3, *([4] if pooled == "relu" else [])]
    gradient = torch.randn(y.shape).to(made.element)
    spread = torch.zeros_like(whole)
    for pixel in range(4):
        window = spread[:, pixel // 2 :: 2, pixel % 2 :: 2][:, : y.shape[1], : y.shape[2]]
        window.copy_(torch.where(picked == pixel, gradient, 0))
        values = whole[:, pixel // 2 :: 2, pixel % 2 :: 2][:, : y.shape[1], : y.shape[2]]
        assert torch.equal(y[picked == pixel], values[picked == pixel])
    of_x = made.input_gradient(spread, filters, padding, x.shape)
    assert torch.equal(made.input_gradient(gradient, filters, padding, x.shape, picked), of_x)
    assert torch.equal(made.filter_gradient(x, gradient, padding, picked), made.filter_gradient(x, spread, padding))
    torch.testing.assert_close(made.channel_sums(gradient, picked), made.channel_sums(spread), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("images", "height", "width", "inputs", "outputs", "padding"), [*SHAPES, (2, 4, 5, 16, 16, 0)])
def test_a_convolution_with_pooling_and_dropout_behind_it(made, images, height, width, inputs, outputs, padding, relu):
    """The same as the convolution with its pooling and then the dropout, its gradients those behind what is kept."""
    torch.manual_seed(0)
    x = torch.randn(images, height, width, inputs).to(made.element)
    filters, bias = torch.randn(outputs, 3, 3, inputs) / (9 * inputs) ** 0.5, torch.randn(outputs) / 4
    mask = kernels.Mask(100, 2**64 - 7, 2)
    whole, all_picked = made.forward_pooled(x, filters, bias, padding, relu)
    y, picked = made.forward_pooled(x, filters, bias, padding, relu, mask)
    kept = made.drop(torch.ones_like(whole), mask) > 0
    assert 0.3 < kept.float().mean() < 0.9
    assert torch.equal(picked, torch.where(kept, all_picked, 4))
    tight = {"rtol": 1e-2, "atol": 1e-2} if made.element == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y, made.drop(whole, mask), **tight)
    gradient = torch.randn(y.shape).to(made.element)
    scaled, tight = 256 / 156, {"rtol": 2e-2, "atol": 2e-2} if made.element == torch.bfloat16 else tight
    of_x = made.input_gradient(gradient, filters * scaled, padding, x.shape, picked)
    assert torch.equal(made.input_gradient(gradient, filters, padding, x.shape, picked, 100), of_x)
    for ours, plain in (
        (made.filter_gradient(x, gradient, padding, picked, 100), made.filter_gradient(x, gradient, padding, picked)),
        (made.channel_sums(gradient, picked, 100), made.channel_sums(gradient, picked)),
    ):
        torch.testing.assert_close(ours, plain * scaled, rtol=1e-5, atol=1e-5)


def test_a_network_drops_in_a_convolution_what_it_drops_behind_it(made):
    """Train 2's first layers, in training, with kernels and without."""
    shape = {"channels": [[16, 32], [32]], "padding": ["valid", "same"], "activation_layers": [False, True]}
    recipe = load_recipe("train2").override({f"network.{name}": value for name, value in shape.items()})
    model = networks.build(recipe.network, (14, 14, 16), 10, seed=1)
    torch.manual_seed(0)
    x, found = torch.randn(6, 16, 14, 14), []
    for used in (True, False):
        if not used:
            kernels.use(kernels.NONE, made.element)
        model.zero_grad()
        model.reseed(3, 5)
        with torch.autocast("cpu", torch.bfloat16, enabled=made.element == torch.bfloat16):
            y = model(x)
        y.float().logsumexp(1).sum().backward()
        found.append([y.detach().float(), *(weight.grad.clone() for weight in model.parameters())])
    for ours, plain in zip(*found, strict=True):
        error = (ours - plain).norm() / plain.norm().clamp(min=1e-6)
        assert error < (0.3 if made.element == torch.bfloat16 else 1e-5)  # bfloat16 picks other pixels


@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
@pytest.mark.parametrize("shape", [(3, 5, 7, 20), (1, 3, 2, 5), (40, 9, 9, 64)])
@pytest.mark.parametrize("joined", [False, True], ids=["alone", "joined"])
def test_batch_normalisation_with_what_is_behind_it_and_gradients(made, shape, activation, joined):
    torch.manual_seed(0)
    x = (torch.randn(shape) * 3 + torch.linspace(-100, 100, shape[-1])).to(made.element).permute(0, 3, 1, 2)
    gradient = torch.randn(x.shape).to(made.element).contiguous(memory_format=torch.channels_last)
    layer = modules.BatchNorm(shape[-1], activation)
    torch.nn.init.normal_(layer.bias)
    exact = modules.BatchNorm(shape[-1], activation).double()
    exact.load_state_dict(layer.state_dict())
    another = torch.float32 if made.element == torch.bfloat16 else torch.bfloat16
    given = [
        x,
        *([torch.randn(x.shape).bfloat16().to(another)] if joined else []),
    ]  # the second in another order of memory, too
    results = []
    for module, kinds in ((layer, (made.element, another)), (exact, 2 * (torch.float64,))):
        images, *others = (t.to(kind).detach().requires_grad_() for t, kind in zip(given, kinds, strict=False))
        y = module.train()(images, *others)
        y.backward(gradient.to(y.dtype))
        with torch.no_grad():
            scored = module.eval()(images, *others)
        gradients = [leaf.grad for leaf in (images, *others, module.bias)]
        results.append((y, *gradients, module.running_mean, module.running_var, scored))
    assert results[0][0].dtype == made.element
    for ours, theirs in zip(*results, strict=True):
        tolerance = 1e-4 if ours.dtype == torch.float32 and made.element == torch.float32 else 0.02
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
    one = torch.ones(1, 1, 1, 1)  # fits every pixel by PyTorch's rules
    with torch.no_grad():
        torch.testing.assert_close(layer(x, one).double(), exact(x.double(), one), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shape", [(64, 33, 5, 7), (3, 1), (301, 77)])
def test_dropout_keeps_what_it_keeps_without_kernels(made, shape):
    x = torch.randn(shape).to(made.element)
    results = []
    for used in (True, False):
        if not used:
            kernels.use(kernels.NONE, made.element)
        layer = modules.Dropout(0.25, modules.Masks())
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(x)
        results.append((y.detach(), leaf.grad))
    for ours, plain in zip(*results, strict=True):
        assert torch.equal(ours == 0, plain == 0)
        torch.testing.assert_close(ours, plain)


def test_the_activations_and_their_slopes_are_those_of_pytorch(made):
    """GELU by a formula of our own, or by a table of it: everywhere."""
    near, rounded = {torch.float32: (2e-6, 2e-6), torch.bfloat16: (2.5e-5, 2**-8)}[made.element]
    x = torch.cat([torch.linspace(-20, 20, 100_001), torch.tensor([0.0, -0.0, 1e-30, 1e30, -1e30])])
    x = x.to(made.element)
    zero, one, leaf = torch.zeros(len(x)), torch.ones(len(x)), x.double().requires_grad_()
    for name, function in (("relu", F.relu), ("gelu", F.gelu), ("", lambda z: z)):
        expected = function(leaf)
        ours = made.normalise(x[None], zero, one, zero, name)[0]
        assert ((ours - expected).abs() <= near + rounded * expected.abs()).all()
        (slopes,) = torch.autograd.grad(expected.sum(), leaf)
        _, ours, _ = made.normalise_gradient(x[None], torch.ones_like(x)[None], zero, one, zero, name)  # of one row
        assert ((ours - slopes).abs() <= 2 * near).all()
    for name in kernels.ACTIVATIONS:
        nan = torch.full((1, 1), torch.nan, dtype=made.element)
        assert made.normalise(nan, zero[:1], one[:1], zero[:1], name).isnan().all()
    _, ours, _ = made.normalise_gradient(x[None, :1], x[None, :1], zero[:1], one[:1], one[:1] * torch.nan, "gelu")
    assert ours.isnan().all()


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("height", "width", "channels"), [(8, 8, 32), (7, 9, 20), (2, 3, 5), (31, 31, 16)])
def test_pooling_and_its_gradient_are_those_of_pytorch(made, height, width, channels, relu):
    torch.manual_seed(0)
    x = torch.randint(-3, 4, (3, channels, height, width)).to(made.element)  # many windows have two maxima
    x = x.contiguous(memory_format=torch.channels_last)
    plain, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = F.max_pool2d(plain, 2)
    expected = F.relu(expected) if relu else expected
    gradient = torch.randn(expected.shape).to(made.element)
    expected.backward(gradient)
    y = kernels.MaxPool2x2.apply(ours, relu, made)
    y.backward(gradient)
    assert torch.equal(y, expected)
    assert torch.equal(ours.grad, plain.grad)


def test_what_is_not_finite_stays_so(made):
    x = torch.zeros(2, 8, 8, 16).to(made.element)
    x[1, 5, 5, 3] = torch.nan
    assert made.forward(x, torch.ones(16, 3, 3, 16), None, 1)[1].isnan().any()
    image = x[..., 2:5].contiguous()
    assert made.forward_directly(image, torch.ones(16, 3, 3, 3), None, 1, False, True)[0][1].isnan().any()
    assert made.forward_directly(image, torch.ones(16, 3, 3, 3), None, 1, True, True)[0][1].isnan().any()
    assert made.max_pool(x, True).isnan().sum() == made.max_pool(x, False).isnan().sum() == 1
    assert made.channel_sums(x).isnan().nonzero().tolist() == [[3]]
    assert made.forward_pooled(x, torch.ones(16, 3, 3, 16), None, 1, True)[0][1].isnan().any()
    assert all(moment.isnan().nonzero().tolist() == [[3]] for moment in made.moments(x))
    zero, one = torch.zeros(1), torch.ones(1)
    for infinity in (torch.inf, -torch.inf):
        lone = torch.full((1, 1), infinity, dtype=made.element)
        assert not made.normalise(lone, zero, one, zero, "gelu").isfinite().any()


def test_threads_that_compute_in_other_types_do_not_disturb_each_other():
    threads = {name: machine.prepare(name, device="cpu", threads=1) for name in ("bfloat16", "float32")}
    chosen = {}

    def compute(name, first, second):
        first.wait()
        threads[name].set_up()
        second.set()
        time.sleep(0.05)  # while the other one chooses
        chosen[name] = kernels._chosen.kernels

    one, two = threading.Event(), threading.Event()
    one.set()
    both = [threading.Thread(target=compute, args=of) for of in (("bfloat16", one, two), ("float32", two, two))]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    for name, here in threads.items():
        expected = None if here.kernels == kernels.NONE else machine.ELEMENTS[here.precision]
        assert (None if chosen[name] is None else chosen[name].element) == expected


def test_each_threads_scratch_memory_begins_where_vectors_are_aligned(made):
    """In any Python thread, as each has its own."""
    with ThreadPoolExecutor(1) as pool:
        begin, floats = pool.submit(made._own, 193 * 24 + 1).result()
        assert floats >= 193 * 24 + 1
        assert floats % 16 == 0
        assert pool.submit(made._own, 5).result() == (begin, floats)


@pytest.mark.parametrize("name", ["train1", "train3", "quick"])
def test_a_network_learns_the_same_with_and_without_kernels(name, tiny_images, monkeypatch):
    """In float32 the first losses agree to four digits; later ones do not: rounding errors grow with each step."""
    here = machine.prepare("float32", device="cpu", threads=2)
    if here.kernels == kernels.NONE:
        pytest.skip("no kernels on this machine")
    recipe = load_recipe(name).network
    pixels = torch.from_numpy(tiny_images.train.pixels[:50]).permute(0, 3, 1, 2).float() / 255
    labels = torch.from_numpy(tiny_images.train.labels[:50])
    curves, calls, convolved, convolve = [], [], [], kernels.Kernels._convolve
    monkeypatch.setattr(kernels.Kernels, "_convolve", lambda *given: calls.append(given) or convolve(*given))
    for used in (here.kernels, kernels.NONE):
        kernels.use(used, torch.float32)
        model = networks.build(recipe, (32, 32, 3), 10, seed=0)
        modules.whiten(model, pixels)
        losses = []
        for step in range(5):
            model.reseed(0, step)
            loss = F.cross_entropy(model(pixels), labels)
            loss.backward()
            losses.append(loss.item())
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.grad is not None:
                        weight -= 0.01 * weight.grad
                        weight.grad = None
        curves.append(losses)
        convolved.append(len(calls))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert convolved[0] >= 5, "the kernels were not used"
    assert convolved[1] == convolved[0], "convolutions were to be left to PyTorch"


def test_without_tiles_vectors_compute_the_same(tmp_path, monkeypatch):
    if machine.prepare("bfloat16", device="cpu").kernels == kernels.NONE:
        pytest.skip("no kernels of bfloat16 on this machine")
    monkeypatch.setenv("FROMZERO_HOME", str(tmp_path))
    monkeypatch.setattr(building, "_tiles_granted", lambda: False)
    name, made, _ = building.made.__wrapped__(torch.bfloat16)
    assert name != kernels.NONE
    assert kernels.agrees(made)


def test_the_check_reaches_the_gradient_that_is_computed_position_by_position(tmp_path, monkeypatch):
    if machine.prepare("bfloat16", device="cpu").kernels == kernels.NONE or not building._tiles_granted():
        pytest.skip("no tiles on this machine, which has no such gradient then")
    for source in building.SOURCE_FOLDER.glob("*.[ch]"):
        text = source.read_text("utf-8")
        if source.name == "winograd.c":
            before, staged, after = text.partition("static void sum_staged(")
            assert staged
            text = before + staged + after.replace("units, wide, depth, sums", "units, wide, depth / 32 * 16, sums", 1)
            assert "depth / 32 * 16" in text
        (tmp_path / source.name).write_text(text, "utf-8")
    monkeypatch.setattr(building, "SOURCE_FOLDER", tmp_path)
    library = building.built("cc", [*building.COMPILE, "-march=native", "-DBFLOAT16"], tmp_path)
    assert not kernels.agrees(kernels.Kernels(library, torch.bfloat16))


COMPUTING = [
    name for name, value in vars(kernels.Kernels).items() if callable(value) and name[0] != "_" and name != "moves"
]


@pytest.mark.parametrize("name", COMPUTING)
def test_the_check_finds_a_kernel_that_computes_something_else(name, made, monkeypatch):
    whole = getattr(kernels.Kernels, name)

    def wrong(result):
        if isinstance(result, torch.Tensor):
            return result + 1
        return tuple(map(wrong, result)) if isinstance(result, tuple) else not result if result is not None else None

    def broken(self, weights, *arguments, **named):
        result = whole(self, weights, *arguments, **named)
        if name in ("sgd_step", "adam_step"):
            weights += 1
        return wrong(result)

    monkeypatch.setattr(kernels.Kernels, name, broken)
    assert not kernels.agrees(made)


@pytest.mark.parametrize("flags", [["-mavx2", "-mfma"], ["-mavx"], ["-march=x86-64"]])
def test_other_instruction_sets_compute_the_same(flags, tmp_path, monkeypatch):
    if kernels.find(torch.float32).kernels is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("no kernels on this machine")
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("needs a processor with AVX2")
    built = kernels.Kernels(building.built("cc", [*building.COMPILE, *flags], tmp_path), torch.float32)
    assert kernels.agrees(built)
    drawn = torch.empty(1001, dtype=torch.uint8)
    built._call.random_bytes(drawn.data_ptr(), len(drawn), *rng.words(5), 3, 1)
    assert drawn.max() > 200
    assert torch.equal(drawn, rng.random_bytes(torch.tensor(rng.words(5), dtype=torch.int32), 3, len(drawn)))


def fake_compiler(folder, then):
    """A program that has a version and, asked to compile, does something else."""
    folder.mkdir(exist_ok=True)
    compiler = folder / "cc"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo fake 1 && exit 0\n{then}\n')
    compiler.chmod(0o755)
    return str(compiler)


def test_without_a_compiler_pytorch_computes_and_it_is_said(tmp_path, monkeypatch, tiny_images):
    monkeypatch.setenv("FROMZERO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("FROMZERO_KERNELS", raising=False)
    monkeypatch.setattr(building, "made", building.made.__wrapped__)
    monkeypatch.setattr(building, "COMPILE_SECONDS", 1.0)
    fake = tmp_path / "bin" / "cc"
    for then, why in (
        ("", "no C compiler was found"),
        (
            "echo 'In file x'; echo 'x.c:1: Error: no such chip' >&2; exit 1",
            f"{fake} failed: x.c:1: Error: no such chip",
        ),
        ("exit 1", f"{fake} failed"),
        ("exec /bin/sleep 9", f"{fake} gave no answer in 1 s"),
        ("for last; do :; done; echo > $last", f"{fake}: {tmp_path / 'home' / 'kernels'}/"),
    ):
        monkeypatch.setenv("CC", fake_compiler(tmp_path / "bin", then) if then else "")
        recipe = load_recipe("train1").override({"precision": "float32"})
        training = new_training(recipe, tiny_images, runs_dir=tmp_path / "runs", device="cpu", threads=1)
        training.close()
        assert training.machine.kernels == kernels.NONE
        assert header(training).splitlines()[4].startswith(f"  by PyTorch's kernels, which are slower: {why}")
    monkeypatch.setenv("FROMZERO_KERNELS", "off")
    assert training.machine.why_no_kernels == "FROMZERO_KERNELS is off"


def test_another_compiler_is_tried_and_what_it_made_is_kept(tmp_path, monkeypatch):
    if kernels.find(torch.float32).kernels is None:
        pytest.skip("no kernels on this machine")
    monkeypatch.setenv("FROMZERO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CC", fake_compiler(tmp_path / "bin", f"echo >> {tmp_path}/asked; exit 1"))
    if shutil.which("gcc") is None:
        pytest.skip("no gcc on this machine")
    assert agree_twice(lambda: building.made.__wrapped__(torch.float32).name)
    assert (tmp_path / "asked").read_text().count("\n") == 1


def test_where_the_folder_of_kernels_cannot_be_written_they_are_compiled_elsewhere(tmp_path, monkeypatch):
    if kernels.find(torch.float32).kernels is None:
        pytest.skip("no kernels on this machine")
    monkeypatch.setenv("FROMZERO_HOME", str(tmp_path / "home"))
    compiled = building._compiled

    def on_a_full_disk(compiler, flags, folder, *rest):
        if tmp_path in folder.parents:
            raise OSError(28, "No space left on device")
        return compiled(compiler, flags, folder, *rest)

    monkeypatch.setattr(building, "_compiled", on_a_full_disk)
    assert building.made.__wrapped__(torch.float32).kernels is not None
    assert not list((tmp_path / "home" / "kernels").iterdir())


def test_what_an_update_adds_to_the_list_of_a_processors_features_changes_no_name(monkeypatch):
    listed = "model name\t: A\nflags\t\t: fpu vme sse4_2 avx512_bf16 fma {}\n"
    named = {}
    for more in ("", "ibpb_exit_to_user", "amx_tile"):
        monkeypatch.setattr(Path, "read_text", lambda *given, more=more: listed.format(more))
        named[more] = building._processor()
    assert named[""] == named["ibpb_exit_to_user"] == "model name\t: A\nsse4_2 avx512_bf16 fma"
    assert named["amx_tile"] != named[""]


def agree_twice(ask):
    """Whether the answer is something, and the same when asked again."""
    first = ask()
    return first != kernels.NONE and ask() == first


def test_kernels_of_bfloat16_need_a_processor_that_multiplies_it(monkeypatch):
    monkeypatch.setattr(machine, "_bfloat16_features", list)
    here = machine.prepare("bfloat16", device="cpu", threads=1)
    assert here.why_no_kernels == "fromzero's of bfloat16 need AVX512-BF16"


@pytest.mark.skipif(shutil.which("clang") is None, reason="no clang on this machine")
@pytest.mark.parametrize("flags", [[], [building.NATIVE.get(platform.machine(), "-mcpu=native")]])
def test_clang_compiles_them_as_on_a_mac(flags, tmp_path):
    """Compiled alone: what Apple's linker is told, others are not, and of OpenMP torch may have loaded another kind."""
    for source, *more in building.OBJECTS:
        command = ["clang", "-Werror", "-O3", "-Xclang", "-fopenmp", "-fPIC", "-c", *flags, *more]
        subprocess.run([*command, str(building.SOURCE_FOLDER / source), "-o", str(tmp_path / "object.o")], check=True)


def test_kernels_that_compute_something_else_are_not_used(tmp_path, monkeypatch):
    if kernels.find(torch.float32).kernels is None:
        pytest.skip("no kernels on this machine")
    monkeypatch.setenv("FROMZERO_HOME", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(building, "agrees", lambda made: False)
        none = building.made.__wrapped__(torch.float32)
        assert (none.name, none.kernels) == (kernels.NONE, None)
        assert none.why.endswith("made computes something else")
    assert list((tmp_path / "kernels").iterdir()) == []
    name, made, _ = building.made.__wrapped__(torch.float32)
    assert name == kernels.find(torch.float32).name
    assert kernels.agrees(made)
    (library,) = (tmp_path / "kernels").iterdir()
    assert library.name == f"{name}-{building._content_digest(library)}.so"


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:9000], lambda content: content[::-1]])
def test_damaged_kernels_are_made_again(damage, tmp_path, monkeypatch):
    if kernels.find(torch.float32).kernels is None:
        pytest.skip("no kernels on this machine")
    monkeypatch.setenv("FROMZERO_HOME", str(tmp_path))
    building.made.__wrapped__(torch.float32)
    (library,) = (tmp_path / "kernels").iterdir()
    whole = library.read_bytes()
    library.unlink()  # it is loaded
    library.write_bytes(damage(whole))
    name, made, _ = building.made.__wrapped__(torch.float32)
    assert name == kernels.find(torch.float32).name
    assert kernels.agrees(made)
    assert any(building._content_digest(path) in path.name for path in (tmp_path / "kernels").iterdir())


def test_kernels_that_are_not_there_are_not_replaced_silently():
    with pytest.raises(FromzeroError, match="the kernels 123 are not on this machine"):
        kernels.use("123", torch.float32)


def test_other_types_of_weights_and_a_changed_default_type(made):
    torch.manual_seed(0)
    x = torch.randn(2, 16, 8, 8).to(made.element)
    exact = modules.Convolution(16, 32, 1, bias=True).double()
    expected = F.conv2d(x.double(), exact.weight, exact.bias, padding=1).detach()
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        weight, bias = exact.weight.detach().to(dtype), exact.bias.detach().to(dtype)
        y = kernels.Convolve3x3.apply(x, weight, bias, 1, False, False, None, made)
        assert error(y, expected) < ERRORS[torch.bfloat16]
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert kernels.agrees(made)
        finally:
            torch.set_default_dtype(torch.float32)
    with torch.inference_mode():
        assert kernels.agrees(made)
    with torch.device("meta"):
        assert kernels.agrees(made)


def test_what_kernels_cannot_do_pytorch_does(made):
    layer = modules.Convolution(16, 32, 1, bias=True).to(made.element)
    assert layer(torch.zeros(0, 16, 8, 8, dtype=made.element)).shape == (0, 32, 8, 8)
    with pytest.raises(RuntimeError):
        modules.MaxPool(2, relu=False)(torch.zeros(1, 16, 1, 4, dtype=made.element))
    double = torch.randn(1, 16, 8, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.in_use(double) is None
    x = torch.randn(1, 16, 8, 8).to(made.element).requires_grad_()
    y = kernels.Convolve3x3.apply(x, layer.weight, layer.bias, 1, False, False, None, made)
    (gradient,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.float().sum().backward()


def test_what_does_not_fit_is_refused_and_never_read(made):
    with torch.no_grad():
        for layer in (
            modules.Convolution(16, 32, 1, bias=True),
            modules.Convolution(3, 32, 1, bias=True),
            modules.BatchNorm(16).eval(),
            modules.BatchNorm(16),
        ):
            for channels in (4, 512):
                with pytest.raises(RuntimeError):
                    layer.to(made.element)(torch.zeros(1, channels, 8, 8, dtype=made.element))


def test_batch_normalisation_with_statistics_of_another_type(made):
    x = torch.randn(4, 32, 6, 6).to(made.element)
    for dtype in (torch.bfloat16, torch.float64) if made.element == torch.bfloat16 else (torch.float64,):
        with torch.no_grad():
            try:
                y = modules.BatchNorm(32).to(dtype).eval()(x)
            except RuntimeError:  # PyTorch refuses some pairs of types
                continue
        torch.testing.assert_close(y.to(x.dtype), x, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("value", [300.0, 1.0])
def test_a_variance_keeps_its_digits_where_borders_are_unlike_the_rest(made, value):
    """Every 64th part of the rows begins with the first pixel of an image, beside the padding."""
    x = torch.full((128, 16, 16, 20), value).to(made.element)
    x[:, 0, 0] = 0
    x += (torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) / 64).to(made.element)
    mean, variance = made.moments(x)
    exact = x.double().flatten(0, 2)
    torch.testing.assert_close(mean.double(), exact.mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(variance.double(), exact.var(0, unbiased=False), rtol=1e-3, atol=0)


def test_their_sources_are_part_of_the_package():
    root = building.SOURCE_FOLDER.parents[2]
    if not (root / "pyproject.toml").exists():
        pytest.skip("installed without its sources")
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["fromzero"]
    packed = {path for pattern in patterns for path in (root / "src" / "fromzero").glob(pattern)}
    assert packed >= {building.SOURCE_FOLDER / name for name in building.SOURCES}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_values_within_a_limit(made, kind, compiled):
    """In tensors of any kind, and a NaN never is."""
    if not compiled:
        kernels.use(kernels.NONE, made.element)
    for wrong in (-2.0, 2.0, torch.inf, -torch.inf, torch.nan):
        for shape, at in (((1,), (0,)), ((40_001,), (40_000,)), ((8, 16, 3, 3), (3, 5, 1, 2))):
            x = torch.rand(shape).to(kind)
            if x.dim() == 4:
                x = x.contiguous(memory_format=torch.channels_last)
            assert kernels.within([x, x[..., :1]], 1.0)
            x[at] = wrong
            assert not kernels.within([torch.zeros(3), x], 1.0)
            assert kernels.within([x], 2.0) == (abs(wrong) == 2)


@pytest.mark.parametrize("channels", [1, 3, 4, 37])
def test_normalised_pixels_have_the_same_bits_with_kernels_and_without(made, channels):
    pixels = torch.randint(0, 256, (5, 7, 9, channels), dtype=torch.uint8)
    shift, scale = 255 * torch.rand(channels), torch.rand(channels)
    ours = kernels.normalise_pixels(pixels, shift, scale)
    kernels.use(kernels.NONE, made.element)
    theirs = kernels.normalise_pixels(pixels, shift, scale)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, (pixels.float() - shift) * scale)


def test_values_of_other_channels_or_types_are_never_read_as_those_of_pixels(made):
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)  # channels second, by mistake
    with pytest.raises(RuntimeError):
        kernels.normalise_pixels(pixels, torch.zeros(3), torch.ones(3))
    pixels, recipe = pixels.permute(0, 2, 3, 1).contiguous(), load_recipe("train1")
    for rule in ("unit", "standard"):
        expected = Normalise.of(recipe.override({"normalise": rule}), pixels)(pixels)
        torch.set_default_dtype(torch.float64)
        try:
            found = Normalise.of(recipe.override({"normalise": rule}), pixels)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(found(pixels), expected)
        doubles = kernels.normalise_pixels(pixels, found.shift.double(), found.scale.double())
        torch.testing.assert_close(doubles.float(), expected.permute(0, 2, 3, 1))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 7, 9, 3), (2000, 33, 5, 4), (3, 2, 300, 37)])
def test_sums_of_bytes_are_exact(made, shape):
    for pixels in (torch.randint(0, 256, shape, dtype=torch.uint8), torch.full(shape, 255, dtype=torch.uint8)):
        whole = pixels.long().flatten(0, 2)
        expected = torch.stack([whole.sum(0), whole.square().sum(0)])
        kernels.use(kernels.find(made.element).name, made.element)
        assert torch.equal(kernels.byte_sums(pixels), expected)
        kernels.use(kernels.NONE, made.element)
        assert torch.equal(kernels.byte_sums(pixels), expected)


@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
@pytest.mark.parametrize(
    ("images", "height", "width", "inputs", "outputs", "side"),
    [(3, 9, 12, 3, 24, 2), (2, 5, 3, 1, 2, 1), (1, 4, 4, 3, 96, 4), (5, 6, 8, 2, 33, 3), (2, 2, 2, 4, 16, 2)],
)
def test_a_convolution_of_pixels(made, images, height, width, inputs, outputs, side, activation):
    """Maps narrower than what is multiplied at once, sides, channels that fill no vector; nothing trained before it."""
    torch.manual_seed(0)
    x = torch.randn(images, inputs, height, width).contiguous(memory_format=torch.channels_last)
    layer = modules.Whitening(inputs, outputs, side, same=False, activation=activation)
    layer.weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16, enabled=made.element == torch.bfloat16):
        y = layer(x)
    expected = modules.ACTIVATIONS[activation](F.conv2d(x.double(), layer.weight.double()))
    assert (y.dtype, y.shape) == (made.element, expected.shape)
    assert (y.double() - expected).abs().max() <= {torch.float32: 2e-6, torch.bfloat16: 2**-8}[made.element] * 4
    trained = x.clone().requires_grad_()
    layer(trained).sum().backward()
    assert trained.grad is not None


def test_a_whitening_layer_refuses_other_channels_and_smaller_images(made):
    layer = modules.Whitening(3, 24, 2, same=False)
    layer.weight.requires_grad_(False)
    for shape in ((2, 4, 8, 8), (2, 3, 1, 8)):
        with pytest.raises(RuntimeError):
            layer(torch.zeros(shape))
    assert layer(torch.zeros(0, 3, 8, 8)).shape == (0, 24, 7, 7)


@pytest.mark.parametrize("shape", [(32, 216), (5, 7), (19, 297), (1, 9), (130, 131), (64, 64), (96, 1000)])
def test_orthogonalised_matrices(made, shape):
    """Beside the steps in double precision; and nothing stays nothing."""
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    a, b, c = coefficients = (3.4445, -4.7750, 2.0315)
    exact = matrix.double() / matrix.double().norm()
    for _ in range(3):
        square = exact @ exact.T
        exact = a * exact + b * square @ exact + c * square @ square @ exact
    ours = made.orthogonalise(matrix, coefficients, 3)
    assert (ours - exact).norm() <= {torch.float32: 1e-5, torch.bfloat16: 0.04}[made.element] * exact.norm()
    assert made.orthogonalise(torch.zeros(shape), coefficients, 3).abs().max() == 0


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_gathered_pixels_are_the_same_with_kernels_and_without(made, channels):
    pixels = torch.randint(0, 256, (9, 7, 5, channels), dtype=torch.uint8)
    indices = torch.tensor([8, 0, 3, 3])
    rows, columns = torch.randint(0, 7, (4, 6)), torch.randint(0, 5, (4, 8))
    ours = kernels.gather(pixels, indices, rows, columns)
    kernels.use(kernels.NONE, made.element)
    assert torch.equal(ours, kernels.gather(pixels, indices, rows, columns))
    assert torch.equal(ours[2, 4, 7], pixels[3, rows[2, 4], columns[2, 7]])


def test_kernels_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("FROMZERO_KERNELS", "off")
    assert machine.prepare(device="cpu", threads=1).kernels == kernels.NONE
    assert kernels.in_use(torch.zeros(1)) is None


@pytest.mark.parametrize(
    ("features", "precision", "expected"),
    [
        (["avx512_bf16"], "bfloat16", "found"),
        (["amx_bf16", "avx512_bf16"], "bfloat16", "found"),
        (["amx_bf16"], "bfloat16", "none"),
        ([], "bfloat16", "none"),
        ([], "float32", "found"),
        (["amx_bf16", "avx512_bf16"], "float32", "found"),
    ],
)
def test_which_kernels_a_processor_gets(features, precision, expected, monkeypatch):
    monkeypatch.delenv("FROMZERO_KERNELS", raising=False)
    monkeypatch.setattr(machine, "_bfloat16_features", lambda: features)
    monkeypatch.setattr(building, "made", lambda element: kernels.Made("found", None))
    assert machine._kernels("cpu", precision).name == expected
    assert machine._kernels("cuda", precision).name == "none"
