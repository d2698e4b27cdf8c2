"""What the tests share: CIFAR-10 where it is, and small folders in its layout where it is not needed."""

import pickle
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest

from fromzero.data import load_images

# A shell's background job has Ctrl-C ignored, and so would everything that a test starts and then interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# And under nohup a hang-up; with a handler it is ignored here still, but not by the processes that tests start.
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)


class Python2Pickler(pickle._Pickler):
    """Writes as Python 2 did, whose pickles the published python batches are: every string is a plain byte string."""

    def save_string(self, text):
        raw = text.encode("latin-1") if isinstance(text, str) else text
        self.write(b"T" + len(raw).to_bytes(4, "little") + raw)

    dispatch = pickle._Pickler.dispatch | {str: save_string, bytes: save_string}


def dump_python2(content, path):
    with open(path, "wb") as file:
        Python2Pickler(file, protocol=2).dump(content)
    path.write_bytes(path.read_bytes().replace(b"cnumpy._core.", b"cnumpy.core."))


@pytest.fixture(scope="session")
def cifar10_dir():
    """The folder that holds cifar-10-batches-bin."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not (folder / "cifar-10-batches-bin").is_dir():
        pytest.skip("CIFAR-10 is not at ../shared/data")
    return folder


CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(scope="session")
def write_cifar():
    """write_cifar(folder): images that a network can learn, in CIFAR's layout; the same in either layout."""

    def write(folder, layout="binary", per_batch=20, batches=5, seed=0, classes=10):
        folder.mkdir(parents=True, exist_ok=True)
        patterns = np.random.default_rng(0).integers(40, 215, (classes, 3, 4, 4)).repeat(8, 2).repeat(8, 3)
        rng = np.random.default_rng(seed)
        names = [*CIFAR10_NAMES, *(f"class{n}" for n in range(10, classes))][:classes]
        for batch in (*(f"data_batch_{n}" for n in range(1, batches + 1)), "test_batch"):
            labels = rng.permutation(np.arange(per_batch) % classes).astype(np.uint8)
            noise = rng.normal(0, 20, (per_batch, 3, 32, 32))
            rows = np.clip(patterns[labels] + noise, 0, 255).astype(np.uint8).reshape(per_batch, -1)
            if layout == "binary":
                (folder / f"{batch}.bin").write_bytes(np.column_stack([labels, rows]).tobytes())
            else:
                files = [f"{names[label]}_s_{n:06}.png" for n, label in enumerate(labels)]
                content = {"batch_label": batch, "labels": labels.tolist(), "data": rows, "filenames": files}
                dump_python2(content, folder / batch)
        if layout == "binary":
            (folder / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
        else:
            meta = {"num_cases_per_batch": per_batch, "label_names": names, "num_vis": 3072}
            dump_python2(meta, folder / "batches.meta")
        return folder

    return write


@pytest.fixture(scope="session")
def tar_cifar():
    """tar_cifar(folder, archive): the folder's files as members under the name that the published archives use."""

    def pack(folder, archive, under="cifar-10-batches-bin"):
        with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
            tar.add(folder, under)
        return archive

    return pack


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory, write_cifar):
    """200 train and 40 test images of ten classes."""
    return load_images(write_cifar(tmp_path_factory.mktemp("data") / "tiny", per_batch=40))


@pytest.fixture
def bare_machine(tmp_path, monkeypatch):
    """No data set anywhere and no way out: an empty folder that is home, cache and working folder at once."""
    for name in ("KERAS_HOME", "XDG_CACHE_HOME", "FROMZERO_CIFAR10_MIRROR"):
        monkeypatch.delenv(name, raising=False)
    for scheme in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{scheme}_proxy", raising=False)
        monkeypatch.delenv(f"{scheme.upper()}_PROXY", raising=False)
    home = tmp_path / "bare"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("FROMZERO_HOME", str(home / "fromzero"))
    monkeypatch.chdir(home)
    monkeypatch.setattr("fromzero.data.download.MIRRORS", ())
    return home
