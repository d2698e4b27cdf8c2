"""Which processors to compute on and how much memory there is, from files as Linux keeps them."""

import math
import os
from pathlib import Path

import pytest

from fromzero import InputError, load_images, load_recipe, machine, new_training, resources, resumed_training
from fromzero.resources import available_memory, check_memory
from fromzero.study import pools


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A machine of eight processors, no files that say more about them, and a way to write one."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    for name, place in (
        ("CONTROL_GROUPS", "groups"),
        ("OWN_GROUPS", "own"),
        ("PROCESSORS", "processors"),
        ("MEMORY", "memory"),
    ):
        monkeypatch.setattr(resources, name, tmp_path / place)

    def write(place, text):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(text))

    return write


def test_all_where_nothing_else_is_known(system, monkeypatch):
    assert resources.usable_cores() == list(range(8))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert resources.usable_cores() == [0]


@pytest.mark.parametrize(
    ("siblings", "usable"),
    [(lambda n: f"{n % 4},{n % 4 + 4}\n", [0, 1, 2, 3]), (lambda n: f"{n // 2 * 2}-{n // 2 * 2 + 1}\n", [0, 2, 4, 6])],
)
def test_one_of_each_core(system, monkeypatch, siblings, usable):
    for number in range(8):
        system(f"processors/cpu{number}/topology/thread_siblings_list", siblings(number))
    assert resources.usable_cores() == usable
    assert machine._default_threads() == 4
    assert pools._core_groups(2, 2) == [usable[:2], usable[2:]]
    assert pools._core_groups(4, 2) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert pools._core_groups(9, 1) == [[]] * 9
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 7})
    assert len(resources.usable_cores()) == (1 if usable == [0, 1, 2, 3] else 2)


