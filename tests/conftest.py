"""Every test of this process, and of those it starts, sees eight CPU devices and a compiler in a hurry."""

import os
import signal

from vit_dist.job import processes

# Compiling takes most of the suite's time, and no claim of it is about how good the machine code is. The second flag
# chooses the older way to make the code of fused operations, which is twice as quick.
HURRY = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{HURRY} {os.environ.get('XLA_FLAGS', '')}".strip()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as under nohup; what tests start would be deaf to Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
processes.start(fake_devices=8)
