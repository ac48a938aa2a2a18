"""Published weights become our model: the outputs of their own libraries, and what is wrong with a file by name."""

import golden_weights
import numpy as np
import pytest
from filled_model import filled
from golden_weights import NAMES, fixture

from vit_dist.weights.published import open_published

TOLERANCE = 1e-4  # of the outputs' standard deviation


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_their_own_library(name, tmp_path):
    golden = fixture(name)
    published = open_published(golden_weights.write(golden, tmp_path).parent)
    model, images = filled(published.model, published.parameters), golden_weights.images(golden)
    features = model.features(images)
    found = {"features": features} if model.head is None else {"features": features, "logits": model.head(features)}
    for output, expected in golden_weights.outputs(golden).items():
        if output == "pooler_output":
            continue  # of ViTModel, a further layer that is left out
        difference = np.abs(found[output] - expected).max() / expected.std()
        assert difference <= TOLERANCE, f"{output}: {difference:.1e}"
