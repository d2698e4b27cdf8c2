"""Per-example outcomes of a network on images, and the metrics that follow from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fromzero import augment, kernels
from fromzero.errors import InputError, NonFiniteError, nearest
from fromzero.machine import Machine
from fromzero.recipe import Recipe

BATCH, BATCH_PIXELS = 1000, 1000 * 32 * 32  # images in a batch of an evaluation; of larger images, pixels
NEAR_ONE = 0.25  # standard deviation of an inverse temperature around 1, before images are seen
COLDEST, HOTTEST = 1e-3, 1e3  # temperatures

# Test-time augmentation: the views of an image whose outputs are averaged, (mirrored, pixels down, pixels right) and
# weight. multicrop is that of cifar10-airbench (Jordan, 2024).
VIEWS: dict[str, tuple[tuple[tuple[bool, int, int], float], ...]] = {
    "none": (((False, 0, 0), 1.0),),
    "mirror": (((False, 0, 0), 0.5), ((True, 0, 0), 0.5)),
    "multicrop": tuple(
        ((mirrored, shift, shift), 0.25 if shift == 0 else 0.125) for shift in (0, -1, 1) for mirrored in (False, True)
    ),
}


class Normalise(NamedTuple):
    """How uint8 pixels become the network's input: (pixels - shift) × scale, one value a channel."""

    shift: Tensor
    scale: Tensor

    @classmethod
    def of(cls, recipe: Recipe, train_pixels: Tensor) -> Normalise:
        """As the recipe says; `standard` takes mean and standard deviation from the train pixels (N, H, W, C)."""
        channels = train_pixels.shape[-1]
        if recipe.normalise == "unit":
            shift = torch.zeros(channels, dtype=torch.float32)
            scale = torch.full((channels,), 1 / 255, dtype=torch.float32)
        else:
            sums, squares = kernels.byte_sums(train_pixels).tolist()
            count = train_pixels.numel() // channels
            means = [total / count for total in sums]
            variances = [
                (count * square - total * total) / count**2 for total, square in zip(sums, squares, strict=True)
            ]
            shift = torch.tensor(means, dtype=torch.float32)
            scale = torch.tensor(variances, dtype=torch.float64).sqrt().clamp(min=1e-6).reciprocal().float()
        return cls(shift.to(train_pixels.device), scale.to(train_pixels.device))

    def to_json(self) -> dict[str, list[float]]:
        """As JSON data, which `from_json` reads to the same bits."""
        return {"shift": self.shift.tolist(), "scale": self.scale.tolist()}

    @classmethod
    def from_json(cls, found: dict[str, list[float]], device: str) -> Normalise:
        return cls(*(torch.tensor(found[name], dtype=torch.float32, device=device) for name in cls._fields))

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 (N, H, W, C) → float32 (N, C, H, W) in channels-last memory."""
        return kernels.normalise_pixels(pixels, self.shift, self.scale).permute(0, 3, 1, 2)


class Outcomes(NamedTuple):
    """What a network says of N images: cross-entropy loss float32 (N,), outputs float32 (N, classes), truth int64
    (N,)."""

    losses: Tensor
    outputs: Tensor
    labels: Tensor

    @property
    def predictions(self) -> Tensor:
        """The predicted class int64 (N,)."""
        return self.outputs.argmax(1)

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        return self.losses.double().mean().item()

    @property
    def accuracy(self) -> float:
        """Share of images whose class was predicted."""
        return (self.predictions == self.labels).double().mean().item()

    @property
    def balanced_accuracy(self) -> float:
        """The mean of the accuracies of all classes that have an image."""
        counts = self.by_class(1 + max(int(of.cpu().max()) for of in (self.labels, self.predictions)))
        recalls = [right / count for right, count in counts if count]
        return sum(recalls) / len(recalls)

    def temperature(self, adjustment: Tensor) -> float:
        """As the function of that name has it."""
        return temperature(*(of.cpu().numpy() for of in (self.outputs, self.labels, adjustment)))

    def by_class(self, num_classes: int) -> list[tuple[int, int]]:
        """Of each class how many images were right, and how many there are."""
        counts = self.confusions(num_classes)
        return list(zip(counts.diagonal().tolist(), counts.sum(1).tolist(), strict=True))

    def confusions(self, num_classes: int) -> np.ndarray:
        """As the function of that name has them."""
        return confusions(self.labels.cpu().numpy(), self.predictions.cpu().numpy(), num_classes)


def confusions(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """How many images of each class (row) were taken for each class (column), int64 (classes, classes)."""
    pairs = np.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    return pairs.reshape(num_classes, num_classes)


def temperature(outputs: np.ndarray, labels: np.ndarray, adjustment: np.ndarray | float = 0.0) -> float:
    """What outputs (N, classes) are to be divided by for their probabilities to fit the labels int64 (N,) best: above 1
    where a network is surer than it is right (temperature scaling; Guo et al., 2017). A few images tell little, and all
    of them right would make it zero; so its inverse is drawn towards 1, as by a normal prior. adjustment (classes,):
    what is added to them for classes as frequent as the labels', where training added it (logit adjustment)."""
    outputs = outputs.astype(np.float64)
    outputs -= outputs.max(1, keepdims=True)
    of_labels = outputs[np.arange(len(labels)), labels].sum()
    low, high = 1 / HOTTEST, 1 / COLDEST  # the loss is convex in the inverse, so its slope has one zero
    for _ in range(40):
        inverse = math.sqrt(low * high)
        shares = np.exp(inverse * outputs + adjustment)
        expected = (shares * outputs).sum(1) / shares.sum(1)
        slope = expected.sum() - of_labels + (inverse - 1) / NEAR_ONE**2
        low, high = (low, inverse) if slope > 0 else (inverse, high)
    return 1 / math.sqrt(low * high)


