"""A training on another device than the processor, where none is at hand: on PyTorch's device `meta`, whose tensors
have shapes and a place but no values. An operation on one of them and one of the processor's fails as on a GPU.
And the network compiled, as it is for a GPU, on the processor.
"""

import contextlib
import dataclasses

import pytest
import torch
import torch._dynamo
import torch.fx.experimental._config
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fromzero import FromzeroError, augment, kernels, machine, modules, networks, new_training
from fromzero.recipe import load_recipe
from fromzero.splits import Data
from fromzero.state import State
from fromzero.training import Training


class RefusedByCuda(TorchDispatchMode):
    """Fails where PyTorch's CUDA operations would: those of no deterministic form that a network might have
    (torch.use_deterministic_algorithms lists them), and batch normalisation without a scale, whose shift is given a
    gradient of no elements there in channels-last memory (aten/src/ATen/native/cuda/Normalization.cuh)."""

    NOT_DETERMINISTIC = """
        _adaptive_avg_pool2d_backward adaptive_max_pool2d_backward fractional_max_pool2d_backward max_unpool2d
        upsample_bilinear2d_backward upsample_bicubic2d_backward _upsample_bilinear2d_aa_backward
        reflection_pad2d_backward grid_sampler_2d_backward nll_loss2d_forward cumsum histc median put_
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.NOT_DETERMINISTIC.split(), function
        scale = {"native_batch_norm": 1, "native_batch_norm_backward": 2}.get(name)  # which argument it is
        assert scale is None or args[scale] is not None, function
        return function(*args, **(kwargs or {}))


class Elsewhere(machine.Machine):
    def autocast(self):
        return contextlib.nullcontext()  # the device has none


@pytest.fixture
def elsewhere(monkeypatch):
    """A machine whose device is `meta`. Where a training reads a value from there it gets one, though there are none;
    `waits` notes how it read."""
    here = machine.prepare("float32", device="cpu")
    kernels.use(kernels.NONE, torch.float32)
    tensor = torch.Tensor

    def stand_in(found):
        return torch.ones(found.shape, dtype=found.dtype, device="cpu")

    def standing_in(name, read):
        def wait(self):
            if self.is_meta:
                waits.append(name)
            return read(stand_in(self) if self.is_meta else self)

        return wait

    waits = []
    for name in ("item", "tolist", "cpu", "__bool__"):
        monkeypatch.setattr(tensor, name, standing_in(name, getattr(tensor, name)))
    enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and enabled(kind))
    monkeypatch.setattr(torch, "autocast", lambda kind, **how: contextlib.nullcontext())
    # How many of a mask are set is a value, too: all.
    with torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True):
        there = Elsewhere(**(dataclasses.asdict(here) | {"device": "meta", "kernels": kernels.NONE}))
        object.__setattr__(there, "waits", waits)
        yield there
    here.set_up()


def training_there(name, images, where, **changes):
    recipe = load_recipe(name).override({"batch_size": 30, "validation.source": "split", **changes})
    state = State.initial(recipe, images.image_shape, images.num_classes, where.device)
    return Training(None, recipe, images, where, state, Data.of(recipe, images, where.device))


@pytest.mark.parametrize("name", ["train1", "train2", "train3", "quick", "strong", "best"])
def test_a_training_stays_on_its_device(name, tiny_images, elsewhere):
    changes = {"ema_decay": 0.9, "augment.cutout": 4, "augment.translate": 2, "augment.flip": "random"}
    changes |= {"augment.rotate": 10.0, "augment.colour": 0.2, "logit_adjustment": 1.0}
    if name != "quick":  # which skips easy images
        changes["augment.cutmix"] = 0.5
    training = training_there(name, tiny_images, elsewhere, **changes)
    state = training.state
    with RefusedByCuda():
        for epoch in range(2):
            state.counters.epoch, state.counters.step = epoch, training.timetable.start_of(epoch)
            order = training._order()
            for start in (0, len(order) - 7):  # a whole batch, and a last one that is smaller
                training._step(order[start : start + 30])
            row = training._measure(lambda: None)
            assert row["val/accuracy"] == 1.0  # the value that there is not
            if state.losses is not None:
                state.skip_easiest(10)
    tensors = state.to_checkpoint().tensors
    assert len(tensors) > len(state.model.state_dict())  # momenta, too
    assert all(tensor.is_meta for tensor in tensors.values())


@pytest.mark.parametrize("name", ["train3", "quick", "strong"])
def test_a_step_waits_for_its_device_twice(name, tiny_images, elsewhere):
    """For loss and accuracy together, and for the gradients to be finite; to gather, draw and count for nothing."""
    training = training_there(name, tiny_images, elsewhere, **{"ema_decay": 0.9, "augment.cutout": 4})
    order = training._order()
    elsewhere.waits.clear()
    training._step(order[:30])
    assert elsewhere.waits == ["tolist", "__bool__"]


@pytest.mark.parametrize(("name", "most"), [("train3", 230), ("strong", 370)])
def test_a_step_calls_few_operations(name, most, tiny_images, elsewhere):
    """A GPU computes most of them in less time than it takes to call one. Dropout's bytes alone would be 725."""

    class Counted(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    training = training_there(name, tiny_images, elsewhere)
    order = training._order()
    with Counted() as counted:
        for _ in range(32):
            training._step(order[:30])
    assert counted.calls / 32 < most


def test_a_proxy_waits_where_it_is_trained_only(tiny_images, elsewhere):
    training = training_there("best", tiny_images, elsewhere)
    for step, waits in ((0, 4), (1, 2), (3, 2), (4, 4)):
        training.state.counters.step = step
        elsewhere.waits.clear()
        training._step(training._order()[:30])
        assert elsewhere.waits == ["tolist", "__bool__"] * (waits // 2)


def test_this_would_find_what_cuda_refuses():
    x, norm = torch.randn(4, 3, 6, 6, requires_grad=True), modules.BatchNorm(3)
    kernels.use(kernels.NONE, torch.float32)
    with RefusedByCuda():
        norm(x).sum().backward()
        with pytest.raises(AssertionError, match="native_batch_norm"):
            F.batch_norm(x, None, None, None, norm.bias, True)
        with pytest.raises(AssertionError, match="adaptive_avg_pool2d_backward"):
            F.adaptive_avg_pool2d(x, 2).sum().backward()


def test_this_would_find_a_tensor_on_the_wrong_device(tiny_images, elsewhere, monkeypatch):
    training = training_there("quick", tiny_images, elsewhere, **{"augment.cutout": 4})
    monkeypatch.setattr(augment, "cut_out", lambda images, *rest: images * torch.ones(images.shape[2:], device="cpu"))
    with pytest.raises(RuntimeError, match="device"):
        training._step(training._order()[:30])


torchs_own_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

SMALL = {
    "train3": {
        "network.channels": [[4], [8]],
        "network.activation_layers": True,
        "network.pool": 4,
        "network.block_dropout": 0.4,
        "network.dense": [16],
    },
    "quick": {"epochs": 2, "network.channels": [[4], [8, 8], [16]], "augment.scale": 0.6},
}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """A processor that computes as a GPU does: by PyTorch, and small maps as any."""
    monkeypatch.setenv("FROMZERO_KERNELS", "off")
    monkeypatch.setattr(modules, "SMALL_MAP_PIXELS", 0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters
    torch._dynamo.reset()


def trained(name, images, where, backend=None, **changes):
    """The weights of a small network after two epochs, and the shapes of batches that it was trained on."""
    recipe = load_recipe(name).override({"epochs": 2, "batch_size": 100, "validation.source": "split", **changes})
    training = new_training(recipe, images, runs_dir=where, device="cpu", threads=1)
    shapes = set()
    if backend:
        training.state.compile_network(backend)
    else:
        training.state.model.register_forward_pre_hook(
            lambda model, given: shapes.add(given[0].shape) if model.training else None
        )
    for _ in training:
        pass
    return training.state.model.state_dict(), shapes


@torchs_own_warnings
@pytest.mark.parametrize("name", SMALL)
def test_a_network_is_compiled_whole_once_for_each_size_of_batch(name, tiny_images, as_on_a_gpu, tmp_path):
    plain, shapes = trained(name, tiny_images, tmp_path, **SMALL[name])
    assert len(shapes) > 1
    for _ in range(2):  # the second run finds what the first one compiled
        compiled, _ = trained(name, tiny_images, tmp_path, "aot_eager", **SMALL[name])
        assert as_on_a_gpu()["stats"]["unique_graphs"] == len(shapes)
        assert not as_on_a_gpu()["graph_break"]
        assert all(torch.equal(plain[key], compiled[key]) for key in plain)


@torchs_own_warnings
@pytest.mark.parametrize("name", ["train1", "train2", "train3", "quick", "strong", "best"])
def test_no_layer_of_any_recipe_is_left_out_of_the_program(name, as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(modules, "steps_ahead", lambda device, count: 4)  # for those that are not compiled
    model = networks.build(load_recipe(name).network, (32, 32, 3), 10)
    traced = torch.compile(model, dynamic=False, backend="eager", fullgraph=True)  # which fails where one is
    images = torch.rand(2, 3, 32, 32)
    for step in range(2):  # another key of the masks
        model.reseed(0, step)
        assert torch.equal(traced(images), model(images))
    assert as_on_a_gpu()["stats"]["unique_graphs"] == 1


@torchs_own_warnings
def test_a_compiled_network_trains_as_without_and_to_the_same_bits_again(tiny_images, as_on_a_gpu, tmp_path):
    """By torch.compile's own backend, which on a processor takes seconds for a convolution and minutes for dropout."""
    changes = SMALL["train3"] | {"network.channels": [[4]], "precision": "float32"}
    changes |= {"network.block_dropout": 0.0, "network.dense_dropout": 0.0}
    (plain, _), (once, _), (again, _) = (
        trained("train3", tiny_images, tmp_path, backend, **changes) for backend in (None, "inductor", "inductor")
    )
    assert all(torch.equal(once[key], again[key]) for key in once)
    for key in plain:
        assert (plain[key] - once[key]).abs().max() <= 1e-4 * plain[key].abs().max()


@torchs_own_warnings
def test_a_compiler_that_fails_is_named(tiny_images, as_on_a_gpu, tmp_path):
    def broken(*given):
        raise RuntimeError("no such chip")

    with pytest.raises(FromzeroError, match=r"torch.compile failed \(.*no such chip\); the run is at step 0, .* false"):
        trained("quick", tiny_images, tmp_path, broken, **SMALL["quick"])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_recipe_compiles_where_there_are_no_kernels(device, tiny_images, elsewhere):
    where = elsewhere if device == "meta" else dataclasses.replace(elsewhere, device="cpu")
    training = training_there("quick", tiny_images, where, compile=True)
    assert (training.state.compiled is not None) == (device == "meta")
