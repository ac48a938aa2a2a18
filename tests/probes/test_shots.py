"""The examples of a few-shot probe are the same everywhere, and so many of each class."""

import numpy as np

from vit_dist.probes.shots import choose

LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 4], [50, 30, 7]))


def test_each_class_has_its_shots_and_a_smaller_one_all_it_has():
    for shots, expected in ((1, [1, 1, 1]), (7, [7, 7, 7]), (40, [40, 30, 7])):
        chosen = choose(LABELS, shots, seed=0)
        assert np.bincount(LABELS[chosen], minlength=5)[[0, 1, 4]].tolist() == expected
        assert (np.diff(chosen) > 0).all()


def test_fewer_shots_are_among_more_of_the_same_seed():
    for seed in range(5):
        assert set(choose(LABELS, 3, seed)) < set(choose(LABELS, 5, seed))


def test_another_seed_chooses_others_and_every_example_has_its_turn():
    chosen = [tuple(choose(LABELS, 5, seed)) for seed in range(60)]
    assert len(set(chosen)) > 50
    assert set(np.concatenate(chosen)) == set(range(len(LABELS)))


def test_the_choice_is_the_same_on_every_host_and_in_every_version():
    assert choose(np.arange(100) % 2, 4, seed=3).tolist() == [5, 6, 23, 24, 46, 47, 50, 71]


def test_classes_of_one_size_have_choices_of_their_own():
    chosen = choose(np.repeat([0, 1], 100), 10, seed=0)
    assert set(chosen[:10]) != set(chosen[10:] - 100)
