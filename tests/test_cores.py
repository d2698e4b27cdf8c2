"""Which processors to compute on, from files as Linux keeps them."""

import os

import pytest

from fromzero import cores, machine
from fromzero.study import pools


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A machine of eight processors, no files that say more about them, and a way to write one."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    for name, place in (("CONTROL_GROUPS", "groups"), ("OWN_GROUPS", "own"), ("PROCESSORS", "processors")):
        monkeypatch.setattr(cores, name, tmp_path / place)

    def write(place, text):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(text))

    return write


def test_all_where_nothing_else_is_known(system, monkeypatch):
    assert cores.usable_cores() == list(range(8))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores.usable_cores() == [0]


@pytest.mark.parametrize(
    ("siblings", "usable"),
    [(lambda n: f"{n % 4},{n % 4 + 4}\n", [0, 1, 2, 3]), (lambda n: f"{n // 2 * 2}-{n // 2 * 2 + 1}\n", [0, 2, 4, 6])],
)
def test_one_of_each_core(system, monkeypatch, siblings, usable):
    for number in range(8):
        system(f"processors/cpu{number}/topology/thread_siblings_list", siblings(number))
    assert cores.usable_cores() == usable
    assert machine._default_threads() == 4
    assert pools._core_groups(2, 2) == [usable[:2], usable[2:]]
    assert pools._core_groups(4, 2) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert pools._core_groups(9, 1) == [[]] * 9
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 7})
    assert len(cores.usable_cores()) == (1 if usable == [0, 1, 2, 3] else 2)


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
    assert cores.num_threads() == machine._default_threads() == count
    # How many is not which: nothing is pinned then; nor where cores are left over, which others may sit on as well.
    assert cores.usable_cores() == list(range(8))
    assert pools._core_groups(8, 1) == ([[core] for core in range(8)] if count == 8 else [[]] * 8)
    assert pools._core_groups(7, 1) == [[]] * 7
