"""The documentation of the config keys is the schema's own."""

import json

from vit_dist import cli, keys
from vit_dist.config import Config, to_dict
from vit_dist.data.sets.sources import SOURCES
from vit_dist.schema import flatten
from vit_dist.step.optimizer import DIRECTIONS


def test_every_key_has_its_default_a_type_and_a_meaning():
    rows = {row["key"]: row for row in keys.rows()}
    assert {key: json.loads(row["default"]) for key, row in rows.items() if "[]" not in key} == flatten(
        to_dict(Config())
    )
    assert [key for key, row in rows.items() if not row["meaning"] or not row["type"]] == []
    assert {"optimizer.rules[].path", "data.mixture[].weight"} <= set(rows)


def test_a_meaning_goes_on_in_the_lines_below_and_a_type_has_its_bounds():
    rows = {row["key"]: row for row in keys.rows()}
    assert rows["model.context_attention"]["meaning"].endswith("before and after, as DeepSpeed-Ulysses does")
    assert rows["optimizer.clip"]["type"] == "a number above 0 or null"
    assert rows["model.pool"]["type"] == "cls | mean | cls_mean | map"


def test_sources_and_optimizers_are_all_named():
    rows = {row["key"]: row for row in keys.rows()}
    assert [name for name in SOURCES if name not in rows["data.source"]["meaning"]] == []
    assert [name for name in DIRECTIONS if name not in rows["optimizer.name"]["meaning"]] == []


def test_a_pattern_chooses_by_key_or_meaning(capsys):
    assert cli.main(["configs", "--keys", "WARM", "--json"]) == 0
    found = [row["key"] for row in json.loads(capsys.readouterr().out)]
    assert found == ["optimizer.warmup_steps", "optimizer.warmup_epochs", "optimizer.schedule"]
    assert cli.main(["configs", "--keys"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["key", "type", "default", "meaning"] and len(lines) == 1 + len(keys.rows())
    assert cli.main(["configs", "--keys=no_such_key"]) == 2
    assert capsys.readouterr().err == (
        "error: --keys: no key or meaning holds 'no_such_key'; leave it out to list all\n"
    )
