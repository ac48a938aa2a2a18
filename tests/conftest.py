"""Every test of this process, and of those it starts, sees eight CPU devices and a compiler in a hurry."""

import os

from vit_dist.mesh import processes

# Compiling takes most of the suite's time, and no claim of it is about how good the machine code is.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}".strip()
processes.start(fake_devices=8)
