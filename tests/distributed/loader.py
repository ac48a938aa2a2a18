"""A process of a job that loads weights over fsdp, and prints what private memory that took.

Arguments: the folder of the weights. stdout: one JSON object with the bytes of memory before and after, the most in
between, and the sum of squares of this process's shards of one parameter.
"""

import json
import re
import sys
import threading
import time

import jax
import numpy as np

from vit_dist.config import Mesh
from vit_dist.job import processes
from vit_dist.mesh import topology
from vit_dist.step.state import ModelFunction
from vit_dist.weights.adapted import adapted, placed
from vit_dist.weights.published import open_published


def private():
    """Bytes of this process alone: not of pages of a file, which the system can drop."""
    text = open("/proc/self/status").read()
    return int(re.search(r"RssAnon:\s+(\d+) kB", text)[1]) * 1024


def main(folder):
    processes.start(1)
    mesh = topology.make_mesh(topology.axis_sizes(Mesh(data=1, fsdp=-1), jax.device_count()), jax.devices())
    published = open_published(folder)
    with jax.set_mesh(mesh):
        function = ModelFunction(published.model)
        like = jax.eval_shape(lambda: function.initialise(0))
        before, most, done = private(), [0], threading.Event()

        def watch():
            while not done.is_set():
                most[0] = max(most[0], private())
                time.sleep(0.02)

        threading.Thread(target=watch).start()
        parameters = placed(adapted(published, published.model, "keep").parameters, like, mesh)
        jax.block_until_ready(parameters)
        done.set()
        kernel = parameters["blocks"][0]["mlp"]["up"]["kernel"]
        squares = sum(float(np.square(np.asarray(shard.data)).sum()) for shard in kernel.addressable_shards)
    print(json.dumps({"before": before, "after": private(), "most": most[0], "squares": squares}), flush=True)
    processes.leave(0, "", together=True)


main(sys.argv[1])
