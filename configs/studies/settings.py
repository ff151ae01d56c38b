"""Shared by the studies: their sizes, from minutes on a laptop to weeks on a pod.

    digits    NF-ResNet-8 of half the width on the 8x8 digits that scikit-learn carries
    cifar10   NF-ResNet-20, ten epochs of CIFAR-10, from TensorFlow Datasets (docs/data.md)
    imagenet  NF-ResNet-50 on ImageNet, as in configs/imagenet

    cifar10_small  NF-ResNet-8 of half the width, three epochs of a fifth of CIFAR-10: small
                   enough for one core of a CPU

(and caltech101, which needs a folder, in the two studies that the report did on it, and
caltech101_small, which needs arrays of 32 x 32 pixels, in one of them.)

Tuned values, such as learning rates, are chosen on validation images: a part of the training set
where the data have none. At cifar10 they are searched with one seed first.

All sizes share a recipe: SGD with Nesterov momentum 0.9, a learning rate in proportion to the batch
(the numbers are for 256 examples) that rises for a tenth of the training and falls along a cosine,
weight decay as part of the gradient, no moving average of the parameters.
"""

from collections.abc import Mapping

from ml_collections import ConfigDict

from configs.imagenet import recipe
from experiments.config import default_config
from experiments.study.config import default_study
from nfnets_jax import models
from nfnets_jax.errors import UsageError, nearest

# The source of a claim that, as far as we know, is neither in the papers nor in the report.
OURS = 'our question'

# What claims are about, if it is not what a study trains.
NFNET_F0 = 'NFNet-F0, ImageNet, 360 epochs'
NF_RESNET_50 = 'NF-ResNet-50, ImageNet, 90 epochs'
REPORT_A = 'SmallCNN, CIFAR-10, budget of the report'
REPORT_B = 'ResNet-20, CIFAR-10, budget of the report'
REPORT_C = 'NF-ResNet-50, Caltech-101, budget of the report'

NO_CLIPPING = {'optimizer': {'clip': {'name': 'none'}}}

# The network of each size, without normalization.
_NETWORKS: dict[str, dict[str, str | float]] = {
    'digits': {'name': 'NF-ResNet-8', 'width': 0.5},
    'cifar10_small': {'name': 'NF-ResNet-8', 'width': 0.5, 'stem': 'imagenet'},
    'cifar10': {'name': 'NF-ResNet-20'},
    'caltech101_small': {'name': 'NF-ResNet-8', 'width': 0.5},
    'caltech101': {'name': 'NF-ResNet-50'},
    'imagenet': {'name': 'NF-ResNet-50'},
}
_CLASSES = {
    'digits': 10,
    'cifar10_small': 10,
    'cifar10': 10,
    'caltech101_small': 101,
    'caltech101': 101,
    'imagenet': 1000,
}
_DATA_WORDS = {
    'digits': '8x8 digits, 1154 to train on, 288 to validate and 355 to test with, shifted by up '
    'to a pixel',
    'cifar10_small': 'CIFAR-10, 9,000 images to train on, 1,000 to validate and 2,000 to test '
    'with, shifted by up to 4 pixels and mirrored',
    'cifar10': 'CIFAR-10, 45,000 images to train on, 5,000 to validate and 10,000 to test with, '
    'shifted by up to 4 pixels and mirrored',
    'caltech101_small': 'Caltech-101 at 32 pixels, 27 images of each class to train on, 3 to '
    'validate and at most 20 to test with, shifted by up to 4 pixels and mirrored',
    'caltech101': 'Caltech-101, 30 images of each class, a tenth of them to validate, random '
    'crops, mirrored',
    'imagenet': 'ImageNet, a hundredth of the training images to validate, random crops, mirrored',
}
_NETWORK_WORDS = {
    'digits': 'NF-ResNet-8 of half the width (19,957 parameters), or the ResNet-8 like it',
    'cifar10_small': 'NF-ResNet-8 of half the width with a stem that quarters the side, or the '
    'ResNet-8 like it',
    'cifar10': 'NF-ResNet-20 or ResNet-20',
    'caltech101': 'NF-ResNet-50 or ResNet-50, at 224 pixels',
    'imagenet': 'NF-ResNet-50 or ResNet-50, at 224 pixels',
}

# For studies whose networks all have batch norm or no normalization.
RESNET_WORDS = {
    'digits': 'ResNet-8 of half the width',
    'cifar10_small': 'ResNet-8 of half the width with a stem that quarters the side',
    'cifar10': 'ResNet-20',
}


def new_study(
    name: str,
    size: str,
    sizes: tuple[str, ...],
    networks: Mapping[str, str] = _NETWORK_WORDS,
) -> ConfigDict:
    """Returns a study with the data, the network and the recipe of its size.

    Args:
      name: name of the study's file.
      size: one of `sizes`.
      sizes: the sizes that the study has.
      networks: descriptions of the network at each size.

    Raises:
      UsageError: the study has no such size.
    """
    if size not in sizes:
        raise UsageError(f'{name} has no size {size!r}{nearest(size, sizes)}')
    study = default_study()
    study.name, study.size = name, size
    study.setting = f'{_DATA_WORDS[size]}; {networks[size]}'
    study.base = _BASES[size]()
    study.base.model = dict(_NETWORKS[size])
    study.chance = 1 / _CLASSES[size]
    study.search = 'coarse' if size in ('cifar10', 'imagenet') else 'full'
    return study


