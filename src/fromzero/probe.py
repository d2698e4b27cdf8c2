"""Cheap measurements of a run that change nothing: what `diagnosis` needs beside the rows of metrics.

All is measured at the weights that the run has come to, but for `trials` and `fit_accuracy`, which begin again at its
first ones, `cooldown`, which goes on from its last, and `mirror_accuracy`, of a network of its own. Networks are
copies, loaded from a checkpoint; the run folder is only read.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fromzero import augment, modules
from fromzero.errors import InputError, NonFiniteError
from fromzero.evaluate import Outcomes, evaluate
from fromzero.evidence import (
    SMALL_GAP,
    TRIAL_STEPS,
    Cooldown,
    Copied,
    Copies,
    Copy,
    Evidence,
    LayerMeasures,
    Measures,
    Score,
    Surest,
    Trial,
    best_factor,
)
from fromzero.machine import Machine
from fromzero.modules import Network
from fromzero.networks import layers
from fromzero.optim import learning_rate_at
from fromzero.recipe import AugmentRecipe, Recipe, load_recipe
from fromzero.rng import permutation
from fromzero.splits import Data, Subset
from fromzero.state import State
from fromzero.steps import Batch, Step, batch_at, initial_state, mixed, train_step
from fromzero.timetable import Timetable
from fromzero.trained import Trained

IMAGES = 1000  # train images that modes, augmentation and units are measured on
GRADIENT_BATCHES = 4
SUREST_SHARE = 0.1
TRIAL_FACTORS, MOST_TRIALS = (1.0, 0.1, 10.0, 0.01, 100.0), 8
FEWEST_TRIAL_STEPS, TRIAL_SECONDS = 25, 60.0  # of each, TRIAL_STEPS at most; seconds: of all together
LEAST_TRIAL_STEPS = 8  # of a run with fewer no trial is made: its last quarter would be a step
LEAST_COMPARED = 25  # validation images that two trainings are compared on
DRAWN_BATCH, DRAWN_STEPS = 50, 200  # of what is learned from images drawn anew for each step
FITTED_IMAGES = 100  # whether the network can learn that few by heart
MIRROR_IMAGES = 2000  # whether a small network can tell as many images from their mirror images, at most
MIRROR_CHANNELS, MIRROR_BORDER = [[16], [32], [32]], 1 / 8  # its, of the recipe few; of a side, that it does not see
PIXELS_AT_ONCE = 10_000_000  # of images that are made smaller
AT_ONCE = 10_000_000  # pairs of images, one of them a train image, whose likeness is computed in one product
SIDE, MIN_CORRELATION = 16, 0.98  # pictures whose pixels, made so few, are as correlated as that count as one
TWINS = 0.01  # share of pictures with a likeness in another class, beyond which likeness says nothing
ALIKE = 0.5  # share of a class's pictures that look like another of it, as ones do, where other classes have none
UNCHANGED = {f"augment.{name}": value for name, value in AugmentRecipe().model_dump().items()}  # images as they are
ALL_IMAGES = {"hardest": 1.0, "skip_easy": 0.0}
UNHINDERED = {  # nothing that keeps a network from learning what it is shown
    **UNCHANGED,
    **ALL_IMAGES,
    "network.block_dropout": 0.0,
    "network.dense_dropout": 0.0,
    "optimizer.weight_decay": 0.0,
    "label_smoothing": 0.0,
    "logit_adjustment": 0.0,
    "ema_decay": 0.0,
}


def evidence_of(trained: Trained, say: Callable[[str], None] = lambda line: None) -> Evidence:
    """What can be told of a run by scoring it and by some hundreds of steps, two thousand at most: the first ones at
    other learning rates where the train images are not fitted, never of a run that began with another one's weights;
    and some more at a falling rate where the run's is constant. `say` is told what is being done. Raises
    NonFiniteError."""
    images, data, network, here = trained.images, trained.data, trained.network, trained.machine
    recipe = trained.run.recipe
    say("scoring")
    validation = evaluate(network, *data.validation, data.normalise, here)
    train = evaluate(network, *data.clean_train, data.normalise, here)
    probabilities = validation.outputs.softmax(1)
    say("gradients and units")
    plain, dropped, changed = _modes(network, data, recipe, here)
    say("copies")
    copies = _copies(trained)
    measures = Measures(
        image_shape=data.image_shape,
        class_names=images.class_names,
        train_counts=tuple(torch.bincount(data.train.labels, minlength=data.num_classes).tolist()),
        validation_counts=tuple(torch.bincount(data.validation.labels, minlength=data.num_classes).tolist()),
        recalls=tuple(right / count if count else None for right, count in validation.by_class(data.num_classes)),
        loss_se=_standard_error(validation),
        surest=surest_of(probabilities, data.validation.labels),
        copies=copies,
        plain_loss=plain,
        dropout_loss=dropped,
        changed_by_batch_norm=changed,
        train_accuracy=train.accuracy,
        seen_accuracies=_seen_accuracies(network, data, recipe, here),
        layers=_layers(network, data, recipe, here),
        map_sides=tuple(_map_sides(recipe, data)),
    )
    rows = trained.rows()
    if trained.steps_beyond:  # the last row is of other weights than these
        scores = {"train/accuracy": train.accuracy, "train/loss": train.loss}
        scores |= {"val/accuracy": validation.accuracy, "val/loss": validation.loss}
        rows = [*rows[:-1], rows[-1] | scores]
    evidence = Evidence(recipe, rows, measures)
    found: dict[float, Trial] = {}
    fit = without_decay = cooldown = None
    if recipe.schedule.name == "constant":
        say("more steps at a falling learning rate")
        cooldown = _cooldown(trained, validation)
    if trained.run.provenance["from"] is None and not evidence.fitted:
        say("short trainings at other learning rates")
        measures = replace(measures, trial_steps=_trial_steps(recipe, data, _seconds_a_step(trained)))
        found, without_decay = _trials(recipe, data, here, measures.trial_steps)
        if evidence.gap < SMALL_GAP:
            say("a few images by heart")
            factors = {1.0, *(scale * best_factor(found) for scale in (1.0, 0.1) if found)}
            fit = max(_fit(recipe, data, here, factor) for factor in sorted(factors))
    say("mirror images")
    tried = replace(
        measures,
        trials=found,
        without_decay=without_decay,
        fit_accuracy=fit,
        cooldown=cooldown,
        mirror_accuracy=_mirror_accuracy(recipe, data, here),
    )
    return replace(evidence, measures=tried)


def _standard_error(outcomes: Outcomes) -> float:
    return float(outcomes.losses.double().std() / math.sqrt(len(outcomes.losses)))


def surest_of(probabilities: Tensor, labels: Tensor) -> Surest:
    """Of images with these labels, int64 (N,), those that a network is surest of which gives them these probabilities,
    (N, classes)."""
    confidence, predictions = probabilities.max(1)
    count = max(round(SUREST_SHARE * len(labels)), 1)
    chosen = confidence.argsort(descending=True, stable=True)[:count]
    wrong = int((predictions[chosen] != labels[chosen]).sum())
    return Surest(wrong, count, float(confidence[chosen].mean()))


def _modes(network: Network, data: Data, recipe: Recipe, here: Machine) -> tuple[float, float, float]:
    """On the same train images, as they are: the mean loss in evaluation mode, that with dropout on, and for what share
    of them another class is predicted when batches as large as the recipe's are normalised by themselves."""
    model = copy.deepcopy(network)
    pixels, labels = _some(data, recipe)

    def logits(on: type[torch.nn.Module] | None) -> Tensor:
        model.eval()
        for module in model.modules():
            if on is not None and isinstance(module, on):
                module.train()
        seen = []
        with torch.no_grad(), here.autocast():
            for index, part in enumerate(torch.arange(len(labels), device=labels.device).split(recipe.batch_size)):
                model.reseed(recipe.seed, index)
                seen.append(model(data.normalise(pixels[part])).float())
        return torch.cat(seen)

    plain, dropped, normed = logits(None), logits(modules.Dropout), logits(modules.BatchNorm)
    changed = (normed.argmax(1) != plain.argmax(1)).float().mean()
    return F.cross_entropy(plain, labels).item(), F.cross_entropy(dropped, labels).item(), float(changed)


