"""Reads, recognizes, writes and fits weights: published ones and those of this project.

weights = nfnets_jax.load_pretrained('F0_haiku.npz')
params, state, report = pretrained.fit_weights(weights, params, state)
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nfnets_jax import augment, extras, files, models
from nfnets_jax.data import imagenet
from nfnets_jax.errors import UsageError, first_line, nearest
from nfnets_jax.image_size import ImageSize, is_size
from nfnets_jax.image_size import describe as describe_size
from nfnets_jax.pixel_format import PixelFormat, is_range
from nfnets_jax.weights import convert_timm, downloads, weight_files

with extras.optional():
    import haiku as hk


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metadata:
    """Everything needed to use weights; fields are None where unknown.

    Attributes:
      model: name in `list_models()`.
      options: options of `create_model`, without the name and the number of classes.
      num_classes: size of the logits; 0 for a network of features.
      class_names: names of the classes in the order of the logits; empty if unknown.
      multi_label: whether an image may have several of the classes: their probabilities are the
        sigmoids of the logits, not the softmax.
      train_size, test_size: side of the images in pixels, or height and width.
      eval_mode: how an image becomes `test_size` pixels, a mode of `make_transform`; by default
        that of the model's authors, `Variant.eval_mode`.
      mean, std: normalization, one value per channel on a scale of 0..255.
      value_range: see `PixelFormat`.
    """

    model: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    num_classes: int | None = None
    class_names: tuple[str, ...] = ()
    multi_label: bool = False
    train_size: ImageSize | None = None
    test_size: ImageSize | None = None
    eval_mode: str = ''
    mean: tuple[float, ...] = augment.IMAGENET_MEAN
    std: tuple[float, ...] = augment.IMAGENET_STD
    value_range: tuple[float, float] | None = None

    def __post_init__(self):
        variant = models.find_variant(self.model)
        own = {'model': variant.name} if variant else {}  # What an alias stands for.
        if not self.eval_mode:
            own['eval_mode'] = variant.eval_mode if variant else 'crop_resize'
        for name, value in own.items():
            object.__setattr__(self, name, value)  # As the dataclass is frozen.

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.options.get('channels') or 3

    @property
    def class_labels(self) -> tuple[str, ...]:
        """Names of the classes; their numbers where no names are known."""
        return self.class_names or tuple(map(str, range(self.num_classes or 0)))

    @property
    def pixels(self) -> PixelFormat:
        """What the pixels of an image become."""
        return PixelFormat(self.channels, self.value_range)


class Weights(NamedTuple):
    """Parameters and state as Haiku trees of float32 numpy arrays, with their metadata."""

    params: hk.Params
    state: hk.State
    metadata: Metadata


class Report(NamedTuple):
    """Result of `fit_weights`: the name ('module/name') of every parameter in exactly one field."""

    matched: tuple[str, ...]  # taken from the weights
    new_head: tuple[str, ...]  # of the classifier, left as they were
    unused_head: tuple[str, ...]  # of the weights' classifier, where the model has none
    missing: tuple[str, ...]  # the weights do not have them; left as they were
    unexpected: tuple[str, ...]  # the model does not have them; not used
    wrong_shape: tuple[str, ...]  # left as they were

    @property
    def fits(self) -> bool:
        """Whether all weights were used and all parameters set, not counting the classifier."""
        return not (self.missing or self.unexpected or self.wrong_shape)

    def __str__(self) -> str:
        """Returns one line: the count of each kind, and the first name of those that do not fit."""
        parts = [f'{len(self.matched)} parameters matched']
        for name in self._fields[1:]:
            if found := getattr(self, name):
                example = '' if name.endswith('head') else f', like {found[0]}'
                parts.append(f'{len(found)} {name.replace("_", " ")}{example}')
        return '; '.join(parts)


def load_pretrained(
    path: str | os.PathLike,
    model: str | None = None,
    *,
    checkpoint: str | int = 'latest',
    ema: bool = True,
) -> Weights:
    """Reads weights of any supported kind. Executes nothing in the file.

    The kinds, detected from the content: the authors' released pickles of {module: {name: array}}
    (F0_haiku.npz), plain .npz with 'module/name' keys, .safetensors written by `save_weights`,
    timm's state dicts (.safetensors, .pth) of its NFNets, NF-ResNets and NF-RegNets, and the
    directory of a training run.

    Args:
      path: a file, the workdir of a run, or a name in `list_pretrained()`, which is downloaded.
      model: name in `list_models()`; fail unless the weights are of this model.
      checkpoint: for a run: 'latest', 'best' or a step.
      ema: for a run: use the moving average of the parameters, if there is one.

    Returns:
      Weights; `metadata.model` is None if no known model has these parameters.

    Raises:
      UsageError: the weights cannot be read; the message names the file and the reason.
    """
    if model is not None:
        model = models.variant_info(model).name
    asked, path = path, downloads.locate(files.expand(path))
    if os.path.isdir(path):
        weights = _load_run(pathlib.Path(path), str(checkpoint), ema)
    else:
        ahead = _read_ahead.pop(_file_key(path), None)
        weights = ahead or _load_file(path)
        weights = weights._replace(metadata=_name_classes(weights.metadata, asked))
    if model not in (None, weights.metadata.model):
        found = weights.metadata.model
        problem = f'are those of {found}' if found else _misfit(weights, model)
        raise UsageError(f'{path} does not hold weights of {model}: they {problem}')
    return weights


def load_metadata(path: str | os.PathLike, model: str | None = None) -> Metadata:
    """Returns the metadata of what `load_pretrained` reads. Uses no device.

    The directory of a run and .safetensors of `save_weights` say it themselves, and no array is
    read. Where the model must be recognized from the parameters, the file is read whole, and the
    next `load_pretrained` of it takes what was read.

    Args:
      path: a file, the workdir of a run, or a name in `list_pretrained()`, which is downloaded.
      model: name in `list_models()`; fails unless the weights are of this model.

    Raises:
      UsageError: naming the file and what is wrong with it.
    """
    asked, path = path, downloads.locate(files.expand(path))
    if os.path.isdir(path):
        metadata = _run_metadata(pathlib.Path(path))
    elif _METADATA_KEY in (text := weight_files.read_header(path)):
        metadata = decode_metadata(text[_METADATA_KEY], path)
    else:
        weights = load_pretrained(path, model)
        _read_ahead.clear()
        _read_ahead[_file_key(path)] = weights
        return _name_classes(weights.metadata, asked)
    model = model if model is None else models.variant_info(model).name
    if model not in (None, metadata.model):
        raise UsageError(
            f'{path} does not hold weights of {model}: they are those of {metadata.model}'
        )
    return metadata


def _name_classes(metadata: Metadata, asked: str | os.PathLike) -> Metadata:
    """Names the classes of weights that were asked for by a published name: ImageNet's."""
    known = bool(metadata.class_names) or os.path.exists(asked) or downloads.find(asked) is None
    names = () if known else imagenet.class_names()
    if len(names) != metadata.num_classes:
        return metadata
    return dataclasses.replace(metadata, class_names=names)


