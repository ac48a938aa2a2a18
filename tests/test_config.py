"""The schema: types, overrides, the round trip through plain values, and that no key of it is dead."""

import ast
import dataclasses
import json
import re
import typing
from pathlib import Path

import pytest

from vit_dist import config, lengths, recipes, schema
from vit_dist.config import Config, ConfigError, resolve

ROOT = Path(config.__file__).parent
RECIPES = sorted((ROOT.parent / "configs").glob("*.py"))


def resolved(*overrides: str, **values) -> Config:
    """The defaults for one step, with values and then overrides."""
    return resolve(recipes.override(config.to_dict(Config(total_steps=1)) | values, overrides))


def value_of(settings: Config, key: str):
    for name in key.split("."):
        settings = getattr(settings, name)
    return settings


def keys_of(hint: type, prefix: str = "") -> list[str]:
    keys = []
    for name, kind in typing.get_type_hints(hint).items():
        keys += keys_of(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [prefix + name]
    return keys


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("optimizer.learning_rate=1e-3", 1e-3),
        ("optimizer.learning_rate=1E3", 1000.0),
        ("optimizer.learning_rate=3", 3.0),
        ("optimizer.eps=.5", 0.5),
        ("total_steps=1e3", 1000),
        ("seed=4", 4),
        ("mesh.data=-1", -1),
        ("data.flip=true", True),
        ("data.flip=False", False),
        ("total_epochs=null", None),
        ("total_epochs=None", None),
        ("model.layer_scale=none", None),
        ("model.qk_norm=true", True),
        ("model.activation=null", None),
        ("model.activation=gelu_tanh", "gelu_tanh"),
        ("model.remat=none", "none"),
        ("model.scan=auto", "auto"),
        ("model.scan=true", True),
        ("model.scan=false", False),
        ("model.image_size=96", 96),
        ("model.image_size=[96,128]", (96, 128)),
        ("model.image_size=(96, 128)", (96, 128)),
        ("data.mean=0.5", 0.5),
        ("data.mean=(0.1, 0.2, 0.3)", (0.1, 0.2, 0.3)),
        ("data.crop_area=[0.05,1]", (0.05, 1.0)),
        ("data.crop_area=(1e-2,1)", (0.01, 1.0)),
        ("evaluate.splits=[test,val]", ("test", "val")),
        ("evaluate.splits=[]", ()),
        ('data.classes=["3", b]', ("3", "b")),
        ("optimizer.rules=[]", ()),
        ("optimizer.rules=[{path: 'mlp/(up|down)', frozen: true}]", (config.Rule("mlp/(up|down)", frozen=True),)),
        ("model.variant=B/16", "B/16"),
        ("model.variant=null", None),
        ("data.path=2024", "2024"),
        ("data.path=1e-3", "1e-3"),
        ("data.path=true", "true"),
        ("data.path=/a b/(c)=[d]: {e}, #f", "/a b/(c)=[d]: {e}, #f"),
        ("data.path=~/ä", "~/ä"),
        ("data.path=null", None),
        ("data.source=012", "012"),
    ],
)
def test_an_override_has_the_type_that_its_key_declares(assignment, value):
    found = value_of(resolved(assignment), assignment.partition("=")[0])
    assert found == value and type(found) is type(value)


def test_yes_is_true_in_an_override_which_is_yaml_and_not_in_a_recipe():
    assert resolved("model.scan=yes").model.scan is True
    with pytest.raises(ConfigError, match=r"model.scan: expected true or false or auto, found 'yes' \(str\)"):
        resolved(model={"scan": "yes"})