def _some(data: Data, recipe: Recipe) -> Subset:
    """At most IMAGES of the clean train images, in an order by chance: pictures come class by class."""
    chosen = torch.from_numpy(permutation(len(data.clean_train.labels), recipe.seed, "probe")[:IMAGES])
    chosen = chosen.to(data.clean_train.labels.device)
    return Subset(data.clean_train.pixels[chosen], data.clean_train.labels[chosen])


def _seen_accuracies(network: Network, data: Data, recipe: Recipe, here: Machine) -> tuple[float, float]:
    """Accuracies on the same train images, as they are and as augmented as the last epoch's, but not mixed, which would
    leave it open what is right."""
    shown = replace(data, train=_some(data, recipe))
    as_they_are = recipe.override(UNCHANGED)
    indices = torch.arange(len(shown.train.labels), device=here.device)

    def accuracy(how: Recipe) -> float:
        right = 0
        with torch.no_grad(), here.autocast():
            for step, part in enumerate(indices.split(250)):
                batch = batch_at(shown, part, how, recipe.epochs - 1, step, recipe.epochs - 1.0)
                right += int((network(batch.images).argmax(1) == batch.labels).sum())
        return right / len(indices)

    return accuracy(as_they_are), accuracy(recipe)


def _mirror_accuracy(recipe: Recipe, data: Data, here: Machine) -> float | None:
    """The share of validation images and of their mirror images that a small network tells apart after DRAWN_STEPS
    steps on train images and theirs, whatever the run's own network learns. It sees the middle of each, at a side of
    32 pixels at most: dates and marks are mostly at the border. None where images are too small for it."""
    small = load_recipe("few").override(UNHINDERED | {"network.channels": MIRROR_CHANNELS, "seed": recipe.seed})
    height, width = data.image_shape[:2]
    top, left = round(MIRROR_BORDER * height), round(MIRROR_BORDER * width)

    def both(part: Subset) -> Subset:
        places = torch.from_numpy(permutation(len(part.labels), recipe.seed, "mirrored")[:MIRROR_IMAGES])
        pixels = part.pixels[places.to(part.pixels.device), top : height - top, left : width - left].contiguous()
        pixels = augment.scaled(pixels, min(1.0, 32 / max(pixels.shape[1:3])))
        is_mirrored = torch.arange(2, device=pixels.device).repeat_interleave(len(pixels))
        return Subset(torch.cat([pixels, pixels.flip(2)]), is_mirrored)

    two = replace(data, train=both(data.train), num_classes=2)
    try:
        state = initial_state(small, two, here)
        falling = [small.optimizer.learning_rate * (1 - step / DRAWN_STEPS) for step in range(DRAWN_STEPS)]
        _drawn_steps(state, np.arange(len(two.train.labels)), "mirrored", falling, small, two, here)
        return evaluate(state.model, *both(data.validation), data.normalise, here).accuracy
    except (InputError, NonFiniteError):
        return None


