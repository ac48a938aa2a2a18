"""`curves.svg`: loss and accuracy against the step.

The file depends on the rows of `metrics.jsonl` alone; the same rows give the same bytes.
"""

import io
from pathlib import Path
from typing import Any

from vit_dist.escape import printable
from vit_dist.run.files import write_atomically
from vit_dist.run.metrics import read_rows

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # distinct for colour-blind readers too
PANELS = {"loss": "loss", "top1": "accuracy (top-1)"}


def draw(workdir: Path) -> Path:
    """Writes `workdir/curves.svg`, completely or not at all, and returns its path.

    There is a panel for loss and one for accuracy, if any row holds them.
    """
    import matplotlib.figure  # takes a second to import, and only this function needs it

    rows, text = read_rows(workdir), io.StringIO()
    panels = [name for name in PANELS if any(name in row for row in rows)] or ["loss"]
    with matplotlib.rc_context({"svg.hashsalt": "vit_dist", "svg.fonttype": "none", "font.size": 10}):
        figure = matplotlib.figure.Figure(figsize=(5.2 * len(panels), 3.6), layout="constrained")
        for number, name in enumerate(panels, 1):
            _draw_panel(figure.add_subplot(1, len(panels), number), name, rows)
        figure.savefig(text, format="svg", metadata={"Date": None})
    write_atomically(workdir / "curves.svg", text.getvalue())
    return workdir / "curves.svg"


def _draw_panel(axes: Any, name: str, rows: list[dict[str, Any]]) -> None:
    axes.set_title(PANELS[name], loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    evaluations = sorted({row["split"] for row in rows} - {"train"})
    for split in ["train", *evaluations]:
        shown = [row for row in rows if row["split"] == split and name in row]
        if not shown:
            continue
        steps = [row["step"] for row in shown]
        values = [float("nan") if row[name] is None else row[name] for row in shown]  # a NaN leaves a gap in the line
        name_of_split = printable(split).replace("$", r"\$")  # between two of them matplotlib reads formulas
        label = f"{name_of_split}  {values[-1]:.4g}"  # the last value, which readers look for first
        if split == "train":
            axes.plot(steps, values, color="#8c8c8c", linewidth=1.2, label=label)
        else:
            color = PALETTE[evaluations.index(split) % len(PALETTE)]
            axes.plot(steps, values, color=color, linewidth=1.8, marker="o", markersize=3.5, label=label)
    if axes.lines:
        axes.legend(frameon=False, loc="upper right" if name == "loss" else "lower right")
    else:
        axes.text(0.5, 0.5, "nothing measured yet", transform=axes.transAxes, ha="center", color="#8c8c8c")
