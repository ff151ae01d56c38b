"""Fine-tunes a network on your own images: one directory for each class, a table, or arrays.

    python -m experiments.train --workdir=runs/mine \\
        --config=configs/finetune.py:weights=F0_haiku.npz,data=PATH_TO_FOLDERS

Arguments, separated by commas:
  data     a directory with train/CLASS/IMAGE and test/CLASS/IMAGE, or with CLASS/IMAGE, of which a
           fifth is then held out for testing; a .csv, .tsv or .parquet table with a row for each
           image (its path, its label, perhaps its split); or an .npz file of arrays. Required.
  weights  anything that `nfnets_jax.load_pretrained` reads: the authors' file, timm's,
           .safetensors, or the directory of a run. Without it the weights are random.
  model    the model's name; not needed if the weights have it.
  channels  of the images, if other than the weights': 1 for gray images and spectrograms, or the
           number of bands. The first convolution is fitted, as by `from_pretrained(channels=N)`.
  freeze   a regular expression for the names of frozen parameters, like
           freeze=.*/stem_conv./.*; freeze=body trains only the new head (batch norm still updates
           its running statistics).
  head_first  how long only the new head is trained at first, like head_first=100 or 20%.
  layer_decay  a factor like 0.75 by which the learning rate falls from block to block, from the
           head to the stem, as in timm; a deep network needs one nearer to 1.
  label_separator, label_columns
           of a table whose images have several labels: label_separator=; label_columns=has_*
  recipe   published: the papers' for fine-tuning from JFT as it is, whatever the number of images.

The recipe is the papers': 15,000 steps of 2048 images, learning rate 0.1 after 5,000 steps of
warm-up and then along a cosine, moving average 0.9999. NFNets have SAM (rho 0.05), weight decay
1e-5, dropout 0.25 and stochastic depth 0.1; ResNets have none of them. With fewer than 500,000
training images, steps, warm-up and batch are those of BiT's HyperRule (arXiv 1912.11370): below
20,000 images 500 steps, 100 of them warm-up, else 10,000 and 500; 512 images a step, or with few an
eighth of them, rounded down to a power of two. With fewer than 32 images a step the learning rate
is 0.1 x batch / 32. The run prints at the start what was chosen.
docs/fine_tuning.md has examples with their results.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments.config import adapted, default_config
from nfnets_jax import models
from nfnets_jax.data.sources import open_source, source_of
from nfnets_jax.errors import UsageError, nearest
from nfnets_jax.optimizers import PUBLISHED_GROUPS, layer_decay_groups
from nfnets_jax.weights.pretrained import Metadata, load_metadata, variable_shapes, with_channels

_TRAINING = ('freeze', 'head_first', 'layer_decay', 'recipe')
_TABLE_OPTIONS = ('label_separator', 'label_columns')
_ARGUMENTS = ('data', *_TABLE_OPTIONS, 'weights', 'model', 'channels', *_TRAINING)
# What depends on the number of images, as published.
_PUBLISHED = {
    'batch_size': 2048,
    'duration': '15000 steps',
    'optimizer.schedule.warmup': '33.3%',
    'optimizer.learning_rate': 0.1,
}
# Below so many images a step, the learning rate falls in proportion. `lr_find` on 160 to 750 images
# of three data sets suggested 0.022 and 0.085 for 16 images a step, 0.067 for 64.
_FULL_RATE_BATCH = 32
VARIANTS = (
    'data=DIRECTORY[,weights=FILE][,model=NAME][,channels=N][,freeze=PATTERN]'
    '[,head_first=DURATION][,layer_decay=FACTOR][,label_separator=TEXT]'
    '[,label_columns=PATTERN][,recipe=published]',
)


def get_config(arguments: str = ''):
    given = _parse(arguments)
    if not given.get('data'):
        raise UsageError(
            'finetune.py needs data: --config=configs/finetune.py:data=PATH_TO_FOLDERS'
        )
    weights, metadata = given.get('weights', ''), Metadata(model=given.get('model'))
    if weights:
        metadata = load_metadata(weights, metadata.model)
    if channels := given.get('channels'):
        metadata = with_channels(metadata, _count(channels))
    name = metadata.model and models.variant_info(metadata.model).name
    if name is None:
        raise UsageError('finetune.py needs model=NAME if the weights do not have it')
    published = models.variant_info(name)

    config = default_config()
    config.model = {'name': name} | {
        # Tuples, because the command line can override them.
        option: tuple(value) if isinstance(value, list) else value
        for option, value in metadata.options.items()
    }
    config.init = {'weights': weights, 'new_head': True}
    source = {'name': source_of(given['data']), 'path': given['data']} | _table_options(given)
    config.data.update(
        **source,
        image_size=metadata.train_size or published.train_size,
        test_image_size=metadata.test_size or published.test_size,
        test_mode=metadata.eval_mode,
    )
    for key in ('mean', 'std', 'value_range'):
        if getattr(metadata, key) != getattr(Metadata(), key):  # The runner's default as well.
            config.data[key] = getattr(metadata, key)
    config.augment.flip = True
    config.update_from_flattened_dict(_PUBLISHED)
    config.ema = 0.9999
    optimizer = config.optimizer
    optimizer.scale_lr_by_batch = False
    is_nfnet = published.family == 'NFNet'
    config.sam.rho = 0.05 if is_nfnet else 0.0
    optimizer.weight_decay = 1e-5 if is_nfnet else 0.0
    if 'drop_rate' in models.model_options(name):
        config.model.drop_rate = 0.25 if is_nfnet else 0.0
        config.model.stochdepth_rate = 0.1 if is_nfnet else 0.0
    pattern, head = given.get('freeze'), 'linear_2' if name == 'SmallCNN' else 'linear'
    if duration := given.get('head_first'):
        if pattern == 'body':
            raise UsageError(f'head_first={duration}: freeze=body trains only the head')
        body = [rule | {'freeze_for': duration} for rule in PUBLISHED_GROUPS[1:]]
        optimizer.groups = (*_head_rules(head), *body)
    if pattern == 'body':
        optimizer.groups = head_only(head)
    elif pattern:
        optimizer.groups = ({'match': pattern, 'freeze': True}, *optimizer.groups)
    if decay := given.get('layer_decay'):
        if pattern == 'body':
            raise UsageError(f'layer_decay={decay}: freeze=body trains only the head')
        shapes, _ = variable_shapes(dataclasses.replace(metadata, model=name, num_classes=1))
        optimizer.groups = layer_decay_groups(shapes, _factor(decay), optimizer.groups)
    if (recipe := given.get('recipe')) is None:
        _adapt(config, source)
    elif recipe != 'published':
        raise UsageError(f"recipe={recipe}: must be 'published', or left out")
    config.eval.every = config.checkpoint.every = '10%'
    config.eval.report = True
    config.log_every = '1%'
    return config


def head_only(head: str = 'linear') -> tuple[dict, ...]:
    """Returns the published parameter groups with everything but the classifier frozen."""
    return (*_head_rules(head), {'match': r'.*', 'freeze': True})


def _head_rules(head: str) -> tuple[dict, ...]:
    return (
        {'match': rf'[^/]+/~/{head}/w', 'clip': False},
        {'match': rf'[^/]+/~/{head}/b', 'decay': False},
    )


def _table_options(given: Mapping[str, str]) -> dict[str, Any]:
    """Returns the options of the table among the arguments."""
    found: dict[str, Any] = {key: given[key] for key in _TABLE_OPTIONS if key in given}
    if 'label_columns' in found:
        found['label_columns'] = (found['label_columns'],)
    return found


def _adapt(config: ConfigDict, source: Mapping[str, Any]) -> None:
    """Replaces batch, duration and warm-up by those of BiT's HyperRule if the images are few."""
    try:
        images = len(open_source(split='train', **source))
    except UsageError:
        return  # Opening the data later reports the error with the config's key.
    if images >= 500_000:
        return
    # HyperRule's schedules have 100 steps of warm-up in 500, and 500 in 10,000.
    duration, warmup = ('500 steps', '20%') if images < 20_000 else ('10000 steps', '5%')
    batch = min(512, 1 << max(images // 8, min(images, 8), 1).bit_length() - 1)
    chosen: dict[str, int | float | str] = {
        'batch_size': batch,
        'duration': duration,
        'optimizer.schedule.warmup': warmup,
    }
    why = dict.fromkeys(chosen, f'for there are {images:,} training images')
    if batch < _FULL_RATE_BATCH:
        chosen['optimizer.learning_rate'] = 0.1 * batch / _FULL_RATE_BATCH
        why['optimizer.learning_rate'] = f'in proportion to a batch below {_FULL_RATE_BATCH}'
    config.update_from_flattened_dict(chosen)
    for key, value in chosen.items():
        adapted(key, value, f'instead of {_PUBLISHED[key]}, {why[key]}')


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise UsageError(f'channels={text}: must be a positive integer')
    return int(text)


def _factor(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f'layer_decay={text}: must be a number like 0.75') from None


def _parse(arguments: str) -> dict[str, str]:
    given = {}
    for argument in filter(None, arguments.split(',')):
        key, equals, value = argument.partition('=')
        if key not in _ARGUMENTS or not equals:
            raise UsageError(
                f'finetune.py takes key=value, not {argument!r}{nearest(key, _ARGUMENTS)}'
            )
        given[key] = value
    return given
