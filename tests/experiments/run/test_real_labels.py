import json

import numpy as np
import pytest

from experiments.run import evaluation, real_labels
from experiments.run.predictions import Predictions
from nfnets_jax.data.sources import ArraySource
from nfnets_jax.errors import UsageError

WORDNET = tuple(f'n{i:08d}' for i in range(1000))


class Validation(ArraySource):
    """Images that are called like ImageNet's, in another order."""

    def __init__(self, numbers, class_names=WORDNET):
        images = np.zeros((len(numbers), 2, 2, 3), np.uint8)
        super().__init__(images, np.zeros(len(numbers), int), class_names)
        self.numbers = numbers

    def where(self, index):
        return f'val/ILSVRC2012_val_{self.numbers[index]:08d}.JPEG'


def write(path, labels):
    path.write_text(json.dumps(labels))
    return str(path)


def test_equals_the_authors_formula(tmp_path):
    """That of the repository's README: names -> labels; images without labels do not count."""
    rng = np.random.default_rng(0)
    labels = [rng.choice(1000, size=rng.integers(0, 4), replace=False).tolist() for _ in range(60)]
    numbers = rng.permutation(60)[:40] + 1
    source = Validation(numbers)
    logits = rng.normal(size=(40, 1000)).astype(np.float32)
    for row, number in enumerate(numbers[:20]):  # some are right
        if labels[number - 1]:
            logits[row, labels[number - 1][-1]] = 9
    order = rng.permutation(40)[:35]  # 5 could not be read
    predictions = Predictions(logits[order], np.zeros(35, np.int32), order.astype(np.int32))

    real = {f'ILSVRC2012_val_{i + 1:08d}.JPEG': each for i, each in enumerate(labels)}
    names = [source.where(int(i)).removeprefix('val/') for i in order]
    is_correct = [
        best in real[name]
        for name, best in zip(names, logits[order].argmax(1), strict=True)
        if real[name]
    ]
    found = real_labels.read(write(tmp_path / 'real.json', labels))
    accuracy = real_labels.top1(predictions, real_labels.image_numbers(source, 60), found)
    assert accuracy == np.mean(is_correct)
    assert 0 < accuracy < 1


def test_the_line_has_it():
    metrics = {'test/top1': 0.5, 'test/top5': 0.75, 'test/real_top1': 0.625}
    metrics |= {name.replace('/', '_ema/'): value for name, value in metrics.items()}
    assert evaluation.describe_accuracy(metrics) == (
        'test top-1 50.00%, top-5 75.00%, ReaL top-1 62.50% (EMA 50.00%, 75.00%, 62.50%)'
    )


@pytest.mark.parametrize('labels', [{}, [1], [[1000]], [[0.5]], [['1']]])
def test_what_is_no_list_of_labels_is_one_line(tmp_path, labels):
    with pytest.raises(UsageError, match='must be a list of lists of labels, from 0 to 999'):
        real_labels.read(write(tmp_path / 'real.json', labels))
    with pytest.raises(UsageError, match='cannot be read'):
        real_labels.read(str(tmp_path / 'none.json'))


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        (Validation([1], WORDNET[:10]), 'has 10 classes'),
        (Validation([1], WORDNET[::-1]), 'in the order of their WordNet IDs'),
        (Validation([1], sorted(map(str, range(1000)))), 'or their numbers in it'),
        (Validation([1], tuple(f'tench {i:03d}' for i in range(1000))), "the first 'tench 000'"),
        (Validation([1, 61]), 'ILSVRC2012_val_00000061.JPEG is not called like an image of'),
        (ArraySource(np.zeros((1, 2, 2, 3), np.uint8), [0], WORDNET), 'arrays.0. is not called'),
    ],
)
def test_other_images_are_refused(source, message):
    with pytest.raises(UsageError, match=message):
        real_labels.image_numbers(source, 60)
