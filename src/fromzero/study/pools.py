"""Where cells run: worker processes on this machine, or a Ray cluster. Both yield the same events."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fromzero.errors import FromzeroError, InputError, StoppedError
from fromzero.resources import num_threads, usable_cores, usable_processors
from fromzero.signals import StopSignals
from fromzero.study.cells import Cell, Setting
from fromzero.study.worker import TASKS, Task, outcome_of

ATTEMPTS = 3  # how often a cell is begun or gone on with when the process that trains it dies
STOP_SECONDS = 60.0


class Event(NamedTuple):
    """What happened to a cell: `share` of it is done; `text` says why it failed, or what a user should know."""

    kind: Literal["started", "progress", "finished", "failed", "note"]
    cell: Cell
    share: float = 0.0
    text: str = ""


def on_this_machine(cells: Sequence[Cell], setting: Setting, jobs: int, log: Path) -> Iterator[Event]:
    """Train cells in `jobs` worker processes, each on cores of its own. A worker that dies is replaced and its cell
    gone on with. Raises StoppedError when asked to stop, every cell saved."""
    events: queue.SimpleQueue[tuple[_Worker, dict[str, Any]]] = queue.SimpleQueue()
    waiting = list(cells)
    attempts: Counter[str] = Counter()
    workers: list[_Worker] = []
    cores = _core_groups(jobs, setting.threads or 1)
    with open(log, "ab") as errors, StopSignals() as stop:
        try:
            while waiting or any(w.cell for w in workers):
                for number in range(jobs):
                    busy = {w.cell.path for w in workers if w.cell}
                    cell = next((c for c in waiting if not _blocked(c, waiting, busy)), None)
                    idle = next((w for w in workers if w.number == number), None)
                    if cell is None or (idle is not None and idle.cell is not None):
                        continue
                    if idle is None:
                        idle = _Worker(number, cores[number], events, errors)
                        workers.append(idle)
                    waiting.remove(cell)
                    attempts[cell.name] += 1
                    idle.give(cell, setting)
                    yield Event("started", cell)
                try:
                    sender, answer = events.get(timeout=0.25)
                except queue.Empty:
                    sender, answer = None, {}
                if stop.signal is not None:
                    _stop(workers)
                    raise StoppedError("stopped", stop.signal)
                if sender is None or sender.cell is None:
                    if sender in workers and answer.get("gone"):
                        workers.remove(sender)
                        sender.end()
                    continue
                cell = sender.cell
                if "progress" in answer:
                    yield Event("progress", cell, answer["progress"])
                elif "note" in answer:
                    yield Event("note", cell, text=answer["note"])
                elif answer.get("gone"):  # killed, out of memory, crashed
                    workers.remove(sender)
                    sender.end()
                    why = f"its process ended with {_describe_exit(sender.process.returncode)}"
                    if attempts[cell.name] < ATTEMPTS:
                        waiting.insert(0, cell)
                        yield Event("note", cell, text=f"{cell.name}: {why}: going on with it")
                    else:
                        yield Event("failed", cell, text=f"{why}, {ATTEMPTS} times; see {log}")
                elif "failed" in answer:
                    sender.cell = None
                    yield Event("failed", cell, text=answer["failed"])
                elif "done" in answer:
                    sender.cell = None
                    yield Event("finished", cell, 1.0)
                # Else somebody stopped the worker alone: it goes, and its cell to another.
            if stop.signal is not None:  # while the last one ended
                raise StoppedError("stopped", stop.signal)
        finally:
            for w in workers:
                w.end()


class _Worker:
    """A process that trains cells; a thread of ours passes its answers on."""

    def __init__(self, number: int, cores: list[int], events: Any, errors: Any):
        self.number = number
        self.cell: Cell | None = None
        with _pinned(cores):
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fromzero.study.worker", *sys.argv[1:]],  # for its runs to record, and ps
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is for us; we pass it on
            )
        self.listener = threading.Thread(target=self._listen, args=(events,), daemon=True)
        self.listener.start()

    def _listen(self, events: Any) -> None:
        assert self.process.stdout
        with self.process.stdout as answers:
            for line in answers:
                with contextlib.suppress(ValueError):  # cut off by a kill
                    events.put((self, json.loads(line)))
        events.put((self, {"gone": True}))

    def give(self, cell: Cell, setting: Setting) -> None:
        self.cell = cell
        assert self.process.stdin
        with contextlib.suppress(OSError):  # it has died; the listener says so
            task = TASKS.dump_python(Task(cell, setting), mode="json")
            self.process.stdin.write(json.dumps(task) + "\n")  # pydantic's own refuses names that are not UTF-8
            self.process.stdin.flush()

    def end(self) -> None:
        """Kill it if it still runs; what it saved is whole."""
        self.process.kill()
        self.process.wait()
        self.listener.join()
        if self.process.stdin:
            with contextlib.suppress(OSError):
                self.process.stdin.close()


def _stop(workers: Sequence[_Worker]) -> None:
    """Have every cell saved: a worker whose input ends stops its training, or goes if it has none. A signal would be
    lost on one that is just ending a training."""
    for w in workers:
        if w.process.stdin:
            with contextlib.suppress(OSError):
                w.process.stdin.close()
    for w in workers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            w.process.wait(STOP_SECONDS)


@contextlib.contextmanager
def _pinned(cores: list[int]) -> Iterator[None]:
    """A process started in here runs on these cores alone (none: on all), for it inherits them."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _blocked(cell: Cell, waiting: Sequence[Cell], busy: set[Path]) -> bool:
    """Whether the cell from whose weights this one starts is still to be trained."""
    return cell.after is not None and (cell.after in busy or any(cell.after == other.path for other in waiting))


