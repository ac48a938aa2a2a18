"""Our model with the parameters of published weights."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx

from vit_dist import ViT, config
from vit_dist.weights.lazy import Lazy


def filled(model: config.Model, parameters: Mapping[str, Lazy]) -> ViT:
    """The model, with blocks one by one, with these parameters by path."""
    keywords = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    graph, state = nnx.split(nnx.eval_shape(lambda: ViT(**keywords, rngs=nnx.Rngs(0))))
    tree: dict = {}
    for path, lazy in parameters.items():
        *parents, name = (int(part) if part.isdigit() else part for part in path.split("/"))
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jnp.asarray(lazy.read())
    nnx.replace_by_pure_dict(state, tree)
    return nnx.merge(graph, state)
