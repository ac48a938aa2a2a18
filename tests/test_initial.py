"""`init.weights`: a fresh run from published weights or an earlier run; it is no resume, and they are read once."""

import json
import logging
import shutil

import golden_weights
import jax
import numpy as np
import pytest
from golden_weights import fixture
from system import checkpoint_steps, saved_state, settings, train_here

from vit_dist import inspect, load, plan
from vit_dist.config import ConfigError
from vit_dist.describe import inspect_weights
from vit_dist.weights.earlier_run import open_run

# The tiny recipe without the sizes that it sets, which then are those of the weights.
OPEN = (
    *(f"model.{key}=null" for key in ("width", "depth", "mlp", "heads", "patch_size")),
    *("model.pool=cls", "model.position_std=0.02", "model.image_size=224"),
)
STILL = ("optimizer.learning_rate=0", "optimizer.weight_decay=0", "total_steps=1", "mesh.data=2", "mesh.fsdp=2")


@pytest.fixture(scope="module")
def timm(tmp_path_factory):
    return golden_weights.write(fixture("timm_vit_cls"), tmp_path_factory.mktemp("timm")).parent


def parameters(workdir):
    """Those of the newest checkpoint, by path."""
    run = load(workdir)
    tree = jax.tree_util.tree_leaves_with_path(run._parameters)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in tree}


@pytest.fixture(scope="module")
def run(timm, tmp_path_factory):
    """A run that starts from timm's weights, and whose one step changes nothing."""
    workdir = tmp_path_factory.mktemp("run")
    train_here(workdir, *OPEN, *STILL, f"init.weights={timm}")
    return workdir


def test_a_run_starts_from_the_weights_and_takes_their_traits(run, timm):
    config = json.loads((run / "config.json").read_text())
    assert (
        config["model"]["width"] == 64 and config["model"]["depth"] == 3 and config["model"]["patch_size"] == [16, 16]
    )
    assert config["data"]["eval_crop"] == 0.9 and config["data"]["interpolation"] == "bicubic"
    found, golden = parameters(run), golden_weights.tensors(fixture("timm_vit_cls"))
    for number in range(3):
        up = golden[f"blocks.{number}.mlp.fc1.weight"].T
        np.testing.assert_array_equal(found[f"blocks/{number}/mlp/up/kernel"], up)
    gray = golden["patch_embed.proj.weight"].sum(1).transpose(1, 2, 0).reshape(256, 64)  # digits have one channel
    np.testing.assert_allclose(found["patch/kernel"], gray, rtol=1e-5, atol=1e-7)
    assert not np.any(found["head/kernel"])  # new: the weights do not name their classes
    (session,) = json.loads((run / "environment.json").read_text())
    assert session["weights"]["family"] == "timm" and len(session["weights"]["digest"]) == 64


def test_a_run_that_goes_on_needs_the_weights_no_more(run, timm, tmp_path):
    workdir, hidden = tmp_path / "run", tmp_path / "hidden"
    shutil.copytree(run, workdir)
    shutil.move(timm, hidden)
    try:
        train_here(workdir, *OPEN, *STILL, f"init.weights={timm}", "total_steps=2")
    finally:
        shutil.move(hidden, timm)
    for path, leaf in parameters(run).items():
        np.testing.assert_array_equal(parameters(workdir)[path], leaf, err_msg=path)
    with pytest.raises(ConfigError, match="holds a run of another config: .*init.weights"):
        train_here(workdir, *OPEN, *_sizes(), *STILL, "total_steps=3")


