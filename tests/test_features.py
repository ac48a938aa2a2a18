"""Features of a split: what they are, that each example is there once, that a stopped extraction goes on."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import golden_weights
import jax
import numpy as np
import pyarrow.parquet
import pytest
import reference
from PIL import Image
from system import NOTHING_RANDOM, ROOT, settings, train_here

import vit_dist
from vit_dist import cli, features
from vit_dist.config import ConfigError
from vit_dist.data.sets.formats.idx import read_digits
from vit_dist.evaluate import open_split
from vit_dist.extraction import Extractor
from vit_dist.load import Loaded, opened
from vit_dist.program import Program

MODULE = sys.modules["vit_dist.features"]
ONE, EIGHT, THREE_AXES = ["mesh.data=1"], ["mesh.data=8"], ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
DIGITS = 1437


@pytest.fixture(scope="module")
def timm(tmp_path_factory) -> Path:
    """Weights with a class token, for images of 48 pixels."""
    return golden_weights.write(golden_weights.fixture("timm_vit_cls"), tmp_path_factory.mktemp("timm")).parent


@pytest.fixture(scope="module")
def model(timm) -> Loaded:
    return vit_dist.load(timm)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Thirteen cats and eight dogs of many sizes to train on."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, count in (("cat", 13), ("dog", 8)):
        (folder / "train" / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (rng.integers(30, 90), rng.integers(30, 90), 3), np.uint8)
            Image.fromarray(pixels).save(folder / "train" / name / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run on the digits with an average, which pools the mean of four patches."""
    folder = tmp_path_factory.mktemp("features") / "run"
    train_here(folder, "mesh.data=8", "total_steps=2", "ema_decay=0.5", *NOTHING_RANDOM)
    return folder


def test_features_are_those_of_the_model_called_on_one_image_after_another(timm, model, photos, tmp_path):
    out = tmp_path / "out.parquet"
    answer = features(timm, out, path=photos, overrides=["evaluate.batch_size=8"])
    assert (answer["out"], answer["split"], answer["what"]) == (str(out), "train", "pooled")
    assert (answer["count"], answer["skipped"], answer["shape"]) == (21, 0, [64])
    table = pyarrow.parquet.read_table(out)
    assert table.column_names == ["id", "label", "class", "name", "features"]
    assert table["id"].to_pylist() == list(range(21))
    assert table["label"].to_pylist() == [0] * 13 + [1] * 8
    assert table["class"].to_pylist() == ["cat"] * 13 + ["dog"] * 8
    files = sorted((photos / "train").rglob("*.png"))
    assert table["name"].to_pylist() == [str(file) for file in files]
    found = np.array(table["features"].to_pylist(), np.float32)
    expected = np.concatenate([model.features(model.preprocess(file)[None]) for file in files])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert expected.std(axis=0).min() > 1e-3  # one image's are not another's


@pytest.mark.parametrize("block", [None, 0, -2])
def test_class_token_mean_and_tokens_are_the_references_of_any_block(timm, model, photos, tmp_path, block):
    chosen = opened(timm)
    read = {path: lazy.read() for path, lazy in chosen.fitted.parameters.items()}
    flat = {path: value for path, value in read.items() if not path.startswith("blocks/")}
    depth = model.settings.model.depth
    for path in (path.removeprefix("blocks/0/") for path in read if path.startswith("blocks/0/")):
        flat[f"blocks/{path}"] = np.stack([read[f"blocks/{i}/{path}"] for i in range(depth)])
    images = np.stack([model.preprocess(file) for file in sorted((photos / "train").rglob("*.png"))])
    tokens = reference.inside(vars(chosen.settings.model), flat, images)[0][-1 if block is None else block]
    kinds = {"cls": tokens[:, 0], "pooled": tokens[:, 0], "mean": tokens[:, 1:].mean(1), "tokens": tokens}
    for what, expected in kinds.items():
        out = tmp_path / f"{what}.npz"
        answer = features(timm, out, path=photos, what=what, block=block, overrides=["evaluate.batch_size=16"])
        assert answer["block"] == range(depth)[-1 if block is None else block]
        assert answer["shape"] == list(expected.shape[1:])
        with np.load(out) as arrays:
            np.testing.assert_allclose(arrays["features"], expected, atol=1e-4, err_msg=what)
    tokens_table = features(timm, tmp_path / "t.parquet", path=photos, what="tokens", block=block)
    assert tokens_table["shape"] == [10, 64]
    column = pyarrow.parquet.read_table(tmp_path / "t.parquet")["features"]
    np.testing.assert_allclose(np.array(column.to_pylist()), tokens, atol=1e-4)