@torch.enable_grad()  # whatever the caller has switched off
def _layers(network: Network, data: Data, recipe: Recipe, here: Machine) -> tuple[LayerMeasures, ...]:
    """Norms of weights and of the loss's gradient, a mean over some batches, and how many units no image activates."""
    model = copy.deepcopy(network)
    activated = _activated(model, _some(data, recipe), data, here)
    model.train()
    # No weight moves; a running statistic that does is the copy's.
    indices = torch.from_numpy(permutation(len(data.train.labels), recipe.seed, "probe"))
    size = min(recipe.batch_size, len(indices))
    batches = [indices[start : start + size] for start in range(0, len(indices), size)][:GRADIENT_BATCHES]
    for step, part in enumerate(batches):
        batch = batch_at(data, part.to(here.device), recipe, recipe.epochs - 1, step, recipe.epochs - 1.0)
        batch = mixed(batch, data.num_classes, recipe, step)
        model.reseed(recipe.seed, step, dropout=recipe.epochs - 1 >= recipe.network.dropout_from_epoch)
        with here.autocast():
            logits = model(batch.images)
        loss = batch.loss(logits.float(), recipe.label_smoothing)
        (loss / len(batches)).backward()
    found = []
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() > 1 and weight.requires_grad:
            gradient = 0.0 if weight.grad is None else float(weight.grad.float().norm())
            found.append(LayerMeasures(path, gradient, float(weight.detach().norm()), activated.get(path)))
    return tuple(found)


