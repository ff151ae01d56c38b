import inspect
import re

import haiku as hk
import jax
import jax.numpy as jnp
import pytest

import nfnets_jax
from nfnets_jax import fields, models
from nfnets_jax.errors import UsageError
from nfnets_jax.models.registry import FAMILIES, declared_options


def make(name, num_classes=10, **overrides):
    """Constructs the model, and calls nothing."""
    return hk.transform(lambda: models.create_model(name, num_classes, **overrides) and None).init(
        None
    )


def shallow(name):
    """Whether a network is quickly made."""
    return sum(models.variant_info(name).depths) <= 16


@pytest.mark.parametrize('quick', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_listed_model_can_be_made(quick):
    made = [name for name in models.list_models() if shallow(name) == quick]
    assert len(made) > 20
    for name in made:
        make(name)


def test_names():
    names = models.list_models()
    assert len(names) == len(set(names))
    for name in ('NFNet-F7+', 'NF-RegNet-B8', 'NF-ResNet-50', 'ResNet-600', 'NF-ResNet-110'):
        assert name in names
    assert all(models.variant_info(name).name == name for name in names)


def test_timms_names_of_published_networks_are_aliases():
    for level in range(7):
        alias, ours = f'dm_nfnet_f{level}', f'NFNet-F{level}'
        assert models.variant_info(alias).name == ours
        assert models.model_options(alias) == models.model_options(ours)
    assert models.find_variant('dm_nfnet_f7') is models.find_variant(None) is None


def test_timms_rows():
    row = models.variant_info('eca_nfnet_l1')
    assert (row.train_size, row.test_size, row.eval_mode) == (256, 320, 'timm_center_1.0')
    assert (row.depths, row.top1, row.family) == ((2, 4, 12, 6), 84.062, 'NFNet')
    assert models.variant_info('nf_resnet50').eval_mode == 'timm_center_0.94'
    assert models.variant_info('test_nfnet').mean == (127.5, 127.5, 127.5)


def test_options_of_a_timm_network_can_be_overridden():
    def macs(**overrides):
        return models.model_cost('test_nfnet', 10, **overrides).macs(32)

    own = macs(depths=None, width=None)
    assert macs() == own
    assert macs(depths=(1, 1, 1, 2)) > own
    assert macs(group_size=4) < own


def test_variant_info():
    row = models.variant_info('NFNet-F5')
    assert (row.train_size, row.test_size, row.drop_rate, row.randaugment) == (416, 544, 0.5, 15)
    assert (row.top1, row.top5, row.depths) == (86.0, 97.6, (6, 12, 36, 18))
    assert models.variant_info('NFNet-F5+').channels == (384, 768, 2048, 2048)
    assert models.variant_info('NF-RegNet-B0').channels == (36, 78, 156, 330)


@pytest.mark.parametrize(
    ('name', 'overrides', 'message'),
    [
        ('NFNet-F9', {}, r"model: unknown 'NFNet-F9' \(did you mean 'NFNet-F\d'\?\)"),
        ('NFNet-F0', {'dropout': 0.1}, r"unknown key dropout of NFNet-F0 \(did you mean 'drop_"),
        ('NFNet-F0', {'num_classes': -1}, 'num_classes=-1: must be an integer of at least 0'),
        ('NFNet-F0', {'channels': 0}, 'channels=0: must be None or an integer of at least 1'),
        ('NFNet-F0', {'stem_width': 12}, 'stem_width=12: must be a positive multiple of 8'),
        ('eca_nfnet_l9', {}, r"model: unknown 'eca_nfnet_l9' \(did you mean 'eca_nfnet_l\d'"),
        (
            'NF-ResNet-50',
            {'use_se': True, 'use_eca': True},
            'use_eca=True: must be False where use_se',
        ),
        (
            'NFNet-F0',
            {'drop_rate': 1.5},
            'drop_rate=1.5: must be None or a number of at least 0 and below 1',
        ),
        ('NFNet-F0', {'alpha': -0.2}, 'alpha=-0.2: must be a number above 0'),
        ('NFNet-F0', {'depths': (1, 0, 1, 1)}, r'depths\[1\]=0: must be an integer of at least 1'),
        (
            'NFNet-F0',
            {'depths': (1, 1)},
            r'depths=\(1, 1\): must have one entry a stage, 4 as widths',
        ),
        ('NFNet-F0', {'group_size': 1024}, 'group_size=1024: must be at most the 128 channels'),
        ('NFNet-F0', {'final_conv_mult': None}, 'final_conv_ch=None: must be given'),
        ('NFNet-F0', {'activation': 'rellu'}, "activation='rellu' is unknown .*'relu'"),
        ('NFNet-F0', {'width': float('inf')}, 'width=inf: must be None or a number above 0'),
        ('NFNet-F0', {'activation': ['relu']}, r"activation=\['relu'\]: must be a string"),
        (
            'NFNet-F0',
            {'final_conv_mult': '2'},
            "final_conv_mult='2': must be None or a number",
        ),
        ('NFNet-F0', {'fc_init': '0.1'}, "fc_init='0.1': must be a number or a function"),
        ('NFNet-F0', {'remat': 'no'}, "remat='no': must be True or False"),
        ('NF-ResNet-50', {'use_se': 0}, 'use_se=0: must be True or False'),
        ('NF-ResNet-50', {'width': 0.05}, 'width=0.05: leaves a convolution without channels'),
        ('ResNet-8', {'width': 0.01}, 'width=0.01: leaves a convolution without channels'),
        ('NFNet-F0', {'width': 0.001}, 'width=0.001: leaves a convolution without channels'),
        ('NF-RegNet-B0', {'width': 0.001}, 'width=0.001: leaves a convolution without channels'),
        ('NFNet-F0', {'widths': (1,), 'depths': (1,)}, 'leaves a convolution without channels'),
        (
            'NFNet-F0',
            {'depths': ()},
            r'depths=\(\): must be None or a list of at least one integer',
        ),
        ('SkipInit-ResNet-8', {'width': 0.01}, 'width=0.01: leaves'),
        ('Fixup-ResNet-8', {'width': 0.01}, 'width=0.01: leaves'),
        ('NF-ResNet-50', {'stem': 'tiny'}, "stem='tiny' is unknown .known: imagenet, small"),
        ('NF-ResNet-50', {'width': '4'}, "width='4': must be None or a number above 0"),
        ('ResNet-20', {'norm': 'layer'}, "norm='layer' is unknown .known: batch, none"),
        ('NFNet-F0', {'block': 'basic'}, 'unknown key block of NFNet-F0'),
        ('SmallCNN', {'width': 2}, 'unknown key width of SmallCNN'),
    ],
)
def test_a_mistake_is_one_line_that_names_it(name, overrides, message):
    with pytest.raises(UsageError, match=message) as error:
        make(name, **overrides)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['NF-ResNet-8', 'ResNet-8'])