# Weights that `load_metadata` had to read, until they are asked for: at most one file's.
_read_ahead: dict[tuple | None, Weights] = {}


def _file_key(path: str | os.PathLike) -> tuple | None:
    """Identifies a file and its content, as far as that is known without reading it."""
    try:
        stat = os.stat(path)
    except OSError:
        return None  # Reading it says why.
    return os.path.realpath(path), stat.st_mtime_ns, stat.st_size


def save_weights(path: str | os.PathLike, weights: Weights) -> None:
    """Writes .safetensors that `load_pretrained` reads: 'params/...' and 'state/...', metadata.

    Raises:
      UsageError: it cannot be written.
    """
    arrays = _named(weights.params, weights.state)
    weight_files.write_safetensors(path, arrays, {_METADATA_KEY: encode_metadata(weights.metadata)})


def fit_weights(
    weights: Weights, params: hk.Params, state: hk.State, *, new_head: bool = False
) -> tuple[hk.Params, hk.State, Report]:
    """Returns a model's parameters and state with the weights put in, name by name.

    Args:
      weights: from `load_pretrained`.
      params, state: initial parameters and state of the model.
      new_head: keep the initial classifier even if that of the weights fits. If the number of
        classes differs, it is always kept.

    Returns:
      (params, state, report). A misfit raises no error: see `Report.fits`.
    """
    head, old_head = _head(params), _head(weights.params)
    target, source = _named(params, state), _named(weights.params, weights.state)
    found: dict[str, list[str]] = {kind: [] for kind in Report._fields}
    for name, leaf in target.items():
        bare = name.partition('/')[2]
        in_head = bare.rpartition('/')[0] == head
        if name not in source:
            kind = 'missing'
        elif np.shape(source[name]) == np.shape(leaf) and not (in_head and new_head):
            kind = 'matched'
            target[name] = np.asarray(source[name], leaf.dtype)
        else:
            kind = 'new_head' if in_head else 'wrong_shape'
        found[kind].append(bare)
    for name in source:
        if name in target:
            continue
        bare = name.partition('/')[2]
        is_of_old_head = head is None and bare.rpartition('/')[0] == old_head
        found['unused_head' if is_of_old_head else 'unexpected'].append(bare)
    report = Report(**{kind: tuple(names) for kind, names in found.items()})
    return *_split(target), report


