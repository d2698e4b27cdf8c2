"""What a run computes on: chosen from the machine, recorded, and compared."""

import os
import subprocess
import sys
from dataclasses import asdict, replace

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


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes this machine seem to have a GPU of some compute capability, which computes or does not."""

    def seem(capability=(8, 0), *, computes=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda kind: "Some GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda kind: capability)
        monkeypatch.setattr(machine.Machine, "set_up", lambda self: None)
        if computes:
            monkeypatch.setattr(torch, "zeros", lambda *size, device: None)

    return seem


def test_a_gpu_computes_in_what_it_has(gpu):
    gpu((8, 0))
    here = machine.prepare()
    assert (here.device, here.processor, here.precision) == ("cuda", "Some GPU", "bfloat16")
    assert here.instructions.startswith("compute capability 8.0, cuDNN")
    gpu((7, 5))
    assert machine.prepare().precision == machine.prepare("float32").precision == "float32"
    with pytest.raises(
        InputError, match="Some GPU does not compute in bfloat16; use --device cpu, or --precision float32"
    ):
        machine.prepare("bfloat16")


def test_a_gpu_that_this_torch_cannot_use_is_named(gpu):
    gpu(computes=False)
    with pytest.raises(InputError, match=r"device cuda: PyTorch cannot compute there .*; use --device cpu"):
        machine.prepare()


def test_a_gpu_is_made_to_compute_the_same_each_time(monkeypatch):
    here = machine.prepare("float32", device="cpu", threads=1)
    for given, used in ((None, ":4096:8"), (":16:8", ":16:8"), (":0:0", ":4096:8")):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given or "")
        try:
            replace(here, device="cuda").set_up()
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "ieee"
            assert torch.backends.cudnn.allow_tf32 is False  # which torch reads to export, and raises where they differ
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == used
        finally:
            torch.set_deterministic_debug_mode("default")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no process is forked here")
def test_a_forked_process_says_that_several_threads_would_hang():
    program = """
import os, sys
from fromzero import machine
machine.prepare("float32", device="cpu", threads=2)
if not os.fork():
    machine.prepare("float32", device="cpu", threads=1)
    try:
        machine.prepare("float32", device="cpu", threads=2)
    except machine.InputError as error:
        print(error)
    sys.stdout.flush()
    os._exit(0)
os.wait()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "this process was forked from one that had computed with 2 threads, so 2 would hang here" in done.stdout
    assert (done.returncode, done.stderr) == (0, "")
