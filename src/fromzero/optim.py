"""Optimizers, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
        if not hidden:
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
            updates = _orthogonal_filters(updates)
        torch._foreach_add_(weights, updates, alpha=-group["lr"])


def _orthogonal_filters(updates: Sequence[Tensor]) -> list[Tensor]:
    """Each of them, (O, I, H, W) or (O, I), orthogonalised as a matrix of O rows, its columns as they lie in memory."""
    lying = [update.permute(0, *range(2, update.dim()), 1) for update in updates]
    found = orthogonalised([update.flatten(1) for update in lying])
    return [
        matrix.view(update.shape).permute(0, -1, *range(1, update.dim() - 1))
        for matrix, update in zip(found, lying, strict=True)
    ]


def orthogonalised(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Roughly U Vᵀ where a matrix (M, N) is U S Vᵀ: all singular values pulled to about one by Newton-Schulz steps,
    which need matrix products only; those are taken in autocast's type where it is on.

    A step multiplies x by a polynomial of x xᵀ. Such polynomials commute, so all steps are taken on that small
    square matrix, and x is multiplied once: half the work where N = 9 M, as in filters. Squares of one size are
    multiplied together.
    """
    prepared: list[Tensor] = []
    for matrix in matrices:
        kind = matrix.device.type
        x = matrix / matrix.norm().clamp(min=1e-7)
        x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
        prepared.append(x.T if len(x) > x.shape[1] else x)
    found: list[Tensor] = list(matrices)
    for size in dict.fromkeys(len(x) for x in prepared):
        places = [i for i, x in enumerate(prepared) if len(x) == size]
        products = _newton_schulz(torch.stack([prepared[i] @ prepared[i].T for i in places]))
        for i, product in zip(places, products, strict=True):
            x = product @ prepared[i]
            found[i] = (x if x.shape == matrices[i].shape else x.T).to(matrices[i].dtype)
    return found


def _newton_schulz(squares: Tensor) -> Tensor:
    """The product of all factors by which Newton-Schulz steps multiply x, for each of the squares x xᵀ, (K, M, M)."""
    a, b, c = NEWTON_SCHULZ
    products = squares
    for step in range(NEWTON_SCHULZ_STEPS):
        factors = torch.baddbmm(squares, squares, squares, beta=b, alpha=c)
        factors.diagonal(dim1=1, dim2=2).add_(a)
        products = factors if step == 0 else factors @ products
        if step + 1 < NEWTON_SCHULZ_STEPS:
            squares = factors @ squares @ factors
    return products


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
