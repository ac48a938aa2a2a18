"""`vit-dist export`: a run, or weights of others, in a folder that other libraries open; whole or not at all."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import golden_weights
import numpy as np
import pytest
import safetensors.numpy
from golden_weights import fixture

from vit_dist import export, load, recipes
from vit_dist.cli import main
from vit_dist.config import ConfigError
from vit_dist.exporting import card, onnx
from vit_dist.job.exit_codes import MISTAKE
from vit_dist.train import train

SMALLEST = Path(__file__).parents[1] / "helpers" / "smallest.py"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The weights that the run starts from, with a licence."""
    golden = fixture("timm_vit_avg")
    return golden_weights.write(golden, tmp_path_factory.mktemp("weights")).parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with an average and two checkpoints, of which the first is the best or the second."""
    workdir = tmp_path_factory.mktemp("export") / "digits run"
    steps = ["total_steps=4", "checkpoint.keep_last=2", "ema_decay=0.9", "optimizer.learning_rate=0.01"]
    train(recipes.load(SMALLEST, [*steps, "model.registers=1", "model.head_zero_init=false"]), workdir)
    return workdir


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (17, 8, 8, 1)).astype(np.uint8)


def normalised(pixels):
    return ((pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.5)).astype(np.float32)


@pytest.mark.parametrize("format", ["timm", "huggingface", "safetensors"])
def test_a_folder_is_read_as_the_average_of_the_run(format, run, images, tmp_path):
    result = export(run, tmp_path / "out", format)
    assert result["step"] == 4 and result["format"] == format and result["digest"] is None
    assert result["files"] == sorted(file.name for file in (tmp_path / "out").iterdir())
    assert result["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    again, ours = load(tmp_path / "out"), load(run)
    found, expected = again.model(normalised(images)), ours.model(normalised(images))
    np.testing.assert_allclose(found, expected, atol=1e-5 * expected.std())
    assert again.classes == ours.classes == tuple("0123456789")


def test_the_checkpoint_is_chosen(run, tmp_path):
    numbers = {}
    for step in (2, 4, "best", "newest"):
        result = export(run, tmp_path / str(step), "safetensors", step=step)
        tensors = safetensors.numpy.load_file(tmp_path / str(step) / "model.safetensors")
        numbers[step] = result["step"], tensors["head/kernel"]
    assert [numbers[step][0] for step in (2, 4, "newest")] == [2, 4, 4]
    np.testing.assert_array_equal(numbers[4][1], numbers["newest"][1])
    assert not np.array_equal(numbers[2][1], numbers[4][1])
    np.testing.assert_array_equal(numbers["best"][1], numbers[numbers["best"][0]][1])


ALONE = """
    import sys
    sys.modules.update(dict.fromkeys(("vit_dist", "flax", "optax", "orbax", "safetensors")))  # an import of one fails
    import jax, numpy as np
    from jax import export
    model = export.deserialize(bytearray(open("model.stablehlo", "rb").read()))
    assert model.platforms == ("cpu", "cuda", "tpu"), model.platforms
    with np.load("parameters.npz") as file:
        parameters = jax.device_put(dict(file))
    images = np.load(sys.argv[1])
    for count in (1, 17):
        np.save(f"{sys.argv[2]}{count}.npy", model.call(parameters, images[:count]))
    assert not any(sys.modules.get(name) for name in ("vit_dist", "flax"))
