"""What a run computes on: chosen from the machine, recorded, and compared."""

from dataclasses import asdict

import pytest
import torch

from fromzero import machine
from fromzero.errors import InputError


@pytest.mark.parametrize(
    ("asked", "features", "chosen"),
    [
        ("auto", ["amx_bf16"], "bfloat16"),
        ("auto", ["avx512_bf16"], "bfloat16"),
        ("auto", [], "float32"),
        ("float32", ["amx_bf16"], "float32"),
        ("bfloat16", [], "bfloat16"),
    ],
)
def test_bfloat16_only_where_it_is_fast_unless_asked_for(asked, features, chosen, monkeypatch):
    monkeypatch.setattr(machine, "_bfloat16_features", lambda: features)
    assert machine.prepare(asked, device="cpu", threads=1).precision == chosen


@pytest.mark.skipif(
    not hasattr(torch.cpu, "get_capabilities"), reason="this torch has no get_capabilities to compare with"
)
def test_a_torch_without_get_capabilities_sees_the_same_instructions(monkeypatch):
    here = machine._bfloat16_features()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert machine._bfloat16_features() == here


def test_threads_are_those_of_the_process_unless_asked_for(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert machine.prepare(device="cpu", threads=1).threads == torch.get_num_threads() == 1
    assert machine.prepare(device="cpu").threads == torch.get_num_threads() >= 1
    usable = machine.prepare(device="cpu").threads
    for given, threads in (("1", 1), ("4096", usable), ("many", usable)):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert machine.prepare(device="cpu").threads == threads
    with pytest.raises(InputError, match="threads: 0"):
        machine.prepare(device="cpu", threads=0)


def test_every_difference_is_named():
    here = machine.prepare(device="cpu", threads=1)
    assert here.differences(asdict(here)) == []
    assert here.differences(asdict(here) | {"threads": 7, "torch": "1.0"}) == [
        "threads: 7 → 1",
        f"torch: 1.0 → {torch.__version__}",
    ]
