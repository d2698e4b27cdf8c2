"""The whole state of a training, and its way into a checkpoint and back.

Nothing else changes while a network trains: no loader, schedule or generator has a state of its own. A state that
went through a checkpoint is equal bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fromzero import augment, networks, optim
from fromzero.checkpoint import Checkpoint
from fromzero.errors import FromzeroError, InputError
from fromzero.modules import Network
from fromzero.networks import ImageShape
from fromzero.recipe import Recipe

MEMORY_OVERHEAD = 1.2  # what steps take over what is known to be kept: 1.3 to 4.1 where it was measured (docs/log.md)


@dataclass
class Counters:
    """The counters of a training. `step` counts optimizer steps; `epoch` counts epochs that were also evaluated;
    the running sums belong to the epoch under way; `seconds` is time spent, stops left out, of which `saving_seconds`
    went into checkpoints."""

    step: int = 0
    epoch: int = 0
    running_loss: float = 0.0
    running_correct: int = 0
    running_images: int = 0
    best_epoch: int = 0
    best_accuracy: float = -1.0
    best_loss: float = 0.0
    seconds: float = 0.0
    saving_seconds: float = 0.0


@dataclass
class State:
    """Network, optimizer and counters; `average` is the network with the moving average of the weights, where the
    recipe asks for one; `best_weights` are those of the best epoch until they have been written; `compiled` is the
    network as it makes steps, where it is compiled for that.

    proxy: where the recipe trains on the hardest images of a batch, the small network that finds them, with its
    optimizer; of its counters the step alone is used, and is that of the network.

    losses, skipped: where the recipe skips easy images, of each train image its loss when it was last trained on,
    float32 (N,), and whether the epoch under way leaves it out, bool (N,): losses change while it is under way, so it
    could not be told from them after a stop."""

    model: Network
    optimizer: optim.Optimizer
    average: Network | None = None
    counters: Counters = field(default_factory=Counters)
    proxy: State | None = None
    losses: Tensor | None = None
    skipped: Tensor | None = None
    best_weights: dict[str, Tensor] | None = None
    compiled: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def initial(cls, recipe: Recipe, image_shape: ImageShape, num_classes: int, device: str) -> State:
        """The state before the first step: weights drawn from the recipe's seed."""
        model = networks.build(recipe.network, image_shape, num_classes, recipe.seed, device)
        state = cls(model, optim.make_optimizer(recipe.optimizer, model))
        if recipe.hardest < 1:
            proxy = networks.build(recipe.proxy_network(), image_shape, num_classes, recipe.seed, device)
            state.proxy = cls(proxy, optim.make_optimizer(recipe.optimizer, proxy))
        if recipe.ema_decay > 0:
            state.average = networks.build(recipe.network, image_shape, num_classes, recipe.seed, device)
        return state

    @property
    def scored(self) -> Network:
        """The network whose weights are evaluated: the average where there is one."""
        return self.average or self.model

    def compile_network(self, backend: str = "inductor") -> None:
        """From now on have steps made by `compiled`: the same weights and the same function, other bits. It is compiled
        anew for each size of batch; evaluations, of many sizes, are left as they are."""
        # A limit that is reached would leave the rest uncompiled, and a run that is resumed would not come to it at the
        # same step.
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 100_000
        torch._inductor.config.deterministic = True  # it times no variants against each other
        self.compiled = torch.compile(self.model, dynamic=False, backend=backend)

    def start_average(self) -> None:
        """Begin the average, if there is one, at the network's weights."""
        if self.average is not None:
            self.average.load_state_dict(self.model.state_dict())

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """Move the average, if there is one, towards the weights of the step just made. It starts fast: the decay is
        at most (1 + step) / (10 + step), as TensorFlow's ExponentialMovingAverage has it."""
        if self.average is None:
            return
        step = self.counters.step
        share = 1 - min(decay, (1 + step) / (10 + step))
        average, weights = self.average.state_dict(), self.model.state_dict()
        torch._foreach_lerp_(list(average.values()), list(weights.values()), share)

    def watch_losses(self, num_images: int, device: str) -> None:
        """Begin to keep the losses of so many train images, unless that is done already. The first epoch skips none.
        What was not trained on yet counts as hard: as an easy one it never would be, where a part of each batch is."""
        if self.losses is None or self.skipped is None:
            self.losses = torch.full((num_images,), math.inf, device=device)
            self.skipped = torch.zeros(num_images, dtype=torch.bool, device=device)

    def skip_easiest(self, count: int) -> None:
        """From now on leave out so many images: those of the lowest losses, of equal ones the first."""
        assert self.losses is not None
        assert self.skipped is not None
        easiest = self.losses.argsort(stable=True)[:count]
        self.skipped.zero_()
        self.skipped[easiest] = True

    def to_checkpoint(self) -> Checkpoint:
        """Everything, as tensors and JSON data. The tensors are the live ones: encode before the next step."""
        tensors = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average/{name}": tensor for name, tensor in self.average.state_dict().items()}
        if self.losses is not None and self.skipped is not None:
            tensors |= {"images/losses": self.losses, "images/skipped": self.skipped}
        if self.proxy is not None:
            tensors |= {f"proxy/{name}": tensor for name, tensor in self.proxy.to_checkpoint().tensors.items()}
        for name, slots in self._slots():
            tensors |= {f"optimizer/{name}/{slot}": t for slot, t in slots.items() if isinstance(t, Tensor)}
        return Checkpoint(tensors, asdict(self.counters))

    def load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Become the state that was saved. Raises InputError where the weights are not of this network, FromzeroError
        where the checkpoint has weights only."""
        try:
            self.counters = Counters(**checkpoint.state)
        except TypeError:
            raise FromzeroError(
                f"{checkpoint.path}: holds weights but not the state of a training (a best checkpoint put in place of"
                " the last one?); start a new run from weights with: fromzero train --from RUN"
            ) from None
        load_weights(self.model, _under("model/", checkpoint))
        if self.average is not None:
            load_weights(self.average, _under("average/", checkpoint))
        if self.proxy is not None:
            self.proxy.load_checkpoint(Checkpoint(_under("proxy/", checkpoint), {}, checkpoint.path))
        for name, weight in self.model.named_parameters():
            if slots := _under(f"optimizer/{name}/", checkpoint):
                self.optimizer.state[weight] = {slot: _like(weight, tensor) for slot, tensor in slots.items()}
        if losses := _under("images/", checkpoint):
            device = next(self.model.parameters()).device
            self.losses, self.skipped = (losses[name].to(device, copy=True) for name in ("losses", "skipped"))

    def _slots(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for name, weight in self.model.named_parameters():
            yield name, self.optimizer.state.get(weight, {})


def least_memory(recipe: Recipe, image_shape: ImageShape, num_classes: int, batch_size: int, element_bytes: int) -> int:
    """Bytes that steps on so many images take at least beside these: weights, their gradients and what is
    remembered of each; and of each image of a batch what convolutions, dense layers and batch normalisations are given,
    which is kept until the gradient comes back. Of images that are scaled for a time, as small as they are then."""
    height, width, channels = image_shape
    seen = (*augment.smallest_size(recipe.augment, height, width), channels)
    given, kept = math.prod(seen), 0
    for layer in networks.layers(recipe.network, seen, num_classes):
        if layer.parameters > layer.fixed:
            kept += given
        given = math.prod(layer.shape)
    slots = {"sgd": recipe.optimizer.momentum > 0, "muon": 1}.get(recipe.optimizer.name, 2) + (recipe.ema_decay > 0)
    weights = networks.num_parameters(recipe.network, seen, num_classes)
    return int(MEMORY_OVERHEAD * (4 * weights * (2 + slots) + batch_size * recipe.hardest * kept * element_bytes))


def model_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights in a checkpoint that are evaluated, by name: the average of them where there is one."""
    return _under("average/", checkpoint) or _under("model/", checkpoint)


def load_weights(model: Network, weights: Mapping[str, Tensor], *, partial: bool = False) -> list[str]:
    """Load weights by name. All must fit, unless `partial`: then those that fit are taken.

    Returns the names of the model's weights that were left as they were. Raises InputError with a table, a line for
    each weight that differs.
    """
    differing = networks.differing_layers(model, weights)
    if differing and not partial:
        table = "\n".join(f"  {name:<28} {theirs:<22} {ours}" for name, theirs, ours in differing)
        raise InputError(
            f"the saved weights do not fit this network, {len(differing)} differ:\n"
            f"  {'weight':<28} {'saved':<22} here\n{table}"
        )
    bad = {name for name, *_ in differing}
    model.load_state_dict({k: t for k, t in weights.items() if k not in bad}, strict=False)
    return [name for name in model.state_dict() if name in bad]


def _under(prefix: str, checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in checkpoint.tensors.items() if k.startswith(prefix)}


def _like(weight: Tensor, saved: Tensor) -> Tensor:
    """`saved` in the memory layout of the weight it belongs to: fused optimizers walk both side by side."""
    if saved.shape != weight.shape:
        return saved.to(weight.device, copy=True)
    return torch.empty_like(weight, dtype=saved.dtype).copy_(saved)
