"""Law 1 across processes: two of four devices each, joined by jax.distributed, train as one of eight does.

This test uses three axes; `test_launch_train.py` has data=8.
"""

from system import as_two, examples, largest_difference, losses, rows, train_here


def test_the_curve_of_two_processes_is_that_of_one_device(tmp_path, record_property):
    one_device = train_here(tmp_path / "one", "mesh.data=1")
    first, second = as_two(tmp_path, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    assert (first.wait(), second.wait()) == (0, 0), first.said()[-3000:] + second.said()[-3000:]
    assert "{" not in second.stdout.read_text()  # only process 0 prints results; gloo prints some lines of its own
    joined, summary = rows(tmp_path / "run"), first.result()
    difference = largest_difference(losses(joined), losses(one_device))
    record_property("largest_relative_difference", difference)
    print(f"largest relative difference of a loss: {difference:.1e}")
    assert len(losses(joined)) == summary["step"] == 20
    assert examples(joined) == examples(one_device)
    assert difference < 1e-4
