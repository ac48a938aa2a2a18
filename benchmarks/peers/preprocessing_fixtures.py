"""Writes the pixels that timm, OpenCLIP and transformers make of images, for `tests/weights/test_preprocessing.py`.

    python benchmarks/peers/preprocessing_fixtures.py fixtures tests/weights/preprocessing.json
    python benchmarks/peers/preprocessing_fixtures.py photos FOLDER OUT.npz      # then preprocessing_compare.py

It runs where these libraries are installed, and needs nothing of this project. Fixtures are small: pictures by formula,
results of 12 x 12 pixels. Photographs are prepared as published models want them.
"""

import base64
import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import PIL
import timm.data
import torch
import transformers
from PIL import Image, ImageOps

Prepare = Callable[[Image.Image], np.ndarray]  # -> [H, W, 3] in grey levels, uint8 or float
PICTURES = ((97, 44), (53, 101), (9, 11))  # height, width
STEPS = 128  # of a grey level, in which results that are no whole numbers are stored


def timm_case(size: tuple[int, int], mode: str, crop: float, interpolation: str) -> tuple[dict[str, Any], Prepare]:
    """timm's evaluation, and the `pretrained_cfg` that it comes from."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    config = {
        "input_size": (3, *size), "interpolation": interpolation, "crop_pct": crop, "crop_mode": mode, "mean": mean,
        "std": std,
    }  # fmt: skip
    settings = timm.data.resolve_data_config(pretrained_cfg=config)
    transform = timm.data.create_transform(**settings, is_training=False, normalize=False)
    return config, lambda image: transform(image).permute(1, 2, 0).numpy()


def open_clip_case(size: int, mode: str, interpolation: str) -> tuple[dict[str, Any], Prepare]:
    """OpenCLIP's evaluation, and its `preprocess_cfg`."""
    config = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": interpolation, "resize_mode": mode}
    transform = open_clip.image_transform(size, False, (0.0,) * 3, (1.0,) * 3, mode, interpolation)
    return config | {
        "size": size
    }, lambda image: (transform(image) * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)


def transformers_case(name: str, **settings: Any) -> tuple[dict[str, Any], Prepare]:
    """One of transformers' processors, and the config that it saves."""
    processor = getattr(transformers, name)(**settings)
    as_floats = name.startswith("DINOv3")  # it resizes after the pixels are in [0, 1]

    def prepare(image: Image.Image) -> np.ndarray:
        raw = processor(image, do_normalize=False, do_rescale=as_floats, return_tensors="pt")["pixel_values"][0]
        return raw.permute(1, 2, 0).numpy() * (255 if as_floats else 1)

    return json.loads(processor.to_json_string()), prepare


def small_cases() -> dict[str, tuple[dict[str, Any], Prepare]]:
    sides, short, crop = {"height": 12, "width": 12}, {"shortest_edge": 16}, {"height": 12, "width": 12}
    return {
        "timm center": timm_case((12, 12), "center", 0.75, "bicubic"),
        "timm center bilinear": timm_case((12, 12), "center", 0.9, "bilinear"),
        "timm center oblong": timm_case((12, 8), "center", 0.9, "bicubic"),
        "timm squash": timm_case((12, 12), "squash", 1.0, "bicubic"),
        "timm squash cut": timm_case((12, 8), "squash", 0.7, "bilinear"),
        "timm border": timm_case((12, 12), "border", 1.0, "bicubic"),
        "timm border cut": timm_case((12, 12), "border", 0.6, "bilinear"),
        "open_clip shortest": open_clip_case(12, "shortest", "bicubic"),
        "open_clip squash": open_clip_case(12, "squash", "bilinear"),
        "transformers ViT": transformers_case("ViTImageProcessor", size=sides),
        "transformers DeiT": transformers_case("DeiTImageProcessor", size={"height": 17, "width": 17}, crop_size=crop),
        "transformers SigLIP": transformers_case("SiglipImageProcessor", size=sides),
        "transformers CLIP": transformers_case("CLIPImageProcessor", size={"shortest_edge": 12}, crop_size=crop),
        "transformers DINOv2": transformers_case("BitImageProcessor", size=short, crop_size=crop),
        "transformers DINOv3": transformers_case("DINOv3ViTImageProcessor", size=sides),
    }


def published_cases() -> dict[str, tuple[dict[str, Any], Prepare]]:
    large = {"height": 384, "width": 384}
    return {
        "timm AugReg": timm_case((224, 224), "center", 0.9, "bicubic"),
        "timm DeiT": timm_case((224, 224), "center", 0.875, "bilinear"),
        "timm DeiT-III": timm_case((384, 384), "center", 1.0, "bicubic"),
        "timm SigLIP": timm_case((384, 384), "squash", 1.0, "bicubic"),
        "timm border": timm_case((224, 224), "border", 1.0, "bicubic"),
        "timm oblong": timm_case((224, 160), "center", 0.95, "bicubic"),
        "open_clip CLIP": open_clip_case(224, "shortest", "bicubic"),
        "open_clip SigLIP": open_clip_case(256, "squash", "bicubic"),
        "transformers ViT": transformers_case("ViTImageProcessor"),
        "transformers DeiT": transformers_case("DeiTImageProcessor"),
        "transformers SigLIP": transformers_case("SiglipImageProcessor"),
        "transformers SigLIP 384": transformers_case("SiglipImageProcessor", size=large),
        "transformers CLIP": transformers_case("CLIPImageProcessor"),
        "transformers DINOv2": transformers_case("BitImageProcessor", size={"shortest_edge": 256}),
        "transformers DINOv3": transformers_case("DINOv3ViTImageProcessor"),
    }


def picture(height: int, width: int) -> Image.Image:
    """Blocks of random colours, whose edges make bicubic overshoot."""
    blocks = np.random.RandomState(height).choice(np.array([0, 3, 90, 200, 255], np.uint8), (height, width, 3))
    return Image.fromarray(blocks.repeat(5, axis=0).repeat(3, axis=1)[:height, :width])


def fixtures(out: Path) -> None:
    cases = []
    for name, (config, prepare) in small_cases().items():
        results = []
        for height, width in PICTURES:
            pixels = prepare(picture(height, width))
            step = 1 if pixels.dtype == np.uint8 else STEPS
            stored = np.round(pixels * step).astype("uint8" if step == 1 else "<u2")
            text = base64.b64encode(zlib.compress(stored.tobytes(), 9)).decode()
            results.append({"picture": (height, width), "shape": stored.shape, "steps": step, "pixels": text})
        cases.append({"name": name, "config": config, "results": results})
    versions = {one.__name__: one.__version__ for one in (timm, open_clip, transformers, torch, PIL)}
    rows = ",\n".join(json.dumps(case) for case in cases)
    out.write_text(f'{{"versions": {json.dumps(versions)}, "cases": [\n{rows}\n]}}\n')


def photos(folder: Path, out: Path) -> None:
    cases, arrays = published_cases(), dict[str, np.ndarray]()
    for file in sorted(folder.iterdir()):
        upright = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
        for name, (_, prepare) in cases.items():
            arrays[f"{name}|{file.name}"] = prepare(upright)
    arrays["configs"] = np.array(json.dumps({name: config for name, (config, _) in cases.items()}))
    np.savez(out, allow_pickle=False, **arrays)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "fixtures":
        fixtures(Path(sys.argv[2]))
    else:
        photos(Path(sys.argv[2]), Path(sys.argv[3]))
