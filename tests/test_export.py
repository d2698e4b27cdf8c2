"""Exported models compute what the network computes, as other programs see them."""

import json
import os
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch

import fromzero
from fromzero import checkpoint, cli, export
from fromzero.card import card
from fromzero.data.images import Images, ImageSet
from fromzero.errors import InputError
from fromzero.recipe import load_recipe, recipe_names
from fromzero.scores import own_scores
from fromzero.stats import wilson_interval
from fromzero.trained import load_classifier, load_trained

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


@pytest.fixture(scope="module")
def run(tiny_images, tmp_path_factory):
    """A run of three epochs, 40 images held out of 200."""
    changes = {"network.channels": [[8], [8], [8]], "epochs": 3, "batch_size": 50, "validation.fraction": 0.2}
    folder = tmp_path_factory.mktemp("runs")
    return fromzero.train(load_recipe("quick").override(changes), tiny_images, runs_dir=folder, threads=1)


@pytest.fixture
def copied(run, tmp_path):
    return fromzero.load_run(shutil.copytree(run.path, tmp_path / run.name))


def changed(run, file, **changes):
    """Other records in a run's folder."""
    path = run.path / file
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def test_a_card_says_what_is_recorded_of_the_weights(copied, tiny_images, tmp_path, capsys):
    page = tmp_path / "card.md"
    assert cli.main(["export", str(copied.path), "--card", str(page)]) == 0
    text = page.read_text("utf-8")
    assert onnx.load(copied.path / f"{copied.name}.onnx").doc_string == text
    low, high = wilson_interval(copied.summary["test/accuracy"], len(tiny_images.test))
    interval = f"({low:.4f}–{high:.4f}, 95 % for {len(tiny_images.test)} images)"
    assert f"- Test images: **{copied.summary['test/accuracy']:.4f}** {interval}.\n" in text
    scores = own_scores(load_trained(copied, images=tiny_images))["scores"]["test"]
    worst = min((name for name in scores["recalls"]), key=lambda name: scores["recalls"][name])
    told = f"`{worst}` {scores['recalls'][worst]:.3f} (of {scores['class_images'][worst]})"
    assert f"- Test images by class: {told}, " in text
    most = max(scores["class_images"], key=lambda name: scores["class_images"][name])
    share = scores["class_images"][most] / len(tiny_images.test)
    mean = sum(scores["recalls"].values()) / len(scores["recalls"])  # of as many images each
    assert f". Their mean is {mean:.4f}. To always say `{most}` is right for {share:.1%} of the images.\n" in text
    assert f"- Validation images: {copied.metrics()[-1]['val/accuracy']:.4f}.\n" in text
    assert f"output: {', '.join(f'`{name}`' for name in tiny_images.class_names)}." in text
    assert "Trained from scratch. Weights after epoch 3 of 3, at step" in text
    assert "recipe `quick with epochs" not in text  # which are its own
    assert "recipe `quick with batch_size = 50, network.channels = [[8], [8], [8]], validation.fraction = 0.2`" in text
    assert "160 images to train on, 40 others for validation, 40 for the test." in text
    assert "was not asked about these weights" in text
    assert "judged by one of" not in text
    assert cli.main(["cross-validate", str(copied.path), "--folds", "3", "--jobs", "1"]) == 0
    folds = copied.cross_validation
    said = f"one of 3 other networks, trained by the same recipe without it: **{folds['accuracy']:.4f}** ("
    assert said in card(load_classifier(copied))
    begun_with = {"run": "another", "recipe": "quick", "step": 3, "left": []}
    changed(copied, "provenance.json", **{"from": begun_with})  # the folds begin with random weights
    assert said not in card(load_classifier(copied))
    changed(copied, "provenance.json", **{"from": None})
    assert said in card(load_classifier(copied))
    changed(copied, "folds/result.json", epochs=9)  # as where the run was extended since
    assert said not in card(load_classifier(copied))
    assert cli.main(["diagnose", str(copied.path)]) == 0
    finding = copied.diagnosis["findings"][0]
    assert f"`fromzero diagnose` found: {finding['meaning']} (*{finding['name']}*): " in card(load_classifier(copied))
    changed(copied, "diagnosis.json", findings=[])
    assert "found none of the problems that it could judge" in card(load_classifier(copied))
    changed(copied, "diagnosis.json", epoch=2)
    assert "was not asked about these weights" in card(load_classifier(copied))
    for wrong in (copied.path / "metrics.jsonl", copied.path / f"{copied.name}.onnx", tmp_path / "nowhere" / "card.md"):
        before = wrong.read_bytes() if wrong.exists() else None
        assert cli.main(["export", str(copied.path), "--card", str(wrong)]) == 2
        assert str(wrong) in capsys.readouterr().err
        assert (wrong.read_bytes() if wrong.exists() else None) == before


