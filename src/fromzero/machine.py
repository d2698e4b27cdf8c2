"""The machine a run computes on: device, precision, threads, allocator.

`prepare` chooses and sets them, so that a user sets nothing. Everything that can change the bits of a result is a
field of `Machine`; two machines that are equal compute equal bits.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from fromzero import kernels
from fromzero.errors import InputError
from fromzero.resources import num_threads

Precision = Literal["bfloat16", "float32"]
ELEMENTS: dict[Precision, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}  # to compute in

MAX_THREADS = 1024
_threads_used: dict[int, int] = {}  # the most at a time, by process: one that was forked has those of the one before
PARALLEL = 2**15  # elements that PyTorch gives a thread at least
NUMERIC_MODULES = (
    "augment",
    "data/images",
    "evaluate",
    "kernels/__init__",
    "kernels/functions",
    "kernels/interface",
    "machine",
    "modules",
    "networks",
    "optim",
    "recipe",
    "rng",
    "splits",
    "state",
    "steps",
    "timetable",
    "training",
)


@dataclass(frozen=True)
class Machine:
    """What the bits of a result depend on besides recipe and images. instructions: the processor's vector sets; of a
    GPU its compute capability and cuDNN's version."""

    device: str
    processor: str
    instructions: str
    threads: int
    precision: Precision
    kernels: str
    torch: str
    fromzero: str

    def set_up(self) -> None:
        """Make this process compute as this machine says, whatever it has made torch do before. Raises InputError where
        torch makes tensors of another type than float32 by default, and where several threads would hang."""
        if torch.get_default_dtype() != torch.float32:
            instead = "fromzero needs torch.set_default_dtype(torch.float32)"
            raise InputError(f"torch's default type is {torch.get_default_dtype()} in this process: {instead}")
        own = os.getpid()
        before = max((threads for process, threads in _threads_used.items() if process != own), default=1)
        if self.threads > 1 and before > 1:
            raise InputError(
                f"this process was forked from one that had computed with {before} threads, so {self.threads} would"
                ' hang here: begin processes by multiprocessing\'s "spawn", or give threads=1'
            )
        _threads_used[own] = max(self.threads, _threads_used.get(own, 1))
        torch.set_num_threads(self.threads)
        torch.set_flush_denormal(False)
        torch.set_float32_matmul_precision("highest")
        torch.backends.mkldnn.enabled = True  # type: ignore[assignment]
        torch.backends.mkldnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
        keep_large_buffers()
        kernels.use(self.kernels, ELEMENTS[self.precision])
        if torch.device(self.device).type == "cuda":
            if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):  # others are not deterministic
                os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
            torch.set_deterministic_debug_mode("error")  # torch.use_deterministic_algorithms imports the compiler
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it costs time
            torch.backends.cudnn.benchmark = False
            cudnn: Any = torch.backends.cudnn
            cudnn.allow_tf32 = False  # where the older switch says otherwise, torch refuses to read it, as to export
            for library in (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn):
                library.fp32_precision = "ieee"

    def differences(self, other: dict[str, Any]) -> list[str]:
        """`field: theirs → ours` for every field in which a recorded machine differs from this one."""
        return [
            f"{field}: {other.get(field)} → {value}"
            for field, value in asdict(self).items()
            if other.get(field) != value
        ]

    @property
    def why_no_kernels(self) -> str:
        """Why a processor computes by PyTorch's kernels alone, in a few words; empty where it does not."""
        return "" if self.device != "cpu" or self.kernels != kernels.NONE else _kernels("cpu", self.precision).why

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which a network computes on this machine."""
        kind = torch.device(self.device).type
        return torch.amp.autocast(kind, torch.bfloat16, enabled=self.precision == "bfloat16")


def prepare(precision: str = "auto", *, device: str = "auto", threads: int | None = None) -> Machine:
    """Choose device, precision and threads, set them for this process, and say what was chosen.

    precision: "auto", "bfloat16" or "float32"; device: "auto", "cpu", "cuda" or "cuda:N"; threads: CPU threads, by
    default as `resources.num_threads` says, at most `OMP_NUM_THREADS`. Raises InputError for a device that is not there
    or cannot compute so, and where threads flush denormals, which changes bits and cannot be undone.
    """
    kind = chosen_device(device)
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise InputError(f"threads: {threads} is not from 1 to {MAX_THREADS}")
    if kind.type == "cuda":
        processor, instructions, fast_bfloat16 = _gpu(kind)
    else:
        processor, instructions, fast_bfloat16 = _processor_name(), _instructions(), bool(_bfloat16_features())
    chosen: Precision = "float32" if precision == "float32" else "bfloat16"
    if precision == "auto" and not fast_bfloat16:
        chosen = "float32"
    if kind.type == "cuda" and chosen == "bfloat16" and not fast_bfloat16:
        instead = "use --device cpu, or --precision float32 where a command has it"
        raise InputError(f"device {kind}: {processor} does not compute in bfloat16; {instead}")
    chosen_machine = Machine(
        device=str(kind),
        processor=processor,
        instructions=instructions,
        threads=threads or _default_threads(),
        precision=chosen,
        kernels=_kernels(kind.type, chosen).name,
        torch=torch.__version__,
        fromzero=f"{metadata.version('fromzero')} ({_source_digest()})",
    )
    chosen_machine.set_up()
    if not (torch.full((chosen_machine.threads * PARALLEL,), 1e-40) / 2).all():  # by threads that nothing here reaches
        raise InputError("torch.set_flush_denormal is on in this process: fromzero needs one in which it is not")
    return chosen_machine


def chosen_device(device: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "cuda:N" means here. Raises InputError where it is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device)
    except RuntimeError:
        raise InputError(f"unknown device {device!r}; known: auto, cpu, cuda, cuda:N") from None
    if kind.type not in ("cpu", "cuda"):
        raise InputError(f"device {device!r} is not supported; known: auto, cpu, cuda, cuda:N")
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device!r} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return torch.device("cpu") if kind.type == "cpu" else kind  # "cpu:1" is no other one


def _gpu(kind: torch.device) -> tuple[str, str, bool]:
    """Its name, what of it and its libraries decides bits, and whether it is fast at bfloat16. Raises InputError where
    this PyTorch cannot compute on it."""
    try:
        torch.zeros(1, device=kind)
    except (RuntimeError, AssertionError) as error:
        why = str(error).split("\n")[0]
        raise InputError(f"device {kind}: PyTorch cannot compute there ({why}); use --device cpu") from None
    capability = torch.cuda.get_device_capability(kind)
    instructions = f"compute capability {'.'.join(map(str, capability))}, cuDNN {torch.backends.cudnn.version()}"
    return torch.cuda.get_device_name(kind), instructions, capability >= (8, 0)


@cache
def keep_large_buffers() -> None:
    """Tell glibc to keep freed buffers of the heap instead of returning each to the kernel.

    A training step frees and asks again for the same large buffers; by default each is unmapped and mapped, and
    its pages zeroed, every step. Another C library is left as it is.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # names and numbers of malloc.h
    for name, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 64 * 2**20)):
        mallopt(name, value)


