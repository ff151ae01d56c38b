"""From a model's name to the Haiku module."""

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import jax

from nfnets_jax.errors import UsageError, nearest
from nfnets_jax.models import options
from nfnets_jax.models.fixup_resnet import FixupResNet
from nfnets_jax.models.nf_regnet import NFRegNet
from nfnets_jax.models.nf_resnet import NFResNet
from nfnets_jax.models.nfnet import NFNet
from nfnets_jax.models.resnet import ResNet
from nfnets_jax.models.skipinit_resnet import SkipInitResNet
from nfnets_jax.models.small_cnn import SmallCNN
from nfnets_jax.models.variants import variant_info


class Network(Protocol):
    """What `create_model` returns."""

    def __call__(self, images: jax.Array, is_training: bool, **kwargs: Any) -> dict[str, Any]: ...


FAMILIES: dict[str, Callable[..., Any]] = {
    'NFNet': NFNet,
    'NF-RegNet': NFRegNet,
    'NF-ResNet': NFResNet,
    'ResNet': ResNet,
    'SkipInit-ResNet': SkipInitResNet,
    'Fixup-ResNet': FixupResNet,
    'SmallCNN': SmallCNN,
}


def create_model(name: str, num_classes: int, **overrides: Any) -> Network:
    """Makes the network called `name`, inside `hk.transform_with_state`.

        network = hk.transform_with_state(
            lambda images, is_training: create_model('NFNet-F0', 10)(images, is_training)
        )

    Calling the module with images [N, H, W, 3], normalised, in the dtype to compute in (float32 or
    bfloat16), and a Python bool is_training returns a dict: 'logits' float32 [N, num_classes] and
    'pool' float32 [N, C], the features they are made of; with return_metrics=True (residual
    families) also 'signal', see layers.signal_metrics. Parameters are float32. Training with
    dropout or stochastic depth needs an rng key. Batch-normalised networks have state.

    Args:
      name: one of `list_models()`.
      num_classes: size of the logits.
      **overrides: options of the family's class, e.g. width, depths, stem, drop_rate, activation.

    Raises:
      UsageError: no such model or option, or a value no network could be built from.
    """
    row = variant_info(name)
    family = FAMILIES[row.family]
    known = model_options(name)
    for option in overrides:
        if option not in known:
            raise UsageError(f'{name}: unknown option {option!r}{nearest(option, known)}')
    options.check(row.family, **{k: v for k, v in overrides.items() if v is not None})
    if row.variant:
        overrides['variant'] = row.variant
    return family(num_classes, **overrides)


def model_options(name: str) -> list[str]:
    """Returns the names that `create_model(name, ...)` takes as overrides."""
    family = variant_info(name).family
    parameters = inspect.signature(FAMILIES[family]).parameters
    keywords = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
    named = [name for name in keywords if name != 'name']
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        named += options.overrides_of(family)
    return named