@pytest.mark.parametrize(
    ("own", "files", "count"),
    [
        ("0::/\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/\n", {"cpu.max": "max 100000"}, 8),
        ("0::/a/b\n", {"cpu.max": "max 100000", "a/cpu.max": "300000 100000", "a/b/cpu.max": "500000 100000"}, 3),
        ("0::/docker/of-the-host\n", {"cpu.max": "150000 100000"}, 2),
        ("0::/../beside\n", {"cpu.max": "20000 100000"}, 1),
        ("9:memory:/\n4:cpu,cpuacct:/x\n0::/\n", {"cpu/x/cpu.cfs_quota_us": "400000"}, 8),
        (
            "4:cpuacct,cpu:/x\n0::/\n",
            {"cpu/x/cpu.cfs_quota_us": "400000", "cpu/x/cpu.cfs_period_us": "100000"},
            4,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("1:cpuset:/\n", {"cpuset/cpu.max": "100000 100000"}, 8),
        ("0::/\n", {"cpu.max": "6400000 100000"}, 8),
        ("0::/\n", {"cpu.max": "100000 0"}, 8),
        ("0::/\n", {"cpu.max": ""}, 8),
        ("0::/\n", {"cpu.max": "149999 100000"}, 1),
        ("0::/\n", {"cpu.max": "150000 100000"}, 2),
        ("0::/\n", {"cpu.max": "250000 100000"}, 3),
        ("0::/a:b\x0b\u2028\udcff\n", {"a:b\x0b\u2028\udcff/cpu.max": "300000 100000"}, 3),
        ("garbage\n0::/\0\n\n", {"cpu.max": "100000 100000"}, 1),
        ("0::/\n", {"cpu.max": "\udcff 100000"}, 8),
    ],
)
def test_no_more_threads_than_a_control_group_grants(system, own, files, count):
    system("own", own)
    for name, text in files.items():
        system(f"groups/{name}", text + "\n")
    assert resources.num_threads() == machine._default_threads() == count
    # How many is not which: nothing is pinned then; nor where cores are left over, which others may sit on as well.
    assert resources.usable_cores() == list(range(8))
    assert pools._core_groups(8, 1) == ([[core] for core in range(8)] if count == 8 else [[]] * 8)
    assert pools._core_groups(7, 1) == [[]] * 7


@pytest.mark.parametrize(
    ("own", "files", "left"),
    [
        ("", {}, 8000 * 1024),
        ("0::/\n", {"memory.max": "max", "memory.current": "5"}, 8000 * 1024),
        ("0::/a\n", {"a/memory.max": "3000000", "a/memory.current": "1000000"}, 2000000),
        ("0::/a\n", {"memory.max": "2500000", "memory.current": "2000000", "a/memory.max": "3000000"}, 500000),
        (
            "0::/\n",
            {
                "memory.max": "3",
                "memory.current": "5",
                "memory.stat": "anon 9\nfile 700\nshmem 100\nslab_reclaimable 50\n",
            },
            650,
        ),
        (
            "9:memory:/x\n4:cpu:/x\n",
            {"memory/x/memory.limit_in_bytes": "5000", "memory/x/memory.usage_in_bytes": "2000"},
            3000,
        ),
        ("9:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, 8000 * 1024),
    ],
)
def test_no_more_memory_than_a_control_group_leaves(system, own, files, left):
    assert available_memory() == math.inf  # where the system does not say
    system("memory", "MemTotal: 16000 kB\nMemAvailable:    8000 kB\nSwapTotal: 9 kB\n")
    system("own", own)
    for name, text in files.items():
        system(f"groups/{name}", text + "\n")
    assert available_memory() == left
    system("memory", "MemAvailable: 8000 kB\nSwapFree: 7 kB\n")
    assert available_memory() == left + 7 * 1024


def test_no_more_swap_than_a_control_group_leaves(system):
    system("memory", "MemAvailable: 8 kB\nSwapFree: 7 kB\n")
    system("own", "0::/a\n")
    system("groups/a/memory.swap.current", "1000\n")
    for most, left in (("max", 7 * 1024), ("3000", 2000), ("0", 0)):
        system("groups/a/memory.swap.max", most + "\n")
        assert available_memory() == 8 * 1024 + left


def test_memory_of_this_machine_is_known_where_linux_says():
    if not Path("/proc/meminfo").exists():
        pytest.skip("not Linux")
    assert 1e7 < available_memory() < math.inf
    check_memory(1, "tests", "nothing")
    assert resources.peak_memory() > 1e7


def test_what_cannot_fit_is_refused_before_anything_is_made(system, tiny_images, tmp_path):
    system("memory", "MemAvailable: 100000 kB\n")
    recipe = load_recipe("train1").override({"precision": "float32"})
    new_training(recipe, tiny_images, runs_dir=tmp_path / "fits", device="cpu").close()
    large = recipe.override({"network.dense": [20000]})
    with pytest.raises(InputError, match=r"steps of 128 images of 32×32 pixels through train1 need at least .* GB"):
        new_training(large, tiny_images, runs_dir=tmp_path / "runs", device="cpu")
    assert not (tmp_path / "runs").exists()
    wide = recipe.override({"network.channels": [[64] * 20], "network.head": "mean"})
    with pytest.raises(InputError, match="make the batch"):
        new_training(wide, tiny_images, runs_dir=tmp_path / "runs", device="cpu")
    for smaller in ({"augment.crop": 8}, {"augment.scale": 0.25, "augment.scale_epochs": 99}, {"batch_size": 2}):
        new_training(wide.override(smaller), tiny_images, runs_dir=tmp_path / "fits", device="cpu").close()


def test_a_run_whose_steps_no_longer_fit_is_left_as_it_was(system, tiny_images, tmp_path):
    system("memory", "MemAvailable: 100000 kB\n")
    recipe = load_recipe("train1").override({"precision": "float32"})
    training = new_training(recipe, tiny_images, runs_dir=tmp_path, device="cpu")
    training.close()
    before = {path: path.read_bytes() for path in training.run.path.rglob("*") if path.is_file()}
    system("memory", "MemAvailable: 1000 kB\n")
    with pytest.raises(InputError, match=r"train1 need at least .* left as it was"):
        resumed_training(training.run, tiny_images)
    assert {path: path.read_bytes() for path in training.run.path.rglob("*") if path.is_file()} == before


def test_pictures_that_cannot_fit_are_refused_before_they_are_read(system, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setenv("FROMZERO_HOME", str(tmp_path / "home"))
    for number in range(6):
        path = tmp_path / "set" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (number, 0, 0)).save(path)
    system("memory", "MemAvailable: 1000 kB\n")
    assert load_images(tmp_path / "set").image_shape == (9, 9, 3)
    with pytest.raises(InputError, match=r"set: 6 pictures of 500×500 pixels need .*set@250 makes them smaller"):
        load_images(f"{tmp_path / 'set'}@500")
