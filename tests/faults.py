"""Faults for the reliability tests: a simulated disk that loses power, system calls that fail, processes that die.

`test_reliability.py` runs a fast slice of each; `soak.py` runs them to the full numbers.
"""

import builtins
import contextlib
import errno
import itertools
import os
import random
import shutil
import signal
import time
from pathlib import Path

import torch

from fromzero import checkpoint, files
from fromzero.checkpoint import Checkpoint
from fromzero.errors import FromzeroError, StoppedError

TORN_BYTES = 4096


def small_checkpoint(step, values=3000):
    """A checkpoint of about `4 × values` bytes that says which step it is of, in its state and in its tensors."""
    return Checkpoint({"model/w": torch.full((values,), float(step))}, {"step": step})


# --- system calls: recorded, or made to fail -------------------------------------------------------------------------


@contextlib.contextmanager
def watched_calls(before):
    """Call `before(kind, *paths or data)` before each call with which a save touches the disk: create, write, fsync,
    sync_folder, rename, unlink. It may raise OSError, and then the call does not take place."""
    originals = os.fsync, os.replace, os.unlink
    names = {}

    class Watched:
        def __init__(self, file, path):
            self.file, self.path = file, path

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.__exit__(*error)

        def write(self, data):
            half = len(data) // 2
            for part in (data[:half], data[half:]):  # two calls, so that a kill or an error can come between them
                before("write", self.path, part)
                self.file.write(part)

        def flush(self):
            self.file.flush()

        def fileno(self):
            names[self.file.fileno()] = self.path
            return self.file.fileno()

    def watched_open(path, mode="r", **more):
        if "w" not in mode:
            return builtins.open(path, mode, **more)
        before("create", str(path))
        return Watched(builtins.open(path, mode, **more), str(path))

    def fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        before("sync_folder" if os.path.isdir(path) else "fsync", path)
        originals[0](descriptor)

    def replace(source, target, **more):
        before("rename", str(source), str(target))
        originals[1](source, target, **more)

    def unlink(path, **more):
        before("unlink", str(path))
        originals[2](path, **more)

    files.open = watched_open
    os.fsync, os.replace, os.unlink = fsync, replace, unlink
    try:
        yield
    finally:
        del files.open
        os.fsync, os.replace, os.unlink = originals


def count_calls(action):
    calls = []
    with watched_calls(lambda *call: calls.append(call)):
        action()
    return len(calls)


def fail_nth_call(action, n, number):
    """Run `action` with its n-th call failing as `number` (an errno); returns the OSError or FromzeroError it raised,
    None if it swallowed it."""
    seen = itertools.count()

    def before(*call):
        if next(seen) == n:
            raise OSError(number, os.strerror(number))

    with watched_calls(before):
        try:
            action()
        except (OSError, FromzeroError) as error:
            return error
    return None


def saves_under_failures(folder, errnos=(errno.ENOSPC, errno.EIO)):
    """Fail every call of a save in turn. Yields (call, errno, step found afterwards, whether an error was raised)."""
    for number in errnos:
        for n in itertools.count():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            checkpoint.save(folder, small_checkpoint(1))
            checkpoint.save(folder, small_checkpoint(2))
            if n >= count_calls(lambda: checkpoint.save(folder, small_checkpoint(3))):
                break
            error = fail_nth_call(lambda: checkpoint.save(folder, small_checkpoint(4)), n, number)
            found = checkpoint.load_last(folder).state["step"]
            checkpoint.save(folder, small_checkpoint(5))  # and it goes on once there is room
            assert checkpoint.load_last(folder).state["step"] == 5
            yield n, number, found, error


# --- power loss ------------------------------------------------------------------------------------------------------


def record_saves(folder, saves, *, lose=()):
    """The log of calls of several saves, an ("acknowledged", step) behind each. Kinds in `lose` are left out of it, as
    if the program had forgotten them: for showing that the simulation notices."""
    log = []
    with watched_calls(lambda *call: log.append(call) if call[0] not in lose else None):
        for step in range(1, saves + 1):
            checkpoint.save(folder, small_checkpoint(step))
            log.append(("acknowledged", step))
    return log