def test_pictures_of_integers_are_refused(name):
    network = hk.transform_with_state(lambda x: models.create_model(name, 10)(x, True))
    with pytest.raises(UsageError, match='images must be normalised floats, not uint8'):
        network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3), jnp.uint8))


def test_pictures_too_small_for_the_small_cnn_are_told():
    network = hk.transform_with_state(lambda x: models.SmallCNN(10)(x, True))

    def init(height):
        image = jax.ShapeDtypeStruct((1, height, 32, 3), jnp.float32)
        return jax.eval_shape(network.init, jax.random.key(0), image)

    init(14)
    with pytest.raises(UsageError, match='SmallCNN: .* at least 14 x 14 pixels, not 13 x 32'):
        init(13)


def test_classes_name_their_mistakes_too():
    with pytest.raises(UsageError, match=r"NFNet variant: unknown 'G0' \(did you mean 'F0'"):
        hk.transform(lambda: models.NFNet(10, variant='G0')).init(None)
    with pytest.raises(UsageError, match="unknown key depth .did you mean 'depths'"):
        hk.transform(lambda: models.NFNet(10, depth=(1, 1, 1, 1))).init(None)


@pytest.mark.parametrize('family', FAMILIES.values(), ids=lambda family: family.__name__)
def test_every_class_checks_its_options(family):
    with pytest.raises(UsageError, match='channels=0: must be None or an integer of at least 1'):
        hk.transform(lambda: family(10, channels=0)).init(None)


