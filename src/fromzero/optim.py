"""Optimizers, and the learning rate as a pure function of the step.

SGD and Adam are torch's own fused functions, without `torch.optim.Optimizer` around them: making one of torch's
optimizer objects imports its compiler, which nothing here uses: more than a second at the start of a run and half a
second at its end. The update itself is torch's, called as its classes call it, or, where elements are bfloat16, a
kernel's: the same bits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from fromzero import kernels
from fromzero.recipe import OptimizerRecipe, Recipe
from fromzero.timetable import Timetable

# Quintic Newton-Schulz coefficients of Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS = (3.4445, -4.7750, 2.0315), 3

COOLDOWN = 0.2  # share of the steps after the warm-up


def make_optimizer(recipe: OptimizerRecipe, model: nn.Module) -> Optimizer:
    """The optimizer of `recipe` over all trained weights of `model`, in its fused form (one pass over each tensor).

    Every parameter group has `share`: its learning rate over that of the recipe.
    """
    match recipe.name:
        case "sgd":
            return SGD(
                _groups(recipe, model),
                lr=recipe.learning_rate,
                momentum=recipe.momentum,
                nesterov=recipe.nesterov and recipe.momentum > 0,
                weight_decay=recipe.weight_decay,
            )
        case "adam" | "adamw":
            return Adam(
                _groups(recipe, model),
                lr=recipe.learning_rate,
                betas=(recipe.beta1, recipe.beta2),
                eps=recipe.epsilon,
                weight_decay=recipe.weight_decay,
                decoupled=recipe.name == "adamw",
            )
        case "muon":
            return Muon(_groups(recipe, model), recipe)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Make `rate` the learning rate of the next step, each group's in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]


class Optimizer(ABC):
    """Moves weights along their gradients. `param_groups` are dicts of `params` and the settings for them, which may
    be changed between steps; `state` holds the tensors that go with each weight. Both as in `torch.optim`."""

    def __init__(self, groups: Iterable[dict[str, Any]], defaults: dict[str, Any]):
        """groups: dicts of `params` and the settings in which they differ from `defaults`."""
        self.param_groups: list[dict[str, Any]] = [defaults | group for group in groups]
        self.state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        for group in self.param_groups:
            for weight in group["params"]:
                weight.grad_dtype = None  # gradients may come in any type: _move sees to it

    def gradients(self) -> list[Tensor]:
        """All gradients there are."""
        weights = [weight for group in self.param_groups for weight in group["params"]]
        return [weight.grad for weight in weights if weight.grad is not None]

    @torch.no_grad()
    def step(self) -> None:
        """Move every weight that has a gradient."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                self._move(weights, [weight.grad for weight in weights], group)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for group in self.param_groups:
            for weight in group["params"]:
                weight.grad = None

    @abstractmethod
    def _move(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        """One update of `weights` with the settings of their group."""


class SGD(Optimizer):
    """As `torch.optim.SGD(fused=True)`: momentum after Sutskever et al. (2013), weight decay in the gradient."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay})

    def _move(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        for weight in weights if group["momentum"] else ():
            if not self.state[weight]:
                self.state[weight] = {"momentum_buffer": torch.zeros_like(weight)}
        buffers: list[Tensor | None] = [self.state[weight].get("momentum_buffer") for weight in weights]
        settings = {name: group[name] for name in ("lr", "momentum", "weight_decay", "nesterov")}
        kernel = kernels.in_use(weights[0])
        left: list[tuple[Tensor, Tensor, Tensor | None]] = []
        for three in zip(*_in_memory_order(weights, gradients, buffers), strict=True):
            if kernel is not None and kernel.moves(*three):
                kernel.sgd_step(*three, **settings)
            else:
                left.append(three)
        if left:
            weights, gradients, buffers = map(list, zip(*left, strict=True))
            sgd(weights, _typed(gradients, weights), buffers, fused=True, dampening=0.0, maximize=False, **settings)


class Adam(Optimizer):
    """As `torch.optim.Adam(fused=True)` (Kingma and Ba, 2015), weight decay in the gradient; `decoupled`: as `AdamW`
    (Loshchilov and Hutter, 2019)."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        decoupled: bool = False,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decoupled": decoupled}
        super().__init__(groups, defaults)

    def _move(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        for weight in weights:
            if not self.state[weight]:
                self.state[weight] = {
                    "step": torch.zeros((), dtype=torch.float32, device=weight.device),
                    "exp_avg": torch.zeros_like(weight),
                    "exp_avg_sq": torch.zeros_like(weight),
                }
        first, second, steps = (
            [self.state[weight][name] for weight in weights] for name in ("exp_avg", "exp_avg_sq", "step")
        )
        settings = {
            "lr": group["lr"],
            "beta1": group["betas"][0],
            "beta2": group["betas"][1],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "decoupled_weight_decay": group["decoupled"],
        }
        kernel = kernels.in_use(weights[0])
        left: list[tuple[Tensor, ...]] = []
        for *four, step in zip(*_in_memory_order(weights, gradients, first, second), steps, strict=True):
            weight, gradient, means, squares = four
            if kernel is not None and kernel.moves(*four):
                step += 1
                kernel.adam_step(weight, gradient, means, squares, int(step), **settings)
            else:
                left.append((*four, step))
        if left:
            weights, gradients, first, second, steps = map(list, zip(*left, strict=True))
            settings |= {"fused": True, "amsgrad": False, "maximize": False}
            adam(weights, _typed(gradients, weights), first, second, [], steps, **settings)


class Muon(Optimizer):
    """Momentum made orthogonal, for filters and the weights of hidden dense layers; SGD with Nesterov's momentum for
    all others (Jordan et al., 2024; filters kept at norm √(filters) as in cifar10-airbench).

    A filter bank (O, I, H, W) counts as a matrix (O, I·H·W). An orthogonal step moves every direction equally far, so
    the rare directions of a gradient are learned as fast as the loud ones.
    """

    def __init__(self, groups: list[dict[str, Any]], recipe: OptimizerRecipe):
        hidden = [group for group in groups if group["kind"] == "hidden"]
        rest = [group for group in groups if group["kind"] != "hidden"]
        for group in hidden:
            group["momentum"] = recipe.muon_momentum
        for group in rest:
            group["momentum"] = recipe.momentum
        super().__init__(hidden + rest, {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay})

    def _move(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        hidden = group["kind"] == "hidden"
        gradients = _typed(gradients, weights)
        if not hidden and group["weight_decay"]:
            gradients = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
        for weight in weights:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        momenta = [self.state[weight]["momentum_buffer"] for weight in weights]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients)
        updates = list(torch._foreach_add(gradients, momenta, alpha=group["momentum"]))
        if hidden:
            for weight, norm in zip(weights, torch._foreach_norm(weights), strict=True):
                weight.mul_(math.sqrt(len(weight)) / norm.clamp(min=1e-7))
            updates = [_orthogonal_filters(update) for update in updates]
        torch._foreach_add_(weights, updates, alpha=-group["lr"])


def _typed(gradients: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """The gradients in the types of their weights."""
    return [gradient.to(weight.dtype) for gradient, weight in zip(gradients, weights, strict=True)]


def _in_memory_order(*lists: list[Any]) -> list[list[Any]]:
    """The same tensors, those of filters in channels-last memory as views (O, H, W, I), which are contiguous: others
    torch copies before each update."""

    def views(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        present = [t for t in tensors if t is not None]
        if all(t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) for t in present):
            return tuple(None if t is None else t.permute(0, 2, 3, 1) for t in tensors)
        return tensors

    return list(map(list, zip(*map(views, zip(*lists, strict=True)), strict=True)))


def _orthogonal_filters(update: Tensor) -> Tensor:
    """An update (O, I, H, W) or (O, I) orthogonalised as a matrix of O rows, its columns in the order of memory."""
    lying = update.permute(0, *range(2, update.dim()), 1)
    return orthogonalised(lying.flatten(1)).view(lying.shape).permute(0, -1, *range(1, update.dim() - 1))


def orthogonalised(matrix: Tensor) -> Tensor:
    """Roughly U Vᵀ where `matrix` (M, N) is U S Vᵀ: all singular values pulled to about one by Newton-Schulz steps,
    which need matrix products only; those are taken in autocast's type where it is on.

    A step multiplies x by a polynomial of x xᵀ. Such polynomials commute, so all steps are taken on that small
    square matrix, and x is multiplied once: half the work where N = 9 M, as in filters.
    """
    kind = matrix.device.type
    tall = len(matrix) > matrix.shape[1]
    if not tall and matrix.dtype == torch.float32 and (kernel := kernels.in_use(matrix)):
        return kernel.orthogonalise(matrix.contiguous(), NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS)
    x = matrix / matrix.norm().clamp(min=1e-7)
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    if tall:
        x = x.T
    square = x @ x.T
    factor = product = _newton_schulz_factor(square)
    for _ in range(NEWTON_SCHULZ_STEPS - 1):
        square = factor @ square @ factor
        factor = _newton_schulz_factor(square)
        product = factor @ product
    x = product @ x
    return (x.T if tall else x).to(matrix.dtype)


def _newton_schulz_factor(square: Tensor) -> Tensor:
    a, b, c = NEWTON_SCHULZ
    factor = torch.addmm(square, square, square, beta=b, alpha=c)
    factor.diagonal().add_(a)
    return factor


def learning_rate_at(recipe: Recipe, step: int, timetable: Timetable) -> float:
    """The learning rate of step `step` (0-based): linear warm-up, then constant, linear or cosine (Loshchilov and
    Hutter, 2017) to zero at the end of the last epoch, or constant with a linear cooldown. A pure function."""
    schedule, peak = recipe.schedule, recipe.optimizer.learning_rate
    warmup = timetable.steps_before(schedule.warmup_epochs)
    if step < warmup:
        return peak * (step + 1) / math.ceil(warmup)
    rest = max(timetable.start_of(recipe.epochs) - warmup, 1)
    done = min((step - warmup) / rest, 1.0)
    match schedule.name:
        case "constant":
            return peak
        case "linear":
            return peak * (1 - done)
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * done))
        case "cooldown":
            return peak if done <= 1 - COOLDOWN else peak * (1 - done) / COOLDOWN


def _groups(recipe: OptimizerRecipe, model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups by kind of weight: hidden, head (the output layer's weights) and bias (all vectors)."""
    kinds: dict[str, list[nn.Parameter]] = {"hidden": [], "head": [], "bias": []}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            kind = "bias" if weight.dim() == 1 else "head" if name == "predictions.weight" else "hidden"
            kinds[kind].append(weight)
    rates = {"hidden": 0.0, "head": recipe.head_learning_rate, "bias": recipe.bias_learning_rate}
    return [
        {"params": weights, "kind": kind, "share": (rates[kind] or recipe.learning_rate) / recipe.learning_rate}
        for kind, weights in kinds.items()
        if weights
    ]
