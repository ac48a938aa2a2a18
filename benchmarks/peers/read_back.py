"""Opens what `write_back` wrote by timm and transformers, and compares outputs and tensors: a table in Markdown.

    PYTHONPATH=benchmarks .cache/peers/bin/python -m peers.read_back FOLDER

Outputs are compared with those that the library had of its own file (expected.npz); an error is the largest difference
over their standard deviation. Tensors are compared bit by bit with those of the same names in the library's own file.
The exit code is 1 if a folder is not opened, an error is above 1e-4, or a tensor differs that no reader has changed.
"""

import argparse
import datetime
import json
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
import safetensors.numpy
import timm
import torch
import transformers

from peers import npz_cases, timm_cases
from peers.case import Outputs, head_input

TOLERANCE = 1e-4
FORMATS = ("timm", "huggingface", "npz")
OWN = {"timm": "timm", "hf": "huggingface", "npz": "npz"}  # the format that a case was written in, by its name
# Positions of other tokens are added to these when they are read; what an evaluation does not use is not read.
CHANGED = (
    "reg_token", "pos_embed", "distillation_token", "position_embeddings", "mask_token", "post_layernorm.weight",
    "post_layernorm.bias",
)  # fmt: skip
# What timm and transformers raise for a file that they cannot open.
_OPENING = (AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)


def of_timm(folder: pathlib.Path, images: torch.Tensor) -> Outputs:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    assert tuple(transform(picture(images.shape[1])).shape) == tuple(images.shape[1:])
    return timm_cases.outputs(model, images)


def of_transformers(folder: pathlib.Path, images: torch.Tensor) -> Outputs:
    config = json.loads((folder / "config.json").read_text())
    (architecture,) = config["architectures"]
    cls: Any = (
        transformers.AutoModelForImageClassification if "id2label" in config else getattr(transformers, architecture)
    )
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    missing = [name for name in info["missing_keys"] if not name.startswith("pooler.")]
    assert not missing and not info["unexpected_keys"], info
    assert type(model).__name__ == architecture
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    if images.shape[1] == 3:
        prepared = processor(picture(3), return_tensors="pt")["pixel_values"]
        assert prepared.shape[1:] == images.shape[1:]
    model = model.eval()
    if "id2label" in config:
        return head_input(model, model.classifier, lambda: model(pixel_values=images).logits)
    output = model(pixel_values=images)
    if architecture.endswith("WithProjection"):
        return {"features": output.image_embeds}
    if architecture == "ViTModel":  # what it pools follows by a layer that we do not have
        return {"features": output.last_hidden_state[:, 0]}
    pooled = output.pooler_output
    return {"features": output.last_hidden_state.mean(1) if pooled is None else pooled}


def of_npz(folder: pathlib.Path, images: torch.Tensor) -> Outputs:
    with np.load(folder / "model.npz") as arrays:
        names = set(arrays.files)
        classes = (
            arrays["head/bias" if "head/bias" in names else "params/head/bias"].size
            if any(name.endswith("head/bias") for name in names)
            else 0
        )
    old = any("MultiHeadDotProductAttention_1" in name for name in names)
    mapped, token = (any(part in name for name in names) for part in ("MAPHead_0", "cls"))
    kind = "vision_transformer" if old else "map" if mapped else "tok" if token else "gap"
    further = "pre_logits/kernel" in names
    if not any("pos_embedding" in name for name in names):  # timm knows learned positions only
        positions: dict[str, Any] = {"params/pos_embedding": npz_cases.computed_positions()}
        with np.load(folder / "model.npz") as arrays, tempfile.TemporaryDirectory() as beside:
            np.savez(pathlib.Path(beside) / "model.npz", **arrays, **positions)
            return npz_cases.outputs(npz_cases.load(kind, classes, pathlib.Path(beside)).eval(), images)
    model = npz_cases.load(kind, 0 if further else classes, folder).eval()
    return (npz_cases.further_outputs if further else npz_cases.outputs)(model, images)


# Whose files have other names than those that are written: of whole models, of checkpoints, of stacked blocks.
OTHER_NAMES = ("full", "short_config", "checkpoint", "bf16", "sincos", "stacked")
READERS = {"timm": of_timm, "huggingface": of_transformers, "npz": of_npz}


def picture(channels: int) -> Any:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3)).astype(np.uint8)
    return Image.fromarray(pixels if channels == 3 else pixels[:, :, 0])