def test_the_last_of_two_overrides_holds():
    assert resolved("seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("modle.depth=3", r"unknown key modle \(did you mean model\?\)"),
        ("model.dept=3", r"unknown key model.dept \(did you mean model.depth\?\)"),
        ("model.zzz=3", "unknown key model.zzz$"),
        ("model.depth.x=3", "model.depth.x: model.depth is a value and has no keys below it"),
        ("model=3", r"model: expected keys and values, found 3 \(int\); set a key of it, such as model.variant$"),
        ("optimizer.rules=[{pth: head}]", r"unknown key optimizer.rules\[0\].pth \(did you mean optimizer.rules\[0\]"),
        ("optimizer.rules=3", "optimizer.rules: expected a list of {path, learning_rate, .*}, found 3"),
        ("model.depth=three", r"model.depth: expected a whole number above 0 or null, found 'three' \(str\)"),
        ("model.depth=1.5", "model.depth: expected a whole number above 0 or null, found 1.5"),
        ("model.depth=true", "model.depth: expected a whole number above 0 or null, found True"),
        ("model.depth=[1", r"model.depth: cannot read '\[1' as a value"),
        ("seed=2024-13-45", "seed: cannot read '2024-13-45' as a value"),
        ("seed=null", "seed: expected a whole number, found None"),
        ("data.flip=1", "data.flip: expected true or false, found 1"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate: expected a number, found nan"),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate: expected a number, found inf"),
        ("model.pool=meen", r"model.pool: 'meen' is none of cls, mean, cls_mean, map \(did you mean mean\?\)"),
        ("model.scan=atuo", r"model.scan: expected true or false or auto, found 'atuo' \(str\)"),
        ("model.scan=1", "model.scan: expected true or false or auto, found 1"),
        ("model.pool=3", r"model.pool: expected cls \| mean \| cls_mean \| map, found 3"),
        ("model.image_size=[1,2,3]", r"image_size: expected a whole number above 0 or \(a whole number above 0, "),
        ("evaluate.splits=test", r"evaluate.splits: expected a list of text, found 'test' \(str\); write \[test\]$"),
        ("data.classes=red,green", r"data.classes: expected a list of text, .*; write \[red,green\]$"),
        ("seed", "seed: an override is written key=value"),
        ("seed=", r"seed: no value is given; write seed=VALUE$"),
        ("data.path=", "data.path: no value is given; write data.path=VALUE, or data.path=null for none"),
        ("=3", "=3: names no key; an override is written like --config.model.depth=4"),
        ("model..depth=3", "model..depth=3: names no key"),
    ],
)  # fmt: skip
def test_an_override_that_does_not_fit_is_refused_by_name(assignment, message):
    with pytest.raises(ConfigError, match=message):
        resolved(assignment)


