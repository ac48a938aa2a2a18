"""ImageNet's own tars, in miniature: a tar of tars, a flat tar, and each kind of ground truth."""

import functools
import io
import logging
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
from containers import add_file, assert_refused, assert_same, open_files
from scipy.io import savemat

from vit_dist.data.files import location
from vit_dist.data.sets import index
from vit_dist.data.sets.formats.imagenet_tar import DEVKIT, TARS

_files = functools.partial(open_files, "imagenet_tar")
_fails = functools.partial(assert_refused, "imagenet_tar")

WNIDS = ("n01440764", "n01443537", "n02119789")
TRUTH = [2, 0, 1, 1, 0, 2, 2]  # of the validation images, in the order of their names
NUMBERS = {1: "n02119789", 2: "n01440764", 3: "n01443537", 4: "n00001740"}  # the devkit's; the last is a parent
LABELS = "imagenet_2012_validation_synset_labels.txt"


def _tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            add_file(tar, name, content)
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path: Path, encode: Callable[..., bytes]) -> Path:
    """The same images as class folders: what the tars must be equal to."""
    root = tmp_path / "folder"
    images = [("train", wnid, f"{wnid}_{10 + i}.JPEG") for c, wnid in enumerate(WNIDS) for i in range(3 + c)]
    images += [("val", WNIDS[label], f"ILSVRC2012_val_{1 + i:08d}.JPEG") for i, label in enumerate(TRUTH)]
    for number, (split, wnid, name) in enumerate(images):
        file = root / split / wnid / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(number, format="JPEG"))
    return root


@pytest.fixture
def tars(folder: Path, tmp_path: Path) -> Path:
    """Both tars, their members in no particular order, and the labels as WordNet ids."""
    root = tmp_path / "tars"
    root.mkdir()
    classes = {}
    for wnid in ("n02119789", "n01440764", "n01443537"):
        files = sorted((folder / "train" / wnid).iterdir(), reverse=True)
        classes[f"{wnid}.tar"] = _tar({file.name: file.read_bytes() for file in files})
    (root / TARS["train"]).write_bytes(_tar(classes))
    images = {file.name: file.read_bytes() for file in (folder / "val").glob("*/*")}
    (root / TARS["val"]).write_bytes(_tar(dict(sorted(images.items(), key=lambda item: item[0][-6]))))
    (root / LABELS).write_text("".join(f"{WNIDS[label]}\n" for label in TRUTH))
    return root


def _devkit(numbers: dict[int, str] = NUMBERS, leave_out: str = "") -> bytes:
    """`meta.mat` as the devkit has it: an array of structs, the parents of classes among them."""
    fields = "ILSVRC2012_ID WNID words gloss num_children children wordnet_height num_train_images".split()
    synsets = np.empty((len(numbers), 1), [(name, object) for name in fields])
    for row, (number, wnid) in enumerate(numbers.items()):
        children = np.array([[1.0, 2.0, 3.0]]) if number == 4 else np.zeros((0, 0))
        parents = float(children.size > 0)
        synsets[row, 0] = (float(number), wnid, f"word {number}", "a gloss", 3 * parents, children, parents, 1300.0)
    table = io.BytesIO()
    savemat(table, {"synsets": synsets})
    by_wnid = {wnid: number for number, wnid in NUMBERS.items()}
    truth = "".join(f"{by_wnid[WNIDS[label]]}\n" for label in TRUTH)
    top = "ILSVRC2012_devkit_t12"
    files = {
        f"{top}/readme.txt": b"x",
        f"{top}/data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
        f"{top}/data/meta.mat": table.getvalue(),
    }
    return _tar({name: content for name, content in files.items() if not leave_out or leave_out not in name}, "w:gz")


def test_the_tar_of_tars_is_the_folder(tars: Path, folder: Path) -> None:
    train = _files(tars)
    assert train.class_names == WNIDS and train.labels.tolist() == [0] * 3 + [1] * 4 + [2] * 5
    assert train.names[0] == "n01440764/n01440764_10.JPEG"
    assert train.name(0) == f"{tars}/ILSVRC2012_img_train.tar/n01440764/n01440764_10.JPEG"
    assert_same(train, open_files("folder", folder))


