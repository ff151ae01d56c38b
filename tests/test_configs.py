"""The published recipes: what they say, and that a tiny likeness of each runs."""

import json

import jax
import numpy as np
import pytest

from configs.imagenet import nf_regnet, nf_resnet, nfnet, resnet, sam
from experiments import config as experiment
from experiments import smoke, task
from experiments.train import train
from nfnets_jax import models
from nfnets_jax.data import sources
from nfnets_jax.errors import UsageError

FAMILIES = {nfnet: 'NFNet', sam: 'NFNet', nf_regnet: 'NF-RegNet', nf_resnet: 'NF-ResNet'} | {
    resnet: 'ResNet'
}
ROWS = [models.variant_info(name) for name in models.list_models()]
ALL = [
    (file, row.variant)
    for file, family in FAMILIES.items()
    for row in ROWS
    if row.family == family and row.stem == 'imagenet'
]
FIRST = {(nfnet, 'F0'), (sam, 'F0'), (nf_regnet, 'B0'), (nf_resnet, '50'), (resnet, '50')}
QUICK = {(nf_resnet, '50')}  # The others compile for half a minute each.


def named(file, variant):
    return f'{file.__name__.split(".")[-1]}.py:{variant}'


@pytest.mark.parametrize(('file', 'variant'), ALL, ids=[named(*each) for each in ALL])
def test_every_config_is_whole_and_of_its_network(file, variant):
    config = file.get_config(variant)
    experiment.check(config)
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
    setting = task.prepare(smoke.shrink(file.get_config(variant)))
    assert setting.total_steps == 3
    assert setting.pictures.shape == (32, 32, 3)
    clipped = [group.clip for group in setting.optimizer.groups.values()]
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
    config = sam.get_config('F3')
    tiny = smoke.shrink(config)
    for key in ('augment', 'sam', 'precision', 'ema'):
        assert tiny[key] == config[key]
    for key in ('clip', 'groups', 'weight_decay', 'momentum', 'learning_rate'):
        assert tiny.optimizer[key] == config.optimizer[key]
    assert tiny.model.depths == (1, 1)
    assert tiny.data.name == 'noise'
    assert smoke.shrink(tiny).to_dict() == tiny.to_dict()  # as when the run is resumed
    assert config.model.name == 'NFNet-F3'
    assert config.duration == '360 epochs'


def test_the_likeness_of_a_changed_recipe_is_one_that_trains():
    config = nf_resnet.get_config('50')
    config.optimizer.schedule.name = 'step'
    config.optimizer.schedule.boundaries = ('30 epochs', '60 epochs')
    late = {'match': r'.*/nf_res_block_15/.*', 'lr_scale': 0.1}
    config.optimizer.groups = (late, *config.optimizer.groups)
    config.wandb.project = 'mine'
    tiny = smoke.shrink(config)
    assert task.prepare(tiny).total_steps == 3
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


def test_nfnets_have_the_papers_recipe():
    config = nfnet.get_config('F2+')
    assert config.model.name == 'NFNet-F2+'
    assert (config.batch_size, config.duration, config.ema) == (4096, '360 epochs', 0.99999)
    assert config.optimizer.learning_rate == 0.1
    assert config.optimizer.scale_lr_by_batch
    assert config.optimizer.schedule.warmup == '5 epochs'
    assert config.optimizer.weight_decay == 2e-5
    assert (config.optimizer.clip.name, config.optimizer.clip.clipping) == ('agc', 0.01)
    augment = config.augment
    assert (augment.mixup, augment.cutmix, augment.label_smoothing) == (0.2, 1.0, 0.1)
    assert (augment.randaugment_layers, augment.randaugment_magnitude) == (4, 10)
    assert config.precision == 'bfloat16'
    assert not config.sam.rho
    assert sam.get_config('F2+').sam.to_dict() == {'rho': 0.05, 'ascent_fraction': 0.2}


def test_nf_regnets_decay_more_with_their_level():
    config = nf_regnet.get_config('B3')
    assert config.optimizer.weight_decay == pytest.approx(8e-5)
    assert config.optimizer.clip.name == 'none'
    assert (config.batch_size, config.duration) == (1024, '360 epochs')


def test_a_wrong_variant_is_told():
    with pytest.raises(UsageError, match=r"no NFNet 'F9' \(did you mean 'F\d"):
        nfnet.get_config('F9')
    with pytest.raises(UsageError, match="no NF-ResNet '20'"):  # a network for small pictures
        nf_resnet.get_config('20')


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
    with pytest.raises(UsageError, match='data.classes=0: must be positive'):
        sources.open_source('noise', 'train', classes=0)
    with pytest.raises(UsageError, match="noise has no split 'val'"):
        sources.open_source('noise', 'val')