"""


@pytest.mark.parametrize("input", ["float", "uint8"])
def test_stablehlo_gives_the_same_logits_in_a_process_with_jax_alone(input, run, images, tmp_path):
    export(run, tmp_path / "out", "stablehlo", input=input)
    given = images if input == "uint8" else normalised(images)
    np.save(tmp_path / "images.npy", given)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    arguments = [sys.executable, "-c", textwrap.dedent(ALONE), str(tmp_path / "images.npy"), str(tmp_path / "logits")]
    subprocess.run(arguments, cwd=tmp_path / "out", env=environment, check=True)
    expected = load(run).model(normalised(images))
    for count in (1, 17):
        found = np.load(tmp_path / f"logits{count}.npy")
        np.testing.assert_allclose(found, expected[:count], atol=1e-5 * expected.std())


def test_the_lines_of_a_card_run(run, images, tmp_path, monkeypatch):
    export(run, tmp_path / "out", "stablehlo", input="uint8")
    text = (tmp_path / "out" / card.FILE).read_text()
    lines = text.partition("## How to load it")[2].partition("\n## ")[0].splitlines()
    monkeypatch.chdir(tmp_path / "out")
    found = {}
    exec("\n".join(line.removeprefix("    ") for line in lines if line.startswith("    ")), found)
    assert found["logits"].shape == (17, 10)


def test_a_card_tells_data_recipe_metrics_and_where_the_model_comes_from(run, tmp_path):
    export(run, tmp_path / "out", "timm")
    text = (tmp_path / "out" / card.FILE).read_text()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in rows if row["step"] == 4 and row["split"] == "test/ema")
    for said in (
        "# digits run", "library_name: timm", "checkpoint of step 4, the moving average of its parameters",
        "- source: digits", "- optimizer.learning_rate: 0.01", "started from random numbers", 'local-dir:."',
        f"- test/ema at step 4: top1 {last['top1']:.4f}", "0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
    ):  # fmt: skip
        assert said in text, said
    assert "license" not in text


def test_a_card_tells_what_the_weights_were_and_their_licence(weights, tmp_path):
    result = export(weights, tmp_path / "out", "safetensors")
    text = (tmp_path / "out" / card.FILE).read_text()
    assert f"digest `{result['digest']}`" in text and len(result["digest"]) == 64
    assert 'license: "mit"' in text and "Licence of the weights: mit" in text
    assert load(tmp_path / "out").settings.data.mean == load(weights).settings.data.mean
    again = export(tmp_path / "out", tmp_path / "timm", "timm")
    assert json.loads((tmp_path / "timm/config.json").read_text())["pretrained_cfg"]["license"] == "mit"
    assert again["parameters"] == result["parameters"]


def test_a_run_that_started_from_weights_names_them_and_their_licence(weights, tmp_path):
    keys = [f"init.weights={weights}", "total_steps=1", "checkpoint.every_steps=0", "evaluate.every_steps=0"]
    own = ["width", "depth", "mlp", "heads", "patch_size"]
    nothing = [f"model.{key}=null" for key in own] + ["model.num_classes=10", "batch_size=4", "model.channels=3"]
    train(
        recipes.load(SMALLEST, [*keys, *nothing, "model.image_size=14", "init.own=[model.image_size]"]),
        tmp_path / "run",
    )
    export(tmp_path / "run", tmp_path / "out", "timm")
    text = (tmp_path / "out" / card.FILE).read_text()
    digest = load_digest(weights)
    assert str(weights.parent) not in text  # a folder of this machine
    assert f"The run started from `{weights.name}` (timm), digest `{digest}`" in text
    assert "Licence of the starting weights: mit." in text and "This checkpoint was not evaluated." in text
    assert json.loads((tmp_path / "out/config.json").read_text())["pretrained_cfg"]["license"] == "mit"


def load_digest(weights):
    from vit_dist.weights.published import open_published

    return open_published(weights).origin.digest()


def test_keys_of_the_command_line_change_the_model(weights, tmp_path):
    export(weights, tmp_path / "out", "timm", overrides={"model.image_size": 56, "data.mean": 0.25})
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_args"]["img_size"] == [56, 56] and config["pretrained_cfg"]["mean"] == [0.25] * 3
    shape = safetensors.numpy.load_file(tmp_path / "out/model.safetensors")["pos_embed"].shape
    assert shape == (1, 1 + 16, 64)


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--format=npz"], "model.registers: 1, which big_vision and vision_transformer cannot express"),
        (["--format=torch"], "export: format: 'torch', expected one of timm, huggingface, safetensors, npz, stableh"),
        (["--format=timm", "--input=uint8"], "export: input is of --format=stablehlo or onnx, and has no meaning"),
        (["--format=onnx", "--input=int8"], "export: input: 'int8', expected float or uint8"),
        (["--format=timm", "--step=3"], "export: step: 3, but .* has saved 2, 4; take one, newest or best"),
        (["--format=onnx", "--converter=nowhere/python"], "export: --converter=.*nowhere/python: cannot be run"),
        (["--format=onnx", "--converter=true"], "export: --converter=true: has written no model.onnx"),
        (["--format=onnx"], "export: --format=onnx needs jax2onnx, onnxruntime, which .*; make an environment for it"),
        (["--format=timm", "--config.model.width=8"], "init.weights: "),
    ],
    ids=str,
)  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_nothing(arguments, error, run, tmp_path, capsys):
    if error.startswith("export: --format=onnx needs") and not set(onnx.NEEDED) - set(sys.modules):
        pytest.skip("jax2onnx is installed here")
    assert main(["export", f"--workdir={run}", str(tmp_path / "out"), *arguments]) == MISTAKE
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.match(f"error: {error}", line), line
    assert listing(tmp_path) == []


def test_a_folder_that_exists_is_left_as_it_is(run, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=r"/out: exists; export to a folder that does not"):
        export(run, tmp_path / "out", "timm")
    assert listing(tmp_path / "out") == []
    with pytest.raises(ConfigError, match=r"there is no folder .*/nowhere; make it first"):
        export(run, tmp_path / "nowhere/out", "timm")


def test_an_export_that_fails_half_way_leaves_nothing(run, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("the disk is full")

    monkeypatch.setattr(card, "text", fail)
    with pytest.raises(OSError, match="the disk is full"):
        export(run, tmp_path / "out", "timm")
    assert listing(tmp_path) == []


def test_one_process_of_a_job_of_several_does_not_export(run, tmp_path, monkeypatch):
    for name, value in (("COORDINATOR", "localhost:1"), ("PROCESSES", "2"), ("PROCESS", "1")):
        monkeypatch.setenv(f"VIT_DIST_{name}", value)
    with pytest.raises(ConfigError, match="export: is for one process, and this job has several"):
        export(run, tmp_path / "out", "timm")


def test_a_run_may_be_named_as_weights(run, tmp_path, capsys):
    for number, option in enumerate(("--weights", "--workdir")):
        assert main(["export", f"{option}={run}", "--best", "--format=safetensors", f"{tmp_path}/{number}"]) == 0
    found, expected = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert found | {"out": ""} == expected | {"out": ""}


def test_a_step_is_of_a_run(weights, tmp_path, capsys):
    assert main(["export", f"--weights={weights}", "--best", "--format=timm", str(tmp_path / "out")]) == MISTAKE
    assert f"error: export: step: best, but {weights} holds no run of ours; leave it out" in capsys.readouterr().err
    assert main(["export", f"--workdir={weights}", "--format=timm", str(tmp_path / "out")]) == MISTAKE
    assert f"{weights}: holds no run; --weights=PATH is for weights of others" in capsys.readouterr().err
    assert listing(tmp_path) == []
