"""Weights that no process of a job holds whole: each reads what its own shards need."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from system import free_port, started

PARAMETERS = int(os.environ.get("LOAD_PARAMETERS", 250_000_000))  # 1e9 by hand
WIDTH = 2048


def write(folder, parameters):
    """Files of timm for a wide ViT of so many parameters, zeros but for one kernel; returns bytes and its squares."""
    depth = round(parameters / (12 * WIDTH**2))
    config = {
        "architecture": "vit_base_patch16_224", "num_classes": 10,
        "model_args": {"embed_dim": WIDTH, "depth": depth, "num_heads": 16, "num_classes": 10},
        "pretrained_cfg": {"input_size": [3, 224, 224]},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {
        "cls_token": (1, 1, WIDTH), "pos_embed": (1, 197, WIDTH), "norm.weight": (WIDTH,), "norm.bias": (WIDTH,),
        "patch_embed.proj.weight": (WIDTH, 3, 16, 16), "patch_embed.proj.bias": (WIDTH,),
        "head.weight": (10, WIDTH), "head.bias": (10,),
    }  # fmt: skip
    for number in range(depth):
        for name, rows, columns in (
            ("attn.qkv", 3 * WIDTH, WIDTH), ("attn.proj", WIDTH, WIDTH), ("mlp.fc1", 4 * WIDTH, WIDTH),
            ("mlp.fc2", WIDTH, 4 * WIDTH),
        ):  # fmt: skip
            shapes |= {f"blocks.{number}.{name}.weight": (rows, columns), f"blocks.{number}.{name}.bias": (rows,)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{number}.{norm}.{kind}": (WIDTH,) for kind in ("weight", "bias")}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    kernel = np.random.default_rng(0).normal(size=shapes["blocks.0.mlp.fc1.weight"]).astype(np.float32)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        file.seek(8 + len(text) + header["blocks.0.mlp.fc1.weight"]["data_offsets"][0])
        file.write(kernel.tobytes())
    return end, float(np.square(kernel).sum())


@pytest.mark.slow
def test_four_processes_hold_a_quarter_of_the_file_each(tmp_path):
    size, squares = write(tmp_path, PARAMETERS)
    command = [sys.executable, str(Path(__file__).with_name("loader.py")), str(tmp_path)]
    variables = {"VIT_DIST_COORDINATOR": f"127.0.0.1:{free_port()}", "VIT_DIST_PROCESSES": "4"}
    running = [started(command, tmp_path / str(index), VIT_DIST_PROCESS=str(index), **variables) for index in range(4)]
    with running[0] as a, running[1] as b, running[2] as c, running[3] as d:
        jobs = (a, b, c, d)
        assert [job.wait(600) for job in jobs] == [0] * 4, jobs[0].said()[-3000:]
    found = [job.result() for job in jobs]
    print(f"{size / 1e6:,.0f} MB:", *found, sep="\n")
    assert sum(one["squares"] for one in found) == pytest.approx(squares, rel=1e-5)  # each part once
    for one in found:
        assert one["after"] - one["before"] <= size / 4 + 500e6
        assert one["most"] - one["before"] <= size / 4 + 500e6
