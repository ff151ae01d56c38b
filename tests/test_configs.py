"""The published recipes: what they say, and that a tiny likeness of each runs."""

import json

import jax
import numpy as np
import pytest

from configs.imagenet import fixup_resnet, nf_regnet, nf_resnet, nfnet, resnet, sam, skipinit_resnet
from experiments import config as schema
from experiments.experiment import build
from experiments.run import smoke, workdir
from experiments.train import train
from nfnets_jax import models
from nfnets_jax.data import sources
from nfnets_jax.errors import UsageError

FAMILIES = {
    nfnet: 'NFNet',
    sam: 'NFNet',
    nf_regnet: 'NF-RegNet',
    nf_resnet: 'NF-ResNet',
    resnet: 'ResNet',
    skipinit_resnet: 'SkipInit-ResNet',
    fixup_resnet: 'Fixup-ResNet',
}
ROWS = [models.variant_info(name) for name in models.list_models()]
ALL = [
    (file, row.variant)
    for file, family in FAMILIES.items()
    for row in ROWS
    if row.family == family and row.stem == 'imagenet' and not row.base
]
# One of each network; that of sam is nfnet's, and QUICK is trained.
FIRST = {(nfnet, 'F0'), (nf_regnet, 'B0')}
FIRST |= {(file, '50') for file in (resnet, skipinit_resnet, fixup_resnet)}
QUICK = {(nf_resnet, '50')}  # The others compile for half a minute each.


def named(file, variant):
    return f'{file.__name__.split(".")[-1]}.py:{variant}'


@pytest.mark.parametrize(('file', 'variant'), ALL, ids=[named(*each) for each in ALL])
def test_every_config_is_whole_and_of_its_network(file, variant):
    config = file.get_config(variant)
    schema.check(config)
    row = models.variant_info(config.model.name)
    assert (row.family, row.variant) == (FAMILIES[file], variant)
    assert (config.data.image_size, config.data.test_image_size) == (row.train_size, row.test_size)


def some(quick):
    """All configs; those that are not quick are marked slow."""
    return pytest.mark.parametrize(
        ('file', 'variant'),
        [
            pytest.param(*each, id=named(*each), marks=() if each in quick else pytest.mark.slow)
            for each in ALL
        ],
    )


@some(FIRST)
def test_data_model_optimizer_and_augmentation_of_a_tiny_likeness_fit(file, variant):
    experiment = build(smoke.shrink(file.get_config(variant)))
    assert experiment.total_steps == 3
    assert experiment.image_spec.shape == (32, 32, 3)
    # The mixed recipes read two images for each example.
    images_of_an_example = 2 if file in (nfnet, sam, nf_regnet) else 1
    assert experiment.images_per_step == images_of_an_example * experiment.config.batch_size
    clipped = [group.clip for group in experiment.optimizer.groups.values()]
    assert clipped.count(False) == 1  # the classifier's weight


@pytest.fixture
def forget_programs():
    """Each takes thousands of memory maps, and a process may have 65,530."""
    yield
    jax.clear_caches()


@some(QUICK)
@pytest.mark.usefixtures('forget_programs')
def test_a_tiny_likeness_trains_three_steps(file, variant, tmp_path):
    config = file.get_config(variant)
    config.smoke = True
    summary = train(config, tmp_path / 'run', quiet=True)
    assert summary['step'] == 3
    lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
    losses = [line['train/loss'] for line in map(json.loads, lines) if 'train/loss' in line]
    assert len(losses) == 3
    assert losses[0] == pytest.approx(2.3, abs=0.6)  # log of ten classes


def test_the_likeness_keeps_the_recipe():
    config = sam.get_config('F0')
    tiny = smoke.shrink(config)
    for key in ('augment', 'sam', 'precision', 'ema'):
        assert tiny[key] == config[key]
    for key in ('clip', 'groups', 'weight_decay', 'momentum', 'learning_rate'):
        assert tiny.optimizer[key] == config.optimizer[key]
    assert tiny.model.depths == (1, 1)
    assert tiny.data.name == 'noise'
    assert smoke.shrink(tiny).to_dict() == tiny.to_dict()  # as when the run is resumed
    assert config.model.name == 'NFNet-F0'
    assert config.duration == '360 epochs'


