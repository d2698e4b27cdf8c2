"""A run's curves for TensorBoard: an event file in its folder, made from its metrics. Needs the package tensorboard, an
extra; TensorBoard reads whatever has `tfevents` in its name, so `tensorboard --logdir runs` shows runs side by side."""

from __future__ import annotations

import io
from collections.abc import Iterator

from fromzero.errors import FromzeroError, InputError
from fromzero.runs import Run

EVENTS = "events.out.tfevents.fromzero"
SPLITS = {"train/": "train", "train/running_": "train_running", "val/": "val"}  # in metrics; in tags, behind the figure


def check_installed() -> None:
    """Raise InputError where the package tensorboard is not there or cannot be used."""
    try:
        from tensorboard.compat.proto import event_pb2, summary_pb2  # noqa: F401
        from tensorboard.summary.writer import record_writer  # noqa: F401
    except ImportError:
        raise InputError("TensorBoard's event files need the package tensorboard: pip install tensorboard") from None
    except Exception as error:  # of packages that do not go together
        raise InputError(f"TensorBoard's event files: the package tensorboard cannot be used: {error}") from None


def write_events(run: Run) -> None:
    """Bring the event file of `run` up to its metrics: in its place and not atomically, since a TensorBoard that has it
    open goes on reading there. The same metrics are the same bytes, and an epoch has as many whatever its figures.

    Raises InputError without the package tensorboard, FromzeroError where records are damaged or the file cannot be
    written."""
    check_installed()
    path, data = run.path / EVENTS, _encoded(run)
    try:
        if path.is_file() and path.read_bytes() == data:
            return
        path.touch()
        with open(path, "r+b") as file:
            file.write(data)
            file.truncate()
    except OSError as error:
        raise FromzeroError(f"{path}: cannot be written: {error.strerror}") from None


def _encoded(run: Run) -> bytes:
    """The event file: the same bytes for the same metrics."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    out = io.BytesIO()
    records = RecordWriter(out)
    began = run.began.timestamp()
    records.write(Event(wall_time=began, file_version="brain.Event:2").SerializeToString())
    for epoch, seconds, tag, value in _scalars(run):
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        records.write(Event(wall_time=began + seconds, step=epoch, summary=summary).SerializeToString())
    return out.getvalue()


def _scalars(run: Run) -> Iterator[tuple[int, float, str, float]]:
    """(epoch, seconds of training until then, tag, value) of every figure of the run's epochs."""
    for row in run.metrics():
        at = int(row["epoch"]), row["time/seconds"]
        for figure in ("accuracy", "loss"):
            for split, name in SPLITS.items():
                yield *at, f"{figure}/{name}", row[f"{split}{figure}"]
        yield *at, "learning_rate", row["learning_rate"]
