"""CLU's metric writers and periodic actions without TensorFlow.

CLU imports TensorFlow in one module, `clu.metric_writers.summary_writer`. A module of that name, holding a writer
built on tensorboardX, is put in its place here before CLU is first imported; import CLU from this module and nowhere
else. If some other code has imported CLU's own writer before, that one stays where it is: it is not used here.
"""

import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorboardX


class SummaryWriter:
    """A `clu.metric_writers.MetricWriter` of TensorBoard event files."""

    def __init__(self, logdir: str | Path, *, purge_step: int | None = None, filename_suffix: str = ""):
        """Events of earlier files at `purge_step` or later are hidden from readers.

        `filename_suffix` tells files begun in the same second apart: one would overwrite the other.
        """
        self._writer = tensorboardX.SummaryWriter(str(logdir), purge_step=purge_step, filename_suffix=filename_suffix)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, float(value), step)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        for tag, text in texts.items():
            self._writer.add_text(tag, text, step)

    def _refuse(self, *arguments: Any, **options: Any) -> None:
        raise NotImplementedError("only numbers and texts are written to event files")

    write_images = write_videos = write_audios = write_histograms = write_summaries = write_hparams = _refuse

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


_stand_in = types.ModuleType("clu.metric_writers.summary_writer", "Stands in for CLU's, which needs TensorFlow.")
vars(_stand_in)["SummaryWriter"] = SummaryWriter
sys.modules.setdefault(_stand_in.__name__, _stand_in)

from clu import metric_writers, periodic_actions  # noqa: E402

metric_writers.MetricWriter.register(SummaryWriter)  # it cannot inherit: importing the base class needs this module

__all__ = ["SummaryWriter", "metric_writers", "periodic_actions"]
