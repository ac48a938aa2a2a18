"""Every test of this process sees eight CPU devices."""

from vit_dist.mesh import processes

processes.start(fake_devices=8)