def test_the_likeness_of_a_changed_recipe_is_one_that_trains():
    config = nf_resnet.get_config('50')
    config.optimizer.schedule.name = 'step'
    config.optimizer.schedule.boundaries = ('30 epochs', '60 epochs')
    late = {'match': r'.*/nf_res_block_15/.*', 'lr_scale': 0.1}
    config.optimizer.groups = (late, *config.optimizer.groups)
    config.wandb.project = 'mine'
    tiny = smoke.shrink(config)
    assert build(tiny).total_steps == 3
    assert [rule['match'] for rule in tiny.optimizer.groups] == [
        rule['match'] for rule in nf_resnet.get_config('50').optimizer.groups
    ]
    assert tiny.wandb.project == ''


def test_a_rule_for_no_parameter_of_the_recipes_network_is_told():
    config = nf_resnet.get_config('50')
    config.optimizer.groups = ({'match': '.*/nf_res_block_16/.*'}, *config.optimizer.groups)
    with pytest.raises(UsageError, match=r"config.optimizer.groups\[0\].match='.*16.*' matches no"):
        smoke.shrink(config)
    config.model.name = 'NF-ResNet-51'
    with pytest.raises(UsageError, match=r"config.model: .*'NF-ResNet-51' .did you mean"):
        smoke.shrink(config)


# What the papers and the authors' code state, copied by hand; every config must say the same.
BASE = {
    'optimizer.name': 'sgd',
    'optimizer.momentum': 0.9,
    'optimizer.nesterov': True,
    'optimizer.learning_rate': 0.1,
    'optimizer.scale_lr_by_batch': True,
    'optimizer.schedule.name': 'cosine',
    'optimizer.schedule.warmup': '5 epochs',
    'optimizer.schedule.end_value': 0.0,
    'optimizer.weight_decay': 1e-4,
    'optimizer.clip.name': 'none',
    'batch_size': 1024,
    'duration': '90 epochs',
    'ema': 0.0,
    'precision': 'float32',
    'eval.precision': 'float32',
    'data.test_mode': 'crop_resize',
    'augment.flip': True,
    'augment.label_smoothing': 0.1,
    'augment.mixup': 0.0,
    'augment.cutmix': 0.0,
    'augment.randaugment_layers': 0,
    'augment.erasing': 0.0,
    'sam.rho': 0.0,
}
MIXED = {'augment.mixup': 0.2, 'augment.cutmix': 1.0, 'augment.mix_pairs': 'distinct'}
NFNETS = {
    **BASE,
    **MIXED,
    'optimizer.weight_decay': 2e-5,
    'optimizer.clip.name': 'agc',
    'optimizer.clip.clipping': 0.01,
    'optimizer.clip.eps': 1e-3,
    'batch_size': 4096,
    'duration': '360 epochs',
    'ema': 0.99999,
    'precision': 'bfloat16',
    'data.test_mode': 'resize_crop_32',
    'augment.mix_first': True,
    'augment.randaugment_layers': 4,
}
MAGNITUDES = {0: 5, 1: 10, 2: 10} | dict.fromkeys(range(3, 8), 15)
NF_REGNETS = {
    **BASE,
    **MIXED,
    'optimizer.learning_rate': 0.4,
    'optimizer.scale_lr_by_batch': False,
    'optimizer.schedule.end_value': 0.001,
    'duration': '360 epochs',
    'ema': 0.99999,
}
DECAYS = (5e-5, 6e-5, 7e-5, 8e-5, 9e-5, 1e-4)  # B0 to B5; the authors have none for B6 to B8
STOCHASTIC_DEPTH = {'model.stochdepth_rate': 0.1}
PUBLISHED = {
    **{
        (nfnet, f'F{i}'): NFNETS | {'augment.randaugment_magnitude': MAGNITUDES[i]}
        for i in range(8)
    },
    **{
        (sam, f'F{i}'): NFNETS
        | {'augment.randaugment_magnitude': MAGNITUDES[i]}
        | {'sam.rho': 0.05, 'sam.ascent_fraction': 0.2}
        for i in range(8)
    },
    **{
        (nf_regnet, f'B{i}'): NF_REGNETS | {'optimizer.weight_decay': decay}
        for i, decay in enumerate(DECAYS)
    },
    (resnet, '50'): BASE,
    (resnet, '600'): BASE,
    (nf_resnet, '50'): BASE | STOCHASTIC_DEPTH | {'model.drop_rate': 0.0},
    (nf_resnet, '200,dropout'): BASE | STOCHASTIC_DEPTH | {'model.drop_rate': 0.25},
    (nf_resnet, '50,clipping'): BASE
    | STOCHASTIC_DEPTH
    | {'batch_size': 4096, 'optimizer.clip.name': 'agc', 'optimizer.clip.clipping': 0.01},
    (skipinit_resnet, '50'): BASE | STOCHASTIC_DEPTH,
    (fixup_resnet, '50'): BASE | STOCHASTIC_DEPTH,
}