def arm(name: str, label: str, config: dict | None = None, **grid) -> dict:
    """Returns an arm: its changes to the study's base, and its own values on some axes."""
    return {'name': name, 'label': label, 'config': config or {}, 'grid': grid}


def chart(
    kind: str, title: str, *, x: str, y: str = 'test/top1', series: str = 'arm', **more
) -> dict:
    """Returns a chart of a study; `more`: log_x, log_y, where, x_label."""
    return {'kind': kind, 'title': title, 'x': x, 'y': y, 'series': series, 'log_x': False} | more


def claim(
    text: str, source: str, *, better: dict, worse: dict, margin=0.0, scope='', **more
) -> dict:
    """Returns a claim: the metric at `better` is greater than at `worse` by more than `margin`.

    direction='less' reverses the comparison, direction='same' makes it an equivalence to within the
    margin; metric='...' compares another metric. `scope` is the network, data and budget that the
    claim is about, such as NFNET_F0.
    """
    compare = {'better': better, 'worse': worse, 'margin': margin, 'direction': 'greater'} | more
    return {'text': text, 'source': source, 'scope': scope, 'compare': compare}


def batch_norm(study: ConfigDict) -> dict:
    """Returns the model of the batch-normalized ResNet like the study's network."""
    return _as_resnet(study) | {'cross_replica_axis': 'devices'}


def no_norm(study: ConfigDict) -> dict:
    """Returns the model of that ResNet with biases instead of normalization."""
    return _as_resnet(study) | {'norm': 'none'}


def _as_resnet(study: ConfigDict) -> dict:
    model = study.base.model.to_dict()
    return model | {'name': model['name'].removeprefix('NF-')}


def _digits() -> ConfigDict:
    config = default_config()
    config.data.image_size = 8
    config.data.on_device = True
    config.data.validation_fraction = 0.2
    config.augment.shift = 1
    config.batch_size = 64
    config.duration = '10 epochs'
    config.optimizer.learning_rate = 1.0
    config.optimizer.clip.clipping = 0.04
    return _small(config)


def _cifar10() -> ConfigDict:
    config = default_config()
    config.data = {
        'name': 'tfds',
        'dataset': 'cifar10',
        'on_device': True,
        'train_split': 'train[:90%]',
        'validation_split': 'train[90%:]',
    }
    config.augment.shift = 4
    config.augment.flip = True
    config.batch_size = 256
    config.duration = '10 epochs'
    config.optimizer.learning_rate = 0.4
    config.optimizer.weight_decay = 1e-4
    config.eval.batch_size = 1000
    return _small(config)


def _cifar10_small() -> ConfigDict:
    config = _cifar10()
    config.data.train_split = 'train[:18%]'
    config.data.validation_split, config.data.test_split = 'train[18%:20%]', 'test[:20%]'
    config.duration = '3 epochs'
    config.checkpoint.every = '100%'
    return config


def _small(config: ConfigDict) -> ConfigDict:
    config.optimizer.schedule.warmup = '10%'
    config.ema = 0.0
    config.log_every = '5%'
    config.eval.every = '20%'
    config.checkpoint.every = '50%'
    config.checkpoint.keep = 1
    return config


def _imagenet() -> ConfigDict:
    config = recipe.imagenet(models.variant_info('NF-ResNet-50'))
    config.data.train_split, config.data.validation_split = 'train[:99%]', 'train[99%:]'
    config.batch_size = 1024
    config.duration = '90 epochs'
    config.optimizer.weight_decay = 5e-5
    config.ema = 0.0
    return config


def _caltech101_small() -> ConfigDict:
    config = default_config()
    config.data = {'name': 'arrays', 'path': '', 'on_device': True, 'validation_fraction': 0.1}
    config.augment.shift = 4
    config.augment.flip = True
    config.batch_size = 64
    config.duration = '10 epochs'
    config.optimizer.learning_rate = 0.4
    config.optimizer.weight_decay = 1e-4
    return _small(config)


def _caltech101() -> ConfigDict:
    config = default_config()
    config.data = {
        'name': 'folder',
        'path': '',
        'image_size': 224,
        'test_image_size': 224,
        'validation_fraction': 0.1,
    }
    config.augment.flip = True
    config.batch_size = 32
    config.duration = '50 epochs'
    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = 1e-4
    return _small(config)


_BASES = {
    'digits': _digits,
    'cifar10_small': _cifar10_small,
    'cifar10': _cifar10,
    'caltech101_small': _caltech101_small,
    'caltech101': _caltech101,
    'imagenet': _imagenet,
}
