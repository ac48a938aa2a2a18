"""What processes of a job do together, with a watchdog that notes what it is told."""

import types

import jax

from vit_dist.job import processes


def test_no_deadline_counts_while_processes_compile(monkeypatch):
    told = []

    class Watchdog:
        index = 0

        def stop_clock(self):
            told.append("stop")

        def gather(self, value):
            told.append("gather")
            return [value, value]

        def alive(self, step):
            told.append("alive")

    monkeypatch.setattr(processes, "_watchdog", Watchdog())
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    compiled = types.SimpleNamespace(compile=lambda: told.append("compile"))
    processes.compile_together(types.SimpleNamespace(lower=lambda *arguments: compiled))
    assert told == ["stop", "compile", "gather", "alive"]
