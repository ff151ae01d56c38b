"""timm's state dicts as parameters of our networks, name by name.

Three kinds are known: dm_nfnet_f0 to f6 (the authors' weights), and nf_resnet50 and nf_regnet_b0 to
b5, which timm trained. timm computes with them in networks that differ from the published ones;
what can be put into parameters is, so that the logits are timm's:

- To the variance of a weight timm adds 1e-5, where ours has a floor: the gains make up for it.
- But for dm_nfnet, timm does not scale activations; each convolution is scaled instead, by the same
  number. The convolution that sees no activation (the stem) gets it in its own gain here, and the
  classifier, which has no scaled activation before it in timm, is divided by it.
- But for dm_nfnet, there are no skip gains: ours are 1.

What cannot (symmetric padding, pooled shortcuts, channels rounded to multiples of 8) is the option
`conventions='timm'` of NF-ResNets and NF-RegNets. One difference is left: the GELU of dm_nfnet is
the exact one there and its tanh form here, as published; logits differ by 2.5e-4 of the largest.

Source: the public code of timm, models/nfnet.py.
"""

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from nfnets_jax.errors import UsageError
from nfnets_jax.layers import gains

_VARIANCE_EPS = 1e-5  # timm's, added to the variance
_FLOOR = 1e-4  # ours, of the variance times the fan-in: see layers.standardize


# What timm trains and tests a network with, where that is not as published: fields of
# `pretrained.Metadata`. Crops are timm's `crop_mode` and `crop_pct` at the test size.
_CROPS = (0.9, 0.91, 0.92, 0.94, 0.951, 0.954, 0.956)  # of dm_nfnet_f0 to f6
PREPROCESSING: dict[str, dict[str, Any]] = (
    {f'NFNet-F{level}': {'eval_mode': f'timm_squash_{crop}'} for level, crop in enumerate(_CROPS)}
    | {f'NF-RegNet-B{level}': {'eval_mode': 'timm_center_0.9'} for level in range(6)}
    | {'NF-ResNet-50': {'eval_mode': 'timm_center_0.94', 'train_size': 256, 'test_size': 288}}
)
PREPROCESSING['NF-RegNet-B0'] |= {'train_size': 192, 'test_size': 256}
PREPROCESSING['NF-RegNet-B1'] |= {'train_size': 256, 'test_size': 288}


class Converted(NamedTuple):
    """A Haiku tree, flat.

    Attributes:
      params: 'module/name' -> array.
      options: what `create_model` needs besides the name.
      added: names of the parameters that the state dict does not have.
    """

    params: dict[str, np.ndarray]
    options: dict[str, str]
    added: tuple[str, ...]


class _Family(NamedTuple):
    root: str
    block: str
    activation: str | None  # the one whose gain is in timm's convolutions; None: in activations


_NFNET = _Family('NFNet', 'nf_block', None)
_REGNET = _Family('NF_RegNet', 'nf_block', 'silu')
_RESNET = _Family('NF_ResNet', 'nf_res_block', 'relu')

_STEM = re.compile(r'stem\.conv(\d*)')
_BLOCK = re.compile(r'stages\.(\d+)\.(\d+)\.?(.*)')
_IN_BLOCK = {
    'downsample.conv': 'conv_shortcut',
    'conv1': 'conv0',
    'conv2': 'conv1',
    'conv2b': 'conv1b',
    'conv3': 'conv2',
    'attn.fc1': 'squeeze_excite/~/linear',
    'attn.fc2': 'squeeze_excite/~/linear_1',
    'attn_last.fc1': 'squeeze_excite/~/linear',
    'attn_last.fc2': 'squeeze_excite/~/linear_1',
}
_LINEAR = re.compile(r'.*linear(_1)?')


def is_timm(names) -> bool:
    """Says whether arrays of these names are a state dict of timm's."""
    return any(name.startswith('stages.0.0.') for name in names)


