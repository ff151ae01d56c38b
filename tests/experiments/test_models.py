import pytest

from experiments import models as table_of_models
from nfnets_jax.errors import UsageError


def test_rows_hold_the_published_figures():
    lines = list(table_of_models.table('NFNet-F0', 1000))
    assert [' '.join(line.split()) for line in lines] == [
        'model parameters GMACs train test top-1 top-5 source',
        'NFNet-F0 71,489,284 12.38 192 256 83.6 96.8 2102.06171',
        'NFNet-F0+ 118,824,516 19.52 192 256 - - -',
    ]
    assert lines[0].index('source') == lines[1].index('2102.06171')


def test_timms_networks_are_rows():
    _, *lines = table_of_models.table('test_nfnet', 1000)
    assert [' '.join(line.split()) for line in lines] == [
        'test_nfnet 383,080 0.29 160 160 47.6 72.9 timm, results-imagenet.csv'
    ]


def test_number_of_classes_counts():
    _, line = table_of_models.table('SmallCNN', 10)
    assert line.split()[1] == '37,578'


def test_no_such_model():
    with pytest.raises(UsageError, match='--models=NFnet: no model has this in its name'):
        list(table_of_models.table('NFnet', 10))


def test_a_narrow_terminal_gets_rows_of_several_lines():
    rows = list(table_of_models.table('test_nfnet', 1000, columns=40))
    assert rows[1].splitlines() == [
        'test_nfnet               383,080    0.29',
        '      160  160  47.6  72.9',
        '     timm, results-imagenet.csv',
    ]
    assert rows[0].splitlines()[1:] == ['    train test top-1 top-5  source']
    assert list(table_of_models.table('test_nfnet', 1000, columns=200)) == list(
        table_of_models.table('test_nfnet', 1000)
    )