def _core_groups(jobs: int, threads: int) -> list[list[int]]:
    """Cores of each job, none shared; processors where cores do not suffice; empty lists (no pinning) where those do
    not, or nothing can be pinned. Nothing is pinned either where cores are left over, or where a control group grants
    less time than there are cores: others who do the same would all sit on the first."""
    cores = next((found for found in (usable_cores(), usable_processors()) if jobs * threads <= len(found)), [])
    if not cores or min(num_threads(), jobs * threads) < len(usable_cores()) or not hasattr(os, "sched_setaffinity"):
        return [[] for _ in range(jobs)]
    return [cores[job * threads : (job + 1) * threads] for job in range(jobs)]


def _describe_exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def on_ray(cells: Sequence[Cell], setting: Setting) -> Iterator[Event]:
    """Train cells as tasks of the Ray cluster that RAY_ADDRESS names, else of one started on this machine. Run folders
    must lie on a path that all machines share: a task whose worker died is given to another, which goes on with the
    folder it finds. Raises StoppedError when asked to stop, every cell saved."""
    try:
        import ray
    except ImportError:
        raise InputError("--on ray needs Ray: pip install ray") from None
    address = os.environ.get("RAY_ADDRESS")
    if place := re.fullmatch(r"(?:ray://)?([^/]+):(\d+)", address or ""):
        try:  # Ray itself would try for minutes
            socket.create_connection((place[1], int(place[2])), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise FromzeroError(f"no Ray cluster at {address}, which RAY_ADDRESS names: {error}") from None
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if not address:
        options |= {"num_cpus": max(num_threads(), setting.threads or 1), "include_dashboard": False}
    try:
        ray.init(address=address or "local", **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise FromzeroError(f"Ray at {address or 'this machine'}: {' '.join(str(error).split())[:300]}") from None
    try:
        # Ray begins a task anew when its worker dies, and only then.
        train = ray.remote(max_retries=ATTEMPTS - 1, num_cpus=setting.threads or 1)(outcome_of)
        if _needs_gpu(setting.device, ray.cluster_resources().get("GPU", 0)):
            train = train.options(num_gpus=1)
        with StopSignals() as stop:
            yield from _ray_events(ray, train, cells, setting, stop)
    finally:
        ray.shutdown()


def _needs_gpu(device: str, gpus: float) -> bool:
    """Whether a run on a cluster with so many GPUs asks for one; Ray shows them to those only who do. Raises InputError
    where one is asked for and there is none: Ray would wait for ever."""
    if device == "cuda" and not gpus:
        raise InputError("--device: cuda: no machine of the Ray cluster has a GPU")
    return device != "cpu" and gpus > 0


def _ray_events(ray: Any, train: Any, cells: Sequence[Cell], setting: Setting, stop: StopSignals) -> Iterator[Event]:
    waiting = list(cells)
    tasks: dict[Any, Cell] = {}
    while waiting or tasks:
        for cell in list(waiting):
            if not _blocked(cell, waiting, {c.path for c in tasks.values()}):
                waiting.remove(cell)
                tasks[train.remote(Task(cell, setting))] = cell
                yield Event("started", cell)
        done, under_way = ray.wait(list(tasks), timeout=1.0)
        for task in done:
            cell = tasks.pop(task)
            try:
                outcome = ray.get(task)
            except ray.exceptions.RayError as error:
                outcome = {"failed": " ".join(str(error).split())[:300]}
            if "stopped" in outcome and stop.signal is None:
                outcome = {"failed": "was stopped on the machine that trained it"}
            if "failed" in outcome:
                yield Event("failed", cell, text=outcome["failed"])
            elif "done" in outcome and cell.run.summary is None:
                why = "its run folder is not here: run folders must lie on a path that all machines share (--runs-dir)"
                yield Event("failed", cell, text=why)
            elif "done" in outcome:
                yield Event("finished", cell, 1.0)
        for task in under_way:
            with contextlib.suppress(FromzeroError):  # not there yet, or being written
                yield Event("progress", tasks[task], _share_done(tasks[task]))
        if stop.signal is not None:
            for task in tasks:
                ray.cancel(task)  # Ctrl-C for the one that runs it: it saves
            if tasks:
                ray.wait(list(tasks), num_returns=len(tasks), timeout=STOP_SECONDS)
            raise StoppedError("stopped", stop.signal)
    if stop.signal is not None:  # while the last one ended
        raise StoppedError("stopped", stop.signal)


def _share_done(cell: Cell) -> float:
    """The share of a cell's epochs that its run folder shows."""
    return len(cell.run.metrics()) / cell.recipe.epochs
