"""Which of the machine's processors to compute on: read anew each time, nothing is set."""

from __future__ import annotations

import math
import os
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
PROCESSORS = Path("/sys/devices/system/cpu")


def usable_cores() -> list[int]:
    """Numbers of the processors to compute on, ascending, one at least: those that this process may run on, one of each
    core, and no more than its control group gives it time for.

    Two threads on one core share what multiplies, so a second one gains little and can cost much. A control group
    (`docker run --cpus 2`, a Kubernetes limit) stops all threads of a process for the rest of a tenth of a second when
    they have used up its share, however many processors there are.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = {_siblings(number): number for number in reversed(allowed)}  # the first of each
    time = _granted_processors()
    return sorted(cores.values())[: len(cores) if math.isinf(time) else max(1, round(time))]


def _siblings(number: int) -> str:
    """The processors that share a core with this one, as Linux writes them; itself where it does not say."""
    return _text(PROCESSORS / f"cpu{number}/topology/thread_siblings_list") or str(number)


def _granted_processors() -> float:
    """How many processors' time the control groups of this process grant it; infinity where they set no limit."""
    granted = math.inf
    for line in _text(OWN_GROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = CONTROL_GROUPS / controllers
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
        return path.read_text("utf-8").strip()
    except OSError:
        return ""
