"""The curves: a picture of the rows, whole, and the same for the same rows."""

import xml.etree.ElementTree as ElementTree

from vit_dist.run.curves import draw
from vit_dist.run.metrics import MetricLog


def text_of(path):
    """All the text of an SVG; raises if it is not well-formed."""
    root = ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return " | ".join(element.text.strip() for element in root.iter() if element.text and element.text.strip())


def run(workdir, evaluations):
    log = MetricLog(workdir, resume_step=None)
    for step in range(1, 101):
        log.write(step, "train", {"loss": float("nan") if step == 50 else 2 / step})
        if evaluations and step % 20 == 0:
            log.write(step, "test", {"count": 360, "loss": 3 / step, "top1": 1 - 1 / step})
            log.write(step, "test/ema", {"count": 360, "loss": 3.5 / step, "top1": 1 - 0.5 / step})
    log.close()


def test_the_curves_hold_loss_and_accuracy_of_every_split(tmp_path):
    run(tmp_path, evaluations=True)
    assert draw(tmp_path) == tmp_path / "curves.svg"
    text = text_of(tmp_path / "curves.svg")
    labels = ["loss", "accuracy (top-1)", "step", "train  0.02", "test  0.03", "test/ema  0.035", "test/ema  0.995"]
    assert [label for label in labels if label not in text] == []
    assert [path.name for path in tmp_path.glob("*curves*")] == ["curves.svg"]


def test_the_same_rows_give_the_same_bytes(tmp_path):
    run(tmp_path, evaluations=True)
    assert draw(tmp_path).read_bytes() == draw(tmp_path).read_bytes()


def test_a_run_without_evaluations_has_one_panel(tmp_path):
    run(tmp_path, evaluations=False)
    text = text_of(draw(tmp_path))
    assert "train  0.02" in text and "accuracy" not in text


def test_a_run_without_rows_says_so(tmp_path):
    assert "nothing measured yet" in text_of(draw(tmp_path))