def describe(weights: Weights) -> str:
    """Returns a line like 'NF-ResNet-8, 78,045 parameters, 10 classes, 16 px (crop_resize)'."""
    metadata = weights.metadata
    parameters = sum(leaf.size for module in weights.params.values() for leaf in module.values())
    several = ' (multi-label)' if metadata.multi_label else ''
    size = metadata.test_size and describe_size(metadata.test_size)
    return (
        f'{metadata.model}, {parameters:,} parameters, {metadata.num_classes} classes{several}, '
        f'{size} px ({metadata.eval_mode})'
    )


class Pretrained(NamedTuple):
    """A network with its weights: `network.apply(params, state, None, images, False)`."""

    network: hk.TransformedWithState
    params: hk.Params
    state: hk.State
    metadata: Metadata


def from_pretrained(
    path: str | os.PathLike,
    name: str | None = None,
    *,
    num_classes: int | None = None,
    channels: int | None = None,
) -> Pretrained:
    """Returns the network of some weights with these weights, optionally for other classes.

    Args:
      path: any path that `load_pretrained` accepts.
      name: name of the model; fail unless the weights are of this model.
      num_classes: classes of a new classifier, with initial weights drawn from key 0; 0 for a
        network of features, without a classifier; None keeps the classifier of the weights.
      channels: channels of the images; if the weights have others, see `fit_stem`.

    Raises:
      UsageError: as `load_pretrained` and `create_model`, or the model is not known.
    """
    weights = load_pretrained(path, name)
    if channels is not None:
        weights = fit_stem(weights, channels)
    metadata = weights.metadata
    if num_classes is not None and num_classes != metadata.num_classes:
        metadata = dataclasses.replace(metadata, num_classes=num_classes, class_names=())
    made = network(metadata)
    params, state = variable_shapes(metadata)
    if metadata.num_classes and (head := _head(params)):
        # XLA removes everything else from the program.
        drawn = jax.jit(lambda: _init(metadata)[0][head])()
        params = {**params, head: jax.tree.map(np.asarray, drawn)}
    params, state, report = fit_weights(weights, params, state)
    if not report.fits:
        raise UsageError(f'{path} does not fit {metadata.model}: {report}')
    return Pretrained(made, params, state, metadata)