def test_class_and_name_make_the_same_network():
    def shapes(make):
        network = hk.transform_with_state(lambda x: make()(x, False))
        image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        return jax.eval_shape(network.init, jax.random.key(0), image)

    by_class = shapes(lambda: nfnets_jax.NFNet(5, variant='F0', use_two_convs=False))
    by_name = shapes(lambda: nfnets_jax.create_model('NFNet-F0', 5, use_two_convs=False))
    assert by_class == by_name


@pytest.mark.parametrize('name', ['NFNet-F0', 'nf_regnet_b0', 'ResNet-8', 'SmallCNN'])
def test_channels_and_a_network_of_features(name):
    network = nfnets_jax.build(name, 0, channels=4)

    def init(channels):
        image = jax.ShapeDtypeStruct((2, 32, 32, channels), jnp.float32)
        params, state = jax.eval_shape(lambda x: network.init(jax.random.key(0), x, True), image)
        outputs = jax.eval_shape(
            lambda p, s, x: network.apply(p, s, None, x, False)[0], params, state, image
        )
        return params, outputs

    params, outputs = init(4)
    assert outputs.keys() == {'pool'}
    assert outputs['pool'].shape[0] == 2
    assert not any(re.fullmatch(r'[^/]+/~/linear(_\d)?', module) for module in params)
    with pytest.raises(UsageError, match='channels: the images must have 4, not 3'):
        init(3)


@pytest.mark.parametrize('scan', [False, True])
def test_features_of_every_stage(scan):
    network = nfnets_jax.build('NF-ResNet-8', 5, depths=(1, 7, 1), scan=scan)
    image = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    params, state = jax.eval_shape(lambda x: network.init(jax.random.key(0), x, True), image)

    def features(params, state, image):
        outputs, _ = network.apply(params, state, None, image, False, return_features=True)
        return outputs['features']

    shapes = jax.eval_shape(features, params, state, image)
    assert {name: leaf.shape for name, leaf in shapes.items()} == {
        'stem': (2, 16, 16, 16),
        'stage1': (2, 16, 16, 16),
        'stage2': (2, 8, 8, 32),
        'stage3': (2, 4, 4, 64),
    }


def test_none_is_the_variants_own_value():
    assert make('NF-ResNet-50', width=None, drop_rate=None, stem=None) == {}


@pytest.mark.parametrize('name', models.list_models())
def test_every_option_is_declared_with_the_networks_own_value(name):
    found = declared_options(name)
    assert list(found) == models.model_options(name)
    parameters = inspect.signature(FAMILIES[models.variant_info(name).family]).parameters
    undeclared = {'num_classes', 'variant', 'name', 'overrides'}
    assert parameters.keys() - undeclared <= found.keys()
    fields.check(found, fields.defaults(found), whole=True)
    if 'depths' in found:
        assert found['depths'].default == models.variant_info(name).depths
    if name == 'eca_nfnet_l0':
        assert found['use_eca'].default is True


@pytest.mark.parametrize(
    ('name', 'ours'),
    [
        ('nfnet_f0', 'NFNet-F0'),
        ('NFNET-F5+', 'NFNet-F5+'),
        ('NF_ResNet_50', 'NF-ResNet-50'),
        ('DM-NFNet-F1', 'NFNet-F1'),
        ('resnet50', 'ResNet-50'),
    ],
)
def test_case_and_dashes_do_not_lead_to_another_network(name, ours):
    with pytest.raises(UsageError, match=re.escape(f'unknown {name!r} (did you mean {ours!r}?)')):
        models.variant_info(name)
