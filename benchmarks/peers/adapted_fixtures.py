"""Writes `tests/weights/adapted.json`: outputs of timm's models at other sizes than those of their weights.

    PYTHONPATH=benchmarks .cache/peers/bin/python -m peers.adapted_fixtures tests/weights/adapted.json

timm loads the files of golden fixtures with other arguments, and resamples positions and kernels itself. The tests do
the same to ours and compare the outputs, so that the order of tokens, patches and channels counts too.
"""

import json
import pathlib
import sys
import tempfile
from typing import Any

import safetensors.numpy
import timm
import torch

from peers import random_weights

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests/weights/golden"
# Golden fixture, arguments of timm; sizes are (height, width).
CASES: list[tuple[str, dict[str, Any]]] = [
    ("timm_vit_cls", {"img_size": (64, 64)}),
    ("timm_vit_cls", {"img_size": (32, 80)}),
    ("timm_vit_cls", {"img_size": (48, 48), "patch_size": 12}),
    ("timm_vit_cls", {"img_size": (56, 42), "patch_size": (14, 14), "in_chans": 1}),
    ("timm_vit_cls", {"img_size": (48, 48), "in_chans": 4}),
    ("timm_vit_oblong", {"img_size": (32, 48)}),
    ("timm_vit_registers_with_positions", {"img_size": (64, 32)}),
    ("timm_deit3", {"img_size": (32, 64)}),
    ("timm_dinov2_reg4", {"img_size": (56, 70)}),
    ("timm_siglip", {"img_size": (64, 48)}),
    ("timm_dinov3", {"img_size": (32, 80)}),
]


def main() -> None:
    rows = []
    for name, arguments in CASES:
        fixture = json.loads((GOLDEN / f"{name}.json").read_text())
        with tempfile.TemporaryDirectory() as folder:
            write(fixture, pathlib.Path(folder))
            model = timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments).eval()
        channels = arguments.get("in_chans", fixture["images"][3])
        height, width = arguments["img_size"]
        images = random_weights.images(2, height, width, channels)
        with torch.no_grad():
            found = model(torch.from_numpy(images).permute(0, 3, 1, 2))
        values = [[float(f"{value:.7g}") for value in row] for row in found.tolist()]
        rows.append(json.dumps({"fixture": name, "arguments": arguments, "images": images.shape, "output": values}))
    text = ",\n".join(rows)
    pathlib.Path(sys.argv[1]).write_text(f'{{"timm": "{timm.__version__}", "cases": [\n{text}\n]}}\n')


def write(fixture: dict[str, Any], folder: pathlib.Path) -> None:
    (folder / "config.json").write_text(json.dumps(fixture["config"]))
    sizes = fixture["embedding"], fixture["branch"]
    tensors = {name: random_weights.weight(name, tuple(shape), *sizes) for name, shape in fixture["tensors"].items()}
    safetensors.numpy.save_file(tensors, folder / fixture["weights_file"])


if __name__ == "__main__":
    main()
