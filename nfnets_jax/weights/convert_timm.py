"""Converts timm's state dicts to parameters of this project's networks, name by name.

dm_nfnet_f0 to f6 hold the authors' weights and become NFNet-F0 to F6. Every other network is one of
timm's. It has timm's name here, and its parameters match one to one (`conventions='timm_gains'`).
One value changes: timm adds 1e-5 to the variance of a weight, where `layers.standardize` has a
floor. The converted gains compensate for this.

One difference remains: dm_nfnet uses the exact GELU in timm and the tanh approximation here, as
published. The logits differ by 2.5e-4 of the largest.

Source: the public code of timm, models/nfnet.py.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from nfnets_jax.errors import UsageError
from nfnets_jax.layers import get_gain

_VARIANCE_EPS = 1e-5  # timm's, added to the variance
_FLOOR = 1e-4  # ours, of the variance times the fan-in: see layers.standardize


# timm's `crop_mode` and `crop_pct` for the dm_nfnets, which differ from the authors' preprocessing.
_CROPS = (0.9, 0.91, 0.92, 0.94, 0.951, 0.954, 0.956)
EVAL_MODES = {f'NFNet-F{level}': f'timm_squash_{crop}' for level, crop in enumerate(_CROPS)}


class _Family(NamedTuple):
    root: str
    block: str


_NFNET = _Family('NFNet', 'nf_block')
_REGNET = _Family('NF_RegNet', 'nf_block')
_RESNET = _Family('NF_ResNet', 'nf_res_block')

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
    'attn_last.conv': 'efficient_channel_attention',
}
_LINEAR = re.compile(r'.*linear(_1)?')


def is_timm(names) -> bool:
    """Returns whether these names are those of a timm state dict."""
    return any(name.startswith('stages.0.0.') for name in names)


def is_of_published_form(names: Iterable[str]) -> bool:
    """Returns whether a timm state dict is that of a published dm_nfnet, not of timm's networks."""
    return any(name.endswith('.skipinit_gain') for name in names)


def convert(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns a state dict of an NFNet, NF-ResNet or NF-RegNet as {'module/name': array}.

    Raises:
      UsageError: none of these networks has an array; the message names the first one.
    """
    if 'stem.conv1.weight' in arrays:
        family = _NFNET
    else:
        family = _REGNET if 'final_conv.weight' in arrays else _RESNET
    params: dict[str, np.ndarray] = {}
    first_blocks = _first_blocks(arrays)
    for name, array in arrays.items():
        module, _, leaf = name.rpartition('.')
        ours = _module(module, family, first_blocks)
        params |= dict([_parameter(name, ours, leaf, np.asarray(array, np.float32))])
    _adopt_variance(params)
    return params


def _first_blocks(names) -> dict[int, int]:
    """Returns {stage: number of blocks before it}."""
    depths: dict[int, int] = {}
    for match in filter(None, map(_BLOCK.fullmatch, names)):
        stage, block = int(match[1]), int(match[2])
        depths[stage] = max(depths.get(stage, 0), block + 1)
    stages = sorted(depths)
    before = itertools.accumulate((depths[stage] for stage in stages), initial=0)
    return dict(zip(stages, before, strict=False))


def _module(module: str, family: _Family, first_blocks: dict[int, int]) -> str | None:
    """Returns the name of the module in this project's tree, None if it has no such module."""
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
    """Returns name and array in our layout: HWIO for OIHW, IO for OI and OI11, WIO for OIW."""
    is_linear = module is not None and _LINEAR.fullmatch(module) is not None
    match leaf, x.ndim:
        case 'weight', 4 if module and not is_linear:
            return f'{module}/w', x.transpose(2, 3, 1, 0)
        case 'weight', 2 | 4 if is_linear and x.size == math.prod(x.shape[:2]):
            return f'{module}/w', x.reshape(x.shape[:2]).T
        case 'weight', 3 if module and module.endswith('efficient_channel_attention'):
            return f'{module}/w', x.transpose(2, 1, 0)
        case 'bias', 1 if module:
            return f'{module}/{"b" if is_linear else "bias"}', x
        case 'gain', 4 if module and not is_linear:
            return f'{module}/gain', x.reshape(-1)
        case 'skipinit_gain', 0 if module:
            return f'{module}/skip_gain', x
    raise UsageError(
        f"{name} {list(x.shape)}: timm's NFNets, NF-ResNets and NF-RegNets have no such array"
    )


def _adopt_variance(params: dict[str, np.ndarray]) -> None:
    """Scales the gains so that `layers.standardize` returns the same weights as timm."""
    for name in [name for name in params if name.endswith('/gain')]:
        weight = params[name.removesuffix('gain') + 'w']
        fan_in = weight.size // weight.shape[-1]
        variance = weight.reshape(fan_in, -1).var(0)
        ours = np.sqrt(np.maximum(variance * fan_in, _FLOOR))
        theirs = np.sqrt((variance + _VARIANCE_EPS) * fan_in)
        params[name] = params[name] * (ours / theirs)


def to_skip_gains(
    params: Mapping[str, Mapping[str, Any]], activation: str
) -> dict[str, dict[str, Any]]:
    """Returns weights of `conventions='timm_gains'` for the same network with 'timm'.

    The stem and the final convolution have no activation before them, so the gain of the activation
    is multiplied into theirs. The activation before the classifier is scaled. Skip gains are 1.
    """
    moved = {module: dict(leaves) for module, leaves in params.items()}
    gain = np.float32(get_gain(activation))
    for module in params:
        root, _, name = module.partition('/~/')
        if name in ('initial_conv', 'stem_conv0', 'final_conv'):
            moved[module]['gain'] = params[module]['gain'] * gain
        elif name == 'linear':
            moved[module]['w'] = params[module]['w'] / gain
        elif name.endswith('/~/conv0'):
            block = f'{root}/~/{name.partition("/")[0]}'
            moved.setdefault(block, {})['skip_gain'] = np.ones((), np.float32)
    return moved
