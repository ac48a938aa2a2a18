"""The verb `probe`: of a run, of weights, of features in files."""

import json

import golden_weights
import numpy as np
import pytest
from golden_weights import fixture
from sklearn.neighbors import KNeighborsClassifier
from system import NOTHING_RANDOM, train_here

from vit_dist import cli
from vit_dist.features import features


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe") / "run"
    train_here(folder, "mesh.data=1", "total_steps=6", *NOTHING_RANDOM)
    return folder


@pytest.fixture(scope="module")
def files(workdir, tmp_path_factory):
    """The features of both splits by format: {"npz": [train, test], ...}."""
    folder = tmp_path_factory.mktemp("features")
    written = {kind: [folder / f"{split}.{kind}" for split in ("train", "test")] for kind in ("npz", "parquet")}
    for paths in written.values():
        for path in paths:
            features(workdir, path, split=path.stem)
    return written


def run(capsys, *words):
    """(exit code, the object on stdout or the line on stderr)."""
    code = cli.main(["probe", *map(str, words)])
    out, err = capsys.readouterr()
    return code, json.loads(out) if code == 0 else err.splitlines()[-1]


def test_the_verb_prints_one_object_with_every_probe(workdir, capsys):
    code, found = run(capsys, f"--workdir={workdir}", "--k=1,10", "--shots=2", "--l2=0.01,1")
    assert code == 0
    assert (found["split"], found["count"]) == ("test", 360)
    assert list(found["probes"]) == ["knn/1", "knn/10", "few_shot/2", "linear"]
    assert list(found["probes"]["linear"]["top1_by_l2"]) == ["0.01", "1"]
    assert found["probes"]["linear"]["l2"] in (0.01, 1)


@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_features_in_files_are_probed_as_those_of_the_model(kind, workdir, files, capsys):
    (_, found), (_, expected) = run(capsys, "--features", *files[kind]), run(capsys, f"--workdir={workdir}")
    assert found == expected


def test_the_accuracy_is_scikit_learns_on_what_the_verb_features_writes(files, capsys):
    train, test = (np.load(path) for path in files["npz"])
    _, found = run(capsys, "--features", *files["npz"], "--probes=knn", "--k=7", "--config.probe.temperature=null")
    model = KNeighborsClassifier(7, metric="cosine").fit(train["features"].astype(np.float64), train["label"])
    expected = model.score(test["features"].astype(np.float64), test["label"])
    assert found["probes"] == {"knn/7": {"count": 360, "top1": pytest.approx(expected), "examples": 1437}}


def test_a_run_is_probed_on_other_data_of_which_classes_are_chosen(workdir, tmp_path, capsys):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 60), ("test", 30)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 3
    np.savez(tmp_path / "data.npz", **arrays)
    chosen = ('--config.data.classes=["0","2"]', "--probes=knn", "--k=3")
    code, found = run(capsys, f"--workdir={workdir}", f"--data.path={tmp_path / 'data.npz'}", *chosen)
    assert code == 0, found
    assert (found["count"], found["probes"]["knn/3"]["examples"]) == (20, 40)
    code, found = run(capsys, f"--workdir={workdir}", *chosen)
    assert code == 2 and "holds a run of another config: data.classes" in found


def test_weights_of_others_are_probed_on_data_that_are_named(tmp_path, capsys):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8), np.arange(40) % 2
    images[labels == 1] //= 4  # dark ones
    np.savez(
        tmp_path / "data.npz",
        train_images=images[:30],
        train_labels=labels[:30],
        test_images=images[30:],
        test_labels=labels[30:],
    )
    weights = golden_weights.write(fixture("timm_vit_cls"), tmp_path / "timm").parent
    options = (f"--weights={weights}", "--k=3", "--shots=5", "--config.evaluate.batch_size=10")
    code, found = run(capsys, *options, f"--data.path={tmp_path / 'data.npz'}")
    assert code == 0, found
    assert found["count"] == 10
    assert found["probes"]["knn/3"]["top1"] == found["probes"]["few_shot/5"]["top1"] == 1
    assert run(capsys, *options) == (
        2,
        "error: data.path: not set; give the folder or file of the data, --data.path=DIR",
    )


def cut(path, folder, **changed):
    """A copy of a npz of features with other arrays."""
    with np.load(path) as arrays:
        np.savez(folder / "cut.npz", **{**arrays, **changed})
    return folder / "cut.npz"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--probes=kmn"], "probes: 'kmn' is none of knn, few_shot, linear (did you mean knn?)"),
        (["--probes="], "probes: none is named; give some of knn, few_shot, linear"),
        (["--probes=knn", "--shots=5"], "--shots: is of few_shot, but --probes=knn"),
        (["--probes=knn", "--l2=1"], "--l2: is of few_shot and linear, but --probes=knn"),
        (["--k=many"], "probe.k[0]: expected a whole number, found 'many' (str)"),
        (["--k=5000"], "probe.k: 5000, but there are 1437 training examples; take 1437 at most"),
        (["--shots=134"], "probe.shots: 134, but class '9' has 133 training examples; take 133 at most"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_for_models_and_files(words, message, workdir, files, capsys):
    for which in ([f"--workdir={workdir}"], ["--features", *files["npz"]]):
        assert run(capsys, *which, *words) == (2, f"error: {message}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--split=train"], "split: train is what probes learn from; give another, such as test"),
        (["--split=nope"], "no split 'nope': this source has train and test"),
        (["--what=tokens"], "what: tokens are many features for an image; take pooled, cls or mean"),
        (["--block=2"], "block: 2, but the model has the blocks 0 to 1; -1 is the last"),
        (["--config.model.depth=3"], None),
    ],
)
def test_what_a_run_cannot_do_is_refused(words, message, workdir, capsys):
    code, said = run(capsys, f"--workdir={workdir}", *words)
    assert code == 2
    assert said == f"error: {message}" if message else "model.depth" in said