def probabilities(outputs: Tensor, temperature: float) -> Tensor:
    """Of outputs (N, classes) at that temperature."""
    return (outputs / temperature).softmax(1)


def evaluate(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    normalise: Normalise,
    machine: Machine,
    between: Callable[[], None] = lambda: None,
    views: str = "none",
) -> Outcomes:
    """Outcomes of `model` on `pixels` uint8 (N, H, W, C), in evaluation mode; the mode is left as it was found.
    `between` is called after every batch and may raise to stop. `views`: one of VIEWS, whose outputs are averaged.

    Raises NonFiniteError where the loss is no number: what such a network predicts means nothing, but some of it is
    right and would pass for an accuracy."""
    losses, outputs = [], []
    with _evaluating(model, machine):
        size = _batch_size(pixels)
        for part, truth in zip(pixels.split(size), labels.split(size), strict=True):
            logits = _logits(model, part, normalise, views)
            losses.append(F.cross_entropy(logits, truth, reduction="none"))
            outputs.append(logits)
            between()
    found = Outcomes(torch.cat(losses).float(), torch.cat(outputs), labels)
    if not math.isfinite(found.loss):
        raise NonFiniteError(f"the network's loss is {found.loss}: its weights are too large to compute with")
    return found


def outputs(model: nn.Module, pixels: Tensor, normalise: Normalise, machine: Machine, views: str = "none") -> Tensor:
    """The outputs float32 (N, classes) that `model` gives to `pixels` uint8 (N, H, W, C), as `evaluate` looks at them.
    Raises NonFiniteError where they are no numbers."""
    with _evaluating(model, machine):
        found = torch.cat([_logits(model, part, normalise, views) for part in pixels.split(_batch_size(pixels))])
    if not found.isfinite().all():
        raise NonFiniteError("the network's outputs are no numbers: its weights are too large to compute with")
    return found


@contextmanager
def _evaluating(model: nn.Module, machine: Machine) -> Iterator[None]:
    """In evaluation mode, without gradients, as the machine computes; the mode is left as it was found."""
    was_training = model.training
    machine.set_up()
    model.eval()
    try:
        # Not inference_mode, in which autocast converts all weights anew for every batch.
        with torch.no_grad(), machine.autocast():
            yield
    finally:
        model.train(was_training)


def _batch_size(pixels: Tensor) -> int:
    return max(1, min(BATCH, BATCH_PIXELS // (pixels.shape[1] * pixels.shape[2])))


def _logits(model: nn.Module, pixels: Tensor, normalise: Normalise, views: str) -> Tensor:
    """Outputs float32 (N, classes), averaged over the views."""
    if views not in VIEWS:
        raise InputError(f"no views {views!r}{nearest(views, VIEWS)}")
    seen = [weight * model(normalise(_seen(pixels, how))).float() for how, weight in VIEWS[views]]
    return torch.stack(seen).sum(0)


def _seen(pixels: Tensor, how: tuple[bool, int, int]) -> Tensor:
    return augment.view(pixels, *how) if any(how) else pixels