def crash_states(log):
    """Every state that a power loss may leave: for each prefix of the log, every choice of which unsynced renames and
    unlinks took place, with unsynced writes dropped, torn by their last 4 KiB, or whole.

    Yields (acknowledged step, {name: content})."""
    for end in range(len(log) + 1):
        durable_names, pending, acknowledged = {}, [], 0
        names, contents, synced = {}, {}, {}  # names → inode; inode → bytes as written; inode → bytes on the disk
        for kind, *rest in log[:end]:
            match kind:
                case "create":
                    inode = len(contents)
                    contents[inode], synced[inode] = b"", b""
                    names[rest[0]] = inode
                    pending.append(("link", rest[0], inode))
                case "write":
                    contents[names[rest[0]]] += bytes(rest[1])
                case "fsync":
                    synced[names[rest[0]]] = contents[names[rest[0]]]
                case "rename":
                    names[rest[1]] = names.pop(rest[0])
                    pending.append(("rename", *rest))
                case "unlink":
                    names.pop(rest[0], None)
                    pending.append(("unlink", rest[0]))
                case "sync_folder":
                    durable_names, pending = dict(names), []
                case "acknowledged":
                    acknowledged = rest[0]
        unsynced = [inode for inode in contents if contents[inode] != synced[inode]]
        for chosen in itertools.product((False, True), repeat=len(pending)):
            on_disk = dict(durable_names)
            for happened, (kind, path, *target) in zip(chosen, pending, strict=True):
                if not happened:
                    continue
                if kind == "link":
                    on_disk[path] = target[0]
                elif kind == "unlink":
                    on_disk.pop(path, None)
                elif path in on_disk:
                    on_disk[target[0]] = on_disk.pop(path)
            for fate in ("dropped", "torn", "whole") if unsynced else ("whole",):
                fates = dict(synced)
                for inode in unsynced:
                    written = contents[inode]
                    torn = written[:-TORN_BYTES] + bytes(min(TORN_BYTES, len(written)))
                    fates[inode] = {"dropped": synced[inode], "torn": torn, "whole": written}[fate]
                yield acknowledged, {Path(path).name: fates[inode] for path, inode in on_disk.items()}


def power_loss(folder, saves, *, lose=()):
    """Crash states of `saves` saves that were tried, and those that lost an acknowledged checkpoint or did not load."""
    work, replay = folder / "work", folder / "replay"
    work.mkdir(parents=True)
    states, lost = 0, []
    for acknowledged, content in crash_states(record_saves(work, saves, lose=lose)):
        shutil.rmtree(replay, ignore_errors=True)
        replay.mkdir()
        for name, data in content.items():
            (replay / name).write_bytes(data)
        try:
            found = checkpoint.load_last(replay)
            step = found.state["step"] if found else 0
            assert found is None or found.tensors["model/w"][0] == step
        except FromzeroError:
            step = -1
        states += 1
        if step < acknowledged:
            lost.append((acknowledged, step, sorted(content)))
    return states, lost


# --- corruption ------------------------------------------------------------------------------------------------------


def flips_not_found(data, masks):
    """Positions and masks for which `data` with one byte changed still reads as a checkpoint."""
    missed = []
    for position, mask in itertools.product(range(len(data)), masks):
        flipped = bytearray(data)
        flipped[position] ^= mask
        try:
            checkpoint.decode(bytes(flipped))
        except checkpoint.DamagedCheckpointError:
            continue
        missed.append((position, mask))
    return missed


