"""Weights that are damaged or made to harm give one line that says what is wrong; nothing is run, memory is bounded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hostile_weights import CASES, SECRET, write
from peak import PEAK_BYTES

from vit_dist.config import ConfigError
from vit_dist.weights.origin import open_origin


@pytest.mark.parametrize("name", list(CASES))
def test_what_is_wrong_with_a_file_is_said_in_one_line(name: str, tmp_path: Path) -> None:
    case, folder = CASES[name], tmp_path / "weights"
    with pytest.raises(ConfigError, match=case.words) as raised:
        open_origin(write(case, folder))
    message = str(raised.value)
    assert message.startswith(str(folder)) and message.isprintable()
    assert len(message) < len(str(folder)) + 600
    assert ";" in message  # what to do


def test_there_are_as_many_hostile_files_as_the_claim_says() -> None:
    assert len(CASES) >= 60


def test_hostile_files_take_little_memory_and_run_nothing(tmp_path: Path) -> None:
    folders = {}
    for number, (name, case) in enumerate(CASES.items()):
        (tmp_path / str(number)).mkdir()
        folders[name] = str(write(case, tmp_path / str(number) / "weights"))
    (tmp_path / "folders.json").write_text(json.dumps(folders))
    code = f"""
import json, sys
from vit_dist.config import ConfigError
from vit_dist.weights.origin import open_origin
{PEAK_BYTES}
for name, folder in json.load(open("folders.json")).items():
    before = peak_bytes()
    try:
        open_origin(folder)
    except ConfigError as error:
        grown = peak_bytes() - before
        print(f"{{grown >> 20}} MiB: {{name}}" if grown >= 1 << 24 else "little")
print(peak_bytes(), "jax" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    *grown, last = done.stdout.splitlines()
    assert len(grown) == len(CASES) and done.stderr == ""
    peak, has_jax = last.split()
    assert int(peak) < 200e6, [line for line in grown if line != "little"]
    assert has_jax == "False" and list(tmp_path.rglob(f"{SECRET}-was-run")) == []
