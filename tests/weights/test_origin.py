"""A folder, a file and a name on the hub give the same weights; what is no such thing is told what to do."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import save_file
from weight_files import entry, npy, npz, safetensors

from vit_dist.config import ConfigError
from vit_dist.weights.origin import Origin, open_origin

WEIGHTS = {"head.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "head.bias": np.ones(3, np.float32)}
CONFIG = {"architecture": "vit_tiny_patch16_224", "num_classes": 3}
NAME = "owner/vit_tiny.in1k"


def _fill(folder: Path, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".npz"):
        np.savez(folder / name, **WEIGHTS)
    else:
        save_file(WEIGHTS, folder / name)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def _assert_weights(origin: Origin) -> None:
    assert set(origin.tensors) == set(WEIGHTS) and origin.config == CONFIG
    for name, tensor in origin.tensors.items():
        np.testing.assert_array_equal(tensor.read(), WEIGHTS[name])


def _names(origin: Origin) -> list[str]:
    return [file.name for file in origin.files]


@pytest.mark.parametrize("name", ["model.safetensors", "vit_b16.safetensors", "vit_b16.npz"])
def test_a_folder_and_a_file_in_it_are_the_same_weights(name: str, tmp_path: Path) -> None:
    _fill(tmp_path, name)
    for named in (tmp_path, tmp_path / name, str(tmp_path / name)):
        origin = open_origin(named)
        _assert_weights(origin)
        assert _names(origin) == [name, "config.json"]


def test_safetensors_are_taken_before_what_else_a_folder_holds(tmp_path: Path) -> None:
    _fill(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"")
    np.savez(tmp_path / "vit.npz", other=np.zeros(1))
    _assert_weights(open_origin(tmp_path))
    (tmp_path / "model.safetensors").rename(tmp_path / "vit.safetensors")
    (tmp_path / "open_clip_model.safetensors").unlink()
    _assert_weights(open_origin(tmp_path))


def test_all_configs_beside_the_weights_are_read(tmp_path: Path) -> None:
    _fill(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    (tmp_path / "tokenizer.json").write_text("no JSON, and not read")
    origin = open_origin(tmp_path)
    assert origin.configs == {"config.json": CONFIG, "preprocessor_config.json": {"image_mean": [0.5, 0.5, 0.5]}}
    (tmp_path / "config.json").unlink()
    assert open_origin(tmp_path).config is None


def test_shards_belong_to_the_files_of_the_weights(tmp_path: Path) -> None:
    shard_of = {}
    for number, (name, array) in enumerate(WEIGHTS.items()):
        shard_of[name] = f"model-0000{number}-of-00002.safetensors"
        save_file({name: array}, tmp_path / shard_of[name])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for named in (tmp_path, tmp_path / "model.safetensors.index.json"):
        origin = open_origin(named)
        _assert_weights(origin)
        assert sorted(_names(origin)) == sorted(
            ["model.safetensors.index.json", *sorted(shard_of.values()), "config.json"]
        )


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_the_digest_is_what_sha256sum_says_of_the_files(tmp_path: Path) -> None:
    origin = open_origin(_fill(tmp_path))
    line = "sha256sum config.json model.safetensors | sha256sum"
    expected = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert origin.digest() == expected.split()[0]
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "num_classes": 4}))
    assert open_origin(tmp_path).digest() != expected.split()[0]
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match="config.json: cannot be read .No such file"):
        origin.digest()


def test_a_link_that_the_user_names_is_followed(tmp_path: Path) -> None:
    _fill(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "elsewhere/model.safetensors")
    _assert_weights(open_origin(tmp_path / "link"))
    assert set(open_origin(tmp_path / "link.safetensors").tensors) == set(WEIGHTS)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "vit.npz", "config.json"])
def test_a_pipe_is_refused_and_not_waited_for(name: str, tmp_path: Path) -> None:
    if name == "config.json":
        save_file(WEIGHTS, tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match=f"{name}: cannot be read .it is a pipe, device or folder and no file"):
        open_origin(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "vit.npz"])
def test_a_folder_with_the_name_of_a_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=f"{name}: cannot be read"):
        open_origin(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "runs/none/model.safetensors",
            "init.weights: there is no file or folder runs/none/model.safetensors; expected",
        ),
        ("none/model.npz", "there is no file or folder none/model.npz; .*model.safetensors with its config.json"),
        ("/none/at/all", "there is no file or folder /none/at/all; .*or a name on the Hugging Face hub"),
        ("vit", "there is no file or folder vit; .*timm/vit_base_patch16_224.augreg_in21k"),
        ("gs://vit_models/augreg/B_16.npz", "init.weights: gs://vit.*: is an address, expected a path on a disk"),
        ("../" * 3000, "init.weights: .* cannot be opened .File name too long"),
        ("a\0b/c", r"there is no file or folder a\\x00b/c"),
        ("~nobody-of-this-name/vit", "cannot expand ~"),
    ],
)
def test_a_name_without_weights_is_told_what_is_missing(name: str, words: str, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words) as raised:
        open_origin(name)
    assert str(raised.value).isprintable()


def test_the_key_that_was_set_begins_the_error() -> None:
    with pytest.raises(ConfigError, match="^--weights: there is no file or folder vit;"):
        open_origin("vit", "--weights")


@pytest.mark.parametrize("suffix", [".bin", ".pth", ".pt", ".ckpt", ".h5", ".msgpack"])
@pytest.mark.parametrize("as_folder", [False, True])
def test_other_libraries_files_are_refused_with_the_line_that_converts_them(
    suffix: str, as_folder: bool, tmp_path: Path
) -> None:
    file = tmp_path / f"it's{suffix}"
    file.write_bytes(b"\x80\x04")
    with pytest.raises(ConfigError, match=f"{suffix} is not read; .*import .*save_file") as raised:
        open_origin(tmp_path if as_folder else file)
    line = str(raised.value).partition("run this Python: ")[2]
    compile(line, "line", "exec")
    assert repr(str(file)) in line and repr(str(tmp_path / "model.safetensors")) in line


def test_the_line_that_converts_msgpack_does(tmp_path: Path) -> None:
    tree = {"vit": {"kernel": WEIGHTS["head.weight"]}, "bias": WEIGHTS["head.bias"]}
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    with pytest.raises(ConfigError) as raised:
        open_origin(tmp_path)
    exec(str(raised.value).partition("run this Python: ")[2], {})
    tensors = open_origin(tmp_path).tensors
    assert set(tensors) == {"vit/kernel", "bias"}
    np.testing.assert_array_equal(tensors["vit/kernel"].read(), WEIGHTS["head.weight"])


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vit.onnx").write_bytes(b"")
    with pytest.raises(ConfigError, match="vit.onnx: expected a .safetensors"):
        open_origin(tmp_path / "vit.onnx")
    with pytest.raises(ConfigError, match="holds no weights; .* found vit.onnx"):
        open_origin(tmp_path)


def test_a_file_of_the_hub_that_links_elsewhere_is_refused(tmp_path: Path) -> None:
    cache = _hub_cache(tmp_path)
    (tmp_path / "secret.safetensors").write_bytes(safetensors({"w": entry()}))
    weights = next(cache.glob("snapshots/*/model.safetensors"))
    weights.unlink()
    weights.symlink_to("../../../../secret.safetensors")
    with pytest.raises(ConfigError, match="model.safetensors: is a link to .*secret.safetensors, outside"):
        open_origin(weights.parent)
    weights.unlink()
    (cache / "refs/secret.safetensors").write_bytes(safetensors({"w": entry()}))
    weights.symlink_to("../../refs/secret.safetensors")  # inside of the cache, where no links lead
    with pytest.raises(ConfigError, match="model.safetensors: is a link to .*secret.safetensors, outside"):
        open_origin(weights.parent)


def _hub_cache(root: Path, files: dict[str, bytes] | None = None) -> Path:
    """Fills a cache of the hub as `huggingface_hub` does. Returns the folder of the one repository in it."""
    if files is None:
        _fill(root / "source")
        files = {file.name: file.read_bytes() for file in (root / "source").iterdir()}
    cache, commit = root / "hub" / f"models--{NAME.replace('/', '--')}", "0123456789abcdef" * 2 + "01234567"
    for folder in ("blobs", "refs", f"snapshots/{commit}"):
        (cache / folder).mkdir(parents=True)
    (cache / "refs/main").write_text(commit)
    for name, content in files.items():
        blob = hashlib.sha256(content).hexdigest()
        (cache / "blobs" / blob).write_bytes(content)
        (cache / f"snapshots/{commit}" / name).symlink_to(f"../../blobs/{blob}")
    return cache


OPEN = """
import json, sys
from vit_dist.config import ConfigError
from vit_dist.weights.origin import open_origin
if sys.argv[2] == "without":
    sys.modules["huggingface_hub"] = None