@pytest.mark.parametrize("mesh", [ONE, EIGHT, THREE_AXES], ids=" ".join)
@pytest.mark.parametrize("batch", [100, 512])
def test_every_example_is_there_once_on_any_mesh_whatever_the_batch(run, tmp_path, mesh, batch):
    answer = features(run, tmp_path / "out.npz", overrides=[*mesh, f"evaluate.batch_size={batch}"])
    assert (answer["count"], answer["skipped"]) == (DIGITS, 0)
    images, labels = read_digits("train")
    with np.load(tmp_path / "out.npz") as arrays:
        assert arrays["features"].dtype == np.float32 and arrays["features"].shape == (DIGITS, 32)
        np.testing.assert_array_equal(arrays["id"], np.arange(DIGITS))
        np.testing.assert_array_equal(arrays["label"], labels)
        assert list(arrays["class_names"]) == [str(digit) for digit in range(10)]
        some = np.array([0, 1, 99, 100, 101, 800, DIGITS - 1])
        loaded = vit_dist.load(run)
        expected = loaded.features(np.stack([loaded.preprocess(image) for image in images[some]]))
        np.testing.assert_allclose(arrays["features"][some], expected, atol=1e-5)


def test_a_mesh_that_splits_tokens_changes_nothing(timm, photos, tmp_path):
    split = ["mesh.data=2", "mesh.tensor=2", "mesh.context=2", "evaluate.batch_size=8"]
    for what in ("pooled", "cls", "mean", "tokens"):
        found = []
        for overrides in (["mesh.data=1"], split):
            out = tmp_path / f"{what}{len(overrides)}.npz"
            features(timm, out, path=photos, what=what, block=1, overrides=overrides)
            with np.load(out) as arrays:
                found.append(arrays["features"])
        np.testing.assert_allclose(*found, atol=1e-5, err_msg=what)


KILLED = """
import os, signal, sys
import numpy as np
import vit_dist.features
module = sys.modules["vit_dist.features"]
module.PART_BYTES = 1
savez, calls = np.savez, []
def dies(stream, **arrays):
    calls.append(1)
    if len(calls) == 4:
        stream.write(b"half a part")
        stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    savez(stream, **arrays)
np.savez = dies
module.features(sys.argv[1], sys.argv[2], overrides=["mesh.data=8", "evaluate.batch_size=200", "fake_devices=8"])
"""


