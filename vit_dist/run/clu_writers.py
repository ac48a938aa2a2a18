"""CLU's metric writers and periodic actions without TensorFlow.

CLU imports TensorFlow in one module, `clu.metric_writers.summary_writer`. This module registers a replacement for it,
with a writer built on tensorboardX, and then imports CLU; import CLU from this module only. If other code has already
imported CLU's own writer, that one stays registered, but is not used here.
"""

import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

FLUSH_SECONDS = 30.0  # at most so much later TensorBoard sees a number


class SummaryWriter:
    """A `clu.metric_writers.MetricWriter` of TensorBoard event files."""

    def __init__(self, logdir: str | Path, *, purge_step: int | None = None, filename_suffix: str = ""):
        """Opens an event file in `logdir`.

        Args:
          logdir: the folder.
          purge_step: readers ignore events of earlier files at this step or later.
          filename_suffix: distinguishes files opened in the same second, of which the later would overwrite the first.
        """
        Path(logdir).mkdir(parents=True, exist_ok=True)
        # Not tensorboardX's SummaryWriter, whose thread ends with a traceback when the disk is full.
        self._writer = EventsWriter(str(Path(logdir, "events").absolute()), filename_suffix)
        self._flushed = time.monotonic()
        if purge_step is not None:
            self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        for tag, value in scalars.items():
            self._write(Event(step=step, summary=scalar(tag, float(value))))
        if time.monotonic() > self._flushed + FLUSH_SECONDS:
            self.flush()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)

    def _refuse(self, *arguments: Any, **options: Any) -> None:
        raise NotImplementedError("only numbers are written to event files")

    write_texts = write_images = write_videos = write_audios = _refuse
    write_histograms = write_summaries = write_hparams = _refuse

    def flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


_replacement = types.ModuleType("clu.metric_writers.summary_writer", "Replaces CLU's module, which needs TensorFlow.")
vars(_replacement)["SummaryWriter"] = SummaryWriter
sys.modules.setdefault(_replacement.__name__, _replacement)

from clu import metric_writers, periodic_actions  # noqa: E402

metric_writers.MetricWriter.register(SummaryWriter)  # it cannot inherit: importing the base class needs this module

__all__ = ["SummaryWriter", "metric_writers", "periodic_actions"]
