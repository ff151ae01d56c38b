"""The nearest valid choice, as errors name it."""

import pytest

from nfnets_jax.errors import UsageError, nearest, rename_keys

KEYS = (
    *('seed', 'batch_size', 'duration', 'precision', 'ema', 'sam.rho', 'augment.mixup'),
    *(
        'optimizer',
        'optimizer.learning_rate',
        'optimizer.weight_decay',
        'optimizer.schedule.warmup',
    ),
    *('optimizer.clip', 'optimizer.clip.clipping', 'model', 'model.name', 'model.drop_rate'),
)


@pytest.mark.parametrize(
    ('name', 'meant'),
    [
        ('optimizer.lr', 'optimizer.learning_rate'),
        ('lr', 'optimizer.learning_rate'),
        ('learning_rate', 'optimizer.learning_rate'),
        ('optimizer.LearningRate', 'optimizer.learning_rate'),
        ('optimizer.warmup', 'optimizer.schedule.warmup'),
        ('optimizer.clip.factor', 'optimizer.clip.clipping'),
        ('wd', 'optimizer.weight_decay'),
        ('optimizer.wd', 'optimizer.weight_decay'),
        ('bs', 'batch_size'),
        ('Batch-Size', 'batch_size'),
        ('epochs', 'duration'),
        ('num_epochs', 'duration'),
        ('max_steps', 'duration'),
        ('rho', 'sam.rho'),
        ('augment.mix_up', 'augment.mixup'),
        ('dropout', 'model.drop_rate'),
        ('amp', 'precision'),
        ('arch', 'model'),
        ('sed', 'seed'),
    ],
)
def test_words_of_other_trainers_and_spellings_find_our_key(name, meant):
    assert nearest(name, KEYS) == f' (did you mean {meant!r}?)'


def test_an_alias_tells_the_name_it_stands_for():
    aliases = {'dm_nfnet_f0': 'NFNet-F0'}
    assert nearest('DM-NFNet-F0', ['NFNet-F0', 'ResNet-8'], aliases) == (
        " (did you mean 'NFNet-F0'?)"
    )


def test_where_nothing_is_near_all_are_named():
    assert nearest('zzz', ['one', 'two'], {'other': 'one'}) == ' (known: one, two)'


def test_the_keys_of_an_error_are_renamed_and_nothing_else():
    def name(key):
        return key.replace('config.', 'config.base.')

    error = UsageError(
        "config.a='config.b': must divide config.b=2 of config.ab, config.b",
        'config.a',
        'config.b=',
    )
    assert rename_keys(error, name) == (
        "config.base.a='config.b': must divide config.base.b=2 of config.ab, config.b"
    )
    assert rename_keys(UsageError('config.a', 'config.c'), name) == 'config.a'
    assert rename_keys(ValueError('config.a=1'), name) == 'config.a=1'
