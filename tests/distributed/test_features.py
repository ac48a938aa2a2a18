"""Two processes of four devices each write the features that one process of one device writes, each example once."""

import sys

import numpy as np
from PIL import Image
from system import NOTHING_RANDOM, run, train_here

from vit_dist import features

JOB = ("launch", "--processes=2", "--devices-per-process=4", "--", "features")
MESH = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.evaluate.batch_size=100")


def job(output, *words):
    return run([sys.executable, "-m", "vit_dist", *JOB, *words], output)


def test_features_of_two_processes_are_those_of_one(tmp_path):
    train_here(tmp_path / "run", "mesh.data=1", "total_steps=2", *NOTHING_RANDOM)
    code, said = job(tmp_path / "job", f"--workdir={tmp_path}/run", *MESH, f"{tmp_path}/two.npz")
    assert code == 0, said.said()[-3000:]
    assert said.stdout.read_text().count("{") == 1 and said.result()["count"] == 1437
    features(tmp_path / "run", tmp_path / "one.npz", overrides=["mesh.data=1"])
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert one.files == two.files
        np.testing.assert_array_equal(two["id"], np.arange(1437))
        np.testing.assert_array_equal(two["label"], one["label"])
        np.testing.assert_allclose(two["features"], one["features"], atol=1e-5)
    code, said = job(tmp_path / "again", f"--workdir={tmp_path}/run", *MESH, f"{tmp_path}/two.npz")
    assert code == 2 and "two.npz: exists" in said.said()


def test_a_bad_file_of_one_process_is_named_by_the_job_or_left_out(tmp_path):
    train_here(tmp_path / "run", "mesh.data=1", "total_steps=2", *NOTHING_RANDOM)
    folder, rng = tmp_path / "photos/train/cat", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(10):
        Image.fromarray(rng.integers(0, 256, (9, 9), np.uint8)).save(folder / f"{number}.png")
    (folder / "7.png").write_text("no image")
    words = (f"--workdir={tmp_path}/run", f"--data.path={tmp_path}/photos", *MESH[:3], "--config.evaluate.batch_size=4")
    code, said = job(tmp_path / "error", *words, f"{tmp_path}/out.npz")
    assert code == 2 and "cat/7.png: no known image format" in said.said() and not (tmp_path / "out.npz").exists()
    skip = ("--config.data.on_bad=skip", "--config.data.max_bad_fraction=0.1")
    code, said = job(tmp_path / "skip", *words, *skip, f"{tmp_path}/out.npz")
    assert code == 0, said.said()[-3000:]
    assert (said.result()["count"], said.result()["skipped"]) == (9, 1)
    with np.load(tmp_path / "out.npz") as arrays:
        assert arrays["id"].tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9]
