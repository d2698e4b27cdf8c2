"""Where the figures of a run come from: the program that trained it, the machine, and what in the environment decides
the bits of a result."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

# Environment variables by which MKL, oneDNN and CUDA choose how to compute, and so the bits of a result.
SWITCHES = (
    *("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE"),
    *(f"{of}_{what}" for of in ("ONEDNN", "DNNL") for what in ("MAX_CPU_ISA", "CPU_ISA_HINTS", "DEFAULT_FPMATH_MODE")),
    "NVIDIA_TF32_OVERRIDE",
)


def last_machine(provenance: dict[str, Any]) -> dict[str, Any]:
    """The machine that a run was last trained on."""
    machine: dict[str, Any] = [provenance, *provenance["resumed"]][-1]["machine"]
    return machine


def switches() -> dict[str, str]:
    """The environment variables that are set here of those by which math libraries choose how to compute, and so the
    bits of a result."""
    return {name: os.environ[name] for name in SWITCHES if name in os.environ}


def other_switches(provenance: Mapping[str, Any]) -> list[str]:
    """In which of them this process differs from where a run was trained last; none where that was not recorded."""
    now, then = switches(), last_switches(provenance)
    if then is None:
        return []
    return [
        f"{name} is {repr(now[name]) if name in now else 'not set'}, it was"
        f" {repr(then[name]) if name in then else 'not set'}"
        for name in SWITCHES
        if now.get(name) != then.get(name)
    ]


def last_switches(provenance: Mapping[str, Any]) -> dict[str, str] | None:
    """Those under which a run was trained last; None where that was not recorded."""
    return [provenance, *provenance["resumed"]][-1].get("switches")


def describe_program() -> dict[str, Any]:
    """Versions, platform, command and commit of this process, for a run's provenance."""
    packages = ("fromzero", "torch", "numpy", "safetensors", "pillow")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": f"{_program()} {shlex.join(sys.argv[1:])}",
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "commit": _commit(),
        "switches": switches(),
    }


def _program() -> str:
    name = Path(sys.argv[0]).name
    return {"__main__.py": "python -m fromzero", "worker.py": "python -m fromzero.study.worker"}.get(name, name)


@cache
def _commit() -> str | None:
    """The commit of fromzero's own source, "-dirty" added when it differs; None when installed without it."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
        command = ["git", "-C", str(here), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True, env=environment)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", str(here)) else "")
    except (OSError, subprocess.SubprocessError):
        return None
