"""The package as a house: what it lends by name, and which room may import which."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vit_dist

ROOT = Path(vit_dist.__file__).parent
# Ground floor first; a module imports its own floor's room or lower floors only.
FLOORS = (
    ("schema", "configs", "escape"),
    ("contradictions",),
    ("config", "paths"),
    ("recipes", "job", "keys", "lengths"),
    ("mesh", "data"),
    ("model",),
    ("weights",),
    ("step",),
    ("run",),
    ("program",),
    ("rates", "initial", "extraction", "answers", "overlays"),
    ("probes",),
    (
        "train",
        "evaluate",
        "predict",
        "features",
        "probe",
        "load",
        "describe",
        "plan",
        "bench",
        "exporting",
        "checkpoint_list",
    ),
    ("arguments", "printing"),
    ("commands",),
    ("cli",),
    ("__main__",),
)
VERBS = next(rooms for rooms in FLOORS if "train" in rooms)
DATA_ROOMS = ("files, libraries and the like", "pictures", "sets", "stream", "prepare")  # ground floor first


def modules() -> dict[str, Path]:
    """Name below the package, such as `mesh.layout`, -> file; the package itself is left out."""
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in ROOT.rglob("*.py")}
    return {name.removesuffix(".__init__"): file for name, file in names.items() if name != "__init__"}


def imports(file: Path) -> set[str]:
    """Absolute names of all that a file imports, wherever in it; of `from a import b` both `a` and `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def of_project(file: Path) -> set[str]:
    """The project's modules that a file imports."""
    names = {name.removeprefix("vit_dist.") for name in imports(file) if name.startswith("vit_dist.")}
    return names & set(modules())


def room(name: str) -> str:
    return name.partition(".")[0]


def data_floor(name: str) -> int:
    """Of a module such as `data.sets.index`; those that lie in no room of the data are the ground floor."""
    part = name.split(".")[1]
    return DATA_ROOMS.index(part) if part in DATA_ROOMS else 0


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room(name) in rooms)


def test_every_module_has_a_floor():
    assert {room(name) for name in modules()} == {one for rooms in FLOORS for one in rooms}


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_imports_its_own_room_and_lower_floors_only(name):
    for other in of_project(modules()[name]):
        beside = room(other) == room(name) or (room(name) in VERBS and room(other) in VERBS)
        assert floor(other) < floor(name) or beside, f"{name} imports {other}"


@pytest.mark.parametrize(
    ("where", "allowed"),
    [
        ("config", {"schema", "contradictions"}),
        ("data", {"config", "schema", "escape", "paths", "data"}),
        ("job", {"config", "schema", "escape", "job"}),
        ("mesh", {"config", "schema", "mesh"}),
        ("model", {"config", "schema", "mesh.layout", "model"}),
    ],
)
def test_a_room_knows_no_more_of_the_project_than_it_must(where, allowed):
    for name, file in modules().items():
        if room(name) == where:
            strange = {other for other in of_project(file) if other not in allowed and room(other) not in allowed}
            assert strange - {"mesh"} == set(), name


@pytest.mark.parametrize("name", [name for name in sorted(modules()) if name.startswith("data.")])
def test_a_module_of_the_data_imports_its_own_room_of_them_and_lower_ones_only(name):
    for other in of_project(modules()[name]):
        if other.startswith("data."):
            assert data_floor(other) <= data_floor(name), f"{name} imports {other}"


def test_the_map_in_the_readme_has_every_module_and_no_other_file():
    house = (ROOT.parent / "README.md").read_text().partition("## The house")[2]
    containers = "data.sets.formats."  # the table of `data.source` has these
    files = [name.rpartition(".")[2] for name in modules() if not name.startswith(containers) and name != "__main__"]
    assert [name for name in files if not re.search(rf"\b{name}\b", house)] == []
    assert set(re.findall(r"\b(\w+)\.py\b", house)) <= {*files, "test_package"}


@pytest.mark.parametrize("name", sorted(modules()))
def test_no_module_is_longer_than_400_lines_and_no_function_takes_more_than_nine_arguments(name):
    text = modules()[name].read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            names = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert len([argument for argument in names if argument.arg != "self"]) <= 9, node.name


def test_training_needs_no_estimate_of_the_plan():
    reached, waiting = set(), {"train"}
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting |= of_project(modules()[name]) - reached
    assert "plan.analysis" in reached
    assert not [name for name in reached if name.startswith("plan.estimate")]


def test_no_two_modules_import_each_other_by_any_way_round():
    wanted = {name: of_project(file) - {name} for name, file in modules().items()}
    while free := [name for name, others in wanted.items() if not others]:
        for name in free:
            del wanted[name]
        wanted = {name: others - set(free) for name, others in wanted.items()}
    assert wanted == {}


@pytest.mark.parametrize("name", [name for name in sorted(modules()) if room(name) in ("data", "config")])
def test_the_data_room_imports_neither_jax_nor_flax(name):
    assert {one.partition(".")[0] for one in imports(modules()[name])}.isdisjoint({"jax", "flax", "optax", "orbax"})


NAMES = "ViT, train, evaluate, predict, inspect, plan, bench, prepare, export"


def test_public_names_are_callables_even_after_their_modules_were_imported():
    code = (
        "import vit_dist.train, vit_dist.evaluate, vit_dist.predict, vit_dist.bench, vit_dist.describe\n"
        "import vit_dist.plan.targets\n"
        f"from vit_dist import {NAMES}\n"
        "import vit_dist\n"
        "assert vit_dist.train is train\n"
        f"print(*(f'{{one.__module__}}.{{one.__name__}}' for one in ({NAMES})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=True)
    assert done.stdout.split() == [
        "vit_dist.model.vit.ViT",
        "vit_dist.train.train",
        "vit_dist.evaluate.evaluate",
        "vit_dist.predict.predict",
        "vit_dist.describe.inspect",
        "vit_dist.plan.verb.plan",
        "vit_dist.bench.bench",
        "vit_dist.data.prepare.convert.prepare",
        "vit_dist.exporting.verb.export",
    ]


def test_public_names_are_what_is_said_to_be_public_and_nothing_else():
    assert {name: callable(getattr(vit_dist, name)) for name in vit_dist.__all__} == dict.fromkeys(
        [
            "ViT",
            "bench",
            "evaluate",
            "export",
            "features",
            "inspect",
            "load",
            "load_config",
            "plan",
            "predict",
            "prepare",
            "probe",
            "train",
        ],
        True,
    )
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        vit_dist.trian  # noqa: B018


def test_importing_the_package_imports_no_jax():
    code = "import sys, vit_dist, vit_dist.config, vit_dist.cli; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=True)
    assert done.stdout == "False\n"
