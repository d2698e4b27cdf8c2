"""How well `fromzero diagnose` names a problem that is known to be there, and raises nothing where none is.

    python -m benchmarks.diagnosis [--seeds 10 11 12] [--bases plain norm digits] [--jobs 2]
    python -m benchmarks.diagnosis --remedies --seeds 10 11 12 13 14 15
    python -m benchmarks.diagnosis --render

Faults are planted in small trainings of three kinds (bases), one at a time, each with several seeds; beside them stand
healthy trainings, some of which look odd. A planted fault counts as named when it is among the findings, and as named
first when it is the first of them. Prints a table and writes build/diagnosis.json. --remedies trains with and without
what the first finding proposes, in pairs of seeds, and writes build/remedies.json. --render writes both into
docs/diagnosis.md.
"""

import argparse
import copy
import itertools
import json
import multiprocessing
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import ROOT, default_data_dir

OUTPUT, REMEDIES = ROOT / "build" / "diagnosis.json", ROOT / "build" / "remedies.json"
PAGE, MEASURED = ROOT / "docs" / "diagnosis.md", "## How well it does"
AUTOTRAINER, FINDINGS = "autotrainer.json", "found.json"  # beside what a run leaves behind
TEST_IMAGES = 1000  # that a run is scored on at its end, which matters for the copies only

CIFAR = {"validation.source": "split", "validation.fraction": 0.2, "clean_train_images": 1000}
BASES: dict[str, dict[str, Any]] = {
    # Adam, ReLU, dropout: as the notes' networks, smaller.
    "plain": CIFAR
    | {
        "base": "train2",
        "images": 5000,
        "network.channels": [[16, 32], [64], [128]],
        "network.padding": "same",
        "network.activation_layers": True,
        "network.block_dropout": 0.1,
        "network.dense_dropout": 0.2,
        "augment.flip": "random",
        "augment.translate": 1,
        "optimizer.learning_rate": 1e-3,
        "schedule.name": "linear",
        "batch_size": 64,
        "epochs": 30,
    },
    # Muon, batch normalisation, GELU, label smoothing: as quick.
    "norm": CIFAR
    | {
        "base": "quick",
        "images": 5000,
        "skip_easy": 0.0,
        "network.channels": [[32], [64, 64], [128]],
        "augment.translate": 2,
        "augment.scale": 1.0,
        "augment.scale_epochs": 0.0,
        "optimizer.learning_rate": 0.12,
        "batch_size": 125,
        "epochs": 20,
    },
    # SGD with momentum at a constant rate, on 1,437 handwritten digits.
    "digits": {
        "base": "train1",
        "images": 0,
        "network.channels": [[16], [32], [64]],
        "network.dense": [32],
        "network.dense_dropout": 0.3,
        "optimizer.name": "sgd",
        "optimizer.learning_rate": 0.02,
        "schedule.name": "cosine",
        "batch_size": 32,
        "epochs": 20,
        "validation.source": "split",
        "validation.fraction": 0.2,
        "clean_train_images": 1000,
    },
}

BASES["residual"] = CIFAR | {
    "base": "quick",
    "images": 4000,
    "skip_easy": 0.0,
    "label_smoothing": 0.0,
    "network.channels": [[24, 24], [48, 48], [96, 96]],
    "network.residual": True,
    "network.activation": "relu",
    "network.whitening": 0,
    "network.whitening_directions": 0,
    "network.initial": "glorot",
    "network.head": "max",
    "network.logit_scale": 1.0,
    "augment.translate": 2,
    "augment.scale": 1.0,
    "augment.scale_epochs": 0.0,
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 2e-3,
    "optimizer.head_learning_rate": 0.0,
    "optimizer.bias_learning_rate": 0.0,
    "optimizer.weight_decay": 0.01,
    "schedule.name": "cosine",
    "batch_size": 100,
    "epochs": 20,
}


