"""Everything a user can get wrong: one `error:` line on stderr, nothing on stdout, exit 2, and nothing left behind."""

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

from vit_dist import cli, evaluate, inspect, recipes
from vit_dist.config import ConfigError
from vit_dist.paths import expanded
from vit_dist.run import workdir as run_files
from vit_dist.train import train

REPOSITORY = Path(__file__).parents[1]
SMALLEST = str(Path(__file__).parent / "helpers" / "smallest.py")
Refused = Callable[..., str]


@pytest.fixture
def refused(capsys, tmp_path) -> Refused:
    """Runs a command that must be refused, `WORKDIR` being a directory two levels below what exists; its message."""

    def run(*words: str) -> str:
        before = snapshot(tmp_path)
        capsys.readouterr()
        try:
            code = cli.main([word.replace("WORKDIR", str(tmp_path / "not" / "there")) for word in words])
        except SystemExit as stopped:  # argparse's way
            code = stopped.code
        out, err = capsys.readouterr()
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
        assert snapshot(tmp_path) == before
        return err.removeprefix("error: ").rstrip("\n")

    return run


@pytest.fixture
def refused_train(refused) -> Refused:
    """As `refused`, of training the smallest recipe with these overrides."""
    return lambda *overrides: refused(
        "train", f"--config={SMALLEST}", "--workdir=WORKDIR", *(f"--config.{one}" for one in overrides)
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A finished run; not to be changed."""
    workdir = tmp_path_factory.mktemp("errors") / "run"
    train(recipes.load(SMALLEST), workdir)
    return workdir


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """A copy of the run, to spoil."""
    return shutil.copytree(trained, tmp_path / "run")


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def image_folder(root: Path, *, splits: tuple[str, ...] = ("train", "test")) -> Path:
    for split in splits:
        for number, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            cv2.imwrite(str(folder / "1.png"), np.full((8, 8, 3), 40 * number, np.uint8))
    return root


# What does not fit the schema, the model, the mesh, the optimizer or the data.


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("model.dept=3", r"unknown key model.dept \(did you mean model.depth\?\)"),
        ("model.variant=Q/16", r"model.variant: 'Q' is none of mu, Ti, S, S\+, M, B, "),
        ("model.variant=B-16", "model.variant: 'B-16' is none of mu, .*; write size and patch like B/16"),
        ("model.variant=B model.patch_size=null", "model.variant: 'B' names no patch size; write it like B/16"),
        ("model.image_size=9", "model.image_size: height 9 is not a multiple of the patch's 4; take 8 or 12"),
        ("batch_size=15 mesh.data=-1", "batch_size: 15 does not divide over mesh.data=8; take 8 or 16"),
        ("accumulate_steps=4 mesh.data=-1", "batch_size: 16 .* mesh.data=8 x accumulate_steps=4; take 32"),
        ("mesh.tensor=4", "model.heads: 2 does not divide over mesh.tensor=4; take 4"),
        ("mesh.tensor=4 model.heads=4 model.mlp=30", "model.mlp: 30 does not divide over mesh.tensor=4; take 28 or 32"),
        ("mesh.fsdp=8 model.width=20", "model.width: 20 does not divide over mesh.fsdp=8; take 16 or 24"),
        ("mesh.data=16", "mesh: data=16 needs 16 devices, found 8; .*fake_devices=16"),
        ("fake_devices=3", "fake_devices: 3 asked for, but jax already runs with 8 devices"),
        ("optimizer.name=adamm", r"optimizer.name: 'adamm' is none of sgd, adam, .* \(did you mean adam\?\)"),
        ("optimizer.schedule=cosin", r"optimizer.schedule: 'cosin' is none of .* \(did you mean cosine\?\)"),
        ("optimizer.cooldown_steps=3", "optimizer.cooldown_steps: goes with the schedules rsqrt and constant"),
        ("optimizer.rules=[{path: nowhere}]", r"optimizer.rules\[0\].path: 'nowhere' matches no parameter"),
        ("optimizer.rules=[{path: (}]", r"optimizer.rules\[0\].path: '\(' is no regular expression"),
        ("data.source=digit", r"data.source: 'digit' is none of digits, .* \(did you mean digits\?\)"),
        ("data.source=folder", "data.path: not set; the source 'folder' needs a folder or file"),
        ("data.source=tar data.path=/nowhere/at/all", "data.path: no such file or folder: /nowhere/at/all"),
        ("evaluate.splits=[tets]", "no split 'tets': this source has train and test"),
        ("model.num_classes=7", r"model.num_classes: example 5 \(id 5\) has label 7, .* in 0..6; 424 of 1437"),
        ("binarize_targets=true", "binarize_targets: needs loss=sigmoid, found softmax; set loss=sigmoid or"),
        ("model.width=1048576", r"model: its state takes 49,.* GiB of a device's memory, which is"),
        ("model.image_size=65536", "model: its state takes .* split over more devices$"),
        ("batch_size=1440", "batch_size: 1440, but the training split has 1437 images; take at most as many"),
        ("data.augment_on=device data.erase=0.5", "data.augment_on: device, but data.erase is done by the host alone"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_anything_is_written(refused_train, overrides, message):
    """Some of what each layer refuses; the tests of the layers have all of it."""
    assert re.match(message, refused_train(*re.split(r" (?=[\w.]+=)", overrides)))


def test_a_folder_of_images_is_refused_for_what_it_lacks(refused_train, tmp_path):
    common = ("data.source=folder", "model.channels=3", "model.num_classes=null", "batch_size=2", "mesh.data=1")
    whole = image_folder(tmp_path / "whole")
    assert "has label 1, which is not in 0..0" in refused_train(*common, f"data.path={whole}", "model.num_classes=1")
    assert "model.channels: 2, but" in refused_train(*common, f"data.path={whole}", "model.channels=2")
    assert "is a file" in refused_train(*common, f"data.path={whole}/train/cat/1.png")
    no_test = image_folder(tmp_path / "no_test", splits=("train",))
    assert "no folder 'test' or 'val'" in refused_train(*common, f"data.path={no_test}")
    (whole / "train" / "eel").mkdir()
    assert "class folder 'eel' holds no images; fill or remove it" in refused_train(*common, f"data.path={whole}")


# Recipes.

HEAD = "from vit_dist.config import default_config\n\n\ndef get_config():\n    config = default_config()\n"
TAIL = "    return config\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n", ":1: invalid syntax"),
        ("import nonesuch\n", ":1: ModuleNotFoundError: No module named 'nonesuch'"),
        ("def get_config():\n    return {}[\n        'x']\n", ":2: KeyError: x"),
        ("def get_config():\n    raise RuntimeError('two\\nlines')\n", ":2: RuntimeError: two lines"),
        ("def get_config():\n    pass\n", ": get_config() returned NoneType, expected a ConfigDict"),
        ("def get_config(batch):\n    pass\n", "get_config() missing 1 required positional argument: 'batch'"),
        ("x = 1\n", "defines no get_config()"),
        (HEAD + "    config.model.dept = 3\n" + TAIL, ": unknown key model.dept (did you mean model.depth?)"),
        (HEAD + "    config.modle.depth = 3\n" + TAIL, ":6: AttributeError: 'modle' Did you mean \"model\""),
        (HEAD + "    config.model = 3\n" + TAIL, ": model: expected keys and values, found 3 (int)"),
        (HEAD + "    config.seed = 'x'\n" + TAIL, ": seed: expected a whole number, found 'x' (str)"),
        ("\0", "null bytes"),
    ],
)  # fmt: skip
def test_a_broken_recipe_is_refused_with_its_name_and_line(refused, tmp_path, text, message):
    file = tmp_path / "mine.py"
    file.write_text(text)
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        said = refused("train", f"--config={file}", "--workdir=WORKDIR", "--config.model.depth=2")
    finally:
        sys.dont_write_bytecode = before
    assert said.startswith(str(file)) and message in said


def test_a_recipe_that_is_not_there_is_refused_with_the_near_miss(refused, tmp_path):
    (tmp_path / "digits.py").write_text("")
    said = refused("train", f"--config={tmp_path}/digit.py", "--workdir=WORKDIR")
    assert said == f"{tmp_path}/digit.py: no such config file (did you mean digits.py?)"
    (tmp_path / "config.json").write_text("{}")
    assert "a config file is a Python file" in refused("inspect", f"--config={tmp_path}/config.json")


# Words of the command line.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "the following arguments are required: VERB"),
        ("trian", "invalid choice: 'trian' (choose from"),
        ("train --config=x.py", "the following arguments are required: --workdir"),
        ("train --workdir=WORKDIR", "the following arguments are required: --config"),
        ("train --config=x.py --workdir=", "argument --workdir: the path is empty"),
        ("eval", "the following arguments are required: --workdir"),
        ("eval --workdir=WORKDIR --step=x", "argument --step: invalid int value: 'x'"),
        ("eval --workdir=WORKDIR --step=2 --best", "argument --best: not allowed with argument --step"),
        ("eval --workdir=WORKDIR --spilt=test", "unrecognized arguments: --spilt=test"),
        ("train --config=x.py --workdir=WORKDIR --lr=3", "--lr=3 (did you mean --config.optimizer.learning_rate?)"),
        ("train --config=x.py --workdir=WORKDIR --epochs 3", "--epochs 3 (did you mean --config.total_epochs?)"),
        ("train --config=x.py --workdir=~nobody-here/run", "~nobody-here/run: cannot expand ~ to a home folder"),
        (
            "train --config=~nobody-here/x.py --workdir=WORKDIR",
            "config: ~nobody-here/x.py: cannot expand ~ to a home folder",
        ),
        ("train --config=x.py --workdir=gs://b/run", "--workdir: gs://b/run: is an address, expected a path on a disk"),
        ("eval --workdir=S3://b/run", "--workdir: S3://b/run: is an address"),
        ("predict --workdir=WORKDIR gs://b/a.png", "IMAGE: gs://b/a.png: is an address"),
        ("features --weights=gs://b/w o.npz", "features: gs://b/w: is an address"),
        ("predict --weights=w --out=az://b/o.csv one.png", "--out: az://b/o.csv: is an address"),
        ("predict --weights=w --attention=gs://b one.png", "--attention: gs://b: is an address"),
        ("features --weights=w gs://b/o.npz", "OUT: gs://b/o.npz: is an address"),
        ("export --weights=w --format=timm file:///tmp/o", "OUT: file:///tmp/o: is an address"),
        ("export --workdir=gs://b/run --format=timm o", "--workdir: gs://b/run: is an address"),
        ("probe --features gs://b/a.npz b.npz", "--features: gs://b/a.npz: is an address"),
        ("prepare --source=digits gs://b/o", "gs://b/o: records are written to a mounted disk"),
        ("train --config=gs://b/x.py --workdir=WORKDIR", "config: gs://b/x.py: is an address"),
        ("configs gs://b", "folder: gs://b: is an address"),
        ("predict --workdir=WORKDIR", "the following arguments are required: IMAGE"),
        ("predict one.png", "one of the arguments --workdir --weights is required"),
        ("predict --workdir=WORKDIR --weights=w one.png", "argument --weights: not allowed with argument --workdir"),
        ("predict --weights=w --json --out=x.csv one.png", "--json prints and --out writes the result"),
        ("features --weights=w", "the following arguments are required: OUT"),
        ("features --weights=w --block=x o.npz", "argument --block: invalid int value: 'x'"),
        ("configs --config.seed=1", "--config.seed=1: configs only lists, and takes no keys"),
        ("configs nowhere", "nowhere: no such folder"),
    ],
)
def test_a_mistyped_command_is_refused_with_what_is_wrong_in_it(refused, words, message):
    assert message in refused(*words.split())


@pytest.mark.parametrize("word", ["--config.", "--config.seed", "--config.seed="])
def test_an_override_without_key_or_value_is_refused_and_swallows_no_other_word(refused, word):
    said = refused("train", f"--config={SMALLEST}", word, "--workdir=WORKDIR")
    assert said.startswith("seed: no value is given" if "seed" in word else "=: names no key")


def test_an_address_is_refused_where_a_function_expects_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("gs://bucket/run", Path("gs://bucket/run"), "memory://run"):
        with pytest.raises(ConfigError, match="workdir: .*: is an address, expected a path on a disk"):
            expanded(path, "workdir")
    with pytest.raises(ConfigError, match="workdir: gs://bucket/run: is an address"):
        train(recipes.load(SMALLEST), "gs://bucket/run")
    assert list(tmp_path.iterdir()) == []
    for kept in ("a:b/c", "http/x", "/data/gs://x", "c:/x", "runs:"):
        assert expanded(kept, "workdir") == Path(kept)


def test_a_mistyped_key_is_refused_without_starting_jax():
    code = (
        "import sys\nfrom vit_dist.cli import main\n"
        f"code = main(['train', '--config={SMALLEST}', '--workdir=/nowhere', '--config.sed=1'])\n"
        "print(code, 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout == "2 False\n" and done.stderr == "error: unknown key sed (did you mean seed?)\n"


# Working directories.


def test_a_workdir_that_cannot_be_made_is_refused(refused, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for workdir, why in (
        (file, "File exists"),
        (file / "below", "Not a directory"),
        (tmp_path / "new" / ("x" * 300), "File name too long"),
    ):
        said = refused("train", f"--config={SMALLEST}", f"--workdir={workdir}")
        assert said.startswith(str(workdir)) and why in said
    assert file.read_text() == "mine"


def test_a_full_disk_is_said_in_one_line(refused, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "run").mkdir()
    command = ("train", f"--config={SMALLEST}", f"--workdir={tmp_path}/run")
    monkeypatch.setattr(run_files, "write_atomically", full)
    assert (
        refused(*command)
        == f"{tmp_path}/run: cannot write there ({os.strerror(errno.ENOSPC)}); choose another --workdir"
    )
    monkeypatch.setattr(run_files, "write_run", full)
    assert refused(*command) == f"{tmp_path}/run: {os.strerror(errno.ENOSPC)}"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 16508 bytes.\nmore lines"),
            "out of memory: Out of memory allocating 16508 bytes.; lower batch_size, evaluate.batch_size or",
        ),
        (MemoryError(), "out of memory: the host's memory is full; lower batch_size"),
    ],
)
def test_too_little_memory_is_said_in_one_line(refused_train, monkeypatch, error, message):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("vit_dist.program.Program.check_memory", fails)
    assert refused_train().startswith(message)


def test_a_run_is_evaluated_where_its_optimizer_would_not_fit(trained, refused_train, monkeypatch):
    parameters = inspect(SMALLEST)["bytes_per_device"]["parameters"]
    monkeypatch.setattr("vit_dist.program.memory_share", lambda device: 2 * parameters)
    assert evaluate(trained)["step"] == 2
    assert refused_train().startswith("model: its state takes 0.0 GiB")


def test_registers_that_no_memory_holds_end_in_one_line(tmp_path):
    """jax itself finds out, when it allocates."""
    words = ["train", f"--config={SMALLEST}", f"--workdir={tmp_path}/run", "--config.model.registers=65536"]
    done = subprocess.run([sys.executable, "-m", "vit_dist", *words], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: out of memory: ")
    assert "Traceback" not in done.stderr


def test_a_workdir_of_another_run_is_refused_with_the_keys_and_left_alone(refused, copy):
    said = refused(
        "train", f"--config={SMALLEST}", f"--workdir={copy}", "--config.model.depth=2", "--config.optimizer.b1=0.8"
    )
    assert "model.depth (was 1, now 2), optimizer.b1 (was 0.9, now 0.8)" in said
    assert said.startswith(f"{copy} holds a run of another config") and "choose another --workdir" in said


@pytest.mark.parametrize("verb", ["eval", "predict", "features"])
def test_a_directory_that_holds_no_run_or_no_checkpoint_is_refused(refused, tmp_path, copy, verb):
    image = tmp_path / "one.png"
    cv2.imwrite(str(image), np.zeros((8, 8), np.uint8))
    words = (verb, *{"predict": [str(image)], "features": [f"{tmp_path}/out.npz"]}.get(verb, []))
    assert "holds no run (config.json is missing)" in refused(*words, "--workdir=WORKDIR")
    assert "holds no run (config.json is missing)" in refused(*words, f"--workdir={tmp_path}")
    assert "no checkpoint of step 7; there are 2" in refused(*words, f"--workdir={copy}", "--step=7")
    assert "model.depth (was 1, now 3)" in refused(*words, f"--workdir={copy}", "--config.model.depth=3")
    shutil.rmtree(copy / "checkpoints")
    assert f"{copy}/checkpoints: no checkpoint" in refused(*words, f"--workdir={copy}")
    (copy / "checkpoints").mkdir()
    assert f"{copy}/checkpoints: no checkpoint here" in refused(*words, f"--workdir={copy}")


def test_eval_of_a_split_that_is_not_there_is_refused(refused, trained):
    assert refused("eval", f"--workdir={trained}", "--split=nope") == "no split 'nope': this source has train and test"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", ": not JSON"),
        ("[]", ": expected an object, found a list that is empty"),
        ('{"sed": 3}', ": unknown key sed (did you mean seed?)"),
        ('{"model": 3}', ": model: expected keys and values, found 3 (int)"),
    ],
)
def test_a_config_file_of_a_run_that_is_damaged_is_refused_by_name(refused, copy, text, message):
    (copy / "config.json").write_text(text)
    said = refused("eval", f"--workdir={copy}")
    assert said.startswith(f"{copy}/config.json{message}")
    assert refused("train", f"--config={SMALLEST}", f"--workdir={copy}") == said


def test_class_names_and_summaries_that_are_damaged_are_refused_by_name(refused, copy, tmp_path):
    image = tmp_path / "one.png"
    cv2.imwrite(str(image), np.zeros((8, 8), np.uint8))
    (copy / "summary.json").write_text("[]")
    assert "summary.json: expected an object, found a list" in refused(
        "train", f"--config={SMALLEST}", f"--workdir={copy}"
    )
    (copy / "classes.json").write_text("3")
    assert "classes.json: expected a list, found 3" in refused("predict", f"--workdir={copy}", str(image))
    (copy / "classes.json").unlink()
    assert "classes.json: missing" in refused("predict", f"--workdir={copy}", str(image))


# Processes.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("localhost:1", "", ""), r"VIT_DIST_PROCESSES=\(unset\), VIT_DIST_PROCESS=\(unset\): all three must be set"),
        (("", "2", "0"), r"VIT_DIST_COORDINATOR=\(unset\), .*: all three must be set"),
        (("localhost:1", "two", "0"), "VIT_DIST_PROCESSES=two, .* to whole numbers"),
        (("localhost:1", "2", "2"), "VIT_DIST_PROCESS=2: VIT_DIST_PROCESS must be less than VIT_DIST_PROCESSES"),
        (("localhost:1", "0", "0"), "VIT_DIST_PROCESS=0: VIT_DIST_PROCESS must be less than VIT_DIST_PROCESSES"),
        (("localhost", "2", "1"), "VIT_DIST_COORDINATOR must be host:port"),
    ],
)
def test_variables_of_a_job_that_make_no_sense_are_refused(refused_train, monkeypatch, values, message):
    for name, value in zip(("VIT_DIST_COORDINATOR", "VIT_DIST_PROCESSES", "VIT_DIST_PROCESS"), values, strict=True):
        monkeypatch.setenv(name, value)
    assert re.search(message, refused_train())


def test_a_job_that_was_joined_without_us_is_refused(refused_train, monkeypatch):
    """Its processes would train without being compared, and each would count its own bad files alone."""
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert re.search("jax.distributed.initialize: this process has joined its job by itself", refused_train())


# The command itself.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--config.mesh.data=16", "mesh: data=16 needs 16 devices, found 2"),
        ("--config.data.source=folder --config.data.path=/nowhere", "data.path: no such file or folder: /nowhere"),
    ],
)
def test_the_command_says_one_line_and_leaves_no_trace(tmp_path, words, message):
    workdir = tmp_path / "not" / "there"
    command = [sys.executable, "-m", "vit_dist", "train", f"--config={SMALLEST}", f"--workdir={workdir}"]
    done = subprocess.run(
        [*command, "--config.fake_devices=2", *words.split()], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
