"""The page about a run: its figures on answers made by hand, and what it shows of real runs."""

import json
import os
import re
import warnings
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from PIL import Image

import fromzero
from fromzero import cli
from fromzero.data import Images, ImageSet
from fromzero.errors import FromzeroError, InputError
from fromzero.report import Scored, _doubtful, _mistakes, _told, calibration, page, report
from fromzero.runs import check_named, write_named
from fromzero.trained import load_trained

ARGUMENTS = ["--recipe", "train1", "--epochs", "2", "--threads", "1", "--precision", "float32"]
ARGUMENTS += ["--network.channels", "[[8],[8]]", "--network.pool", "4", "--network.dense", "[16]"]
ARGUMENTS += ["--validation.source", "split", "--validation.fraction", "0.3"]
RECIPE = fromzero.load_recipe("train1").override({"epochs": 1, "network.channels": [[4]], "network.pool": 8})


def scored(labels, probabilities):
    labels = np.array(labels)
    return Scored(np.zeros((len(labels), 4, 4, 3), np.uint8), labels, np.array(probabilities, np.float32), 0.5)


THREE = scored([0, 0, 1, 1, 2], [[0.8, 0.1, 0.1], [0.3, 0.6, 0.1], [0.1, 0.9, 0.0], [0.94, 0.0, 0.06], [0.2, 0.2, 0.6]])


def test_confusions_and_mistakes():
    assert THREE.confusions().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert THREE.mistakes().tolist() == [3, 1]
    assert THREE.accuracy == pytest.approx(3 / 5)


