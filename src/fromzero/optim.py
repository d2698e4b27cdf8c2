"""Optimizers, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fromzero import fused
from fromzero.recipe import OptimizerRecipe, Recipe

# Quintic Newton-Schulz coefficients of Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS = (3.4445, -4.7750, 2.0315), 3


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
        for weight, gradient in zip(weights, gradients, strict=True):
            if not hidden:
                gradient = gradient.add(weight, alpha=group["weight_decay"])
            state = self.state[weight]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
            update = gradient.add(momentum, alpha=group["momentum"])
            if hidden:
                weight.mul_(math.sqrt(len(weight)) / weight.norm().clamp(min=1e-7))
                update = orthogonalised(update.flatten(1)).view_as(update)
            weight.add_(update, alpha=-group["lr"])


def orthogonalised(matrix: Tensor) -> Tensor:
    """Roughly U Vᵀ where `matrix` (M, N) is U S Vᵀ: all singular values pulled to about one by Newton-Schulz steps,
    which need matrix products only."""
    a, b, c = NEWTON_SCHULZ
    precise = matrix.dtype
    x = matrix / matrix.norm().clamp(min=1e-7)
    if wide := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if wide else x).to(precise)


def learning_rate_at(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The learning rate of step `step` (0-based): linear warm-up, then constant, linear or cosine (Loshchilov and
    Hutter, 2017) to zero at the end of the last epoch. A pure function."""
    schedule, peak = recipe.schedule, recipe.optimizer.learning_rate
    warmup = schedule.warmup_epochs * steps_per_epoch
    if step < warmup:
        return peak * (step + 1) / math.ceil(warmup)
    rest = max(recipe.epochs * steps_per_epoch - warmup, 1)
    done = min((step - warmup) / rest, 1.0)
    match schedule.name:
        case "constant":
            return peak
        case "linear":
            return peak * (1 - done)
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * done))


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