def convert(arrays: Mapping[str, np.ndarray]) -> Converted:
    """Converts a state dict of dm_nfnet_f*, nf_resnet50 or nf_regnet_b*.

    Raises:
      UsageError: naming the first array that none of these networks has.
    """
    if 'stem.conv1.weight' in arrays:
        family = _NFNET
        if not any(name.endswith('.skipinit_gain') for name in arrays):
            raise UsageError(
                "timm's nfnet_* without skipinit_gain are other networks: of NFNets only "
                'dm_nfnet_f0 to dm_nfnet_f6 can be read'
            )
    else:
        family = _REGNET if 'final_conv.weight' in arrays else _RESNET
    params, first_blocks = {}, _first_blocks(arrays)
    for name, array in arrays.items():
        module, _, leaf = name.rpartition('.')
        ours = _module(module, family, first_blocks)
        params |= dict([_parameter(name, ours, leaf, np.asarray(array, np.float32))])
    _adopt_variance(params)
    if family.activation is None:
        return Converted(params, {}, ())
    _adopt_scale(params, family)
    blocks = {name.partition('/~/conv')[0] for name in params if '/~/conv0/' in name}
    added = {f'{block}/skip_gain': np.ones((), np.float32) for block in sorted(blocks)}
    return Converted(params | added, {'conventions': 'timm'}, tuple(added))


def _first_blocks(names) -> dict[int, int]:
    """Returns for each stage how many blocks there are before it."""
    depths: dict[int, int] = {}
    for match in filter(None, map(_BLOCK.fullmatch, names)):
        stage, block = int(match[1]), int(match[2])
        depths[stage] = max(depths.get(stage, 0), block + 1)
    stages = sorted(depths)
    before = itertools.accumulate((depths[stage] for stage in stages), initial=0)
    return dict(zip(stages, before, strict=False))


def _module(module: str, family: _Family, first_blocks: dict[int, int]) -> str | None:
    """Returns what the module is called in our tree; None if there is none."""
    if match := _STEM.fullmatch(module):
        own = f'stem_conv{int(match[1]) - 1}' if match[1] else 'initial_conv'
    elif match := _BLOCK.fullmatch(module):
        index = first_blocks[int(match[1])] + int(match[2])
        own = family.block + (f'_{index}' if index else '')
        if match[3]:
            if match[3] not in _IN_BLOCK:
                return None
            own += f'/~/{_IN_BLOCK[match[3]]}'
    elif module in ('final_conv', 'head.fc'):
        own = {'final_conv': 'final_conv', 'head.fc': 'linear'}[module]
    else:
        return None
    return f'{family.root}/~/{own}'


def _parameter(name: str, module: str | None, leaf: str, x: np.ndarray) -> tuple[str, np.ndarray]:
    """Returns our name and layout: HWIO for OIHW, IO for OI and for OI11."""
    is_linear = module is not None and _LINEAR.fullmatch(module) is not None
    match leaf, x.ndim:
        case 'weight', 4 if module and not is_linear:
            return f'{module}/w', x.transpose(2, 3, 1, 0)
        case 'weight', 2 | 4 if is_linear and x.size == math.prod(x.shape[:2]):
            return f'{module}/w', x.reshape(x.shape[:2]).T
        case 'bias', 1 if module:
            return f'{module}/{"b" if is_linear else "bias"}', x
        case 'gain', 4 if module and not is_linear:
            return f'{module}/gain', x.reshape(-1)
        case 'skipinit_gain', 0 if module:
            return f'{module}/skip_gain', x
    raise UsageError(
        f'{name} {list(x.shape)}: dm_nfnet_f*, nf_resnet50 and nf_regnet_b* of timm have no such '
        'array'
    )


def _adopt_variance(params: dict[str, np.ndarray]) -> None:
    """Makes `layers.standardize` return what timm's convolutions standardise their weights to."""
    for name in [name for name in params if name.endswith('/gain')]:
        weight = params[name.removesuffix('gain') + 'w']
        fan_in = weight.size // weight.shape[-1]
        variance = weight.reshape(fan_in, -1).var(0)
        ours = np.sqrt(np.maximum(variance * fan_in, _FLOOR))
        theirs = np.sqrt((variance + _VARIANCE_EPS) * fan_in)
        params[name] = params[name] * (ours / theirs)


def _adopt_scale(params: dict[str, np.ndarray], family: _Family) -> None:
    """Moves the scale of the activations from where timm has it to where ours is."""
    scale = np.float32(gains[family.activation])
    stem, head = f'{family.root}/~/initial_conv/gain', f'{family.root}/~/linear/w'
    params[stem] = params[stem] * scale
    params[head] = params[head] / scale
