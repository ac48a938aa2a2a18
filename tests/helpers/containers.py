"""What the tests of containers ask of the sets that they open."""

import numpy as np

from vit_dist.data.sets.examples import FileSource, Source, fingerprint


def assert_same(one: Source, other: Source) -> None:
    """Two file sources hold the same examples, by name, label, class and byte."""
    assert isinstance(one, FileSource) and isinstance(other, FileSource)
    assert tuple(one.names) == tuple(other.names) and one.class_names == other.class_names
    assert np.array_equal(one.labels, other.labels) and fingerprint(one) == fingerprint(other)
    assert [one.read(i) for i in range(len(one))] == [other.read(i) for i in range(len(other))]
