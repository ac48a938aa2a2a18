"""Published weights become our model: the outputs of their own libraries, and what is wrong with a file by name."""

import dataclasses

import golden_weights
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_weights import NAMES, fixture

from vit_dist import ViT
from vit_dist.weights.published import Published, open_published

TOLERANCE = 1e-4  # of the outputs' standard deviation


def module(published: Published) -> ViT:
    """Our model with these parameters."""
    keywords = {field.name: getattr(published.model, field.name) for field in dataclasses.fields(published.model)}
    graph, state = nnx.split(nnx.eval_shape(lambda: ViT(**keywords, rngs=nnx.Rngs(0))))
    tree: dict = {}
    for path, lazy in published.parameters.items():
        *parents, name = (int(part) if part.isdigit() else part for part in path.split("/"))
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jnp.asarray(lazy.read())
    nnx.replace_by_pure_dict(state, tree)
    return nnx.merge(graph, state)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_their_own_library(name, tmp_path):
    golden = fixture(name)
    published = open_published(golden_weights.write(golden, tmp_path).parent)
    model, images = module(published), golden_weights.images(golden)
    features = model.features(images)
    found = {"features": features} if model.head is None else {"features": features, "logits": model.head(features)}
    for output, expected in golden_weights.outputs(golden).items():
        if output == "pooler_output":
            continue  # of ViTModel, a further layer that is left out
        difference = np.abs(found[output] - expected).max() / expected.std()
        assert difference <= TOLERANCE, f"{output}: {difference:.1e}"
