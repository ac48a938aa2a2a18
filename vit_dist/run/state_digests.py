"""Digests of the tensors of a state, by path, computed where the tensors lie; `mesh.digests` says what they are."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from vit_dist.job import processes
from vit_dist.mesh import digests

Tensors = dict[str, Any]  # path, such as `parameters/head/kernel` -> array, or jax.ShapeDtypeStruct


class StateDigests:
    """Computes digests of states; it compiles once for each tree, however often states of it come."""

    def __init__(self) -> None:
        self._compiled = set[tuple]()

    def start(self, trees: Mapping[str, Any]) -> "Pending":
        """Begins to compute the digests of named trees; their buffers may be donated at once. All processes call it."""
        on_host, on_devices = dict[str, list[str]](), list[tuple[Tensors, jax.Array]]()
        for name, tree in trees.items():
            tensors = tensors_of(name, tree)
            split = {path: leaf for path, leaf in tensors.items() if _is_split(leaf)}
            for path in tensors.keys() - split.keys():
                on_host[path] = [_text(tensors[path], digests.of_numpy(np.asarray(tensors[path])))]
            for mesh in dict.fromkeys(leaf.sharding.mesh for leaf in split.values()):
                on_mesh = {path: leaf for path, leaf in split.items() if leaf.sharding.mesh == mesh}
                leaves = tuple(on_mesh.values())
                specs = tuple(leaf.sharding.spec for leaf in leaves)
                function = digests.on_devices(mesh, specs)
                program = (mesh, specs, *((leaf.shape, leaf.dtype) for leaf in leaves))
                if program not in self._compiled:
                    processes.compile_together(function, *leaves)
                    self._compiled.add(program)
                on_devices.append(({path: described(leaf) for path, leaf in on_mesh.items()}, function(*leaves)))
        return Pending(on_host, on_devices)


class Pending:
    """Digests that the devices compute."""

    def __init__(self, on_host: dict[str, list[str]], on_devices: list[tuple[Tensors, jax.Array]]):
        self._on_host, self._on_devices = on_host, on_devices

    def each(self) -> dict[str, list[str]]:
        """Waits for them; returns type, shape and digest by path, one of each device of this process."""
        found = dict(self._on_host)
        for descriptions, sums in self._on_devices:
            rows = np.concatenate([np.asarray(shard.data) for shard in sums.addressable_shards])
            for number, (path, description) in enumerate(descriptions.items()):
                found[path] = [f"{description} {digests.text((int(row[0]), int(row[1])))}" for row in rows[:, number]]
        return found


def tensors_of(name: str, tree: Any) -> Tensors:
    """Returns the leaves of a tree by path; a tree that is a single leaf has the path `name`."""
    return {
        f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}".removesuffix("/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def described(leaf: Any) -> str:
    """Returns type and shape, such as `float32[8, 10]`."""
    return f"{np.dtype(leaf.dtype).name}[{', '.join(map(str, leaf.shape))}]"


def _is_split(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding)


def _text(leaf: Any, digest: digests.Digest) -> str:
    return f"{described(leaf)} {digests.text(digest)}"