def mutated_headers_read(data, count, seed):
    """How many of `count` random edits of the header of `data` (1 to 8 bytes changed, removed or put in) still read as
    a checkpoint although a byte differs. Anything but DamagedCheckpointError gets through to the caller."""
    rng, read = random.Random(seed), 0
    end = 8 + int.from_bytes(data[:8], "little")
    for _ in range(count):
        mutated = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            position = rng.randrange(end)
            match rng.randrange(3):
                case 0:
                    mutated[position] = rng.randrange(256)
                case 1:
                    del mutated[position]
                case 2:
                    mutated.insert(position, rng.choice(b'{}[]",:0919e-\\\xff'))
        try:
            checkpoint.decode(bytes(mutated))
        except checkpoint.DamagedCheckpointError:
            continue
        read += bytes(mutated) != data
    return read


# --- processes that die ----------------------------------------------------------------------------------------------


def in_child(action):
    """Fork a process that runs `action(say)`; `say` sends an integer to us durably. Returns (pid, reader)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reader)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            action(lambda step: os.write(writer, step.to_bytes(8, "little")))
            code = 0
        except (FromzeroError, StoppedError) as error:
            code = error.exit_code
        finally:
            os._exit(code)
    os.close(writer)
    return pid, reader


def kill_after(pid, reader, seconds, number=signal.SIGKILL):
    """Send `number` after so long. Returns (exit status, the last integer that the child sent, 0 if none)."""
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    _, status = os.waitpid(pid, 0)
    said = b""
    while part := os.read(reader, 1 << 16):
        said += part
    os.close(reader)
    whole = len(said) // 8 * 8
    return os.waitstatus_to_exitcode(status), int.from_bytes(said[whole - 8 : whole], "little") if whole else 0


def kill_saves(folder, kills, seed, longest_seconds=0.05):
    """Kill a process that does nothing but save, again and again in the same folder. Returns the losses: acknowledged
    checkpoints that were not found, and folders that did not load."""
    rng, lost, start = random.Random(seed), [], 0
    for _ in range(kills):

        def save_on(say, first=start + 1):
            for step in itertools.count(first):
                checkpoint.save(folder, small_checkpoint(step, 20_000))
                say(step)

        pid, reader = in_child(save_on)
        _, acknowledged = kill_after(pid, reader, rng.uniform(0, longest_seconds))
        try:
            found = checkpoint.load_last(folder)
            step = found.state["step"] if found else 0
        except FromzeroError:
            step = -1
        if step < max(acknowledged, start):
            lost.append((acknowledged, step))
        start = max(step, start)
    return lost


def train_through_kills(recipe, images, folder, rng, kills, seconds):
    """Train in processes of their own, killed `kills` times at random moments (and sometimes asked to stop), saving
    after every step. Returns the finished run, how often it was really interrupted, and the losses."""
    from fromzero.runs import list_runs
    from fromzero.sessions import new_training, resumed_training

    interrupted, lost, acknowledged = 0, [], 0
    while True:
        runs = list_runs(folder)

        def go_on(say, runs=runs):
            options = {"threads": 1, "checkpoint_minutes": 0}
            if runs:
                training = resumed_training(runs[0], images, **options)
            else:
                training = new_training(recipe, images, runs_dir=folder, **options)
            save = training.save

            def save_and_say():
                save()
                say(training.state.counters.step)

            training.save = save_and_say
            for _ in training:
                pass

        pid, reader = in_child(go_on)
        if interrupted < kills:
            number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
            code, step = kill_after(pid, reader, rng.uniform(0, seconds), number)
        else:
            code, step = kill_after(pid, reader, 0, 0)
        acknowledged = max(acknowledged, step)
        runs = list_runs(folder)
        if runs:
            found = checkpoint.load_last(runs[0].checkpoints)
            if (found.state["step"] if found else 0) < acknowledged:
                lost.append((acknowledged, found and found.state["step"]))
        if code == 0 or (runs and runs[0].summary is not None):  # it may be killed as it leaves
            return runs[0], interrupted, lost
        if code not in (-signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM):
            raise AssertionError(f"a training ended with {code}")
        interrupted += 1
