"""Normalizer-Free networks, adaptive gradient clipping and SAM for JAX.

Names are imported on first use, so that `import nfnets_jax.agc` needs only jax and optax.
`adaptive_grad_clip`, `sam_value_and_grad` and their helpers need no more than that; the networks
and their weights need `pip install 'nfnets_jax[models]'`.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # For readers of types; `__getattr__` does the same when a name is used.
    from nfnets_jax.agc import adaptive_grad_clip, describe_clipping, unit_axes
    from nfnets_jax.models import (
        FixupResNet,
        NFNet,
        NFRegNet,
        NFResNet,
        ResNet,
        SkipInitResNet,
        build,
        create_model,
        list_models,
    )
    from nfnets_jax.sam import sam_value_and_grad
    from nfnets_jax.weights.downloads import list_pretrained
    from nfnets_jax.weights.pretrained import from_pretrained, load_pretrained

__version__ = '0.2.0'

__all__ = [
    'FixupResNet',
    'NFNet',
    'NFRegNet',
    'NFResNet',
    'ResNet',
    'SkipInitResNet',
    'adaptive_grad_clip',
    'build',
    'create_model',
    'describe_clipping',
    'from_pretrained',
    'list_models',
    'list_pretrained',
    'load_pretrained',
    'sam_value_and_grad',
    'unit_axes',
]

_HOME = {
    'adaptive_grad_clip': 'agc',
    'describe_clipping': 'agc',
    'unit_axes': 'agc',
    'sam_value_and_grad': 'sam',
    'from_pretrained': 'weights.pretrained',
    'list_pretrained': 'weights.downloads',
    'load_pretrained': 'weights.pretrained',
}


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    try:
        module = importlib.import_module(f'{__name__}.{_HOME.get(name, "models")}')
    except ModuleNotFoundError as error:
        from nfnets_jax import extras

        if line := extras.how_to_install(error.name):
            return _unavailable(name, line)
        raise
    return getattr(module, name)


def _unavailable(name: str, line: str):
    """Returns what stands for a name whose packages are missing: calling it raises `line`.

    Looking at it does not, so that `help`, `dir`, tab completion and `import *` work.
    """

    def unavailable(*args, **kwargs):
        raise ModuleNotFoundError(f'{__name__}.{name}: {line}')

    unavailable.__name__ = unavailable.__qualname__ = name
    unavailable.__doc__ = f'Unavailable: {line}'
    return unavailable


def __dir__():
    return [*__all__, '__version__']