def _activated(model: Network, shown: Subset, data: Data, here: Machine) -> dict[str, float]:
    """For every layer whose output goes through a ReLU, the share of its units (of a map: channels) that are zero for
    all of the images shown."""
    ever: dict[str, Tensor] = {}
    handles = []

    def watch(name: str, module: torch.nn.Module) -> None:
        def keep(_: torch.nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            active = (output.flatten(2).amax(2) if output.dim() == 4 else output).amax(0) > 0
            ever[name] = active | ever[name] if name in ever else active

        handles.append(module.register_forward_hook(keep))

    last = ""
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            last = path
        pooling = getattr(module, "pooling", None)
        relu = getattr(module, "relu", False) is True or getattr(pooling, "relu", False) is True
        if relu or "relu" in (getattr(module, "activation", ""), getattr(module, "name", "")):
            watch(last, module)
    try:
        evaluate(model, *shown, data.normalise, here)
    finally:
        for handle in handles:
            handle.remove()
    return {name: 1 - float(active.float().mean()) for name, active in ever.items()}


def _map_sides(recipe: Recipe, data: Data) -> Iterator[int]:
    """The side of the map that each convolution works on, the smaller where they differ."""
    side = min(data.image_shape[:2])
    for row in layers(recipe.network, data.image_shape, data.num_classes):
        if row.kind == "Conv2D" and row.name != "whitening":
            yield side
        if len(row.shape) == 3:
            side = min(row.shape[:2])


def _copies(trained: Trained) -> Copies:
    """Validation images, and test images where those are others, that are among the train images: byte for byte, or
    nearly, mirrored ones too. Where images of other classes look as alike, or images have too few pixels, looks say
    nothing and only bytes count; nor do they say anything of a class that is alike all over, where few of the classes
    are: copies are of all classes."""
    data, images = trained.data, trained.images
    parts = {"validation": (data.validation, trained.validation_images.files)}
    if trained.run.recipe.validation.source != "test":
        parts["test"] = (data.test, images.test.files)
    looked_at = torch.cat([part.pixels for part, _ in parts.values()]).cpu()
    labels = torch.cat([part.labels for part, _ in parts.values()]).cpu()
    known: dict[int, int] = {}  # what an image's bytes hash to → its place among the train images
    views = [_small(looked_at), _small(looked_at.flip(2))]
    same, other = torch.full((len(labels),), -1.0), torch.full((len(labels),), -1.0)
    most_alike, begin = torch.zeros(len(labels), dtype=torch.int64), 0
    for pixels, theirs in zip(*(part.split(max(AT_ONCE // len(labels), 1)) for part in data.train), strict=True):
        part = pixels.cpu()
        known |= {hash(image.tobytes()): place for place, image in enumerate(part.numpy(), begin)}
        alike = torch.maximum(*(view @ _small(part).T for view in views))
        is_same = labels[:, None] == theirs.cpu()[None, :]
        here, places = alike.masked_fill(~is_same, -1.0).max(1)
        most_alike = torch.where(here > same, places + begin, most_alike)
        same = torch.maximum(same, here)
        other = torch.maximum(other, alike.masked_fill(is_same, -1.0).amax(1))
        begin += len(part)
    of_bytes = [known.get(hash(image.tobytes())) for image in looked_at.numpy()]
    exact = np.array([place is not None for place in of_bytes])
    near = exact | (same > MIN_CORRELATION).numpy()
    # A copy may have a wrong label: a few that look like one of another class say nothing beside many of their own.
    elsewhere = ((other > MIN_CORRELATION).numpy() & ~exact).mean()
    by_looks = min(looked_at.shape[1:3]) >= SIDE and elsewhere <= max(TWINS, near.mean() / 4)
    if not by_looks:
        near = exact
    shares = {label: near[labels.numpy() == label].mean() for label in labels.unique().tolist()}
    if np.median(list(shares.values())) <= TWINS:
        all_alike = [label for label, share in shares.items() if share > ALIKE]
        near = exact | (near & ~np.isin(labels.numpy(), all_alike))
    counts, begin = {}, 0
    for split, (part, _) in parts.items():
        of = slice(begin, begin := begin + len(part.labels))
        counts[split] = Copied(int(exact[of].sum()), int(near[of].sum()), len(part.labels))
    found = []
    if images.train.files:
        kept = np.delete(np.arange(len(images.train)), [] if data.held is None else data.held)
        files = [(split, name) for split, (_, names) in parts.items() for name in names]
        for index in np.flatnonzero(near):
            place = of_bytes[index]
            train_file = images.train.files[kept[most_alike[index] if place is None else place]]
            found.append(Copy(*files[index], train_file, place is not None))
    return Copies(counts, bool(by_looks), tuple(found))


def _small(pixels: Tensor) -> Tensor:
    """Images (N, H, W, C) as vectors (N, D) of a few pixels, whose products are their correlations; zero for an image
    of one colour."""
    size = min(SIDE, pixels.shape[1]), min(SIDE, pixels.shape[2])
    parts = pixels.split(max(PIXELS_AT_ONCE // (pixels.shape[1] * pixels.shape[2]), 1))
    small = torch.cat([F.adaptive_avg_pool2d(part.permute(0, 3, 1, 2).float(), size).flatten(1) for part in parts])
    small = small - small.mean(1, keepdim=True)
    norm = small.norm(dim=1, keepdim=True)
    return torch.where(norm > 1.0, small / norm.clamp(min=1.0), torch.zeros(()))


def _seconds_a_step(trained: Trained) -> float:
    rows = trained.run.metrics()
    return rows[-1]["time/seconds"] / max(rows[-1]["step"], 1) if rows else 0.1


def _affordable_steps(seconds_a_step: float) -> int:
    """How many steps a short training may have, at so many seconds each."""
    affordable = TRIAL_SECONDS / (MOST_TRIALS * max(seconds_a_step, 1e-4))
    return min(TRIAL_STEPS, int(max(FEWEST_TRIAL_STEPS, affordable)))


def _cooldown(trained: Trained, before: Outcomes) -> Cooldown | None:
    """Whether a constant rate is what keeps a run from a better end: steps from its last weights and optimizer state,
    over which the rate falls to zero (the cooldown of Zhai et al., "Scaling Vision Transformers", 2022), beside the
    same steps at its own rate, in the order of its current epoch from that epoch's start. None where it has
    made too few steps, is still in its warm-up, or has too few validation images to tell; or where steps overflow."""
    data, here, recipe = trained.data, trained.machine, trained.run.recipe
    begin = trained.checkpoint.state.get("step", 0)
    timetable = Timetable.of(recipe, len(data.train.labels))
    peak, steps = recipe.optimizer.learning_rate, min(_affordable_steps(_seconds_a_step(trained)), begin)
    too_few = steps < LEAST_TRIAL_STEPS or len(before.labels) < LEAST_COMPARED
    if too_few or learning_rate_at(recipe, begin, timetable) != peak:
        return None
    recipe = recipe.override(ALL_IMAGES)

    def after(rate_at: Callable[[int], float], looks: tuple[int, ...]) -> list[Tensor]:
        """What the validation images come to after so many steps each, by image."""
        state = State.initial(recipe, data.image_shape, data.num_classes, here.device)
        state.load_checkpoint(trained.checkpoint)
        seen = []
        batches = _batches(recipe, data, range(begin, begin + steps), timetable, trained.checkpoint.epochs, begin)
        for step, batch in enumerate(batches):
            whole = batch._replace(share=len(batch.labels) / min(recipe.batch_size, len(data.train.labels)))
            train_step(state, whole, rate_at(step), recipe, timetable.epochs_after(begin + step), here)
            state.counters.step += 1
            state.update_average(recipe.ema_decay)
            if step + 1 in looks:
                seen.append(_by_image(evaluate(state.scored, *data.validation, data.normalise, here)))
        return seen

    try:
        halfway, held = after(lambda step: peak, (steps // 2, steps))
        (falling,) = after(lambda step: peak * (1 - step / steps), (steps,))
    except NonFiniteError:
        return None
    scores = {"before": _by_image(before), "halfway": halfway, "held": held, "falling": falling}
    errors = (falling - (halfway + held) / 2).std(1) / math.sqrt(len(before.labels))
    return Cooldown(
        steps=steps,
        **{name: Score(*by_image.mean(1).tolist()) for name, by_image in scores.items()},
        loss_se=errors[0].item(),
        accuracy_se=errors[1].item(),
    )


def _by_image(outcomes: Outcomes) -> Tensor:
    """Loss and whether it is right, of each image: float64 (2, N)."""
    return torch.stack([outcomes.losses.double(), (outcomes.predictions == outcomes.labels).double()])


def _trial_steps(recipe: Recipe, data: Data, seconds_a_step: float) -> int:
    """How many steps a short training at another rate has: as the run at most."""
    in_all = Timetable.of(recipe, len(data.train.labels)).start_of(recipe.epochs)
    return min(_affordable_steps(seconds_a_step), in_all)


def _trials(recipe: Recipe, data: Data, here: Machine, steps: int) -> tuple[dict[float, Trial], Trial | None]:
    """Factor on the learning rate → train loss over the last quarter of so many first steps; and that at the run's rate
    without its weight decay, if it has any. All begin at the run's first weights and see the same images, in the same
    order. They go through the run's whole course, of rate, augmentation and dropout, in these steps: a high peak may be
    right once the rate has fallen. Where the best factor is the lowest or the highest,
    one beyond is tried, too. Nothing where the run has too few steps."""
    timetable = Timetable.of(recipe, len(data.train.labels))
    in_all = timetable.start_of(recipe.epochs)
    if steps < LEAST_TRIAL_STEPS:
        return {}, None
    course = [step * in_all // steps for step in range(steps)]  # the run's step that each stands for
    simple = recipe.override(ALL_IMAGES | {"ema_decay": 0.0})

    def last_losses(factor: float, recipe: Recipe = simple) -> list[float]:
        """Of each step; infinite where one overflows."""
        state = initial_state(recipe, data, here)
        losses = []
        batches = _batches(recipe, data, course, timetable)
        for step, (at, batch) in enumerate(zip(course, batches, strict=True)):
            rate = factor * learning_rate_at(recipe, at, timetable)
            state.counters.step = step
            try:
                losses.append(train_step(state, batch, rate, recipe, timetable.epochs_after(at), here).loss)
            except NonFiniteError:
                return [math.inf]
        return losses[-max(2, steps // 4) :]

    own = last_losses(1.0)
    found = {1.0: _trial(own, own)}
    waiting = [factor for factor in TRIAL_FACTORS if factor != 1]
    while waiting:
        factor = waiting.pop(0)
        found[factor] = _trial(last_losses(factor), own)
        if not waiting and len(found) < MOST_TRIALS:
            lowest, highest, best = min(found), max(found), best_factor(found)
            if best == lowest or math.isinf(found[best].loss):
                waiting = [lowest / 10]
            elif best == highest:
                waiting = [highest * 10]
    if not recipe.optimizer.weight_decay:
        return found, None
    return found, _trial(last_losses(1.0, simple.override({"optimizer.weight_decay": 0.0})), own)


def _trial(losses: list[float], own: list[float]) -> Trial:
    """What a trial says beside that at the run's own rate, whose steps saw the same images."""
    if math.isinf(losses[-1]) or math.isinf(own[-1]):
        return Trial(float(np.mean(losses)), 0.0)
    differences = np.subtract(losses, own)
    return Trial(float(np.mean(losses)), float(differences.std(ddof=1) / math.sqrt(len(differences))))


def _fit(recipe: Recipe, data: Data, here: Machine, factor: float) -> float:
    """Accuracy on FITTED_IMAGES train images after DRAWN_STEPS steps on nothing else, from the run's first weights, at
    `factor` times its rate, with nothing that keeps a network from learning by heart (after Karpathy, "A Recipe for
    Training Neural Networks", 2019: overfit one batch)."""
    free = recipe.override(UNHINDERED)
    few = permutation(len(data.train.labels), recipe.seed, "probe")[:FITTED_IMAGES]
    rates = [factor * recipe.optimizer.learning_rate] * DRAWN_STEPS
    try:
        made = _drawn_steps(initial_state(free, data, here), few, "probe", rates, free, data, here)
    except NonFiniteError:
        return 0.0
    return sum(step.correct for step in made[-10:]) / (10 * min(DRAWN_BATCH, len(few)))


def _drawn_steps(
    state: State, places: np.ndarray, purpose: str, rates: Iterable[float], recipe: Recipe, data: Data, here: Machine
) -> list[Step]:
    """A step at each of the rates, on DRAWN_BATCH of the train images at `places`, drawn anew for each by `purpose`.
    Raises NonFiniteError."""
    made = []
    for step, rate in enumerate(rates):
        chosen = places[permutation(len(places), recipe.seed, purpose, step)[:DRAWN_BATCH]]
        batch = batch_at(data, torch.from_numpy(chosen).to(here.device), recipe, 0, step, 0.0)
        state.counters.step = step
        made.append(train_step(state, batch, rate, recipe, 0.0, here))
    return made


def _batches(
    recipe: Recipe,
    data: Data,
    course: Iterable[int],
    timetable: Timetable,
    epoch: int = 0,
    step: int = 0,
) -> Iterator[Batch]:
    """A batch for each entry of `course`. Order and augmentation are those of training from the start of `epoch` on,
    the first batch being step `step`; schedules (scaling, dropout) are as at the step that `course` names."""
    places = iter(course)
    while True:
        order = torch.from_numpy(permutation(len(data.train.labels), recipe.seed, "order", epoch))
        for indices in order.to(data.train.labels.device).split(recipe.batch_size):
            at = next(places, None)
            if at is None:
                return
            batch = batch_at(data, indices, recipe, epoch, step, timetable.epochs_after(at))
            yield mixed(batch, data.num_classes, recipe, step)
            step += 1
        epoch += 1