try:
    origin = open_origin(sys.argv[1])
    sums = {name: float(tensor.read().sum()) for name, tensor in origin.tensors.items()}
    print(json.dumps({"sums": sums, "config": origin.config, "files": [file.name for file in origin.files]}))
except ConfigError as error:
    print(error)
"""


def _open_on_hub(cache: Path, name: str = NAME, library: str = "with") -> str:
    """What opening a name prints in a process that cannot reach the hub, with the cache in `cache`."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "HF_HOME": str(cache)}
    command = [sys.executable, "-c", OPEN, name, library]
    done = subprocess.run(command, env={**os.environ, **offline}, cwd=cache, capture_output=True, text=True, check=True)
    return done.stdout


def test_a_name_on_the_hub_is_read_from_its_cache(tmp_path: Path) -> None:
    cache = _hub_cache(tmp_path)
    opened = json.loads(_open_on_hub(cache.parent))
    sums = {name: float(array.sum()) for name, array in WEIGHTS.items()}
    assert opened == {"sums": sums, "config": CONFIG, "files": ["model.safetensors", "config.json"]}
    _assert_weights(open_origin(next(cache.glob("snapshots/*"))))  # the folder itself may be named, too


def test_the_only_file_of_a_repository_may_have_any_name(tmp_path: Path) -> None:
    cache = _hub_cache(tmp_path, {"B_16.npz": npz({"w.npy": npy(np.ones(3, np.float32))})})
    assert json.loads(_open_on_hub(cache.parent)) == {"sums": {"w": 3.0}, "config": None, "files": ["B_16.npz"]}


