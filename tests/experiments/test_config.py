"""The declared fields of a config, and that they are those of every config file."""

import json
import re

import pytest

from experiments import config as schema
from experiments.study import config as study_config
from nfnets_jax import fields, models, optimizers, schedules
from nfnets_jax.augment import DEFAULTS
from nfnets_jax.data.sources import SOURCES
from nfnets_jax.errors import UsageError
from tests.experiments.conftest import tiny_config


def test_the_defaults_are_those_of_the_parts():
    config = schema.default_config()
    schema.check(config)
    assert config.augment.to_dict() == DEFAULTS
    assert config.optimizer.to_dict() == optimizers.default_config()
    assert config.optimizer.schedule.to_dict() == schedules.default_config()
    # What configs and runs of earlier versions rely on; the options of a model or source stand
    # beside its name only where a config gives them.
    assert config.model.to_dict() == {'name': 'NF-ResNet-50'}
    data = {'name': 'digits', 'skip_bad': 0, 'on_device': False, 'sampling': 'shuffled'}
    data['validation_fraction'] = 0.0
    assert config.data.to_dict() == data
    assert (config.batch_size, config.duration, config.ema) == (256, '90 epochs', 0.99999)
    assert json.loads(json.dumps(config.to_dict())) == schema.upgrade(
        json.loads(json.dumps(config.to_dict()))
    )


def test_every_field_has_one_line_of_doc_and_says_what_it_may_be():
    config = schema.default_config()
    known = [fields.options(study_config.StudyConfig)]
    for source in SOURCES:
        config.data = {'name': source}
        known.append(schema.declared(config))
    for name in models.list_models():
        config.model = {'name': name}
        known.append(schema.declared(config))
    for each in known:
        for node, _, found in fields.sections(each, 'config'):
            for key, option in found.items():
                assert option.wants
                assert re.fullmatch(r'.{4,}\.', option.field.doc), f'{node}.{key}'


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'model__drop_rate': 2}, 'config.model.drop_rate=2: must be None or a number of at least'),
        ({'model': {'name': 'ResNet-8', 'alpha': 1}}, 'unknown key config.model.alpha'),
        ({'model': 3}, 'config.model=3: must be a mapping of fields: name'),
        ({'data': {'name': 'folder'}}, 'config.data.path is missing: it must be a string or a'),
        ({'data__classes': 3}, 'config.data.classes=3: must be two or more digits from 0 to 9'),
        ({'data__workers': 3}, 'unknown key config.data.workers: images are read by one thread'),
        ({'augment__flip': 1}, 'config.augment.flip=1: must be True or False'),
        ({'optimizer__groups': ({},)}, 'config.optimizer.groups[0].match is missing'),
        ({'eval__precision': 1}, 'config.eval.precision=1 is unknown (known: float32, bfloat16, '),
        ({'duration': 2.5}, "config.duration=2.5: must be a duration like '500 steps'"),
    ],
)
def test_a_mistake_is_named_with_its_whole_path(changes, message):
    with pytest.raises(UsageError) as error:
        schema.check(tiny_config(**changes))
    assert str(error.value).startswith(message)


def test_a_mistake_of_the_library_is_put_under_its_node():
    for message, expected in (
        ('data.path=3: no', 'config.data.path=3: no'),
        ('width=3: no', 'config.data.width=3: no'),
        ('/data.v2/x: no images', 'config.data: /data.v2/x: no images'),
        ('data: unknown', 'config.data: unknown'),
    ):
        with pytest.raises(UsageError) as error, schema.naming('data'):
            raise UsageError(message)
        assert str(error.value) == expected