@pytest.mark.parametrize("suffix", ["parquet", "npz"])
def test_an_extraction_that_is_killed_goes_on_and_ends_with_the_same_bytes(run, tmp_path, monkeypatch, suffix):
    overrides = ["mesh.data=8", "evaluate.batch_size=200"]
    out, whole = tmp_path / f"out.{suffix}", tmp_path / f"whole.{suffix}"
    done = subprocess.run([sys.executable, "-c", KILLED, str(run), str(out)], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert not out.exists()
    parts = tmp_path / f"out.{suffix}.parts"
    assert sorted(file.name for file in parts.glob("[0-9]*")) == [f"{number:06}.npz" for number in range(3)]
    monkeypatch.setattr(MODULE, "PART_BYTES", 1)
    started, batches = [], Extractor.batches
    monkeypatch.setattr(Extractor, "batches", lambda *a, **k: started.append(a[3]) or batches(*a, **k))
    assert features(run, out, overrides=overrides)["count"] == DIGITS
    assert features(run, whole, overrides=overrides)["count"] == DIGITS
    assert started == [600, 0]
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([out.name, whole.name])
    if suffix == "parquet":
        groups = pyarrow.parquet.ParquetFile(out)
        assert [groups.metadata.row_group(i).num_rows for i in range(groups.num_row_groups)] == [*[200] * 7, 37]


def test_parts_of_another_extraction_are_not_continued(run, timm, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(MODULE, "PART_BYTES", 1)
    stopped = RuntimeError("stopped")

    def stops(*_):
        raise stopped

    monkeypatch.setattr(MODULE._Parts, "finish", stops)
    out = tmp_path / "out.parquet"
    with pytest.raises(RuntimeError, match="stopped"):
        features(timm, out, path=photos)
    before = {file: file.read_bytes() for file in (tmp_path / "out.parquet.parts").iterdir()}
    assert len(before) == 2
    monkeypatch.setattr(MODULE._Parts, "finish", lambda *_: pytest.fail("parts of another extraction were continued"))
    fewer = shutil.copytree(photos, tmp_path / "fewer")
    (fewer / "train/cat/00.png").unlink()
    retrained = golden_weights.fixture("timm_vit_cls")
    arrays = golden_weights.tensors(retrained)
    arrays["norm.bias"] = arrays["norm.bias"] + 1
    retrained = golden_weights.write(retrained, tmp_path / "retrained", arrays).parent
    for model, changes, key in (
        (timm, {"what": "cls"}, "what was 'pooled', now 'cls'"),
        (timm, {"block": 0}, "block was "),
        (timm, {"overrides": ["data.mean=0.4"]}, "data.mean was "),
        (timm, {"path": fewer}, "data was "),
        (retrained, {}, "weights was "),
    ):
        with pytest.raises(ConfigError, match=f"out.parquet.parts: holds parts of another extraction .{key}.*remove"):
            features(model, out, **{"path": photos, **changes})
    assert {file: file.read_bytes() for file in (tmp_path / "out.parquet.parts").iterdir()} == before
    assert not out.exists()
    monkeypatch.undo()
    assert features(timm, out, path=photos, overrides=["evaluate.batch_size=40"])["count"] == 21  # another batch size
    assert not (tmp_path / "out.parquet.parts").exists()


def test_a_damaged_part_is_made_again(run, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(MODULE, "PART_BYTES", 1)
    whole = tmp_path / "whole.npz"
    features(run, whole, overrides=["mesh.data=8", "evaluate.batch_size=200"])
    for number, damage in enumerate((b"", b"noise" * 20, None)):
        out = tmp_path / f"{number}.npz"
        with monkeypatch.context() as patch:
            patch.setattr(MODULE._Parts, "finish", lambda *_: pytest.fail("stopped"))
            with pytest.raises(pytest.fail.Exception, match="stopped"):
                features(run, out, overrides=["mesh.data=8", "evaluate.batch_size=200"])
        part = tmp_path / f"{number}.npz.parts/000002.npz"
        part.write_bytes(part.read_bytes()[:-9] if damage is None else damage)
        features(run, out, overrides=["mesh.data=8", "evaluate.batch_size=200"])
        assert out.read_bytes() == whole.read_bytes()
        assert f"{part}: cannot be read (" in caplog.text


def test_an_attempt_that_made_no_part_hinders_no_other(timm, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "train/cat/03.png").write_text("no image")
    out, parts = tmp_path / "out.npz", tmp_path / "out.npz.parts"
    with pytest.raises(ConfigError, match="no known image format"):
        features(timm, out, path=folder)
    assert not parts.exists()
    parts.mkdir()
    (parts / "plan.json").write_text('{"what": "cls"}')  # as a kill before the first part leaves it
    assert features(timm, out, path=photos)["count"] == 21
    assert not parts.exists()


def test_a_file_that_does_not_decode_is_an_error_or_left_out_as_data_on_bad_says(
    timm, photos, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(MODULE, "PART_BYTES", 1)  # a part for each batch
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "train/cat/03.png").write_text("no image")
    out, small = tmp_path / "out.npz", ["evaluate.batch_size=8"]
    with pytest.raises(ConfigError, match=r"train/cat/03.png: no known image format; repair or remove it"):
        features(timm, out, path=folder, overrides=small)
    skip = [*small, "data.on_bad=skip"]
    for _ in range(2):  # the second goes on after the part with the bad file, and may not forget it
        with pytest.raises(ConfigError, match="data.max_bad_fraction: 1 of 21 files did not decode"):
            features(timm, out, path=folder, overrides=skip)
        assert not out.exists()
    answer = features(timm, out, path=folder, overrides=[*skip, "data.max_bad_fraction=0.05"])
    assert (answer["count"], answer["skipped"]) == (20, 1)
    assert "skipped" in caplog.text and "03.png: no known image format" in caplog.text
    with np.load(out) as arrays:
        assert arrays["id"].tolist() == [0, 1, 2, *range(4, 21)]
        assert arrays["label"].tolist() == [0] * 12 + [1] * 8


def test_a_part_without_a_single_row_is_no_row_group(timm, photos, tmp_path, monkeypatch):
    folder = shutil.copytree(photos, tmp_path / "photos")
    for number in range(8):
        (folder / f"train/cat/{number:02}.png").write_text("no image")
    monkeypatch.setattr(MODULE, "PART_BYTES", 1)
    overrides = ["evaluate.batch_size=8", "data.on_bad=skip", "data.max_bad_fraction=0.5"]
    assert features(timm, tmp_path / "out.parquet", path=folder, overrides=overrides)["count"] == 13
    assert pyarrow.parquet.read_table(tmp_path / "out.parquet")["id"].to_pylist() == list(range(8, 21))
    assert pyarrow.parquet.ParquetFile(tmp_path / "out.parquet").num_row_groups == 2


def test_what_cannot_be_made_is_said_and_leaves_nothing(timm, run, photos, tmp_path):
    out = tmp_path / "out.parquet"

    def refused(model, out, **options):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ConfigError) as error:
            features(model, out, **options)
        assert sorted(tmp_path.rglob("*")) == before
        return str(error.value)

    assert "out.csv: expected a name that ends in .parquet or .npz" in refused(timm, tmp_path / "out.csv", path=photos)
    assert f"there is no folder {tmp_path}/no" in refused(timm, tmp_path / "no/out.npz", path=photos)
    assert "what: expected one of pooled, cls, mean, tokens" in refused(timm, out, path=photos, what="patches")
    assert "the model has the blocks 0 to" in refused(timm, out, path=photos, block=99)
    assert "what: cls, but the model has no class token" in refused(run, out, what="cls")
    assert "data.path: not set; give the folder" in refused(timm, out)
    assert "no folder 'test' or 'val'" in refused(timm, out, path=photos, split="test")
    assert "no data set that is known by its files" in refused(timm, out, path=photos / "train" / "cat")
    assert "which with --config.data.source, one of" in refused(timm, out, path=photos / "train" / "cat")
    assert "model.depth (was 2, now 3)" in refused(run, out, overrides=["model.depth=3"])
    out.write_text("mine")
    assert "out.parquet: exists" in refused(timm, out, path=photos)
    assert out.read_text() == "mine"
    (tmp_path / "other.npz.parts").mkdir()
    (tmp_path / "other.npz.parts/mine").write_text("mine")
    assert "is no folder of parts" in refused(timm, tmp_path / "other.npz", path=photos)
    (tmp_path / "other.npz.parts/plan.json").write_text("{")
    assert "plan.json: not JSON" in refused(timm, tmp_path / "other.npz", path=photos)


def test_the_verb_takes_a_run_or_weights_and_prints_one_object(timm, run, photos, tmp_path, capsys):
    words = [f"--weights={timm}", f"--data.path={photos}", "--what=tokens", "--block=-1", "--split=train"]
    assert cli.main(["features", *words, f"{tmp_path}/a.npz"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["out"], found["count"], found["shape"]) == (f"{tmp_path}/a.npz", 21, [10, 64])
    assert cli.main(["features", f"--workdir={run}", "--split=test", "--best", f"{tmp_path}/b.parquet"]) == 2
    assert "so none is the best" in capsys.readouterr().err
    assert cli.main(["features", f"--workdir={run}", "--split=test", "--step=2", f"{tmp_path}/b.parquet"]) == 0
    assert json.loads(capsys.readouterr().out)["count"] == 360


def test_a_run_under_way_has_features_of_its_parameters_compiled_once(run):
    asked = settings("mesh.data=8", *NOTHING_RANDOM)
    program, source = Program(asked, classes=10, steps=1, augment_on_device=True), open_split(asked, "test")
    with program.in_use():
        extractor = Extractor(program.settings, program.model, program.mesh)
        parameters = program.new_state().parameters
        first = extractor.all(parameters, source)
        other = jax.tree.map(lambda leaf: leaf * 1.5, parameters)
        second = extractor.all(other, source)
        assert {step._cache_size() for step in extractor._steps.values()} == {0, 1}
    assert first.ids.tolist() == list(range(360)) and first.features.shape == (360, 32)
    np.testing.assert_array_equal(first.labels, source.labels)
    assert np.abs(first.features - second.features).max() > 0.1