def fit_stem(weights: Weights, channels: int) -> Weights:
    """Returns weights for images of another number of channels than three.

    For one channel the weight of the first convolution is summed over the three channels. For N
    channels it is repeated in order and scaled by 3 / N. This is timm's rule. It preserves the
    output of the convolution for images with equal channels (N a multiple of 3, or 1), up to a
    scale for each output channel if its weight is standardized. One channel gets the average of
    the normalization; N channels repeat the three.

    Raises:
      UsageError: the weights are for other than three channels, or no first convolution is known.
    """
    stem = next(filter(_STEM.fullmatch, weights.params), None)
    w = np.asarray(weights.params[stem]['w'] if stem else ())
    if stem is None or w.ndim != 4 or w.shape[2] not in (3, channels):
        found = f'{w.shape[2]} channels' if w.ndim == 4 else 'no known stem'
        raise UsageError(
            f'channels={channels}: must be 3 or fitted from 3, the weights have {found}'
        )
    if channels < 1:
        raise UsageError(f'channels={channels}: must be a positive integer')
    if channels == w.shape[2]:
        return weights
    if channels == 1:
        w = w.sum(2, keepdims=True)
    else:
        w = w[:, :, [i % 3 for i in range(channels)]] * np.float32(3 / channels)
    params = {**weights.params, stem: {**weights.params[stem], 'w': w}}
    return weights._replace(
        params=params,  # type: ignore[arg-type]  # the arrays of a file are NumPy's
        metadata=with_channels(weights.metadata, channels),
    )


def with_channels(metadata: Metadata, channels: int) -> Metadata:
    """Returns the metadata of weights after `fit_stem`."""
    if channels == metadata.channels:
        return metadata
    mean, std = (augment.of_channels(v, channels) for v in (metadata.mean, metadata.std))
    options = {**metadata.options, 'channels': channels}
    return dataclasses.replace(metadata, options=options, mean=mean, std=std)


def network(metadata: Metadata) -> hk.TransformedWithState:
    """Returns the model that weights are for: apply(params, state, key, images, is_training).

    Raises:
      UsageError: the metadata do not say which.
    """
    if metadata.model is None:
        raise UsageError('the weights do not say which model they are of: give its name')

    return models.build(
        metadata.model,
        metadata.num_classes,  # type: ignore[arg-type]  # for None, build raises a UsageError
        **metadata.options,
    )


def variable_shapes(metadata: Metadata) -> tuple[hk.Params, hk.State]:
    """Returns the shapes and dtypes of a model's parameters and state."""
    return jax.eval_shape(lambda: _init(metadata))


def _init(metadata: Metadata) -> tuple[hk.Params, hk.State]:
    images = jnp.zeros((1, 32, 32, metadata.channels))
    return network(metadata).init(jax.random.key(0), images, True)


