"""Checkpoints: nothing lost, everything checked, no code from files."""

import json
import struct

import pytest
import torch

from fromzero import checkpoint
from fromzero.checkpoint import Checkpoint, DamagedCheckpointError
from tests import faults


@pytest.fixture
def small():
    tensors = {"model/w": torch.arange(6.0).view(2, 3), "model/steps": torch.tensor(7), "optimizer/w/m": torch.ones(2)}
    return Checkpoint(tensors, {"step": 3, "seconds": 0.1 + 0.2, "best_accuracy": -1.0})


def test_what_is_saved_is_loaded_bit_for_bit(small, tmp_path):
    checkpoint.save(tmp_path, small)
    found = checkpoint.load(tmp_path / "last.safetensors")
    assert found.state == small.state
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in small.tensors.items())
    assert found.tensors.keys() == small.tensors.keys()


def test_equal_checkpoints_are_equal_files(small):
    turned = Checkpoint(dict(reversed(small.tensors.items())), dict(reversed(small.state.items())))
    assert len({checkpoint.encode(one) for one in [small, turned] * 10}) == 1


def test_others_read_it_as_plain_safetensors(small, tmp_path):
    from safetensors.torch import load_file

    checkpoint.save(tmp_path, small)
    assert torch.equal(load_file(tmp_path / "last.safetensors")["model/w"], small.tensors["model/w"])


def test_every_single_byte_flip_is_found(small):
    assert not faults.flips_not_found(checkpoint.encode(small), masks=(0x01, 0x80, 0xFF))


def test_every_truncation_and_extension_is_found(small):
    data = checkpoint.encode(small)
    for length in range(len(data)):
        with pytest.raises(DamagedCheckpointError):
            checkpoint.decode(data[:length])
    with pytest.raises(DamagedCheckpointError):
        checkpoint.decode(data + b"\0")


def test_mutated_headers_raise_nothing_else(small):
    assert faults.mutated_headers_read(checkpoint.encode(small), count=3000, seed=0) == 0


@pytest.mark.parametrize("header_bytes", [2**63, 2**40, 10**9, 0, 1])
def test_a_header_that_lies_about_its_size_costs_no_memory(header_bytes):
    with pytest.raises(DamagedCheckpointError):
        checkpoint.decode(struct.pack("<Q", header_bytes) + b"{}" * 50)


def test_a_foreign_or_newer_format_is_named(small, monkeypatch):
    from safetensors.torch import save

    with pytest.raises(DamagedCheckpointError, match="no single checksum"):
        checkpoint.decode(save({"w": torch.ones(2)}))
    monkeypatch.setattr(checkpoint, "FORMAT", "99")
    newer = checkpoint.encode(small)
    monkeypatch.undo()
    with pytest.raises(DamagedCheckpointError, match="its format is 99, this version reads format 1"):
        checkpoint.decode(newer)


def test_the_newest_are_kept(small, tmp_path):
    for step in range(5):
        checkpoint.save(tmp_path, small._replace(state={"step": step}), keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "last.safetensors",
        "step-000000002.safetensors",
        "step-000000003.safetensors",
    ]
    assert checkpoint.load_last(tmp_path).state["step"] == 4
    checkpoint.save(tmp_path, small._replace(state={"step": 5}), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["last.safetensors"]


def test_a_crash_between_the_renames_leaves_the_one_before(small, tmp_path):
    checkpoint.save(tmp_path, small)
    (tmp_path / "last.safetensors").rename(tmp_path / "step-000000003.safetensors")
    (tmp_path / "last.safetensors.partial").write_bytes(b"half")
    assert checkpoint.load_last(tmp_path).state["step"] == 3


def test_all_damaged_is_an_error_and_none_is_none(small, tmp_path):
    assert checkpoint.load_last(tmp_path) is None
    checkpoint.save(tmp_path, small)
    (tmp_path / "last.safetensors").write_bytes(b"")
    with pytest.raises(DamagedCheckpointError, match=r"no whole checkpoint is left$"):
        checkpoint.load_last(tmp_path)
    checkpoint.save_best(tmp_path, small._replace(state={"epoch": 7}))
    with pytest.raises(DamagedCheckpointError, match=r"best epoch, 7, are: fromzero evaluate .* --checkpoint best$"):
        checkpoint.load_last(tmp_path)
    (tmp_path / "best.safetensors").write_bytes(b"")
    with pytest.raises(DamagedCheckpointError, match=r"no whole checkpoint is left$"):
        checkpoint.load_last(tmp_path)


def test_the_state_in_a_checkpoint_is_plain_json(small):
    data = checkpoint.encode(small)
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    assert json.loads(header["__metadata__"]["state"]) == small.state
