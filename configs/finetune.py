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
  freeze   a regular expression for the names of frozen parameters, like
           freeze=.*/stem_conv./.*; freeze=body trains only the new head (batch norm still updates
           its running statistics).

The recipe is the papers' for fine-tuning from JFT: 15,000 steps of 2048 images, learning rate 0.1
after 5,000 steps of warm-up and then along a cosine, moving average 0.9999. NFNets have SAM (rho
0.05), weight decay 1e-5, dropout 0.25 and stochastic depth 0.1; ResNets have none of them. A small
data set needs less: --config.duration='500 steps' --config.batch_size=256; the warm-up stays a
third of the duration. With fewer than 2048 training images, the default batch is an eighth of them,
rounded down to a power of two, and the run prints it at the start. docs/pretrained.md has an
example with its results.
"""

import pathlib

from experiments.config import adapted, default_config
from nfnets_jax import models
from nfnets_jax.data.sources import open_source
from nfnets_jax.errors import UsageError, nearest
from nfnets_jax.optimizers import PUBLISHED_GROUPS
from nfnets_jax.weights.pretrained import Metadata, load_metadata

_BATCH_SIZE = 2048
_ARGUMENTS = ('data', 'weights', 'model', 'freeze')
VARIANTS = ('data=DIRECTORY[,weights=FILE][,model=NAME][,freeze=PATTERN]',)


def get_config(arguments: str = ''):
    given = _parse(arguments)
    if not given.get('data'):
        raise UsageError(
            'finetune.py needs data: --config=configs/finetune.py:data=PATH_TO_FOLDERS'
        )
    weights, metadata = given.get('weights', ''), Metadata(model=given.get('model'))
    if weights:
        metadata = load_metadata(weights, metadata.model)
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
    config.data.update(
        name=_source(given['data']),
        path=given['data'],
        image_size=metadata.train_size or published.train_size,
        test_image_size=metadata.test_size or published.test_size,
        test_mode=metadata.eval_mode,
    )
    for key in ('mean', 'std'):
        if getattr(metadata, key) != getattr(Metadata(), key):  # The runner's default as well.
            config.data[key] = getattr(metadata, key)
    config.augment.flip = True
    config.batch_size = _batch_size(given['data'])
    config.duration = '15000 steps'
    config.ema = 0.9999
    optimizer = config.optimizer
    optimizer.learning_rate = 0.1
    optimizer.scale_lr_by_batch = False
    optimizer.schedule.warmup = '33.3%'
    is_nfnet = published.family == 'NFNet'
    config.sam.rho = 0.05 if is_nfnet else 0.0
    optimizer.weight_decay = 1e-5 if is_nfnet else 0.0
    if 'drop_rate' in models.model_options(name):
        config.model.drop_rate = 0.25 if is_nfnet else 0.0
        config.model.stochdepth_rate = 0.1 if is_nfnet else 0.0
    if pattern := given.get('freeze'):
        if pattern == 'body':
            optimizer.groups = head_only('linear_2' if name == 'SmallCNN' else 'linear')
        else:
            optimizer.groups = ({'match': pattern, 'freeze': True}, *PUBLISHED_GROUPS)
    config.eval.every = config.checkpoint.every = '10%'
    config.eval.report = True
    config.log_every = '1%'
    return config


def head_only(head: str = 'linear') -> tuple[dict, ...]:
    """Returns the published parameter groups with everything but the classifier frozen."""
    return (
        {'match': rf'[^/]+/~/{head}/w', 'clip': False},
        {'match': rf'[^/]+/~/{head}/b', 'decay': False},
        {'match': r'.*', 'freeze': True},
    )


def _source(path: str) -> str:
    """Returns the name of the source that reads a directory or a file."""
    sources = dict.fromkeys(('.csv', '.tsv', '.parquet'), 'table') | {'.npz': 'arrays'}
    return sources.get(pathlib.PurePath(path).suffix.lower(), 'folder')


def _batch_size(path: str) -> int:
    """Returns the papers' batch size, or one that fits a small folder, which the run prints."""
    try:
        examples = len(open_source(_source(path), 'train', path=path))
    except UsageError:
        return _BATCH_SIZE  # Opening the data later reports the error with the config's key.
    if examples >= _BATCH_SIZE:
        return _BATCH_SIZE
    fitting = 1 << max(examples // 8, min(examples, 8), 1).bit_length() - 1
    why = f'instead of {_BATCH_SIZE}, for there are {examples:,} training images'
    adapted('batch_size', fitting, why)
    return fitting


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