def test_a_plain_tar_of_class_folders_needs_no_members_for_them(
    tars: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = {f"{file.parent.name}/{file.name}": file.read_bytes() for file in (folder / "train").glob("*/*")}
    (tars / TARS["train"]).write_bytes(_tar(images))
    assert_same(_files(tars), open_files("folder", folder))
    assert not caplog.records
    with tarfile.open(tars / TARS["train"], "w") as tar:
        for name, content in [*images.items(), *images.items()]:
            add_file(tar, name, content)
    assert len(_files(tars)) == 12 and "left out 12 images that a later one of the same name" in caplog.text


@pytest.mark.parametrize("truth", ["wnids", "devkit", "solution"])
def test_validation_images_are_the_folder_by_every_ground_truth(tars: Path, folder: Path, truth: str) -> None:
    if truth == "devkit":
        (tars / LABELS).write_text("the devkit goes before")
        (tars / DEVKIT).write_bytes(_devkit())
    elif truth == "solution":
        (tars / LABELS).unlink()
        rows = [f"ILSVRC2012_val_{1 + i:08d},{WNIDS[label]} 1 2 3 4 " for i, label in enumerate(TRUTH)]
        (tars / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(rows)]) + "\n")
    for split in ("val", "test", "validation"):
        val = _files(tars, split)
        assert val.split == "val"
        assert [val.labels[i] for i in np.argsort([name[-13:] for name in val.names])] == TRUTH
        assert_same(val, open_files("folder", folder, "val"))


def test_the_devkits_numbers_are_not_the_labels(tars: Path) -> None:
    (tars / DEVKIT).write_bytes(_devkit())
    val = _files(tars, "val")
    first = [name.split("/")[1] for name in val.names].index("ILSVRC2012_val_00000001.JPEG")
    assert val.labels[first] == 2  # number 1 of the devkit is n02119789, the last of three


def test_bare_numbers_without_the_devkit_are_refused(tars: Path) -> None:
    (tars / LABELS).unlink()
    _fails(f"no labels of the validation images in .*put {DEVKIT}, {LABELS} or LOC_val_solution.csv there", tars, "val")
    truth = tars / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("".join(f"{1 + label}\n" for label in TRUTH))
    _fails(f"ground_truth.txt: begins with '3', expected a WordNet id .*put {DEVKIT}", tars, "val")
    (tars / "val_labels.txt").write_text("".join(f"{WNIDS[label]}\n" for label in TRUTH))
    assert len(_files(tars, "val")) == 7  # what holds WordNet ids is taken


def test_a_ground_truth_that_does_not_fit_is_named(tars: Path) -> None:
    lines = (tars / LABELS).read_text()
    (tars / LABELS).write_text(lines[:-10])
    _fails(f"{LABELS}: the labels of 6 images, but .*img_val.tar holds 7", tars, "val")
    (tars / LABELS).write_text(lines.replace(WNIDS[1], "tench"))
    _fails(f"{LABELS}: holds 'tench', expected a WordNet id", tars, "val")
    (tars / LABELS).write_text(lines.replace(WNIDS[1], "n00000001"))
    _fails("img_val.tar: class 'n00000001' is not among the 3 of the train split", tars, "val")
    (tars / TARS["train"]).unlink()
    assert _files(tars, "val").class_names == ("n00000001", "n01440764", "n02119789")


def test_a_damaged_devkit_is_named(tars: Path) -> None:
    (tars / DEVKIT).write_bytes(_devkit(leave_out="meta.mat"))
    _fails(f"{DEVKIT}: no data/meta.mat in it", tars, "val")
    (tars / DEVKIT).write_bytes(_devkit({1: "n02119789"}))
    _fails(f"{DEVKIT}: data/meta.mat has no 2", tars, "val")
    top = "ILSVRC2012_devkit_t12/data"
    broken = {f"{top}/meta.mat": b"no table", f"{top}/ILSVRC2012_validation_ground_truth.txt": b"1\n"}
    (tars / DEVKIT).write_bytes(_tar(broken, "w:gz"))
    _fails(f"{DEVKIT}: data/meta.mat or data/.* cannot be read", tars, "val")


