import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from nfnets_jax.data.pipeline import epoch_order
from nfnets_jax.data.sampling import balanced_order, class_weights

LABELS = np.array([0] * 50 + [1] * 7 + [3] * 3)  # no example of class 2


def test_classes_and_their_examples_are_equally_frequent_in_every_epoch_and_in_all():
    total = np.zeros(len(LABELS), int)
    for epoch in range(10):
        order = balanced_order(LABELS, 5, epoch)
        assert len(order) == len(LABELS)
        counts = np.bincount(LABELS[order], minlength=4)
        assert counts[2] == 0
        assert set(counts[[0, 1, 3]]) <= {19, 20, 21}
        total += np.bincount(order, minlength=len(LABELS))
        for label in (0, 1, 3):
            of_class = total[label == LABELS]
            assert of_class.max() - of_class.min() <= 1
    by_class = [total[label == LABELS].sum() for label in (0, 1, 3)]
    assert max(by_class) - min(by_class) <= 1


def test_it_depends_on_seed_and_epoch_alone():
    first = balanced_order(LABELS, 1, 3)
    np.testing.assert_array_equal(balanced_order(LABELS, 1, 3), first)
    assert (balanced_order(LABELS, 1, 4) != first).any()
    assert (balanced_order(LABELS, 2, 3) != first).any()


def test_equal_classes_are_each_used_once():
    labels = np.arange(40) % 4
    np.testing.assert_array_equal(np.sort(balanced_order(labels, 0, 2)), np.arange(40))


def test_classes_are_mixed_within_an_epoch():
    drawn = LABELS[balanced_order(LABELS, 0, 0)]
    assert len(set(drawn[:12])) == 3


def test_weights_equal_scikit_learns():
    expected = compute_class_weight('balanced', classes=np.array([0, 1, 3]), y=LABELS)
    weights = class_weights(LABELS, 4)
    np.testing.assert_allclose(weights[[0, 1, 3]], expected, rtol=1e-6)
    assert weights[2] == 1
    assert weights[LABELS].mean() == pytest.approx(1)


@pytest.mark.parametrize('epoch', [0, 3])
def test_each_order_of_a_class_is_that_of_a_generator_of_its_own(epoch):
    """The slow formula, which runs of earlier versions resume by."""
    labels = np.random.default_rng(0).permutation(np.repeat([0, 4, 7], [40, 5, 3]))
    size, drawn = len(labels), []
    for number, label in enumerate((0, 4, 7)):
        examples = np.flatnonzero(labels == label)
        places = [(e * size * (n)) // 3 for e in (epoch, epoch + 1) for n in (number, number + 1)]
        start, stop = places[1] - places[0], places[3] - places[2]
        for position in range(start, stop):
            order, place = divmod(position, len(examples))
            bits = np.random.Philox(key=[5, 0], counter=[0, order, number + 1, 0])
            drawn.append(examples[np.argsort(bits.random_raw(len(examples)))[place]])
    shuffled = np.array(drawn)[epoch_order(size, 5, epoch)]
    np.testing.assert_array_equal(balanced_order(labels, 5, epoch), shuffled)