def errors(found: Outputs, expected: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns the errors of outputs that both have; a projection may have become the head."""
    result = {}
    if "logits" in found and "logits" not in expected and "features" in expected:
        found = {
            "features": found["logits"] if found["logits"].shape == expected["features"].shape else found["features"]
        }
    for name, value in expected.items():
        if name in found and tuple(found[name].shape) == value.shape:
            result[name] = float(np.abs(found[name].numpy() - value).max() / value.std())
    return result


def tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    (file,) = [*folder.glob("*.safetensors"), *folder.glob("model.npz")]
    if file.suffix == ".safetensors":
        return safetensors.numpy.load_file(file)
    with np.load(folder / ("float32.npz" if (folder / "float32.npz").exists() else "model.npz")) as arrays:
        return {name: arrays[name] for name in arrays.files}


def bitwise(case: pathlib.Path, format: str) -> tuple[int, int, list[str]]:
    """Returns how many tensors have the name of one in the original file, how many are equal, and which are not."""
    theirs, ours = tensors(case), tensors(case / f"written_{format}")
    both = [name for name in ours if name in theirs]
    wrong = [name for name in both if not np.array_equal(ours[name], theirs[name])]
    return len(both), len(both) - len(wrong), wrong


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(f"# Models that `vit-dist export` wrote, opened by timm and transformers, {datetime.date.today()}\n")
    print(
        f"timm {timm.__version__}, transformers {transformers.__version__}, torch {torch.__version__}, on a CPU. By\n"
    )
    print("    make peers\n")
    print("Each file of another library is read by ours, written in each format that has such a model, and opened by")
    print(
        "that library; `ours_*` are models of our own. An error is the largest difference of any number from what the"
    )
    print(f"library computed of its own file, over the standard deviation; {TOLERANCE:.0e} is allowed. timm reads npz.")
    print("Tensors: how many of those with a name of the original file are equal to it, bit by bit.\n")
    print("| case | format | written as | features | logits | equal tensors |\n|---|---|---|---|---|---|")
    bad, refused, worst, count = [], [], 0.0, 0
    for case in sorted(path for path in options.folder.iterdir() if [*path.glob("written_*")]):
        with np.load(case / "expected.npz") as arrays:
            expected = {name: arrays[name] for name in ("features", "logits") if name in arrays.files}
            images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2)
        for format in FORMATS:
            folder = case / f"written_{format}"
            if not folder.exists():
                refused.append(f"| {case.name} | {format} | {(case / f'written_{format}.txt').read_text()} |")
                continue
            if format == "npz" and not npz_is_like_timm(folder, images):
                continue
            count += 1
            try:
                found = errors(READERS[format](folder, images), expected)
            except _OPENING as error:  # a table of all cases is worth more than the first that fails
                print(
                    f"| {case.name} | {format} | NOT OPENED: {type(error).__name__}: {str(error)[:200]} | | | |",
                    flush=True,
                )
                bad.append(f"{case.name} {format}")
                continue
            cells = " | ".join(f"{found[name]:.1e}" if name in found else "" for name in ("features", "logits"))
            same = ""
            if OWN.get(case.name.partition("_")[0]) == format:
                all_, equal, wrong = bitwise(case, format)
                same = f"{equal} of {all_}" + (f"; not {', '.join(wrong)}" if wrong else "")
                if not all_ and not case.name.endswith(OTHER_NAMES):
                    bad.append(f"{case.name} {format} has no tensor of the same name")
                bad += [f"{case.name} {format} {name}" for name in wrong if not name.endswith(CHANGED)]
            print(f"| {case.name} | {format} | {written_as(folder)} | {cells} | {same} |", flush=True)
            if not found or not max(found.values()) <= TOLERANCE:
                bad.append(f"{case.name} {format}")
            worst = max(worst, *found.values()) if found else worst
    print(f"\n{count} were opened; the largest error is {worst:.1e}.\n\n## Refused\n")
    print("| case | format | error |\n|---|---|---|")
    print("\n".join(refused))
    if bad:
        sys.exit(f"error: {len(bad)} are not as they should be: {'; '.join(bad[:8])}")


def npz_is_like_timm(folder: pathlib.Path, images: torch.Tensor) -> bool:
    """Returns whether a file has the size of those that `npz_cases.load` builds a model for."""
    with np.load(folder / "model.npz") as arrays:
        kernel = next(arrays[name] for name in arrays.files if name.endswith("embedding/kernel"))
        hidden = next(arrays[name].shape[1] for name in arrays.files if name.endswith("Dense_0/kernel"))
    size = (npz_cases.PATCH, npz_cases.PATCH, 3, npz_cases.WIDTH)
    return kernel.shape == size and hidden == npz_cases.HIDDEN and images.shape[-1] == npz_cases.GRID * npz_cases.PATCH


def written_as(folder: pathlib.Path) -> str:
    """Returns the architecture that a config names."""
    if not (folder / "config.json").exists():
        return "npz"
    config = json.loads((folder / "config.json").read_text())
    return config.get("architecture") or config["architectures"][0]


if __name__ == "__main__":
    main()
