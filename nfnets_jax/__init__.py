"""Normalizer-Free networks, adaptive gradient clipping and SAM for JAX.

Names are imported on first use, so that `import nfnets_jax.agc` needs jax and optax only.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nfnets_jax.agc import adaptive_grad_clip, describe_clipping, unit_axes
    from nfnets_jax.models import (
        FixupResNet,
        NFNet,
        NFRegNet,
        NFResNet,
        ResNet,
        SkipInitResNet,
        create_model,
        list_models,
    )
    from nfnets_jax.pretrained import load_pretrained
    from nfnets_jax.sam import sam_value_and_grad

__version__ = '0.1.0'

_HOME = {
    'adaptive_grad_clip': 'agc',
    'describe_clipping': 'agc',
    'unit_axes': 'agc',
    'sam_value_and_grad': 'sam',
    'create_model': 'models',
    'list_models': 'models',
    'NFNet': 'models',
    'NFResNet': 'models',
    'NFRegNet': 'models',
    'ResNet': 'models',
    'SkipInitResNet': 'models',
    'FixupResNet': 'models',
    'load_pretrained': 'pretrained',
}

__all__ = [*sorted(_HOME), '__version__']


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'{__name__}.{_HOME[name]}'), name)


def __dir__():
    return __all__
