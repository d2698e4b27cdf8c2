"""Exported models compute what the network computes, as other programs see them."""

import json
import sys

import numpy as np
import pytest
import torch

import fromzero
from fromzero import cli
from fromzero.card import card
from fromzero.data.images import Images, ImageSet
from fromzero.recipe import load_recipe, recipe_names
from fromzero.stats import wilson_interval
from fromzero.trained import load_classifier

onnx = pytest.importorskip("onnx")


def trained(name, images, folder):
    """A run of a built-in recipe with an eighth of its channels, of one epoch."""
    recipe = load_recipe(name)
    narrow = [[max(16, channels // 8) for channels in block] for block in recipe.network.channels]
    changes = {"network.channels": narrow, "epochs": 1, "batch_size": 50, "proxy_channels": []}
    if recipe.network.dense:
        changes["network.dense"] = [16] * len(recipe.network.dense)
    return fromzero.train(recipe.override(changes), images, runs_dir=folder, threads=1)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipes_network_computes_the_same(name, tiny_images, tmp_path, capsys):
    run = trained(name, tiny_images, tmp_path)
    assert cli.main(["export", str(run.path)]) == 0
    path = run.path / f"{run.name}.onnx"
    assert str(path) in capsys.readouterr().out
    model = onnx.load(path)
    classifier = load_classifier(run, precision="float32", device="cpu")
    pixels = tiny_images.test.pixels[:10]
    ours = classifier.predict(torch.from_numpy(pixels)).numpy()
    (theirs,) = onnx.reference.ReferenceEvaluator(model).run(None, {"pixels": pixels})
    np.testing.assert_allclose(theirs, ours, atol=2e-5)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(properties["classes"]) == list(tiny_images.class_names)
    assert properties["recipe_fingerprint"] == run.recipe.fingerprint()


def test_a_card_says_what_is_recorded_of_the_weights(tiny_images, tmp_path, capsys):
    recipe = load_recipe("quick").override({"network.channels": [[8], [8], [8]], "epochs": 3, "batch_size": 50})
    run = fromzero.train(recipe, tiny_images, runs_dir=tmp_path, threads=1)
    page = tmp_path / "card.md"

    def written(*options):
        assert cli.main(["export", str(run.path), "--card", str(page), *options]) == 0
        assert onnx.load(run.path / f"{run.name}.onnx").doc_string == page.read_text("utf-8")
        return page.read_text("utf-8")

    last = written()
    low, high = wilson_interval(run.summary["test/accuracy"], len(tiny_images.test))
    interval = f"({low:.4f}–{high:.4f}, 95 % for {len(tiny_images.test)} images)"
    assert f"- Test images: **{run.summary['test/accuracy']:.4f}** {interval}; they decided nothing." in last
    assert f"- Validation images: {run.metrics()[-1]['val/accuracy']:.4f}." in last
    assert f"output: {', '.join(f'`{name}`' for name in tiny_images.class_names)}." in last
    assert "not looked at by `fromzero diagnose`" in last
    assert cli.main(["diagnose", str(run.path)]) == 0
    diagnosis = run.diagnosis["findings"][0]
    assert f"*{diagnosis['name']}*: {diagnosis['meaning']}" in written()
    best = run.summary["best/epoch"]
    if best < 3:
        assert "- Test images: not scored;" in written("--checkpoint", "best")
    assert f"of epoch {best} of 3" in written("--checkpoint", "best")
    assert cli.main(["export", str(run.path), "--card", str(run.path / "metrics.jsonl")]) == 2
    assert "records" in capsys.readouterr().err


def test_the_card_of_a_run_watched_by_its_test_images_says_so(tiny_images, tmp_path):
    text = card(load_classifier(trained("train1", tiny_images, tmp_path)))
    assert "training was watched by the same images" in text
    assert "Validation" not in text


def test_a_runtime_computes_the_same(tiny_images, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    run = trained("best", tiny_images, tmp_path)
    assert cli.main(["export", str(run.path), str(tmp_path / "model.onnx"), "--checkpoint", "best"]) == 0
    classifier = load_classifier(run, "best", precision="float32", device="cpu")
    pixels = tiny_images.test.pixels
    ours = classifier.predict(torch.from_numpy(pixels)).numpy()
    (theirs,) = runtime.InferenceSession(tmp_path / "model.onnx").run(None, {"pixels": pixels})
    np.testing.assert_allclose(theirs, ours, atol=2e-5)


def test_images_that_are_not_square_and_two_classes(tmp_path):
    rng = np.random.default_rng(0)

    def part(count):
        return Images(rng.integers(0, 256, (count, 20, 28, 3), dtype=np.uint8), np.arange(count) % 2)

    prints = {"train": "a", "test": "b"}
    images = ImageSet("odd", part(40), part(10), ("left", "right"), "made up", prints)
    run = trained("quick", images, tmp_path)
    assert cli.main(["export", str(run.path)]) == 0
    model = onnx.load(run.path / f"{run.name}.onnx")
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim][1:] == [20, 28, 3]


def test_what_cannot_be_exported_is_one_line(tiny_images, tmp_path, capsys, monkeypatch):
    run = trained("train1", tiny_images, tmp_path)
    assert cli.main(["export", str(run.path), str(tmp_path / "nowhere" / "model.onnx")]) == 1
    assert "nowhere/model.onnx: cannot be written: No such file or directory" in capsys.readouterr().err
    assert cli.main(["export", "nothing", "--runs-dir", str(tmp_path)]) == 2
    assert "no run 'nothing'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnx.reference", None)
    assert cli.main(["export", str(run.path)]) == 2
    assert "pip install onnx" in capsys.readouterr().err
