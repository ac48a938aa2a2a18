"""The baselines of `benchmarks/step.py` train the same model as ours: as many parameters, and the same losses."""

import json
import re
from typing import Any

import jax
import numpy as np
import pytest
import step
import timm_baseline
from states import random_parameters, state_of

from vit_dist.config import Config, ConfigError

TINY = {
    "d2l": [
        *("model.width=16", "model.mlp=24", "model.heads=2", "model.image_size=8", "model.patch_size=4"),
        *(f"model.{name}=0" for name in ("dropout", "embedding_dropout", "attention_dropout")),
    ],
    "cifar10": ["model.width=16", "model.depth=2", "model.mlp=24", "model.heads=2", "model.image_size=8"],
    "S/4": [
        *("model.width=16", "model.depth=1", "model.mlp=24", "model.heads=2", "model.image_size=8"),
        *("model.pool=mean", "model.position=sincos2d", "optimizer.clip=0.5", "optimizer.moment_dtype=bfloat16"),
    ],
}
BATCH = 8
# Where a name of Linen's differs from ours.
RENAMED = {
    "linen": {
        r"^Conv_0/": "patch/",
        r"^positions$": "position",
        r"^Block_(\d+)/": r"blocks/\1/",
        r"^LayerNorm_0/": "norm/",
        r"^Dense_0/": "head/",
    },
    "bigvision": {
        r"^embedding/": "patch/",
        r"^pos_embedding$": "position",
        r"^Transformer/encoderblock_(\d+)/": r"blocks/\1/",
        r"^Transformer/encoder_norm/": "norm/",
    },
}
IN_BLOCKS = {
    r"/LayerNorm_0/": "/norm1/",
    r"/LayerNorm_1/": "/norm2/",
    r"/Mlp(Block)?_0/Dense_0/": "/mlp/up/",
    r"/Mlp(Block)?_0/Dense_1/": "/mlp/down/",
    r"/MultiHeadDotProductAttention_0/out/": "/attention/projection/",
    r"/MultiHeadDotProductAttention_0/": "/attention/",
}


def configured(model: str, *overrides: str) -> Config:
    return step.settings_for(model, BATCH, "float32", [*TINY[model], "model.scan=false", *overrides])


def batch_for(settings: Config) -> tuple[np.ndarray, np.ndarray]:
    draw, side = np.random.default_rng(0), settings.model.image_size
    images = draw.integers(0, 256, (BATCH, side, side, settings.model.channels), np.uint8)
    return images, draw.integers(0, settings.model.num_classes, BATCH, np.int32)


def as_theirs(peer: str, params: Any, ours: dict[str, np.ndarray]) -> Any:
    """Our parameters, by path, in the tree of a baseline's."""

    def take(path: tuple[Any, ...], leaf: jax.Array) -> np.ndarray:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, replacement in (RENAMED[peer] | IN_BLOCKS).items():
            name = re.sub(pattern, replacement, name)
        if found := re.search(r"attention/(query|key|value)/", name):
            which = ("query", "key", "value").index(found[1])
            fused = ours[name.replace(found[0], "attention/qkv/")]
            return fused[:, which] if name.endswith("kernel") else fused[which]
        return ours[name].reshape(leaf.shape)

    return jax.tree.map_with_path(take, params)


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("peer", ["linen", "bigvision"])
def test_a_baseline_of_our_parameters_has_our_losses(peer: str, model: str) -> None:
    settings = configured(model)
    images, labels = batch_for(settings)
    drawn: dict[str, np.ndarray] = {}

    def new_state(program: Any) -> Any:
        drawn.update(random_parameters(program, 1))
        abstract = program.abstract_state().parameters
        by_path = jax.tree.map_with_path(
            lambda path, _: drawn[jax.tree_util.keystr(path, simple=True, separator="/")], abstract
        )
        return state_of(program, by_path)

    ours, theirs = step.Ours(settings, images, labels, new_state), step.peer_for(peer, settings, images, labels)
    assert theirs.parameters() == ours.parameters() == sum(array.size for array in drawn.values())
    params = as_theirs(peer, theirs.state.params, drawn)
    sharding = jax.tree.map(lambda leaf: leaf.sharding, theirs.state.params)
    theirs.state = theirs.state.replace(params=jax.device_put(params, sharding))
    losses = {}
    for trainer in (ours, theirs):
        losses[trainer.name] = []
        with trainer.in_use():
            for _ in range(3):  # the second and third show the update
                trainer.step()
                losses[trainer.name].append(trainer.block())
    np.testing.assert_allclose(losses["vit_dist"], losses[theirs.name], rtol=1e-4)
    assert len(set(losses["vit_dist"])) == 3


def test_the_activations_of_big_visions_step_are_constrained() -> None:
    settings = configured("cifar10")
    theirs = step.peer_for("bigvision", settings, *batch_for(settings))
    with theirs.in_use():
        text = theirs._step.lower(theirs.state, *theirs._batch, theirs._key).as_text()
    assert text.count("sdy.sharding_constraint") >= 6 * settings.model.depth  # in the forward pass of each block


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mixup=0.1", "mixup: the peers have only 0; found 0.1"),
        ("model.registers=2", "model.registers: the peers have only 0; found 2"),
        ("optimizer.name=lion", "optimizer.name: the peers have only sgd, adam, adamw; found lion"),
        ("model.pool=map", "model.pool: the peers have only cls, mean; found map"),
    ],
)
def test_what_the_peers_do_not_have_is_refused(override: str, message: str) -> None:
    settings = configured("cifar10", override)
    with pytest.raises(ConfigError, match=f"^{message}$"):
        step.peer_for("linen", settings, *batch_for(settings))


def test_without_pytorch_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(timm_baseline.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["step.py", "--peer=timm"])
    with pytest.raises(SystemExit) as ended:
        step.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --peer: timm needs torch") and "pip install torch timm" in error


def test_the_result_has_both_sides_and_their_ratio(capsys: Any) -> None:
    settings = configured("S/4")
    images, labels = batch_for(settings)
    sides = [step.Side(step.peer_for(peer, settings, images, labels)) for peer in ("linen", "bigvision")]
    for side, seconds in zip(sides, ([2.0, 4.0, 6.0], [3.0, 4.0, 12.0])):
        side.step_seconds, side.processor_seconds, side.python_seconds = seconds, [1.0], [1.0]
    step.print_results(sides, BATCH, {"peer": "bigvision"})
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["ratio"] == 1.5 and result["cpu_ratio"] == 1.0  # the median of each round's ratio
    assert result["flax linen"]["step_ms"] == 4000 and result["big_vision"]["images_per_second"] == BATCH / 4
    assert "ratio (big_vision's step over ours): 1.500" in table
