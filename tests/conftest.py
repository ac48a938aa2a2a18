"""Every test of this process, and of those it starts, sees eight CPU devices and a compiler in a hurry."""

import os
import signal

import pytest
from tally import Tally

from vit_dist.job import processes

# Compiling takes most of the suite's time, and no claim of it is about how good the machine code is. The second flag
# chooses the older way to make the code of fused operations, which is twice as quick.
HURRY = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{HURRY} {os.environ.get('XLA_FLAGS', '')}".strip()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background; what tests start would be deaf to Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
processes.start(fake_devices=8)


@pytest.fixture
def tally(request):
    """A `Tally` of the faults that a test inflicts; `make chaos` prints all of them as a table."""
    tally = Tally()
    yield tally
    request.node.user_properties += [("fault", [fault, *counts]) for fault, counts in tally.counts.items()]


def pytest_terminal_summary(terminalreporter):
    """Prints the table of faults: how many were inflicted, and of how many no harm came."""
    sums = {}
    for report in (one for reports in terminalreporter.stats.values() for one in reports):
        if getattr(report, "when", "") == "teardown":
            for name, value in report.user_properties:
                if name == "fault":
                    fault, *counts = value
                    sums[fault] = [sum(pair) for pair in zip(sums.get(fault, (0, 0)), counts, strict=True)]
    rows = [(fault, *counts) for fault, counts in sums.items()]
    if rows:
        width = max(map(len, sums))
        terminalreporter.section("faults")
        lines = [(fault, tried, survived, tried - survived) for fault, tried, survived in sorted(rows)]
        for fault, *counts in (("fault", "tried", "survived", "lost"), *lines):
            terminalreporter.write_line("  ".join((fault.ljust(width), *(str(count).rjust(8) for count in counts))))