def _kernels(device: str, precision: Precision) -> kernels.Made:
    """Which compiled kernels to use."""
    if device != "cpu":
        return kernels.Made(kernels.NONE, None)
    if precision == "bfloat16" and "avx512_bf16" not in _bfloat16_features():
        return kernels.Made(kernels.NONE, None, "fromzero's of bfloat16 need AVX512-BF16")
    return kernels.find(ELEMENTS[precision])


def _default_threads() -> int:
    """As many as `num_threads` says; no more than OMP_NUM_THREADS, where the user has set it."""
    threads, wanted = num_threads(), os.environ.get("OMP_NUM_THREADS", "")
    return min(threads, int(wanted)) if wanted.isdecimal() and int(wanted) > 0 else threads


def _bfloat16_features() -> list[str]:
    """Which of the instruction sets that make bfloat16 fast the processor has."""
    features: Mapping[str, Any]
    if hasattr(torch.cpu, "get_capabilities"):
        features = torch.cpu.get_capabilities()
    else:  # torch 2.10
        features = dict.fromkeys(_from_cpuinfo("flags").split(), True)
    return [name for name in ("amx_bf16", "avx512_bf16") if features.get(name)]


def _instructions() -> str:
    return " ".join([torch.backends.cpu.get_cpu_capability(), *_bfloat16_features()])


@cache
def _source_digest() -> str:
    """Short digest of the modules that decide the bits of a result, so that another fromzero is not taken for this."""
    digest = hashlib.sha256()
    for name in NUMERIC_MODULES:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()[:12]


def _processor_name() -> str:
    return _from_cpuinfo("model name") or platform.processor() or platform.machine()


def _from_cpuinfo(key: str) -> str:
    """What Linux says of the first processor under `key`; empty where it does not."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith(key)), "")
    except OSError:
        return ""