@dataclass(frozen=True)
class Case:
    """A training with one fault, or a healthy one (`problem` None). changes: recipe fields, a number being a factor
    where it stands in `times`; images, weights: what is done to the data and to the first weights."""

    name: str
    problem: str | tuple[str, ...] | None
    changes: Mapping[str, Any] = field(default_factory=dict)
    times: Mapping[str, float] = field(default_factory=dict)
    images: Callable[[Any, np.random.Generator], Any] | None = None
    weights: Callable[[Any], None] | None = None
    bases: tuple[str, ...] = tuple(BASES)

    @property
    def problems(self):
        """The names that are right, of which one will do."""
        return (self.problem,) if isinstance(self.problem, str) else (self.problem or ())


def kept(images, indices):
    train = images.train.take(indices)
    return replace(images, train=train, fingerprints=images.fingerprints | {"train": train.fingerprint()})


def few(images, rng):
    return kept(images, np.sort(rng.permutation(len(images.train))[: len(images.train) // 8]))


def mislabelled(share):
    def change(images, rng):
        def part(split):
            wrong = rng.random(len(split)) < share
            shift = rng.integers(1, images.num_classes, len(split))
            return replace(split, labels=np.where(wrong, (split.labels + shift) % images.num_classes, split.labels))

        train, test = part(images.train), part(images.test)
        prints = {"train": train.fingerprint(), "test": test.fingerprint()}
        return replace(images, train=train, test=test, fingerprints=prints)

    return change


def imbalanced(images, rng):
    """Of every other class one image in fifty."""
    rare = (images.train.labels % 2 == 1) & (rng.random(len(images.train)) > 0.02)
    for label in range(1, images.num_classes, 2):  # two at least, so that one can be held out
        members = np.flatnonzero(images.train.labels == label)
        rare[members[:3]] = False
    return kept(images, np.flatnonzero(~rare))


def copied(share):
    """A share of the train images stands there twice, so that validation has copies of what is trained on."""

    def change(images, rng):
        count = round(share * len(images.train) / (1 + share))
        order = rng.permutation(len(images.train))
        return kept(images, np.sort(np.concatenate([order[count:], order[count : 2 * count]])))

    return change


def scaled_weights(factor):
    def change(model):
        for weight in model.parameters():
            if weight.dim() > 1 and weight.requires_grad:
                weight.data.mul_(factor)

    return change


def low_biases(model):
    for name, weight in model.named_parameters():
        if name.endswith("bias") and not name.startswith("predictions"):
            weight.data.fill_(-5.0)


NO_BN = ("plain", "digits")
NO_AUGMENTATION = {"augment.flip": "none", "augment.translate": 0, "augment.cutout": 0}
NO_DROPOUT = {"network.block_dropout": 0.0, "network.dense_dropout": 0.0}
CASES = [
    Case("healthy", None),
    Case("healthy, dropout of a half", None, {"network.dense_dropout": 0.5, "network.dense": [256]}),
    Case("healthy, mild weight decay", None, {"optimizer.weight_decay": 5e-4}),
    Case("healthy, twice the channels", None, times={"network.channels": 2}),
    Case("healthy, a warm-up", None, {"schedule.warmup_epochs": 4.0, "schedule.name": "cosine"}),
    Case(
        "an eighth of the images, no dropout, no augmentation",
        "overfitting",
        NO_DROPOUT | NO_AUGMENTATION | {"label_smoothing": 0.0},
        times={"epochs": 2},
        images=few,
        bases=("plain", "norm", "residual"),
    ),
    Case(
        "no dropout, no augmentation, constant rate",
        "overfitting",
        NO_DROPOUT | NO_AUGMENTATION | {"label_smoothing": 0.0, "schedule.name": "constant"},
        bases=("plain",),
    ),
    Case("two channels", "underfitting", {"channels": 2, "network.dense": [4], "network.whitening": 0}),
    Case("rate × 50", "rate-too-high", times={"optimizer.learning_rate": 50}),
    Case("rate ÷ 100", "rate-too-low", times={"optimizer.learning_rate": 0.01}),
    Case("a tenth of the epochs", "stopped-early", times={"epochs": 0.1}),
    Case(
        "constant high rate",
        ("oscillating", "rate-too-high"),
        {"schedule.name": "constant"},
        times={"optimizer.learning_rate": 4},
    ),
    Case("dropout of 0.8", "dropout-too-strong", {"network.block_dropout": 0.8}),
    Case("pooling by 8 at once", "pooling-too-early", {"first_pool": 8}),
    Case("weight decay of 0.1", "decay-too-strong", {"optimizer.weight_decay": 0.1}),
    Case("batches of 2", "batch-too-small", {"batch_size": 2, "epochs": 3}, bases=("norm", "residual")),
    Case("cutout of 28 pixels", "augmentation-too-strong", {"augment.cutout": 28}),
    Case("shifts of 24 pixels", "augmentation-too-strong", {"augment.translate": 24}),
    Case("biases at −5", "dead-units", weights=low_biases, bases=NO_BN),
    Case("first weights × 0.02", ("vanishing-gradients", "dead-units"), weights=scaled_weights(0.02), bases=NO_BN),
    Case("50 : 1", "imbalance", images=imbalanced),
    Case("copies, a quarter", "copies", images=copied(0.25)),
    Case("copies, a tenth", "copies", images=copied(0.1)),
    Case("a fifth of the labels wrong", "label-noise", images=mislabelled(0.2)),
    Case("two fifths of the labels wrong", "label-noise", images=mislabelled(0.4)),
    Case("few validation images", "validation-too-small", {"validation.fraction": 0.02}),
]


def recipe_of(base, case, seed):
    from fromzero import load_recipe

    changes = dict(BASES[base])
    recipe = load_recipe(changes.pop("base"))
    changes.pop("images")
    recipe = recipe.override(changes)
    changes = dict(case.changes)
    for path, factor in case.times.items():
        if path == "network.channels":
            changes[path] = [[round(c * factor) for c in block] for block in recipe.network.channels]
        else:
            old = recipe.fields()[path]
            changes[path] = max(1, round(old * factor)) if isinstance(old, int) else old * factor
            if path == "optimizer.learning_rate":
                for other in ("head", "bias"):
                    changes[f"optimizer.{other}_learning_rate"] = (
                        factor * recipe.fields()[f"optimizer.{other}_learning_rate"]
                    )
    if (channels := changes.pop("channels", None)) is not None:
        changes["network.channels"] = [[channels] * len(block) for block in recipe.network.channels]
    if (pool := changes.pop("first_pool", None)) is not None:
        changes["network.pool"] = [pool, *([2] * (len(recipe.network.channels) - 2)), 1]
    if recipe.optimizer.name == "adamw" and "optimizer.weight_decay" in changes:
        # Decoupled, it is multiplied by the rate. 5 was no fault yet: validation accuracy rose.
        changes["optimizer.weight_decay"] *= 1000 if case.problem else 50
    if not recipe.network.dense and case.problem is not None:
        changes.pop("network.dense", None)
        changes.pop("network.dense_dropout", None)
    return recipe.override(changes | {"name": f"{base}: {case.name}".replace(" : ", ":"), "seed": seed})


def images_of(base, case, data_dir):
    from fromzero.data import load_images

    count = BASES[base]["images"]
    images = load_images(f"cifar10:{count}" if count else "digits", data_dir=data_dir if count else None)
    if len(images.test) > TEST_IMAGES:
        images = replace(images, test=images.test.take(np.arange(TEST_IMAGES)))
    return images if case.images is None else case.images(images, np.random.Generator(np.random.PCG64(7)))


def name_of(base, case, seed):
    return f"{base}-{case.name}-{seed}".replace(" ", "_").replace(",", "")


def trained(base, case, seed, folder, data_dir):
    """The run of a case in `folder`, trained unless it is there, and its images; what AutoTrainer's rules say of it."""
    from fromzero import NonFiniteError, Run, new_training

    images = images_of(base, case, data_dir)
    path = Path(folder) / name_of(base, case, seed)
    if not (path / AUTOTRAINER).exists():
        if path.exists():
            shutil.rmtree(path)
        recipe = recipe_of(base, case, seed)
        training = new_training(recipe, images, runs_dir=folder, name=path.name, threads=1)
        if case.weights is not None:
            case.weights(training.state.model)
        rules = AutoTrainer(training)
        try:
            for progress in training:
                rules.look(progress)
        except NonFiniteError:
            rules.overflowed = True
        (path / AUTOTRAINER).write_text(json.dumps(rules.found()), "utf-8")
    return Run(path), images


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
        if progress.row is None or progress.ended:
            return
        self.accuracies.append(progress.row["train/running_accuracy"])
        if len(self.accuracies) % 3 == 0:
            self.look_at_gradients()

    def look_at_gradients(self):
        import torch
        import torch.nn.functional as F

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


def diagnosed(base, case, seed, folder, data_dir):
    """(names of the findings, first that which comes first; seconds it took) of a case."""
    from fromzero import probe
    from fromzero.diagnosis import diagnose
    from fromzero.evidence import Evidence
    from fromzero.sessions import load_trained

    run, images = trained(base, case, seed, folder, data_dir)
    kept = run.path / FINDINGS
    if not kept.exists():
        began = time.monotonic()
        measures = probe.measure(load_trained(run, images=images, threads=1))
        found = [finding.name for finding in diagnose(Evidence(run.recipe, run.metrics(), measures))]
        kept.write_text(json.dumps({"found": found, "seconds": time.monotonic() - began}), "utf-8")
    last = run.metrics()[-1]
    return {
        "base": base,
        "case": case.name,
        "problem": case.problems,
        "seed": seed,
        "autotrainer": json.loads((run.path / AUTOTRAINER).read_text("utf-8")),
        "train": last["train/accuracy"],
        "val": last["val/accuracy"],
        **json.loads(kept.read_text("utf-8")),
    }


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.diagnosis", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12], help="(10 11 12)")
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=BASES, help=" ".join(BASES))
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side, a thread each (2)")
    parser.add_argument("--runs-dir", type=Path, default=ROOT / "build" / "diagnosis", help="what is there is kept")
    parser.add_argument("--data-dir", default=default_data_dir(), help="where CIFAR-10 is")
    parser.add_argument("--remedies", action="store_true", help="train with and without each first remedy instead")
    parser.add_argument("--render", action="store_true", help="write docs/diagnosis.md from what was measured before")
    arguments = parser.parse_args()
    if arguments.render:
        PAGE.write_text(page(json.loads(OUTPUT.read_text("utf-8")), json.loads(REMEDIES.read_text("utf-8"))), "utf-8")
        return
    if arguments.remedies:
        print("\n".join(remedy_lines(_remedies(arguments))))
        return
    todo = [
        (base, CASES.index(case), seed, arguments.runs_dir, arguments.data_dir)
        for seed in arguments.seeds
        for case in CASES
        for base in case.bases
        if base in arguments.bases
    ]
    found = []
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(_diagnosed, todo):
            found.append(row)
            print(line(row), flush=True)
    OUTPUT.parent.mkdir(exist_ok=True)
    content = {"date": time.strftime("%Y-%m-%d"), "seeds": arguments.seeds, "rows": found}
    OUTPUT.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    print("\n".join(summary(found)))


def _remedies(arguments):
    """All pairs; faults that lie in the first weights are not in a recipe, and cannot be tested by another."""
    todo = [
        (base, CASES.index(case), arguments.seeds, arguments.runs_dir, arguments.data_dir)
        for base in arguments.bases
        for case in CASES
        if case.problem and case.weights is None and base in case.bases
    ]
    found = []
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(_remedied, todo):
            found.append(row)
            print(remedy_lines([row])[-1], flush=True)
    OUTPUT.parent.mkdir(exist_ok=True)
    content = {"date": time.strftime("%Y-%m-%d"), "seeds": arguments.seeds, "rows": found}
    REMEDIES.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    return found


def remedied(base, case, seeds, folder, data_dir):
    """What the remedy of the first finding on the first seed does: the recipe with it and as it is, in pairs."""
    from fromzero import NonFiniteError, new_training, probe, stats
    from fromzero.diagnosis import Finding, diagnose
    from fromzero.evidence import Evidence
    from fromzero.sessions import load_trained

    run, images = trained(base, case, seeds[0], folder, data_dir)
    measures = probe.measure(load_trained(run, images=images, threads=1))
    found = diagnose(Evidence(run.recipe, run.metrics(), measures))
    finding = found[0] if found else Finding("nothing", "", "", "")
    accuracies = {"as it is": [], "remedied": []}
    for seed in seeds if finding.changes else ():
        accuracies["as it is"].append(trained(base, case, seed, folder, data_dir)[0].metrics()[-1]["val/accuracy"])
        recipe = recipe_of(base, case, seed).override(finding.changes)
        name = name_of(base, case, seed) + "-remedied"
        shutil.rmtree(Path(folder) / name, ignore_errors=True)
        training = new_training(recipe, images, runs_dir=folder, name=name, threads=1)
        try:
            for _ in training:
                pass
        except NonFiniteError:
            pass
        rows = training.run.metrics()
        accuracies["remedied"].append(rows[-1]["val/accuracy"] if rows else 0.0)
    row = {"base": base, "case": case.name, "finding": finding.name, "changed": finding.changed, **accuracies}
    if finding.changes:
        pairs = stats.compare(accuracies["remedied"], accuracies["as it is"])
        row |= {"difference": list(pairs.difference), "verdict": stats.verdict(pairs.n, pairs.p, pairs.favourable)}
    return row


def remedy_lines(rows):
    """The second table of docs/diagnosis.md."""
    lines = ["| base | planted | first finding | changed | as it is | remedied | difference, points | verdict |"]
    lines.append("| --- | --- | --- | --- | ---: | ---: | ---: | --- |")
    for row in rows:
        cells = [row["base"], row["case"], row["finding"], row["changed"] or "–"]
        if row["changed"]:
            mean, low, high = (100 * value for value in row["difference"])
            cells += [f"{statistics.mean(row[arm]):.3f}" for arm in ("as it is", "remedied")]
            cells += [f"{mean:+.1f} ({low:+.1f} to {high:+.1f})", row["verdict"]]
        else:
            cells += ["–", "–", "–", "no field to test"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _remedied(task):
    base, number, *rest = task
    return remedied(base, CASES[number], *rest)


def _diagnosed(task):
    base, number, *rest = task
    return diagnosed(base, CASES[number], *rest)


def verdict(row):
    """`first`, `named`, `missed`; of a healthy training `silent` or `false alarm`."""
    right = [name for name in row["found"] if name in row["problem"]]
    if not row["problem"]:
        return "false alarm" if row["found"] else "silent"
    return "missed" if not right else "first" if row["found"][0] in row["problem"] else "named"


def line(row):
    return (
        f"{verdict(row):12} {row['base']:7} {row['case'][:46]:47} seed {row['seed']} train {row['train']:.3f} val"
        f" {row['val']:.3f}  {', '.join(row['found']) or '–'}  | AutoTrainer: {', '.join(row['autotrainer']) or '–'}"
    )


def summary(rows):
    """The sums, as a list, then a table with a row a problem and the healthy trainings."""
    faulty, healthy = ([row for row in rows if bool(row["problem"]) == planted] for planted in (True, False))
    named = sum(verdict(row) in ("first", "named") for row in faulty)
    first = sum(verdict(row) == "first" for row in faulty)
    findings = sum(len(row["found"]) for row in rows)
    silent = sum(not row["found"] for row in healthy)
    raised = [sum(bool(row["autotrainer"]) for row in part) for part in (faulty, healthy)]
    lines = [
        f"- **Recall**: the planted fault is among the findings of {named} of {len(faulty)} trainings"
        f" ({named / max(len(faulty), 1):.3f}), and the first of them in {first}.",
        f"- **Precision**: of {findings} findings {named} are the planted fault ({named / max(findings, 1):.3f}). The"
        " others count as wrong here, although some are true, too: what was left out of a fault's trainings also makes"
        " validation small.",
        f"- **Healthy trainings**: {silent} of {len(healthy)} have no finding.",
        f"- **AutoTrainer's rules** on the same trainings raise something in {raised[0]} of {len(faulty)} faulty ones"
        f" and in {raised[1]} of {len(healthy)} healthy ones. They know of five problems.",
        f"- **Time**: {statistics.median(row['seconds'] for row in rows):.0f} s a diagnosis, the median on one thread.",
        "",
        "| planted | trainings | named | first | what else was found | AutoTrainer's rules raise |",
        "| --- | ---: | ---: | ---: | --- | --- |",
    ]

    def name_of(row):
        return " or ".join(row["problem"]) or "nothing: healthy"

    for name in dict.fromkeys(map(name_of, rows)):
        of = [row for row in rows if name_of(row) == name]
        verdicts = [verdict(row) for row in of]
        others = Counter(other for row in of for other in row["found"] if other not in row["problem"])
        theirs = Counter(other for row in of for other in row["autotrainer"])
        hits = [sum(v in kinds for v in verdicts) for kinds in (("first", "named"), ("first",))]
        shown = ["–", "–"] if name.startswith("nothing") else map(str, hits)
        lines.append(f"| {' | '.join([name, str(len(of)), *shown, counts(others), counts(theirs)])} |")
    return lines


def page(found, remedies):
    """docs/diagnosis.md: what it says of the rules stays, what was measured is written anew."""
    head = PAGE.read_text("utf-8").partition(MEASURED)[0]
    missed = [line(row).split("  | Auto")[0] for row in found["rows"] if verdict(row) in ("missed", "false alarm")]
    trials = [row for row in remedies["rows"] if row["changed"]]
    verdicts = Counter(row["verdict"] for row in trials)
    said = ", ".join(f"{verdicts.get(word, 0)} {word}" for word in ("supported", "undecided", "contradicted"))
    return "\n".join(
        [
            head + MEASURED,
            f"From `python -m benchmarks.diagnosis` on {found['date']}."
            " Each training has one fault planted, or none. There are four kinds: `plain` (Adam, ReLU, dropout, as the"
            " notes' networks, smaller) and `norm` (Muon, batch normalisation, GELU, as `quick`) on 5,000 images of"
            " CIFAR-10, `digits` (SGD with momentum), and `residual` (AdamW, residual blocks, ReLU) on 4,000 images of"
            " CIFAR-10. Thresholds were chosen on the first three with seed 0, and rules were changed after a look at"
            " seeds 10 and 11 of `residual`, seed 10 of the others (docs/log.md). So this says how they hold on other"
            " seeds, and not on kinds of networks or data that are not here.",
            "",
            f"### plain, norm and digits, seeds {seeds_of(found['rows'], residual=False)}",
            *summary([row for row in found["rows"] if row["base"] != "residual"]),
            "",
            f"### residual, seed {seeds_of(found['rows'], residual=True)}",
            *summary([row for row in found["rows"] if row["base"] == "residual"]),
            "",
            "Missed, or raised where nothing was planted:",
            "",
            "```",
            *(missed or ["none"]),
            "```",
            "",
            "AutoTrainer's rules (Zhang et al., ICSE 2021) were written anew from the paper, with its thresholds; what"
            " counts as a swing of accuracy, a turn by 0.03 or more both ways, is our reading.",
            "",
            "## Do the remedies help?",
            "The recipe with what the first finding proposes, beside the recipe as it is, in pairs of seeds"
            f" {remedies['seeds'][0]} to {remedies['seeds'][-1]} ({remedies['date']}; validation accuracy, last epoch,"
            f" 95 % t interval, verdict by the exact sign-flip test): {said}, of {len(trials)}. Faults in the first"
            " weights are not in a recipe and left out.",
            "",
            *remedy_lines(remedies["rows"]),
            "",
        ]
    )


def seeds_of(rows, residual):
    return ", ".join(map(str, sorted({row["seed"] for row in rows if (row["base"] == "residual") == residual})))


def counts(found):
    return ", ".join(f"{name} {count}" for name, count in found.most_common()) or "–"


if __name__ == "__main__":
    main()