def test_what_is_missing_is_named(tars: Path) -> None:
    _fails("no split 'extra': this source has train and val", tars, "extra")
    _fails("img_train.tar is a file; expected the folder that holds", tars / TARS["train"])
    (tars / TARS["train"]).unlink()
    _fails("no ILSVRC2012_img_train.tar in", tars)


def test_damage_and_links_in_the_inner_tars_are_refused(tars: Path) -> None:
    file = tars / TARS["train"]
    original = file.read_bytes()
    file.write_bytes(_tar({"n01440764.tar": b"no tar" * 100}))
    _fails("img_train.tar:n01440764.tar: damaged at byte 512", tars)
    inner = _tar({"a.JPEG": bytes(600)})
    file.write_bytes(_tar({"n01440764.tar": inner[:1024]}))
    _fails("img_train.tar:n01440764.tar: member 'a.JPEG' is damaged", tars)
    file.write_bytes(_tar({"n01440764.tar": _tar({"../a.JPEG": b"x"})}))
    _fails("n01440764.tar: member '../a.JPEG' reaches outside", tars)
    file.write_bytes(_tar({"n01440764.tar": _tar({})}))
    _fails("class folder 'n01440764' holds no images", tars)
    file.write_bytes(original[:-12_000])
    _fails("img_train.tar.*damaged", tars)


def test_what_is_no_image_is_left_out_and_counted(tars: Path, caplog: pytest.LogCaptureFixture) -> None:
    with tarfile.open(tars / TARS["val"], "a") as tar:
        add_file(tar, "notes.txt", b"x")
        add_file(tar, "._ILSVRC2012_val_00000001.JPEG", b"x")
    with tarfile.open(tars / TARS["train"], "a") as tar:
        add_file(tar, "README", b"x")
        add_file(tar, "n09999999.tar", _tar({"a.JPEG": b"x", "b.txt": b"x", "deeper/c.JPEG": b"x"}))
    with caplog.at_level(logging.WARNING):
        assert len(_files(tars)) == 13
        assert "left out 3 entries" in caplog.text and "n09999999/b.txt" in caplog.text
        caplog.clear()
        val = _files(tars, "val")
    assert len(val) == 7 and "left out 2 entries" in caplog.text
    assert "no images of 1 classes of the train split, such as 'n09999999'" in caplog.text


def test_the_index_is_kept_until_the_labels_change(
    tars: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_CACHED_FROM", 1)
    cache = str(tmp_path / "cache")
    expected = {split: _files(tars, split, cache_dir=cache) for split in ("train", "val")}
    with monkeypatch.context() as patched:
        patched.setattr("vit_dist.data.sets.formats.imagenet_tar.scan", None)
        for split, source in expected.items():
            assert_same(_files(tars, split, cache_dir=cache), source)
    (tars / LABELS).write_text(f"{WNIDS[0]}\n" * 7 + "\n")
    assert set(_files(tars, "val", cache_dir=cache).labels.tolist()) == {0}


def test_the_tars_are_read_behind_fsspec_and_in_workers(tars: Path, folder: Path, tmp_path: Path) -> None:
    (tars / LABELS).unlink()
    (tars / DEVKIT).write_bytes(_devkit())
    remote = location(f"memory://{tmp_path.name}")
    fsspec.filesystem("memory").put(f"{tars}/", f"/{tmp_path.name}", recursive=True)
    for split in ("train", "val"):
        source, local = _files(remote, split), _files(tars, split)
        assert_same(source, open_files("folder", folder, split))
        assert_same(pickle.loads(pickle.dumps(local)), source)