def test_a_card_is_of_its_weights_and_no_others(copied):
    """Of those of an epoch before the last, of a stop within an epoch, and of a first epoch that did not end."""
    last, rows = load_classifier(copied), copied.metrics()

    def with_state(file="last", **state):
        path = copied.checkpoints / f"{file}.safetensors"
        return card(last._replace(checkpoint=last.checkpoint._replace(state=state, path=path)))

    best = with_state("best", epoch=2)
    assert "epoch 2 of 3, the best on validation" in best
    assert f"- Validation images: {rows[1]['val/accuracy']:.4f}, by which these weights were chosen." in best
    assert "- Test images: not recorded of these weights" in best
    for epoch in (2, 0):
        stopped = with_state(epoch=epoch, step=rows[1]["step"] + 1)
        assert "- Nothing is recorded of exactly these weights" in stopped
        assert f"after epoch {epoch} of 3, at step {rows[1]['step'] + 1}." in stopped
        assert "Validation images:" not in stopped


def test_a_card_tells_where_weights_come_from_and_what_test_images_have_seen(copied):
    origin = {"run": "a`b\nc", "recipe": "few", "step": 9, "left": []}
    machine = copied.provenance["machine"]
    before = {"machine": machine, "epochs": [1, 3], "summary": copied.summary}
    changed(copied, "provenance.json", **{"from": origin, "resumed": [before]})
    text = card(load_classifier(copied))
    assert "Trained on from the weights of another run, `` a`b c `` (`few`)." in text
    assert "from scratch" not in text
    assert "They were scored before, after epoch 3, and the run was extended then." in text


@pytest.mark.parametrize("which", ["last", "best"])
def test_the_card_of_a_run_watched_by_its_test_images_says_so(which, tiny_images, tmp_path):
    text = card(load_classifier(trained("train1", tiny_images, tmp_path), which))
    assert ("training was watched by the same images" in text) == (which == "last")
    assert ("chosen by the same images, so it flatters" in text) == (which == "best")
    assert "Validation images:" not in text


@pytest.mark.skipif(sys.platform == "darwin", reason="names of its files are text")
def test_a_run_whose_name_is_no_text_is_exported(copied, tmp_path):
    path = shutil.copytree(copied.path, os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    assert cli.main(["export", path, "--card", str(tmp_path / "card.md")]) == 0
    assert (tmp_path / "card.md").read_text("utf-8").startswith("# caf?")


def test_what_is_no_precision_is_refused(copied, tiny_images):
    for load in (load_classifier, partial(load_trained, images=tiny_images)):
        with pytest.raises(InputError, match="precision 'float23': auto, bfloat16 or float32"):
            load(copied, precision="float23")


def test_damage_that_a_model_does_not_need_spoils_the_card_only(copied, tmp_path, capsys):
    (copied.path / "diagnosis.json").write_text("{}")
    assert cli.main(["export", str(copied.path), "--card", str(tmp_path / "card.md")]) == 1
    assert "diagnosis.json: damaged" in capsys.readouterr().err
    assert cli.main(["export", str(copied.path)]) == 0


def test_a_runtime_computes_the_same(tiny_images, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    run = trained("best", tiny_images, tmp_path)
    assert cli.main(["export", str(run.path), str(tmp_path / "model.onnx"), "--checkpoint", "best"]) == 0
    classifier = load_classifier(run, "best", precision="float32", device="cpu")
    pixels = tiny_images.test.pixels
    ours = classifier.predict(torch.from_numpy(pixels)).numpy()
    (theirs,) = runtime.InferenceSession(tmp_path / "model.onnx").run(None, {"pixels": pixels})
    np.testing.assert_allclose(theirs, ours, atol=2e-5)


def test_a_wrong_model_of_a_network_that_is_sure_of_everything_is_refused(copied, tmp_path, capsys, monkeypatch):
    """Its probabilities are ones and zeros, right or wrong."""
    last = copied.checkpoints / "last.safetensors"
    found = checkpoint.load(last)
    found.tensors["model/predictions.weight"] *= 1e5
    checkpoint.save(last.parent, found, keep=1)
    command = ["export", str(copied.path), str(tmp_path / "model.onnx")]
    assert cli.main(command) == 0
    (tmp_path / "model.onnx").unlink()
    add = export._Graph.add
    monkeypatch.setattr(
        export._Graph,
        "add",
        lambda graph, kind, *rest, **options: add(graph, kind.replace("Gelu", "Relu"), *rest, **options),
    )
    capsys.readouterr()
    assert cli.main(command) == 1
    assert "its log-probabilities as ONNX would be off by" in capsys.readouterr().err
    assert not (tmp_path / "model.onnx").exists()


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
