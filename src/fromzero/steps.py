"""The state before the first step of a training, and a step, which moves it on: what becomes of it is a function of the
state, the recipe and the images alone."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fromzero import augment, kernels, modules
from fromzero.errors import NonFiniteError
from fromzero.machine import Machine
from fromzero.optim import set_learning_rate
from fromzero.recipe import Recipe
from fromzero.splits import Data
from fromzero.state import State

WHITENING_IMAGES = 5000  # as many images as the whitening layer is computed from
PROXY_EVERY = 4  # as airbench96 does: losses only rank images, and change slowly
LARGEST_GRADIENT = 1e15  # so that squares of momenta, and their sums over a layer's weights, overflow no float


def initial_state(recipe: Recipe, data: Data, here: Machine) -> State:
    """The state before the first step, whitening layers set from WHITENING_IMAGES of the train images."""
    state = State.initial(recipe, data.image_shape, data.num_classes, here.device)
    if recipe.network.whitening:
        pixels, labels = data.train
        if bool((labels[1:] >= labels[:-1]).all()):  # pictures come class by class, and the first would be of a few
            pixels = pixels[:: -(-len(pixels) // WHITENING_IMAGES)].contiguous()
        seen = data.normalise(pixels[:WHITENING_IMAGES])
        for model in (state.model, *([state.proxy.model] if state.proxy else [])):
            modules.whiten(model, seen)
    return state


class Batch(NamedTuple):
    """What a step is made of: normalised images (B, C, H, W); labels int64 (B,), of mixed images those of the larger
    part; `share`, its size over that of a full batch, below 1 for an epoch's last one; of mixed images the share of
    each class in them, float32 (B, classes); what logit adjustment adds to the outputs in the loss, float32
    (classes,)."""

    images: Tensor
    labels: Tensor
    share: float = 1.0
    targets: Tensor | None = None
    adjustment: Tensor | None = None

    def take(self, places: Tensor) -> Batch:
        """The images at `places`, in that order; as a batch it counts as before."""
        targets = None if self.targets is None else self.targets[places]
        return self._replace(images=self.images[places], labels=self.labels[places], targets=targets)

    def loss(self, logits: Tensor, label_smoothing: float, reduction: str = "mean") -> Tensor:
        """The cross-entropy (nats) of logits (B, classes): the mean, or with the reduction "none" of each image."""
        targets = self.labels if self.targets is None else self.targets
        adjusted = logits if self.adjustment is None else logits + self.adjustment
        return F.cross_entropy(adjusted, targets, label_smoothing=label_smoothing, reduction=reduction)


def batch_at(data: Data, indices: Tensor, recipe: Recipe, epoch: int, step: int, progress: float) -> Batch:
    """The train images at `indices` as a step sees them. progress: epochs done so far, fractions included."""
    augmentation, seed = recipe.augment, recipe.seed
    pixels = augment.gather(data.train.pixels, indices, augmentation, seed, epoch, step)
    if augmentation.scales and progress < augmentation.scale_epochs:
        pixels = augment.scaled(pixels, augmentation.scale)
    pixels = augment.turned(pixels, augmentation, seed, step)
    pixels = augment.recoloured(pixels, augmentation, seed, step)
    images = augment.cut_out(data.normalise(pixels), augmentation, seed, step)
    adjustment = recipe.logit_adjustment * data.log_shares if recipe.logit_adjustment else None
    return Batch(images, data.train.labels[indices], adjustment=adjustment)


def mixed(batch: Batch, num_classes: int, recipe: Recipe, step: int) -> Batch:
    """The batch with its images mixed, where the recipe mixes them. Which are the hardest is asked before: a mixed
    image is harder than those that it is made of, whatever they are."""
    if not recipe.augment.cutmix:
        return batch
    images, own = augment.cut_mix(batch.images, recipe.augment, recipe.seed, step)
    others = batch.labels.roll(1)
    one, other = (F.one_hot(labels, num_classes) for labels in (batch.labels, others))
    targets = own[:, None] * one + (1 - own)[:, None] * other
    return batch._replace(images=images, labels=torch.where(own < 0.5, others, batch.labels), targets=targets)


class Step(NamedTuple):
    """What a step saw before it moved the weights: the batch's mean loss (nats), how many of its images were predicted
    right, and its logits, float32 (B, classes)."""

    loss: float
    correct: int
    logits: Tensor


@torch.enable_grad()  # whatever the caller has switched off
def train_step(
    state: State, batch: Batch, learning_rate: float, recipe: Recipe, progress: float, machine: Machine
) -> Step:
    """Move the weights by one step on `batch`.

    progress: epochs done so far, fractions included. Raises NonFiniteError, the weights untouched (statistics of
    batches aside), when the loss or a gradient is infinite or NaN, or a gradient beyond ± LARGEST_GRADIENT.
    """
    model, step = state.model, state.counters.step
    if not model.training:
        model.train()
    model.reseed(recipe.seed, step, dropout=progress >= recipe.network.dropout_from_epoch)
    model.weigh_batch(batch.share)
    with machine.autocast():
        logits = (state.compiled or model)(batch.images)
    logits = logits.float()
    loss = batch.loss(logits, recipe.label_smoothing)
    correct = (logits.argmax(1) == batch.labels).sum()
    loss.backward()
    # Read together, and when all is under way: on a GPU whoever reads waits for it, and it for what comes after.
    mean_loss, num_correct = torch.stack([loss.detach().double(), correct.double()]).tolist()
    wrong = "" if math.isfinite(mean_loss) else f"the loss is {mean_loss}"
    if not wrong and not kernels.within(state.optimizer.gradients(), LARGEST_GRADIENT):
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        name = next(name for name, gradient in gradients.items() if not kernels.within([gradient], LARGEST_GRADIENT))
        wrong = f"the gradient of {name} is not finite or beyond {LARGEST_GRADIENT:g}"
    if wrong:
        state.optimizer.zero_grad()
        instead = try_instead(learning_rate, recipe, machine)
        raise NonFiniteError(
            f"step {step + 1}: {wrong}; the weights were not changed, checkpoints are whole: {instead}"
        )
    set_learning_rate(state.optimizer, learning_rate)
    with machine.autocast():
        state.optimizer.step()
    state.optimizer.zero_grad()
    return Step(mean_loss, int(num_correct), logits.detach())


def hardest(
    proxy: State, batch: Batch, learning_rate: float, recipe: Recipe, progress: float, machine: Machine
) -> Tensor:
    """Where in `batch` the recipe's share of it is whose loss is highest for the proxy, one image at least: int64 (N,),
    ascending. The proxy is itself trained on those every PROXY_EVERY steps. Raises what `train_step` raises."""
    proxy.model.train()
    proxy.model.reseed(recipe.seed, proxy.counters.step, dropout=False)
    proxy.model.weigh_batch(batch.share)
    with torch.no_grad(), machine.autocast():
        logits = proxy.model(batch.images)
    losses = batch.loss(logits.float(), recipe.label_smoothing, reduction="none")
    count = max(1, round(recipe.hardest * len(batch.labels)))
    chosen = losses.argsort(descending=True, stable=True)[:count].sort().values
    if proxy.counters.step % PROXY_EVERY == 0:
        train_step(proxy, batch.take(chosen), learning_rate, recipe, progress, machine)
    return chosen


def try_instead(learning_rate: float, recipe: Recipe, machine: Machine) -> str:
    """What keeps values from overflowing, in words."""
    own = [name for name in ("head_learning_rate", "bias_learning_rate") if getattr(recipe.optimizer, name)]
    others = "".join(f" or --optimizer.{name}" for name in own)
    if learning_rate * (decay := recipe.optimizer.weight_decay) > 1:  # weights change by more than they are
        return f"try a lower --optimizer.weight_decay (it was {decay:g}, at a learning rate of {learning_rate:g})"
    precise = "" if machine.precision == "float32" or learning_rate > 1 else ", or --precision float32"
    return f"try a lower --optimizer.learning_rate (it was {learning_rate:g}){others}, or a warm-up{precise}"