def test_calibration_is_the_distance_of_confidence_and_accuracy():
    bins, error = calibration(THREE)
    assert [(one.low, one.images) for one in bins] == [(0.6, 2), (0.8, 1), (0.9, 2)]
    assert bins[0].confidence == pytest.approx(0.6)
    assert bins[0].accuracy == 0.5
    assert error == pytest.approx((2 * 0.1 + 0.2 + 2 * abs(0.92 - 0.5)) / 5)
    assert calibration(scored([0, 0], [[1.0, 0.0], [1.0, 0.0]]))[1] == 0


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Red and blue pictures in classes whose names are marks in HTML; one of each is in the wrong class."""
    monkeypatch.setenv("FROMZERO_HOME", str(tmp_path / "home"))
    rng = np.random.default_rng(0)
    for name, color in (("<i>red", 0), ("blue & co", 2)):
        (tmp_path / "my pictures" / name).mkdir(parents=True)
        for n in range(60):
            pixels = rng.integers(0, 90, (16, 16, 3), dtype=np.uint8)
            pixels[..., 2 - color if n == 7 else color] += 160
            Image.fromarray(pixels).save(tmp_path / "my pictures" / name / f"{n:03}{'-wrong' * (n == 7)}.png")
    return tmp_path / "my pictures"


def test_a_page_shows_the_pictures_whose_labels_are_wrong_and_no_test_picture(pictures, tmp_path, capsys):
    runs = ["--runs-dir", str(tmp_path / "runs")]
    assert cli.main(["train", str(pictures), *ARGUMENTS, "--epochs", "8", *runs]) == 0
    (run,) = fromzero.list_runs(tmp_path / "runs")
    capsys.readouterr()
    assert cli.main(["report", str(run.path), "--threads", "1"]) == 0
    assert str(run.path / "report.html") in capsys.readouterr().out
    page = (run.path / "report.html").read_text("utf-8")
    images = fromzero.load_images(str(pictures))
    files = set(re.findall(r"[\d]+(?:-wrong)?\.png", page))
    wrong = {file.rpartition("/")[2] for part in (images.train, images.test) for file in part.files if "wrong" in file}
    assert files & wrong
    assert not any(file.replace("&", "&amp;").replace("<", "&lt;") in page for file in images.test.files)
    assert "&lt;i&gt;red" in page
    assert "<i>red" not in page
    assert "blue &amp; co" in page
    assert f"{run.summary['test/accuracy']:.4f}</td>" in page
    assert f"{run.summary['test/loss']:.4f}</td>" in page
    assert f"Outputs are divided by {run.metrics()[-1]['val/temperature']:.2f} first" in page
    assert 'class="quiet">Recipe train1 with epochs = 8, ' in page
    assert "network.dense = [16], " in page
    assert "was scored then, and extended" not in page
    assert f"{run.summary['val/accuracy']:.4f}</td>" in page
    assert f"{run.summary['train/accuracy']:.4f}</td>" in page
    assert "fromzero diagnose" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page), "it needs nothing else"
    assert cli.main(["diagnose", str(run.path), "--threads", "1"]) == 0
    assert cli.main(["report", str(run.path), str(tmp_path / "page.html"), "--threads", "1"]) == 0
    found = json.loads((run.path / "diagnosis.json").read_text("utf-8"))["findings"]
    page = (tmp_path / "page.html").read_text("utf-8")
    assert found
    assert all(f"<b>{finding['name']}</b>" in page for finding in found)
    remarks = json.loads((run.path / "diagnosis.json").read_text("utf-8"))["remarks"]
    assert any("could not be judged" in remark for remark in remarks)
    here = [remark.replace(f"which fromzero report {run.path} shows", "below") for remark in remarks]
    assert here != remarks
    assert all(f"<p>{remark}</p>" in page for remark in here)
    share, count = run.summary["test/accuracy"], len(images.test)
    assert f"<b>Right on {100 * share:.1f} % of {count} test images</b>" in page
    assert f"What may be wrong first: {found[0]['meaning']}" in page
    assert cli.main(["resume", str(run.path), "--epochs", "9", "--threads", "1"]) == 0
    assert cli.main(["report", str(run.path), "--threads", "1"]) == 0
    page = (run.path / "report.html").read_text("utf-8")
    assert "It had ended after epoch 8, was scored then, and extended." in page
    assert "Made after epoch 8, and not for these weights: <code>fromzero diagnose" in page
    assert not any(f"<b>{finding['name']}</b>" in page for finding in found)


def test_pages_of_other_runs(tiny_images, tmp_path):
    """Validated on the test images; before an epoch has ended."""
    run = fromzero.train(RECIPE, tiny_images, runs_dir=tmp_path, threads=1)
    assert cli.main(["report", str(run.path), "--threads", "1", "--checkpoint", "best"]) == 0
    page = (run.path / "report.html").read_text("utf-8")
    assert "Train images" in page
    assert "Validation images" not in page
    assert 'class="matrix' in page
    training = fromzero.new_training(RECIPE, tiny_images, runs_dir=tmp_path, threads=1, name="begun")
    training.close()
    assert cli.main(["report", str(training.run.path), "--threads", "1"]) == 0
    text = (training.run.path / "report.html").read_text("utf-8")
    assert "after epoch 0 (of 1" in text
    assert "Accuracy and loss over the epochs" not in text
    assert "its test images are scored at its end" in text
    assert "By class, validation images" in text


def test_many_classes_have_no_matrix_and_a_class_may_have_no_image(tmp_path):
    rng = np.random.default_rng(0)

    def part(count):
        return Images(rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8), np.arange(count) % 30)

    images = ImageSet(
        "many", part(120), part(29), tuple(f"kind {n}" for n in range(30)), "", {"train": "a", "test": "b"}
    )
    test = Scored(images.test.pixels, images.test.labels, rng.dirichlet(np.ones(30), 29).astype(np.float32), 0.5)
    assert len(test.mistakes()) > 10
    run = fromzero.train(RECIPE, images, runs_dir=tmp_path, threads=1)
    found = load_trained(run, images=images, threads=1)
    text = page(found, run.metrics(), {"train": test, "val": test, "test": test}, None)
    assert 'class="matrix"' not in text
    assert text.count(" taken for ") == 10
    assert "<td>kind 29</td><td>0</td><td>–</td>" in text


def test_a_mistakes_file_is_one_of_its_own_split():
    pixels = np.arange(4 * 12, dtype=np.uint8).reshape(4, 2, 2, 3)
    found = Scored(pixels[:2], np.array([0, 1]), np.array([[0.1, 0.9], [0.8, 0.2]], np.float32), 0.5)
    train = Images(pixels[[0, 1, 0]], np.array([0, 1, 1]), ("a/0.png", "b/1.png", "b/copy of 0.png"))
    shown = _mistakes(found, train)
    assert [one["file"] for one in shown] == ["a/0.png", "b/1.png"]
    assert _mistakes(found, train, 1) == shown[:1]
    assert [(one["label"], one["said"]) for one in shown] == [(0, 1), (1, 0)]
    assert train.take(np.array([2, 0])).files == ("b/copy of 0.png", "a/0.png")
    assert [one["file"] for one in _mistakes(found, Images(pixels, np.zeros(4, int)))] == [None, None]


def test_values_in_words():
    values = (None, True, False, 0, 1, 0.0, 1.0, [[1, 2], [3]], {"a": False, "b": 2})
    assert [_told(v) for v in values] == ["–", "yes", "no", "0", "1", "0.0", "1.0", "[1, 2], [3]", "a no, b 2"]


def test_what_keeps_a_page_from_being_made_is_one_line(tiny_images, tmp_path, capsys):
    run = fromzero.train(RECIPE, tiny_images, runs_dir=tmp_path, threads=1)
    capsys.readouterr()
    assert cli.main(["report", str(run.path), str(tmp_path / "nowhere" / "page.html"), "--threads", "1"]) == 1
    assert "nowhere/page.html: cannot be written" in capsys.readouterr().err
    (tmp_path / "folder").mkdir()
    assert cli.main(["report", str(run.path), str(tmp_path / "folder"), "--threads", "1"]) == 0
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["report.html"]
    for content in ("{", "[]", '{"findings": []}', '{"epoch": 1, "findings": [{"name": "copies"}]}'):
        (run.path / "diagnosis.json").write_text(content)
        with pytest.warns(UserWarning, match=r"diagnosis\.json: damaged"):
            report(load_trained(run, images=tiny_images, threads=1))
        with warnings.catch_warnings(action="ignore"):
            assert cli.main(["report", str(run.path), "--threads", "1"]) == 0
        assert "Not made yet" in (run.path / "report.html").read_text("utf-8")


def test_a_file_that_is_named_replaces_no_device_no_link_and_nothing_of_a_run(tiny_images, tmp_path, capsys):
    run = fromzero.train(RECIPE, tiny_images, runs_dir=tmp_path, threads=1)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    own = [run.path / "recipe.toml", run.path / "lock", run.path / "checkpoints" / "last.safetensors"]
    for target in (tmp_path / "pipe", *own):
        for command in (["report", run.path, target], ["export", run.path, target], ["lessons", "--write", target]):
            assert cli.main(list(map(str, command))) == 2
            assert re.match(rf"fromzero: {target} is .*; name (a|another) file\n$", capsys.readouterr().err)
    assert cli.main(["export", str(run.path), str(tmp_path / "folder")]) == 2
    assert "folder is a folder; name a file" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    assert not list(tmp_path.glob("*-pictures"))
    assert cli.main(["report", str(run.path), "/dev/stdout"]) == 2
    assert "/dev/stdout is no" in capsys.readouterr().err
    (tmp_path / "README").write_text("mine")
    assert cli.main(["lessons", "--write", str(tmp_path / "README")]) == 2
    assert (tmp_path / "README").read_text() == "mine"
    picture = tmp_path / "photo.jpg"
    picture.write_bytes(b"a picture")
    for command in (
        ["report", run.path, picture],
        ["export", run.path, picture],
        ["export", run.path, tmp_path / "model.onnx", "--card", picture],
        ["lessons", "--write", picture],
    ):
        assert cli.main([*map(str, command)]) == 2
        assert re.search(r"photo\.jpg is no \.\w+ file by its name; name another file", capsys.readouterr().err)
    assert picture.read_bytes() == b"a picture"
    other = fromzero.train(RECIPE, tiny_images, runs_dir=tmp_path, threads=1)
    assert cli.main(["report", str(run.path), str(other.path)]) == 2
    assert f"{other.path} is another run; a page is about one: fromzero report" in capsys.readouterr().err
    assert cli.main(["report", str(run.path), str(run.path), "--threads", "1"]) == 0
    (tmp_path / "link.html").symlink_to("page.html")
    for _ in range(2):
        write_named(tmp_path / "link.html", b"a page", ".html")
        assert (tmp_path / "link.html").is_symlink()
        assert (tmp_path / "page.html").read_bytes() == b"a page"
    (tmp_path / "loop.html").symlink_to("loop.html")
    write_named(tmp_path / "loop.html", b"a page", ".html")
    assert (tmp_path / "loop.html").read_bytes() == b"a page"
    with ProcessPoolExecutor(2) as pool:  # a reader finds one whole page or the other, and nothing else is left
        writers = [pool.submit(_write_often, tmp_path / "page.html", letter) for letter in (b"a", b"b")]
        while not all(writer.done() for writer in writers):
            assert (tmp_path / "page.html").read_bytes() in (b"a page", b"a" * 100_000, b"b" * 100_000)
    assert [writer.result() for writer in writers] == [None, None]
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(FromzeroError, match=r"none/page\.html: cannot be written: No such file or directory"):
        write_named(tmp_path / "none" / "page.html", b"a page", ".html")


def _write_often(path, letter):
    for _ in range(50):
        write_named(path, letter * 100_000, ".html")


def test_images_of_one_channel_have_a_page_and_no_predictions(tmp_path, capsys):
    rng = np.random.default_rng(0)

    def part(count):
        return Images(rng.integers(0, 256, (count, 16, 16, 1), dtype=np.uint8), np.arange(count) % 2)

    images = ImageSet("grey", part(40), part(10), ("a", "b"), "", {"train": "a", "test": "b"})
    run = fromzero.train(RECIPE, images, runs_dir=tmp_path, threads=1)
    assert "data:image/png" in report(load_trained(run, images=images, threads=1))
    picture = tmp_path / "x.png"
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(picture)
    capsys.readouterr()
    assert cli.main(["predict", str(run.path), str(picture)]) == 2
    assert "its images have 1 channel; pictures are read as red, green, blue" in capsys.readouterr().err


def test_a_runs_own_records_and_its_weights_folder_are_no_place_for_a_page(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "recipe.toml").touch()
    (tmp_path / "link.html").symlink_to(tmp_path / "run" / "metrics.jsonl")
    for path in ("run/checkpoints/page.html", "run/recipe.toml", "run/splits.csv", "link.html"):
        with pytest.raises(InputError, match="keeps its own records and weights"):
            check_named(tmp_path / path, ".html")
    for path in ("run/page.html", "checkpoints/page.html"):
        check_named(tmp_path / path, ".html")


def test_copies_among_the_mistakes_are_named_together():
    pixels, labels = np.zeros((3, 4, 4, 3), np.uint8), np.zeros(3, np.int64)
    pixels[2] = 9
    scored = Scored(pixels, labels, np.array([[0.1, 0.9], [0.1, 0.9], [0.2, 0.8]], np.float32), 0.5)
    found = _mistakes(scored, Images(pixels, labels, ("a.png", "b.png", "c.png")))
    assert [one["file"] for one in found] == ["a.png and b.png", "a.png and b.png", "c.png"]


def test_a_diagnosis_of_before_a_cross_validation_is_called_so(pictures, tmp_path):
    assert cli.main(["train", str(pictures), *ARGUMENTS, "--runs-dir", str(tmp_path / "runs")]) == 0
    (run,) = fromzero.list_runs(tmp_path / "runs")

    def page():
        assert cli.main(["report", str(run.path), str(tmp_path / "page.html"), "--threads", "1"]) == 0
        return (tmp_path / "page.html").read_text("utf-8")

    before = "before the cross-validation whose outcome is below"
    assert cli.main(["diagnose", str(run.path), "--threads", "1"]) == 0
    assert before not in page()
    assert cli.main(["cross-validate", str(run.path), "--folds", "2", "--jobs", "1", "--threads", "1"]) == 0
    told = page()
    assert before in told
    assert f"{run.path / 'folds' / 'labels.csv'}" in told
    recorded = json.loads((run.path / "diagnosis.json").read_text("utf-8"))
    del recorded["cross_validated"]  # as an earlier fromzero left it
    (run.path / "diagnosis.json").write_text(json.dumps(recorded))
    assert before not in page()
    assert cli.main(["diagnose", str(run.path), "--threads", "1"]) == 0
    assert before not in page()


def test_doubtful_labels_that_are_not_of_these_images_are_left_out(tiny_images):
    name = tiny_images.class_names[0]
    row = {
        "image": 0,
        "file": None,
        "label": name,
        "looks_like": name,
        "label_probability": 0.1,
        "looks_like_probability": 0.9,
    }
    wrong = [{"image": len(tiny_images.train)}, {"label": "none such"}]
    assert len(_doubtful([row, *({**row, **one} for one in wrong)], tiny_images)) == 1
