"""Optimizers, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fromzero import fused, kernels
from fromzero.recipe import OptimizerRecipe, Recipe
from fromzero.timetable import Timetable

# Quintic Newton-Schulz coefficients of Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS = (3.4445, -4.7750, 2.0315), 3

COOLDOWN = 0.2  # share of the steps after the warm-up


def make_optimizer(recipe: OptimizerRecipe, model: nn.Module) -> fused.Optimizer:
    """The optimizer of `recipe` over all trained weights of `model`, in its fused form (one pass over each tensor).

    Every parameter group has `share`: its learning rate over that of the recipe.
    """
    match recipe.name:
        case "sgd":
            return fused.SGD(
                _groups(recipe, model),
                lr=recipe.learning_rate,
                momentum=recipe.momentum,
                nesterov=recipe.nesterov and recipe.momentum > 0,
                weight_decay=recipe.weight_decay,
            )
        case "adam" | "adamw":
            return fused.Adam(
                _groups(recipe, model),
                lr=recipe.learning_rate,
                betas=(recipe.beta1, recipe.beta2),
                eps=recipe.epsilon,
                weight_decay=recipe.weight_decay,
                decoupled=recipe.name == "adamw",
            )
        case "muon":
            return Muon(_groups(recipe, model), recipe)


def set_learning_rate(optimizer: fused.Optimizer, rate: float) -> None:
    """Make `rate` the learning rate of the next step, each group's in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]


class Muon(fused.Optimizer):
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
        gradients = fused.typed(gradients, weights)
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