def test_a_probe_of_one_class_is_refused(files, tmp_path, capsys):
    with np.load(files["npz"][0]) as arrays:
        same = np.full_like(arrays["label"], 3)
    one = cut(files["npz"][0], tmp_path, label=same)
    message = "probe: the 1437 training examples are all of class '3'; a probe needs two classes or more"
    assert run(capsys, "--features", one, files["npz"][1]) == (2, f"error: {message}")


def test_files_that_are_no_pair_are_refused(files, tmp_path, capsys):
    train, test = files["npz"]
    with np.load(test) as arrays:
        plan, names = json.loads(str(arrays["plan"])), arrays["class_names"]
    other = cut(test, tmp_path, plan=np.array(json.dumps({**plan, "block": 0})))
    assert run(capsys, "--features", train, other) == (
        2,
        f"error: {other}: its block is 0, but 1 in {train}; give a pair",
    )
    other = cut(test, tmp_path, class_names=names[::-1])
    assert run(capsys, "--features", train, other) == (2, f"error: {other}: class 0 is '9', but '0' in {train}")
    other = cut(test, tmp_path, features=np.zeros((360, 5, 32), np.float32))
    assert run(capsys, "--features", train, other) == (
        2,
        f"error: {other}: holds features [360, 5, 32]; expected one vector for each example",
    )


def test_a_file_is_not_classified_by_itself_nor_by_one_of_other_pixels(files, tmp_path, capsys):
    train, test = files["npz"]
    code, said = run(capsys, "--features", train, train)
    assert (code, said) == (
        2,
        f"error: {train}: holds the examples of {train}, from which probes learn; give other ones",
    )
    with np.load(test) as arrays:
        plan = json.loads(str(arrays["plan"]))
    other = cut(test, tmp_path, plan=np.array(json.dumps({**plan, "data.mean": 0.1})))
    code, said = run(capsys, "--features", train, other)
    assert code == 2 and "its data.mean is 0.1, but 0.5 in" in said


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"plan": "[]"}, "plan: expected an object, found a list that is empty"),
        ({"plan": '{"data": "", "split": "", "examples": 1, "shape": 3}'}, "plan: shape: expected a list, found 3"),
        ({"plan": "{"}, "Expecting property name"),
        ({"id": np.arange(3)}, "labels is [1437] of int32"),
        ({"id": np.int64(3)}, "ids is [] of int64"),
        ({"label": np.zeros(1437)}, "labels is [1437] of float64"),
        ({"label": np.full(1437, -1)}, "its labels go from -1 to -1"),
        ({"label": np.full(1437, 10)}, "label 10, but there are 10 class names"),
        ({"label": np.zeros((1437, 1), np.int32)}, "labels is [1437, 1]"),
        ({"features": np.full((1437, 32), "x")}, "features is [1437, 32] of <U1"),
        ({"class_names": np.arange(10)}, "class_names is [10] of int64"),
    ],
)
def test_a_file_with_columns_of_another_kind_is_refused(changed, problem, files, tmp_path, capsys):
    other = cut(files["npz"][0], tmp_path, **changed)
    code, said = run(capsys, "--features", other, files["npz"][1])
    assert code == 2
    assert said.startswith(f"error: {other}: holds no features of `vit-dist features` ({problem}")


def test_features_that_are_not_finite_are_refused(files, tmp_path, capsys):
    with np.load(files["npz"][1]) as arrays:
        features = arrays["features"].copy()
    features[7, 3], features[9, :] = np.inf, np.nan
    code, said = run(capsys, "--features", files["npz"][0], cut(files["npz"][1], tmp_path, features=features))
    assert code == 2
    assert said.startswith("error: probe: the features of 2 of 360 other examples are not finite")


def test_a_number_that_nobody_set_is_told_as_the_default(files, tmp_path, capsys):
    with np.load(files["npz"][0]) as arrays:
        few = {name: arrays[name][:15] for name in ("id", "label", "features")}
    code, said = run(capsys, "--features", cut(files["npz"][0], tmp_path, **few), files["npz"][1])
    assert (code, said) == (
        2,
        "error: probe.k: 20 by default, but there are 15 training examples; take 15 at most",
    )


def test_files_of_something_else_are_refused(files, tmp_path, capsys):
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    (tmp_path / "empty.npz").touch()
    (tmp_path / "cut.npz").write_bytes(files["npz"][0].read_bytes()[:-100])
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    for other in ("text.npz", "other.npz", "missing.parquet", "empty.npz", "cut.npz", "array.npz"):
        code, said = run(capsys, "--features", files["npz"][0], tmp_path / other)
        assert code == 2
        assert said.startswith(f"error: {tmp_path / other}: holds no features of `vit-dist features` (")


@pytest.mark.parametrize("option", ["--split=test", "--step=3", "--best", "--what=cls", "--block=0", "--data.path=x"])
def test_options_of_a_model_are_refused_with_files(option, files, capsys):
    code, said = run(capsys, "--features", *files["npz"], option)
    assert (code, said) == (2, f"error: {option.partition('=')[0]}: has no effect with --features; leave it out")
    code, said = run(capsys, "--features", *files["npz"], "--config.seed=1")
    assert said == "error: seed: has no effect on features in files; only fake_devices and probe.* can be set"
