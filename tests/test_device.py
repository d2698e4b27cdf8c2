"""A training on another device than the processor, where none is at hand: on PyTorch's device `meta`, whose tensors
have shapes and a place but no values. An operation on one of them and one of the processor's fails as on a GPU.
"""

import contextlib
import dataclasses

import pytest
import torch
import torch.fx.experimental._config

from fromzero import augment, kernels, machine
from fromzero.recipe import load_recipe
from fromzero.state import State
from fromzero.training import Data, Training


class Elsewhere(machine.Machine):
    def autocast(self):
        return contextlib.nullcontext()  # the device has none


@pytest.fixture
def elsewhere(monkeypatch):
    """A machine whose device is `meta`. Where a training reads a value from a device it gets one: there are none."""
    here = machine.prepare("float32", device="cpu")
    kernels.use(kernels.NONE, torch.float32)
    tensor = torch.Tensor

    def stand_in(found):
        return torch.ones(found.shape, dtype=found.dtype, device="cpu")

    for name, read in {
        "item": tensor.item,
        "tolist": tensor.tolist,
        "cpu": tensor.cpu,
        "__bool__": tensor.__bool__,
    }.items():
        monkeypatch.setattr(tensor, name, lambda self, read=read: read(stand_in(self) if self.is_meta else self))
    enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and enabled(kind))
    # How many of a mask are set is a value, too: all.
    with torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True):
        yield Elsewhere(**(dataclasses.asdict(here) | {"device": "meta", "kernels": kernels.NONE}))
    here.set_up()


def training_there(name, images, where, **changes):
    recipe = load_recipe(name).override({"batch_size": 30, "validation.source": "split", **changes})
    state = State.initial(recipe, images.image_shape, images.num_classes, where.device)
    return Training(None, recipe, images, where, state, Data.of(recipe, images, where.device))


@pytest.mark.parametrize("name", ["train1", "train2", "train3", "quick", "strong", "best"])
def test_a_training_stays_on_its_device(name, tiny_images, elsewhere):
    changes = {"ema_decay": 0.9, "augment.cutout": 4, "augment.translate": 2, "augment.flip": "random"}
    training = training_there(name, tiny_images, elsewhere, **changes)
    state = training.state
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


def test_this_would_find_a_tensor_on_the_wrong_device(tiny_images, elsewhere, monkeypatch):
    training = training_there("quick", tiny_images, elsewhere, **{"augment.cutout": 4})
    monkeypatch.setattr(augment, "cut_out", lambda images, *rest: images * torch.ones(images.shape[2:], device="cpu"))
    with pytest.raises(RuntimeError, match="device"):
        training._step(training._order()[:30])
