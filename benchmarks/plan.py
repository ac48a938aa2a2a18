"""Plans the deployed configs on this machine, which has none of their hardware, and measures how long that takes.

    make bench-plan

Each plan runs in its own process, as a user would start it, with the compilers of `make compilers` on PYTHONPATH.
Prints a table in Markdown, for `results/`.
"""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

L16, G14, B16, V22 = (
    f"configs/{name}.py" for name in ("vit_l16_i21k_v5e256", "vit_g14_64gpu", "vit_b16_i1k_8gpu", "vit_22b_v5p1024")
)
PLANS: dict[str, tuple[str, ...]] = {
    "L/16": (L16, "--target=v5e:16x16"),
    "L/16, FSDP a node": (
        L16, "--target=h200:8x4", "--config.mesh.dcn_data=4", "--config.mesh.data=1", "--config.mesh.fsdp=8",
    ),
    "L/16, batch 256": (
        L16, "--target=v5e:4x4", "--config.mesh.data=1", "--config.mesh.fsdp=16", "--config.batch_size=256",
    ),
    "L/16, two slices": (
        L16, "--target=v5e:4x4", "--slices=2", "--config.mesh.dcn_data=2", "--config.mesh.data=1",
        "--config.mesh.fsdp=16", "--config.batch_size=512",
    ),
    "22B": (V22, "--target=v5p:8x8x16"),
    "B/16": (B16, "--target=h100:8"),
    "g/14": (G14, "--target=h100:8x8"),
    "L/16, far too large": (
        L16, "--target=v5e:4x4", "--config.mesh.data=1", "--config.mesh.fsdp=16", "--config.batch_size=4096",
    ),
    "the same, searched": (
        L16, "--target=v5e:4x4", "--config.mesh.data=1", "--config.mesh.fsdp=16", "--config.batch_size=4096",
        "--search",
    ),
    "L/16, largest batch": (
        L16, "--target=h200:8", "--config.mesh.data=1", "--config.mesh.fsdp=8", "--batch-size=max",
    ),
    "g/14, searched": (G14, "--target=h100:8x8", "--search"),
    "g/14, searched for TPUs": (G14, "--target=v5e:16x16", "--search"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help="plans whose name contains this")
    only = parser.parse_args().only
    print("| plan | target | mesh | batch | fits | GiB of | step ms | binds | MFU | compile s | wall s | changed |")
    print("|" + "---|" * 12, flush=True)
    for name, (config, *options) in PLANS.items():
        if only is None or only in name:
            print(row(name, *run(config, options)), flush=True)


def run(config: str, options: list[str]) -> tuple[dict[str, Any] | None, float]:
    """Returns the plan that the command prints, or None if it fails, and the seconds that it took."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "vit_dist", "plan", f"--config={config}", *options, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else None, time.perf_counter() - begun


def row(name: str, plan: dict[str, Any] | None, seconds: float) -> str:
    if plan is None:
        return f"| {name} | FAILED |" + " |" * 10
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
    memory = f"{plan['peak_bytes'] / 2**30:.1f} of {plan['device_bytes'] / 2**30:.1f}"
    known = plan["step_ms"] is not None
    cells = [name, plan["target"], mesh, plan["batch_size"], "yes" if plan["fits"] else "no", memory]
    cells += [f"{plan['step_ms']:.1f}", plan["binds"], f"{plan['mfu']:.0%}"] if known else ["-"] * 3
    cells += [f"{plan['compile_seconds']:.0f}", f"{seconds:.0f}", " ".join(plan["overrides"])]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