def test_a_repository_without_weights_that_are_read_is_named(tmp_path: Path) -> None:
    cache = _hub_cache(tmp_path, {"config.json": b"{}", "pytorch_model.bin": b"\x80"})
    assert f"init.weights: {NAME} on the Hugging Face hub has no .safetensors and no .npz" in _open_on_hub(cache.parent)


def test_a_folder_wins_over_a_name_on_the_hub(tmp_path: Path) -> None:
    cache = _hub_cache(tmp_path, {"B_16.npz": npz({"w.npy": npy(np.ones(3, np.float32))})})
    _fill(cache.parent / NAME)
    assert json.loads(_open_on_hub(cache.parent))["config"] == CONFIG


def test_a_name_that_the_hub_does_not_give_is_an_error_of_one_line(tmp_path: Path) -> None:
    for name in ("owner/another", "owner/two..dots"):
        message = _open_on_hub(tmp_path, name)
        assert message.count("\n") == 1 and "Traceback" not in message
        assert message.startswith(f"init.weights: there is no file or folder {name}, and the Hugging Face hub has none")


def test_without_its_library_the_hub_is_told_how_to_be_reached(tmp_path: Path) -> None:
    message = _open_on_hub(_hub_cache(tmp_path).parent, library="without")
    assert message.count("\n") == 1
    assert message.startswith(
        f"init.weights: there is no file or folder {NAME}; as a name on the Hugging Face hub it needs"
    )
    assert "huggingface_hub, which is not installed" in message and "pip install 'vit-dist[hub]'" in message


def test_a_pointer_of_git_lfs_is_told_from_a_damaged_file(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 346284714\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(
        ConfigError, match="model.safetensors: is a pointer of Git LFS, not the weights; run `git lfs pull`"
    ):
        open_origin(tmp_path)
