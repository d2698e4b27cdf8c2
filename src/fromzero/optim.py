"""Optimizers, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from fromzero.recipe import OptimizerRecipe, Recipe


def make_optimizer(recipe: OptimizerRecipe, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of `recipe` over all weights of `model`, in its fused form (one pass over each tensor)."""
    weights = list(model.parameters())
    match recipe.name:
        case "sgd":
            return torch.optim.SGD(
                weights,
                lr=recipe.learning_rate,
                momentum=recipe.momentum,
                nesterov=recipe.nesterov and recipe.momentum > 0,
                weight_decay=recipe.weight_decay,
                fused=True,
            )
        case "adam" | "adamw":
            kind = torch.optim.Adam if recipe.name == "adam" else torch.optim.AdamW
            return kind(
                weights,
                lr=recipe.learning_rate,
                betas=(recipe.beta1, recipe.beta2),
                eps=recipe.epsilon,
                weight_decay=recipe.weight_decay,
                fused=True,
            )


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