def flatten(tree: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """{'module': {'name': leaf}} -> {'module/name': leaf}, as weights are named in files."""
    return {
        f'{module}/{name}': leaf for module, leaves in tree.items() for name, leaf in leaves.items()
    }


def unflatten(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{'module/name': leaf} -> {'module': {'name': leaf}}."""
    tree: dict[str, dict[str, Any]] = {}
    for path, leaf in leaves.items():
        module, _, name = path.rpartition('/')
        tree.setdefault(module, {})[name] = leaf
    return tree


def encode_metadata(metadata: Metadata) -> str:
    """Returns JSON, as .safetensors files and the directories of runs (model.json) hold it."""
    return json.dumps(dataclasses.asdict(metadata))


def decode_metadata(text: str, path: str | os.PathLike) -> Metadata:
    """Reads what `encode_metadata` wrote.

    Raises:
      UsageError: naming `path` and the field that is wrong.
    """
    try:
        values = json.loads(text)
        known = {field.name for field in dataclasses.fields(Metadata)}
        if unknown := sorted(values.keys() - known):
            raise UsageError(f'{path}: unknown metadata {unknown[0]!r}{nearest(unknown[0], known)}')
        values |= {
            key: tuple(values[key]) for key in ('class_names', 'mean', 'std') if key in values
        }
        values |= {
            key: tuple(values[key])
            for key in ('train_size', 'test_size', 'value_range')
            if isinstance(values.get(key), list)
        }
        metadata = Metadata(**values)
    except UsageError:
        raise
    except (AttributeError, TypeError, RecursionError, ValueError) as error:
        raise UsageError(f'{path}: its metadata cannot be read: {error}') from error
    for name, holds in _METADATA_RULES.items():
        value = getattr(metadata, name)
        if not holds(value):
            raise UsageError(f'{path}: its metadata cannot be read: {name} is {value!r:.80}')
    for name in ('mean', 'std'):
        if len(value := getattr(metadata, name)) != metadata.channels:
            raise UsageError(
                f'{path}: its metadata cannot be read: {name} is {value!r:.80}, for '
                f'{metadata.channels!r:.80} channels'
            )
    if len(metadata.class_names) not in (0, metadata.num_classes):
        raise UsageError(
            f'{path}: its metadata cannot be read: they name {len(metadata.class_names)} '
            f'of {metadata.num_classes} classes'
        )
    return metadata


def _is_per_channel(value: Any) -> bool:
    return len(value) > 0 and all(type(v) in (int, float) and abs(v) < 1e6 for v in value)


# Rules for untrusted metadata. The rest of the code relies on them.
_METADATA_RULES: dict[str, Callable[[Any], bool]] = {
    'model': lambda value: value is None or isinstance(value, str),
    'options': lambda value: (
        isinstance(value, dict) and not value.keys() & {'name', 'num_classes', 'variant'}
    ),
    'num_classes': lambda value: value is None or (type(value) is int and value >= 0),
    'train_size': lambda value: value is None or is_size(value),
    'test_size': lambda value: value is None or is_size(value),
    'class_names': lambda value: all(isinstance(name, str) for name in value),
    'multi_label': lambda value: isinstance(value, bool),
    'eval_mode': lambda value: isinstance(value, str),
    'mean': _is_per_channel,
    'std': lambda value: _is_per_channel(value) and min(value) > 0,
    'value_range': lambda value: value is None or is_range(value),
}


def _load_file(path: str | os.PathLike) -> Weights:
    arrays, text = weight_files.read(path)
    if not arrays:
        raise UsageError(f'{path} holds no arrays')
    for name, array in arrays.items():
        # Kind V is what NumPy makes of the bfloat16 of ml_dtypes; in an .npz it loses its name.
        if array.dtype.kind not in 'fiubV' or array.dtype.type is np.void:
            raise UsageError(f'{path} cannot be read: {name} holds {array.dtype}, not numbers')
    is_timm = convert_timm.is_timm(arrays)
    is_timms_form = is_timm and not convert_timm.is_of_published_form(arrays)
    if is_timm:
        try:
            arrays = convert_timm.convert(arrays)
        except UsageError as error:
            raise UsageError(f'{path}: {error}') from error
        except (KeyError, ValueError, ZeroDivisionError) as error:
            raise UsageError(f"{path}: timm's state dict is not whole: {error}") from error
    params, state = _split(_normalize(arrays))
    if _METADATA_KEY not in text:
        metadata = _recognize(params, is_timms_form)
        if is_timm and metadata.model is None:
            raise UsageError(
                f"{path}: timm's state dict is not whole, or of a network that is not known here"
            )
        if is_timm and metadata.model in convert_timm.EVAL_MODES:
            mode = convert_timm.EVAL_MODES[metadata.model]
            metadata = dataclasses.replace(metadata, eval_mode=mode)
        return Weights(params, state, metadata)
    weights = Weights(params, state, decode_metadata(text[_METADATA_KEY], path))
    if weights.metadata.model is not None:
        try:
            report = _report(weights)
        except Exception as error:  # Untrusted options can make a model raise nearly anything.
            raise UsageError(
                f'{path}: its metadata describe no model: {first_line(error)}'
            ) from error
        if report.new_head or not report.fits:
            raise UsageError(f'{path} does not fit {weights.metadata.model}: {report}')
    return weights


def _load_run(directory: pathlib.Path, checkpoint: str, ema: bool) -> Weights:
    from nfnets_jax.weights.checkpoints import CheckpointReader, DamagedCheckpointError  # Orbax

    metadata = _run_metadata(directory)
    checkpoints = CheckpointReader(directory / 'checkpoints')
    step = checkpoints.choose(checkpoint)
    try:
        tree = checkpoints.restore(step)
    except DamagedCheckpointError as error:
        raise UsageError(f'checkpoint {step} of {directory} is damaged: {error}') from error
    prefix = 'ema_' if ema and tree['ema_params'] else ''
    params, state = tree[f'{prefix}params'], tree[f'{prefix}state']
    return Weights(params, state, metadata)


def _run_metadata(directory: pathlib.Path) -> Metadata:
    path = directory / 'model.json'
    try:
        return decode_metadata(path.read_text(encoding='utf-8'), path)
    except OSError as error:
        raise UsageError(f'{directory} holds no run: there is no {path}') from error
    except UnicodeDecodeError as error:
        raise UsageError(f'{path}: its metadata cannot be read: {error}') from error


_METADATA_KEY = 'nfnets_jax'
# First convolutions, of all families.
_STEM = re.compile(r'[^/]+/~/(stem_conv0|initial_conv|conv0)')
# Modules whose leaves are state, in files that do not say: batch norm's running statistics.
_STATE_MODULE = re.compile(r'.*/(mean|var)_ema')


def _normalize(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arrays of a file as 'params/...' and 'state/...'; floats become float32."""
    normalized = {}
    for name, array in arrays.items():
        if name.partition('/')[0] not in ('params', 'state'):
            module = name.rpartition('/')[0]
            name = f'{"state" if _STATE_MODULE.fullmatch(module) else "params"}/{name}'
        normalized[name] = array if array.dtype.kind in 'iu' else array.astype(np.float32)
    return normalized


def _split(named: Mapping[str, Any]) -> tuple[hk.Params, hk.State]:
    """The inverse of `_named`."""
    trees: dict[str, dict[str, Any]] = {'params': {}, 'state': {}}
    for path, leaf in named.items():
        kind, _, name = path.partition('/')
        trees[kind][name] = leaf
    return unflatten(trees['params']), unflatten(trees['state'])


def _named(params: hk.Params, state: hk.State) -> dict[str, Any]:
    """Returns all leaves by name: 'params/module/name', 'state/module/name'."""
    return {f'params/{name}': leaf for name, leaf in flatten(params).items()} | {
        f'state/{name}': leaf for name, leaf in flatten(state).items()
    }


def _head(params: hk.Params) -> str | None:
    """Returns the classifier's module: the last linear layer directly under the model."""
    linears = [
        (int(match[1] or 0), module)
        for module in params
        if (match := re.fullmatch(r'[^/]+/~/linear(?:_(\d+))?', module))
    ]
    return max(linears)[1] if linears else None


def _report(weights: Weights) -> Report:
    return fit_weights(weights, *variable_shapes(weights.metadata))[2]


def _misfit(weights: Weights, model: str) -> str:
    """Returns how the weights of an unknown model differ from a known one, for a message."""
    num_classes = _num_classes(weights.params) or 1
    metadata = Metadata(model=model, num_classes=num_classes)
    return f'do not fit it: {_report(weights._replace(metadata=metadata))}'


def _num_classes(params: hk.Params) -> int | None:
    head = _head(params)
    weight = params[head].get('w') if head else None
    return weight.shape[-1] or None if weight is not None and np.ndim(weight) == 2 else None


def _recognize(params: hk.Params, is_timms_form: bool) -> Metadata:
    """Returns the metadata of the model whose parameters these are, by their names and shapes.

    Args:
      params: of a model, whole.
      is_timms_form: whether it is one of timm's own networks.
    """
    num_classes = _num_classes(params) if _head(params) else 0
    if not params or num_classes is None:
        return Metadata()
    has_se = any('squeeze_excite' in module for module in params)
    blocks = {m[0] for m in map(re.compile(r'[^/]+/~/\w*block\w*').match, params) if m}
    root = next(iter(params)).partition('/')[0].replace('_', '-').lower()
    for name in models.list_models():
        variant = models.variant_info(name)
        if variant.family.lower() != root or sum(variant.depths) != len(blocks):
            continue
        if bool(variant.base) != is_timms_form:
            continue
        takes_se = not variant.base and 'use_se' in models.model_options(name)
        metadata = Metadata(
            model=name,
            options={'use_se': True} if has_se and takes_se else {},
            num_classes=num_classes,
            train_size=variant.train_size,
            test_size=variant.test_size,
            mean=variant.mean or augment.IMAGENET_MEAN,
            std=variant.std or augment.IMAGENET_STD,
        )
        # Files of parameters alone are common: batch norm's statistics may be missing.
        shapes, _ = variable_shapes(metadata)
        if fit_weights(Weights(params, {}, metadata), shapes, {})[2].fits:
            return metadata
    return Metadata(num_classes=num_classes)
