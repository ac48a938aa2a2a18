"""Law 1 across processes: two of four devices each, joined by jax.distributed, train as one of eight does."""

import socket

import pytest
from system import command, examples, largest_difference, losses, rows, started, train_here

MESHES = {
    "data=8": ("mesh.data=-1",),
    "data=2 x fsdp=2 x tensor=2": ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"),
}


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return train_here(tmp_path_factory.mktemp("one"), "mesh.data=1")


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def train_as_two(folder, *overrides):
    """Both processes to their end; returns the rows and the summary that the first printed."""
    workdir, coordinator = folder / "run", f"127.0.0.1:{free_port()}"
    variables = [
        {"VIT_DIST_COORDINATOR": coordinator, "VIT_DIST_PROCESSES": "2", "VIT_DIST_PROCESS": str(index)}
        for index in range(2)
    ]
    arguments = command(workdir, "fake_devices=4", *overrides)
    with (
        started(arguments, folder / "0", **variables[0]) as first,
        started(arguments, folder / "1", **variables[1]) as second,
    ):
        codes = first.wait(), second.wait()
    assert codes == (0, 0), first.said()[-3000:] + second.said()[-3000:]
    assert "{" not in second.stdout.read_text()  # results are process 0's to print; gloo says some lines of its own
    return rows(workdir), first.result()


@pytest.mark.parametrize("mesh", MESHES)
def test_the_curve_of_two_processes_is_that_of_one_device(mesh, one_device, tmp_path, record_property):
    found, summary = train_as_two(tmp_path, *MESHES[mesh])
    difference = largest_difference(losses(found), losses(one_device))
    record_property("largest_relative_difference", difference)
    print(f"largest relative difference of a loss: {difference:.1e}")
    assert len(losses(found)) == summary["step"] == 20
    assert examples(found) == examples(one_device)
    assert difference < 1e-4
