"""The judge of mutants tells a test that notices a slip from one that passes, and from a slip that merely crashes."""

import importlib

import pytest
from system import ROOT

SOURCE = """
def clipped(number):
    if number < 0:
        raise ValueError("below 0")
    return min(number, 10)
"""
TESTS = """
import pytest
from vit_dist.sums import clipped

def test_ten_is_the_most():
    assert clipped(11) == 10

def test_less_than_nothing_is_refused():
    with pytest.raises(ValueError):
        clipped(-1)
"""
MOST, REFUSED = "test_sums.py::test_ten_is_the_most", "test_sums.py::test_less_than_nothing_is_refused"


@pytest.fixture
def mutants(tmp_path, monkeypatch):
    """The module, which judges the mutants of a tiny checkout."""
    for file, text in {"vit_dist/__init__.py": "", "vit_dist/sums.py": SOURCE, "tests/test_sums.py": TESTS}.items():
        (tmp_path / "root" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / file).write_text(text)
    monkeypatch.syspath_prepend(ROOT / "tests")
    module = importlib.import_module("mutants")
    monkeypatch.setattr(module, "ROOT", tmp_path / "root")
    return module


@pytest.mark.parametrize(
    ("edit", "test", "word", "failure"),
    [
        (("number, 10", "10, number"), MOST, "SURVIVED", ""),
        (("number, 10", "number, 11"), MOST, "killed", "assert 11 == 10"),
        (("number < 0", "number < -1"), REFUSED, "killed", "Failed: DID NOT RAISE"),
        (("number, 10", "numbr, 10"), MOST, "NOT JUDGED: its test fails by NameError", "NameError: name 'numbr'"),
        (
            ("number, 10", "number, None"),
            MOST,
            "NOT JUDGED: its test fails by TypeError",
            "TypeError: '<' not supported",
        ),
        (("return min(", "return min(("), MOST, "NOT JUDGED: pytest ended with 4", "collection failure"),
        (("number", "count"), MOST, "NOT JUDGED: its text stands 3 times in sums.py", ""),
        (("nothing", "else"), MOST, "NOT JUDGED: its text stands 0 times in sums.py", ""),
    ],
)
def test_a_mutant_is_killed_by_an_assertion_alone(mutants, edit, test, word, failure):
    verdict = mutants.judge(mutants.Mutant("sums.py", "a slip", *edit, test))
    assert verdict.word.startswith(word)
    assert verdict.outcome.failure.startswith(failure) and bool(verdict.outcome.failure) == bool(failure)


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        ("jax._src.core.ShardingTypeError: add operation with inputs", "ShardingTypeError"),
        ("", ""),
        ("ValueError: shard_map applied to the function", "ValueError"),
        ('failed on setup with "AttributeError: module', "AttributeError"),
        ("vit_dist.config.ConfigError: top: must be above 0", "ConfigError"),
    ],
)
def test_another_exception_is_no_kill_unless_the_row_names_it(mutants, failure, error):
    outcome = mutants.Outcome(1, "", failure)
    row = ("sums.py", "a slip", "old", "new", MOST)
    assert mutants.judgement(mutants.Mutant(*row), outcome).startswith(f"NOT JUDGED: its test fails by {error},")
    assert mutants.judgement(mutants.Mutant(*row, "KeyError"), outcome).startswith("NOT JUDGED")
    assert not error or mutants.judgement(mutants.Mutant(*row, error), outcome) == "killed"


def test_a_word_that_matches_no_mutant_is_an_error_before_any_test_runs(mutants, monkeypatch, capsys):
    monkeypatch.setattr(mutants, "run", lambda *_: pytest.fail("ran the tests"))
    assert mutants.main(["mesh/layout.py", "no such slip"]) == 2
    assert capsys.readouterr().err == "error: no mutant matches no such slip\n"


def test_tests_without_a_mutant_that_take_longer_than_their_limit_are_named_as_that(mutants, monkeypatch, capsys):
    monkeypatch.setattr(mutants, "MUTANTS", [mutants.Mutant("sums.py", "a slip", "number, 10", "number, 11", MOST)])
    monkeypatch.setattr(mutants, "UNTOUCHED_LIMIT_S", 0.01)
    assert mutants.main([]) == 1
    assert capsys.readouterr().out == "error: the tests without a mutant took longer than their limit of 0.01 s\n"


def test_the_last_line_counts_and_a_survivor_fails(mutants, monkeypatch, capsys):
    rows = [("number, 10", "number, 11"), ("number, 10", "10, number")]
    monkeypatch.setattr(mutants, "MUTANTS", [mutants.Mutant("sums.py", "a slip", *edit, MOST) for edit in rows])
    assert mutants.main(["sums"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "2 tried, 1 killed" and sum("SURVIVED" in line for line in said) == 2
    assert any(line.startswith("killed") and "sums.py: a slip [assert 11 == 10 " in line for line in said)


def test_the_text_of_every_mutant_stands_once_in_its_file(mutants):
    counts = {one: (ROOT / "vit_dist" / one.file).read_text().count(one.old) for one in mutants.MUTANTS}
    assert [f"{one.file}: {one.slip}" for one, count in counts.items() if count != 1] == []
    assert len({(one.file, one.slip) for one in counts}) == len(mutants.MUTANTS)
