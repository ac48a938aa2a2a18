"""Makes the kit of a GPU visit, `.visit/`: everything that the machine lacks and that must be made in advance.

    make visit-kit          # all of it; takes some minutes, and the first time also the compilers

- wheels: the packages that vit_dist's steps and runs import, for Python 3.12 on x86-64 Linux, in the versions of
  constraints.txt; not jax, jaxlib, NumPy, SciPy, ml_dtypes, Pillow and matplotlib, which the machine has
- golden: the rows of twenty steps on this CPU, and their data
- plans: of the steps that the visit times, for one H100 and one H200, by the compilers of `make compilers`
- photos: for the loader's part, from ../shared/data/photos

It prints the size of all files to be copied, the repository included, and fails if that is above 64 MiB.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT.parent / "shared" / "data" / "photos"
COMPILERS = ROOT / ".cache" / "compilers"
LIMIT = 64 * 2**20  # bytes: the repository and the kit
TARGETS = "h100:1,h200:1"
ITEMS = ("wheels", "golden", "plans", "photos")
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")
# The packages that the machine lacks, then those that it has in versions untested with the first.
WHEELS = (
    *(
        "array-record",
        "clu",
        "grain",
        "ml-collections",
        "pathlib-abc",
        "portpicker",
        "safetensors",
        "simplejpeg",
        "tensorboardx",
    ),
    *("universal-pathlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "treescope", "protobuf", "etils"),
    *("absl-py", "aiofiles", "cloudpickle", "fsspec", "humanize", "markdown-it-py", "mdurl", "msgpack", "packaging"),
    *("prometheus-client", "psutil", "pygments", "pyyaml", "rich", "simplejson", "typing-extensions", "uvloop"),
    *("wrapt", "zipp"),
)


def wheels(kit: Path) -> None:
    """Downloads the wheels into `kit/wheels`, and removes those of other versions."""
    folder = kit / "wheels"
    shutil.rmtree(folder, ignore_errors=True)
    pins = pinned((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    platforms = [f"--platform={name}_x86_64" for name in PLATFORMS]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp", *platforms]
    subprocess.run([*command, f"--dest={folder}", *(f"{name}=={pins[name]}" for name in WHEELS)], check=True)


def pinned(constraints: str) -> dict[str, str]:
    """Returns package -> version of a constraints file, for the machine's Python."""
    versions = {}
    for line in constraints.splitlines():
        if line.strip() and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"python_version": PYTHON}):
                versions[requirement.name.lower()] = str(requirement.specifier).removeprefix("==")
    return versions


def golden(kit: Path) -> None:
    """Trains the twenty steps on this CPU."""
    _run("visit.golden", str(kit))


def plans(kit: Path, targets: str) -> None:
    """Plans the steps that the visit times, a process for each target: 1-2 minutes for a GPU, seconds for `cpu:1`."""
    planned = [json.loads(_run("visit.plans", target, path=[COMPILERS])) for target in targets.split(",")]
    (kit / "plans.json").write_text(json.dumps(planned, indent=1) + "\n", encoding="utf-8")


def photos(kit: Path) -> None:
    """Copies the photographs, if there are any."""
    if not PHOTOS.is_dir():
        print(f"no {PHOTOS}: without photographs the loader's part is skipped", file=sys.stderr)
        return
    shutil.rmtree(kit / "photos", ignore_errors=True)
    (kit / "photos").mkdir()
    for file in PHOTOS.iterdir():
        if file.suffix.lower() in (".jpeg", ".jpg"):
            shutil.copyfile(file, kit / "photos" / file.name)


def describe(kit: Path) -> None:
    """Writes `kit.json`, which names the commit that the kit was made from."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout.strip()
    (kit / "kit.json").write_text(json.dumps({"commit": commit, "changed": bool(changed)}) + "\n", encoding="utf-8")


def travelling(root: Path, kit: Path) -> int:
    """Returns the bytes of all files to be copied: those that git tracks or does not ignore, and the kit."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
    files = {root / name for name in names if name} | {file for file in kit.rglob("*") if file.is_file()}
    return sum(file.stat().st_size for file in files if file.is_file())


def check_size(size: int) -> None:
    """Prints the size in bytes, and exits with an error if it is above `LIMIT`."""
    print(f"the repository and the kit: {size / 2**20:.1f} of {LIMIT / 2**20:.0f} MiB", file=sys.stderr)
    if size > LIMIT:
        sys.exit("error: too much to travel; leave out photos or wheels, or what is large in the repository")


def _run(module: str, *arguments: str, path: Sequence[Path] = ()) -> str:
    """Returns what `python -m MODULE` prints, on the CPU."""
    folders = [*path, ROOT / "benchmarks", ROOT]
    environment = {**os.environ, "PYTHONPATH": ":".join(map(str, folders)), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / ".visit", help="the folder (.visit)")
    parser.add_argument("--only", nargs="+", default=ITEMS, choices=ITEMS, help="some of it")
    parser.add_argument("--targets", default=TARGETS, help=f"of the plans ({TARGETS})")
    options = parser.parse_args()
    kit = options.out.resolve()
    kit.mkdir(parents=True, exist_ok=True)
    makers = {"wheels": wheels, "golden": golden, "plans": lambda kit: plans(kit, options.targets), "photos": photos}
    for name in options.only:
        print(f"{name} ...", file=sys.stderr)
        makers[name](kit)
    check_size(travelling(ROOT, kit))
    describe(kit)


if __name__ == "__main__":
    main()
