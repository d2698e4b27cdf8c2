"""Wrong labels planted in train images: how many of them `fromzero cross-validate` lists first.

    python -m benchmarks.labels --data-dir DIR [--sets cifar10:1600 …] [--shares 0.1 …] [--seeds 0 …] [--confused]

Each time, so many train images of an image set, chosen at random, get the label of any other class or, --confused, of
one that it is easily taken for, and all are written as pictures into a folder; `few` trains on that, and is
cross-validated. Prints a line each: the accuracy, how many of the images that the networks are surest of have another
label, and of the first 24 in labels.csv, and of as many as are wrong, the share that is.
"""

import argparse
import csv
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import fromzero
from fromzero.data import split_name
from fromzero.study.folds import fold_result, prepare_folds

# Classes that are easily taken for each other, by their places in the image set's names.
CONFUSED = {"cifar10": ((0, 8), (1, 9), (2, 6), (3, 5), (4, 7)), "digits": ((3, 8), (4, 9), (1, 7), (5, 6), (0, 2))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir")
    parser.add_argument("--sets", nargs="+", default=["cifar10:1600"])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.0, 0.05, 0.1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--confused", action="store_true")
    arguments = parser.parse_args()
    print(
        "| train images | wrong labels | accuracy, as labelled | of the surest, labelled otherwise"
        " | of the first 24, wrong | of as many as are wrong |\n|---|---|---|---|---|---|"
    )
    for name in arguments.sets:
        images = fromzero.load_images(name, data_dir=arguments.data_dir)
        for share in arguments.shares:
            for seed in arguments.seeds:
                with tempfile.TemporaryDirectory() as folder:
                    print(row(images, share, seed, arguments.confused, Path(folder)), flush=True)


def row(images, share, seed, confused, folder):
    """A line of the table."""
    dataset = folder / "pictures"
    wrong = write(images, share, seed, confused, dataset)
    changes = {"dataset": str(dataset), "seed": seed}
    if split_name(images.name)[0] == "digits":
        changes["augment.flip"] = "none"
    run = fromzero.train(fromzero.load_recipe("few").override(changes), runs_dir=folder / "runs")
    found = prepare_folds(run, 5)
    for event in found:
        assert event.kind != "failed", event.text
    result = fold_result(found)
    with open(found.folder / "labels.csv", newline="", encoding="utf-8") as file:
        is_wrong = [line["file"] in wrong for line in csv.DictReader(file)]
    surest = result["surest"]
    listed = [f"{np.mean(is_wrong[:most]):.2f}" if most else "–" for most in (24 if wrong else 0, len(wrong))]
    cells = (
        f"{images.name}, seed {seed}: {len(images.train):,}",
        f"{len(wrong):,}",
        f"{result['accuracy']:.3f}",
        f"{surest['wrong']} of {surest['of']}",
        *listed,
    )
    return f"| {' | '.join(cells)} |"


def write(images, share, seed, confused, folder):
    """The images as pictures in class folders, so many in another's; the names of these under `folder`."""
    rng = np.random.default_rng(seed)
    wrong = set()
    chosen = rng.permutation(len(images.train))[: round(share * len(images.train))]
    labels = images.train.labels.copy()
    if confused:
        other = {a: b for pair in CONFUSED[split_name(images.name)[0]] for a, b in (pair, pair[::-1])}
        labels[chosen] = [other[label] for label in labels[chosen].tolist()]
    else:
        labels[chosen] = (labels[chosen] + rng.integers(1, images.num_classes, len(chosen))) % images.num_classes
    for split, pixels, given in (
        ("train", images.train.pixels, labels),
        ("test", images.test.pixels, images.test.labels),
    ):
        for number, (picture, label) in enumerate(zip(pixels, given, strict=True)):
            file = Path(split, images.class_names[label], f"{number}.png")
            if split == "train" and label != images.train.labels[number]:
                wrong.add(file.as_posix())
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / file, compress_level=1)
    return wrong


if __name__ == "__main__":
    main()