@pytest.mark.parametrize(
    ("key", "most"),
    [
        ("model.depth", 1000),
        ("model.width", 2**20),
        ("model.registers", 2**16),
        ("model.image_size", 2**16),
        ("batch_size", 2**24),
        ("evaluate.batch_size", 2**24),
        ("fake_devices", 1024),
        ("data.workers", 1024),
        ("data.threads", 1024),
        ("data.read_ahead_mb", 2**20),
        ("data.randaugment_layers", 100),
        ("total_steps", 2**31 - 1),
        ("log_every", 2**31 - 1),
    ],
)
def test_a_size_that_no_machine_has_is_refused_with_the_most_that_can_be(key, most):
    resolved("total_steps=1", f"{key}={most}")
    for value in (most + 1, 10**12, "1e300"):
        with pytest.raises(ConfigError, match=rf"^{key}: must be at most {most:,}, found [0-9.e+]+$"):
            resolved(f"{key}={value}")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("total_steps=null", "total_steps: neither it nor total_epochs is set; set one"),
        ("total_steps=0", "total_steps: must be above 0, found 0"),
        ("accumulate_steps=3", "batch_size: 128 does not divide into accumulate_steps=3 .*; take 126 or 129"),
        ("ema_decay=1", r"ema_decay: must be in \[0, 1\), found 1"),
        ("mixup=-1", "mixup: must be 0 or more, found -1"),
        ("seed=4294967296", r"seed: must be at least 0 and below 2\*\*32, found 4294967296"),
        ("data.std=[0.5,0,0.5]", r"data.std\[1\]: must be above 0, found 0"),
        ("data.mean=[0.5,0.5]", "data.mean: has 2 numbers, but model.channels is 3"),
        ("data.crop_area=[0.5,0.1]", "data.crop_area: runs from 0.5 down to 0.1"),
        ("data.crop_area=[0.5,2]", r"data.crop_area\[1\]: must be above 0 and at most 1, found 2"),
        (f"data.mean={10**400}", "data.mean: expected a number or a list of a number, found 1000"),
        ("data.eval_crop=0", "data.eval_crop: must be above 0 and at most 1, found 0"),
        ("optimizer.b2=1", r"optimizer.b2: must be in \[0, 1\), found 1"),
        ("optimizer.rules=[{path: a}, {path: b, weight_decay: -1}]", r"rules\[1\].weight_decay: must be 0 or more"),
        ("model.image_size=[8,0]", r"model.image_size\[1\]: must be above 0, found 0"),
        ("model.attention=cudnn", "model.attention: cudnn takes dtype=bfloat16 and attention_dropout=0, found float32"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_range(assignment, message):
    with pytest.raises(ConfigError, match=message):
        resolved(assignment)


def test_a_config_survives_json_and_back():
    settings = resolved(
        "model.image_size=[96,128]",
        "data.mean=[0.1,0.2,0.3]",
        "evaluate.splits=[test,val]",
        "optimizer.rules=[{path: head, learning_rate: 0.1}, {path: cls, frozen: true}]",
        "total_epochs=0.5",
    )
    assert resolve(json.loads(json.dumps(config.to_dict(settings)))) == settings
    assert settings.optimizer.rules[1] == config.Rule("cls", frozen=True)


def test_differences_are_the_keys_that_changed_and_only_those():
    old = resolved()
    assert config.differences(old, resolved()) == []
    new = resolved("model.depth=3", "seed=1", "optimizer.rules=[{path: head}]")
    assert config.differences(old, new) == ["seed", "model.depth", "optimizer.rules"]


@pytest.mark.parametrize(
    ("steps", "epochs", "batch", "examples", "total"),
    [(7, 100.0, 10, 1000, 7), (None, 2.0, 10, 1000, 200), (None, 1.0, 10, 1001, 101), (None, 0.001, 10, 10, 1)],
)
def test_epochs_are_rounded_up_to_steps_and_steps_win(steps, epochs, batch, examples, total):
    assert lengths.total_steps(Config(total_steps=steps, total_epochs=epochs, batch_size=batch), examples) == total


def test_lengths_in_epochs_become_steps_where_no_steps_are_given():
    values = {"total_epochs": 90, "batch_size": 40, "optimizer": {"warmup_epochs": 5}}
    values |= {"evaluate": {"every_epochs": 1}, "checkpoint": {"every_epochs": 0.5}}
    counted = lengths.in_steps(config.resolve(values), 100)
    assert (counted.total_steps, counted.optimizer.warmup_steps) == (225, 13)
    assert (counted.evaluate.every_steps, counted.checkpoint.every_steps) == (3, 2)
    assert lengths.in_steps(counted, 100) == counted
    own = lengths.in_steps(config.resolve({**values, "total_steps": 75, "evaluate": {"every_steps": 7}}), 100)
    assert (own.total_steps, own.evaluate.every_steps) == (75, 7)


def test_a_batch_of_more_images_than_there_are_is_refused():
    with pytest.raises(ConfigError, match="^batch_size: 128, but the training split has 100 images; take at most"):
        lengths.in_steps(resolved("total_steps=5"), 100)


def test_the_nearest_multiples_are_those_that_one_could_type():
    assert schema.nearest_multiples(30, 8) == "24 or 32"
    assert schema.nearest_multiples(3, 8) == "8"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_loads_and_says_how_to_run_it(recipe):
    settings = recipes.load(recipe)
    assert settings.total_steps or settings.total_epochs
    text = ast.get_docstring(ast.parse(recipe.read_text())) or ""
    assert re.search(rf"configs/{recipe.name}|--config={recipe.stem} ", text) and "xpected" in text


def test_there_are_recipes():
    assert {"digits", "d2l_fashion_mnist", "cifar10"} <= {recipe.stem for recipe in RECIPES}


def test_a_recipe_sees_the_defaults_and_an_override_wins_over_it(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from vit_dist.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.total_steps, config.batch_size = 5, 2 * config.batch_size\n"
        "    config.data.mean = (0.1, 0.2, 0.3)\n"
        "    config.optimizer.rules = [dict(path='head', learning_rate=2)]\n"
        "    return config\n"
    )
    settings = recipes.load(file, ["total_steps=6"])
    assert (settings.total_steps, settings.batch_size, settings.data.mean) == (6, 256, (0.1, 0.2, 0.3))
    assert settings.optimizer.rules == (config.Rule("head", learning_rate=2.0),)


def test_every_key_of_the_schema_is_read_by_the_package():
    read = set()
    for file in ROOT.rglob("*.py"):
        if file.name == "config.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                read.add(node.value)  # such as getattr(model, "width")
    read |= {"total_epochs", "warmup_epochs", "every_epochs"}  # by `lengths.in_steps`
    read |= {"context", "dcn_data"}  # all of `mesh` is read at once, by `mesh.topology.axis_sizes`
    keys = keys_of(Config) + [f"optimizer.rules.{field.name}" for field in dataclasses.fields(config.Rule)]
    assert len(keys) > 90
    assert [key for key in keys if key.rpartition(".")[2] not in read] == []
