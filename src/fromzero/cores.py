"""Which of the machine's processors to compute on: read anew each time, nothing is set."""

from __future__ import annotations

import math
import os
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
PROCESSORS = Path("/sys/devices/system/cpu")


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
    granted = math.inf
    for line in _text(OWN_GROUPS).split("\n"):
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = CONTROL_GROUPS / ("cpu" if controllers else "")
        group = root / path.lstrip("/")
        # Up to the root: groups within groups limit each other, and in a container the path can be that of the host.
        for each in (group, *group.parents):
            granted = min(granted, _granted_by(each))
            if each == root:
                break
    return granted


def _granted_by(group: Path) -> float:
    """By one group: version 2 has share and period in one file, version 1 in two; no number or -1 is no limit."""
    share, period = (*_text(group / "cpu.max").split(), "", "")[:2]
    if not share:
        share, period = (_text(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return int(share) / int(period) if share.isdecimal() and period.isdecimal() and int(period) else math.inf


def _text(path: Path) -> str:
    """What the file holds; empty where it cannot be read."""
    try:
        return os.fsdecode(path.read_bytes()).strip()
    except (OSError, ValueError):  # a name with a zero byte in it
        return ""