@pytest.mark.parametrize(('file', 'variant'), PUBLISHED, ids=[named(*each) for each in PUBLISHED])
def test_every_config_is_the_published_recipe(file, variant):
    config = file.get_config(variant)
    flat = workdir.flatten(config.to_dict())
    expected = PUBLISHED[file, variant]
    assert {key: flat.get(key) for key in expected} == pytest.approx(expected)


def test_the_networks_own_rates_are_the_published():
    """Where a config does not say them they are the variant's: dropout and stochastic depth."""
    rates = {
        'NFNet-F0': (0.2, 0.25),
        'NFNet-F1': (0.3, 0.25),
        'NFNet-F6': (0.5, 0.25),
        'NF-RegNet-B0': (0.2, 0.1),
        'NF-RegNet-B5': (0.4, 0.1),
        'ResNet-50': (0.0, 0.0),
        'SkipInit-ResNet-50': (0.0, 0.0),
    }
    for name, expected in rates.items():
        row = models.variant_info(name)
        assert (row.drop_rate, row.stochdepth_rate) == expected


def test_the_decay_of_the_largest_nf_regnets_goes_on():
    decays = [nf_regnet.get_config(f'B{i}').optimizer.weight_decay for i in (6, 7, 8)]
    assert decays == pytest.approx([1.1e-4, 1.2e-4, 1.3e-4])


def test_every_config_file_tells_its_variants():
    for file in FAMILIES:
        tried = [variant for each, variant in ALL if each is file]
        declared = [variant for variant in file.VARIANTS if ',' not in variant]
        assert declared == tried
    assert nf_resnet.VARIANTS[:3] == ('50', '50,dropout', '50,clipping')


def test_a_wrong_variant_is_told():
    with pytest.raises(UsageError, match=r"no NFNet 'F9' \(did you mean 'F\d"):
        nfnet.get_config('F9')
    with pytest.raises(UsageError, match="no NFNet 'nfnet_l0'"):  # timm's
        nfnet.get_config('nfnet_l0')
    with pytest.raises(UsageError, match="no NF-ResNet '20'"):  # a network for small pictures
        nf_resnet.get_config('20')
    with pytest.raises(UsageError, match=r"no setting 'cliping' \(did you mean 'clipping'"):
        nf_resnet.get_config('50,cliping')
    with pytest.raises(UsageError, match="no setting ''"):
        nf_resnet.get_config('50,')


def test_made_pictures_are_equal_everywhere_and_can_be_told_apart():
    train_source, test_source = (
        sources.open_source('noise', split, image_size=16, classes=5, examples=50)
        for split in ('train', 'test')
    )
    again = sources.open_source('noise', 'train', image_size=16, classes=5, examples=50)
    np.testing.assert_array_equal(train_source.images, again.images)
    assert np.any(train_source.images != test_source.images)
    means = np.stack([train_source.images[train_source.labels == k].mean(0) for k in range(5)])
    distances = ((test_source.images[:, None] - means) ** 2).mean((2, 3, 4))
    np.testing.assert_array_equal(distances.argmin(1), test_source.labels)
    with pytest.raises(UsageError, match='data.classes=0: must be an integer of at least 2'):
        sources.open_source('noise', 'train', classes=0)
    with pytest.raises(UsageError, match="noise has no split 'val'"):
        sources.open_source('noise', 'val')