def test_an_earlier_run_is_a_start_at_another_size_with_its_head(run, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        train_here(tmp_path, *OPEN, *STILL, f"init.weights={run}", "model.image_size=80", "ema_decay=0.9")
    assert "position: resampled from 14x14 to 5x5 patches" in caplog.text or "to 5x5 patches" in caplog.text
    earlier, found = parameters(run), parameters(tmp_path)
    assert found["position"].shape == (26, 64)
    for path in earlier.keys() - {"position"}:
        np.testing.assert_array_equal(found[path], earlier[path], err_msg=path)
    step, state = saved_state(tmp_path, *OPEN, *STILL, "ema_decay=0.9", "model.image_size=80", *_sizes())
    assert step == 1
    for path, leaf in state.items():  # the average starts from the weights too
        if path.startswith("ema/") and not path.startswith("ema/head"):
            np.testing.assert_allclose(leaf, state[path.replace("ema/", "parameters/")], rtol=1e-6, err_msg=path)


def _sizes():
    return ("model.width=64", "model.depth=3", "model.mlp=256", "model.heads=4", "model.patch_size=16")


def test_a_tensor_for_which_the_model_has_no_place_is_named(timm, tmp_path):
    """Keys that the family does not state: nothing of the weights is dropped without a word."""
    named = "no place for norm/bias, blocks/0/norm1/bias, blocks/0/norm2/bias, .* and 3 more"
    with pytest.raises(ConfigError, match=named):
        train_here(tmp_path / "run", *OPEN, *STILL, f"init.weights={_hf_vit(tmp_path)}", "model.norm=rmsnorm")
    with pytest.raises(ConfigError, match="no place for norm/bias, norm/scale"):
        load(timm, overrides={"model.pool_norm": "none"})


def _hf_vit(folder):
    return golden_weights.write(fixture("hf_vit"), folder / "hf_vit").parent


def test_images_are_prepared_as_the_config_says_where_the_weights_say_nothing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train_here(tmp_path / "run", *OPEN, *STILL, f"init.weights={_hf_vit(tmp_path)}", "data.mean=0.25")
    assert "data.std=0.5, the config's: " in caplog.text and "preprocessor_config.json is missing" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ("model.width=32",),
            "model.width=32: the weights .* another model; leave it out, or write --config.model.width=64",
        ),
        (
            ("model.variant=S/16", "model.pool=mean"),
            "model.variant=S/16, model.pool=mean: .* write --config.model.variant=null --config.model.pool=cls",
        ),
        (
            ("init.head=keep", "model.num_classes=12"),
            "init.head: keep, .* it has 10 classes and the model 12; set init.head=new",
        ),
        (("init.step=3",), "init.step: 3, but .* holds no run of ours"),
        (("init.weights=nowhere/at-all.npz",), "init.weights: there is no file or folder nowhere/at-all.npz"),
    ],
    ids=str,
)
def test_what_contradicts_the_weights_is_refused_before_anything_is_written(changes, message, timm, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train_here(tmp_path / "run", *OPEN, *STILL, f"init.weights={timm}", *changes)
    assert not (tmp_path / "run").exists()


def test_the_best_checkpoint_of_an_earlier_run_is_one_that_was_evaluated(run, tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint has been evaluated, so none is the best"):
        train_here(tmp_path / "run", *OPEN, *STILL, f"init.weights={run}", "init.step=best")
    with pytest.raises(ConfigError, match="init.step: 7, but .* has saved 1; take one, newest or best"):
        train_here(tmp_path / "run", *OPEN, *STILL, f"init.weights={run}", "init.step=7")
    assert not (tmp_path / "run").exists()


def test_a_run_of_a_variant_tells_its_numbers(tmp_path):
    changes = ("model.variant=S+/4", *(f"model.{key}=null" for key in ("width", "depth", "mlp", "heads", "patch_size")))
    earlier = open_run(tmp_path, settings(*changes), (), 1)
    told = {key: earlier.description.model[key] for key in ("width", "mlp", "activation", "patch_size", "class_token")}
    assert told == {"width": 384, "mlp": 1536, "activation": "swiglu", "patch_size": (4, 4), "class_token": False}


def test_a_run_that_took_its_jitter_from_the_weights_goes_on(tmp_path):
    weights = golden_weights.write(fixture("hf_dinov3"), tmp_path / "dinov3").parent
    train_here(tmp_path / "run", *OPEN, *STILL, f"init.weights={weights}")
    assert json.loads((tmp_path / "run/config.json").read_text())["model"]["rope_rescale"] == 2.0
    train_here(tmp_path / "run", *OPEN, *STILL, f"init.weights={weights}", "total_steps=2")
    assert checkpoint_steps(tmp_path / "run") == [2]


def test_a_default_is_kept_on_request(timm, tmp_path):
    own = "init.own=[model.image_size,data.interpolation]"
    train_here(tmp_path / "run", *OPEN, *STILL, f"init.weights={timm}", own, "model.image_size=224")
    train_here(tmp_path / "run", *OPEN, *STILL, f"init.weights={timm}", own, "model.image_size=224", "total_steps=2")
    written = json.loads((tmp_path / "run/config.json").read_text())
    assert written["model"]["image_size"] == 224 and written["data"]["interpolation"] == "bilinear"
    assert written["data"]["eval_crop"] == 0.9
    for wrong, message in (
        ("model.imagesize", r"did you mean model.image_size\?"),
        ("seed", "no key of model or data"),
    ):
        with pytest.raises(ConfigError, match=f"init.own: {wrong} .*{message}|init.own: {wrong} is {message}"):
            train_here(tmp_path / "other", *OPEN, *STILL, f"init.weights={timm}", f"init.own=[{wrong}]")


def test_inspect_and_plan_take_the_traits_of_the_weights(timm):
    config = settings(*OPEN, f"init.weights={timm}")
    gray = 200_650 - 2 * 16 * 16 * 64  # of 3 channels
    assert inspect(config)["parameters"] == gray
    assert plan(config, "cpu:1")["fits"]


def test_inspect_says_what_becomes_of_each_tensor(timm, run):
    found = inspect_weights(timm, settings(*OPEN))
    assert found["family"] == "timm" and found["parameters"] == 200_650 and found["classes"] is None
    becomes = {tensor["name"]: tensor["becomes"] for tensor in found["tensors"]}
    assert becomes["blocks.0.attn.qkv.weight"] == ["blocks/0/attention/qkv/kernel"]
    assert found["model"]["norm_epsilon"] == 1e-6 and found["data"]["eval_crop_mode"] == "center"
    assert found["changes"] == [
        "patch/kernel: fitted from 16x16 pixels of 3 channels to 16x16 of 1",
        "head: new, for 10 classes; that of the weights has 10, without names",
    ]
    assert inspect_weights(run)["family"] == "an earlier run, step 1"
