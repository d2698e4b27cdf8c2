"""AutoTrainer's rules, the baseline that `benchmarks.diagnosis` stands beside."""

import copy
import itertools

import torch
import torch.nn.functional as F


class AutoTrainer:
    """The rules of AutoTrainer (Zhang et al., ICSE 2021) with the thresholds it comes with, on the same trainings.

    Gradients of one batch are looked at in the first step and after every third epoch: vanishing, where the first
    layer's norm is below 1e-4 and below a thousandth of the last one's; exploding, where the ratio is above 70 or a
    value is no number; dying ReLU, where 70 % of the gradients are exactly zero. After 30 % of the epochs: oscillating,
    where train accuracy swings by 0.03 or more in a fifth of the epochs; slow convergence, where no epoch gained 0.01.
    What concerns gradients counts only where train accuracy is 0.7 or less or convergence is slow."""

    def __init__(self, training):
        self.training, self.overflowed = training, False
        self.accuracies, self.gradients = [], set()
        self.look_at_gradients()

    def look(self, progress):
        if progress.row is None:
            return
        self.accuracies.append(progress.row["train/running_accuracy"])
        if len(self.accuracies) % 3 == 0:
            self.look_at_gradients()

    def look_at_gradients(self):
        model = copy.deepcopy(self.training.state.model).train()
        pixels, labels = self.training.data.train
        size = self.training.recipe.batch_size
        with self.training.machine.autocast():
            logits = model(self.training.data.normalise(pixels[:size])).float()
        F.cross_entropy(logits, labels[:size]).backward()
        gradients = [w.grad.float() for w in model.parameters() if w.dim() > 1 and w.grad is not None]
        first, last = float(gradients[0].norm()), float(gradients[-1].norm())
        zeros = sum(int((g == 0).sum()) for g in gradients) / sum(g.numel() for g in gradients)
        if first < 1e-4 and first < 1e-3 * last:
            self.gradients.add("vanishing")
        if not torch.isfinite(torch.stack([g.norm() for g in gradients])).all() or first > 70 * last:
            self.gradients.add("exploding")
        if zeros >= 0.7:
            self.gradients.add("dying ReLU")

    def found(self):
        accuracies, epochs = self.accuracies, self.training.recipe.epochs
        gains = [b - a for a, b in itertools.pairwise(accuracies)]
        late = len(accuracies) >= max(2, 0.3 * epochs)
        slow = late and max(gains) < 0.01
        found = set(self.gradients) if slow or (accuracies or [0])[-1] <= 0.7 else set()
        if self.overflowed:
            found.add("exploding")
        swings = sum(1 for i in range(1, len(gains)) if gains[i] <= -0.03 and gains[i - 1] >= 0.03)
        swings += sum(1 for i in range(1, len(gains)) if gains[i] >= 0.03 and gains[i - 1] <= -0.03)
        if late and swings >= 0.2 * len(accuracies):
            found.add("oscillating")
        if slow:
            found.add("slow convergence")
        return sorted(found)
