"""What of the machine this process may use, processors and memory: read anew each time, nothing is set."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from fromzero.errors import TooLargeError

CONTROL_GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
PROCESSORS = Path("/sys/devices/system/cpu")
MEMORY = Path("/proc/meminfo")


def usable_cores() -> list[int]:
    """Numbers of the processors that this process may run on, ascending, where Linux says so one of each core.

    Two threads on one core share what multiplies, so a second one gains little and can cost much.
    """
    first = {_siblings(number): number for number in reversed(usable_processors())}
    return sorted(first.values())


def usable_processors() -> list[int]:
    """Numbers of the processors that this process may run on, ascending, one at least."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def num_threads() -> int:
    """How many threads to compute by: one a usable core, but no more than the control groups of this process have time
    for, to the nearest whole number, and one at least.

    A control group (`docker run --cpus 2`, a Kubernetes limit) stops all threads of a process for the rest of a tenth
    of a second when they have used up its share, however many processors there are.
    """
    return int(min(len(usable_cores()), max(1.0, granted_processors() + 0.5)))


def _siblings(number: int) -> str:
    """The processors that share a core with this one, as Linux writes them; itself where it does not say."""
    return _text(PROCESSORS / f"cpu{number}/topology/thread_siblings_list") or str(number)


def granted_processors() -> float:
    """How many processors' time the control groups of this process grant it; infinity where they set no limit."""
    return min(map(_processors_of, _control_groups("cpu")), default=math.inf)


def check_memory(needed: int, by: str, instead: str) -> None:
    """Refuse what cannot fit, since Linux ends a process that takes too much without a word. by: who need at least so
    many more bytes; instead: what can be done. Raises TooLargeError."""
    free = available_memory()
    if needed > free:
        gigabytes = f"at least {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
        raise TooLargeError(f"{by} need {gigabytes}; {instead}")


def available_memory() -> float:
    """Bytes that this process can still have, those on disk (swap) included: as many as Linux says, and no more than
    its control groups leave it; infinity where the system does not say."""
    said = _numbers(MEMORY)
    if "MemAvailable:" not in said:
        return math.inf
    groups = list(_control_groups("memory"))
    swap = min([1024 * said.get("SwapFree:", 0), *map(_swap_left_by, groups)])
    return min([1024 * said["MemAvailable:"], *map(_memory_left_by, groups)]) + swap


def peak_memory() -> int | None:
    """The most bytes that this process has held so far, or None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _control_groups(controller: str) -> Iterator[Path]:
    """The control groups of this process, of either version, that a controller's limits may stand in. Up to the root:
    groups within groups limit each other, and in a container the path can be that of the host."""
    for line in _text(OWN_GROUPS).split("\n"):
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and controller not in controllers.split(","):
            continue
        root = CONTROL_GROUPS / (controller if controllers else "")
        group = root / path.lstrip("/")
        for each in (group, *group.parents):
            yield each
            if each == root:
                break


def _memory_left_by(group: Path) -> float:
    """What its limit leaves; what is kept of files and folders is counted as used, and makes way."""
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        most, now = _text(group / limit), _text(group / used)
        if most.isdecimal() and now.isdecimal():
            kept = _numbers(group / "memory.stat")
            files = kept.get("file", kept.get("total_cache", 0)) - kept.get("shmem", kept.get("total_shmem", 0))
            return max(int(most) - int(now), 0) + max(files, 0) + kept.get("slab_reclaimable", 0)
    return math.inf


def _swap_left_by(group: Path) -> float:
    """What its limit leaves, of version 2; version 1 limits memory and swap together, where it limits swap."""
    most, now = _text(group / "memory.swap.max"), _text(group / "memory.swap.current")
    return max(int(most) - int(now), 0) if most.isdecimal() and now.isdecimal() else math.inf


def _processors_of(group: Path) -> float:
    """By one group: version 2 has share and period in one file, version 1 in two; no number or -1 is no limit."""
    share, period = (*_text(group / "cpu.max").split(), "", "")[:2]
    if not share:
        share, period = (_text(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return int(share) / int(period) if share.isdecimal() and period.isdecimal() and int(period) else math.inf


def _numbers(path: Path) -> dict[str, int]:
    """The first number of each line of a file by the word before it."""
    rows = (line.split() for line in _text(path).split("\n"))
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def _text(path: Path) -> str:
    """What the file holds; empty where it cannot be read."""
    try:
        return os.fsdecode(path.read_bytes()).strip()
    except (OSError, ValueError):  # a name with a zero byte in it
        return ""
