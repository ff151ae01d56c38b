"""Builds Haiku modules by model name."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import haiku as hk
import jax

from nfnets_jax import fields
from nfnets_jax.errors import nearest
from nfnets_jax.models import options
from nfnets_jax.models.fixup_resnet import FixupResNet
from nfnets_jax.models.nf_regnet import NFRegNet
from nfnets_jax.models.nf_resnet import NFResNet
from nfnets_jax.models.nfnet import NFNet
from nfnets_jax.models.resnet import ResNet
from nfnets_jax.models.skipinit_resnet import SkipInitResNet
from nfnets_jax.models.small_cnn import SmallCNN
from nfnets_jax.models.variants import Variant, variant_info


class Network(Protocol):
    """Type of the modules that `create_model` returns."""

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
    """Returns the network called `name`. Call it inside `hk.transform_with_state`::

        network = hk.transform_with_state(
            lambda images, is_training: create_model('NFNet-F0', 10)(images, is_training)
        )

    Calling the module with images [N, H, W, C], normalised, in the dtype to compute in (float32 or
    bfloat16), and a Python bool is_training returns a dict: 'logits' float32 [N, num_classes] and
    'pool' float32 [N, F], the features they are made of. Residual families return more on demand:
    with return_metrics=True 'signal', see layers.signal_metrics; with return_features=True
    'features', the output of every stage, see residual.run_blocks. Parameters are float32. Training
    with dropout or stochastic depth needs an rng key. Batch-normalised networks have state.

    Args:
      name: one of `list_models()`, or timm's name of one of them, such as 'dm_nfnet_f0'.
      num_classes: size of the logits; 0 for a network of features, without classifier and 'logits'.
      **overrides: options of the family's class, e.g. width, depths, stem, drop_rate, activation;
        channels=N raises an error for images without exactly N channels.

    Raises:
      UsageError: no such model or option, or no network can be built with a value.
    """
    variant = variant_info(name)
    family = FAMILIES[variant.family]
    fields.check(
        declared_options(name),
        overrides,
        hint=lambda option, known: f' of {name}{nearest(option, known)}',
    )
    return family(num_classes, **_arguments(variant, overrides))


def build(name: str, num_classes: int, **overrides: Any) -> hk.TransformedWithState:
    """Returns the network called `name` as init and apply(params, state, key, images, is_training).

    Arguments and errors are those of `create_model`. apply accepts return_metrics and
    return_features too.

    >>> import jax, jax.numpy as jnp
    >>> network = build('SmallCNN', 10)
    >>> images = jnp.zeros((1, 32, 32, 3))
    >>> params, state = network.init(jax.random.key(0), images, True)
    >>> outputs, state = network.apply(params, state, None, images, False)
    >>> outputs['logits'].shape
    (1, 10)
    """

    def forward(images: jax.Array, is_training: bool, **kwargs: Any) -> dict[str, Any]:
        return create_model(name, num_classes, **overrides)(images, is_training, **kwargs)

    return hk.transform_with_state(forward)


def _arguments(variant: Variant, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keyword arguments of the family's class that build this variant."""
    if not variant.variant:
        return dict(overrides)
    if variant.base is None:
        return {'variant': variant.variant, **overrides}
    own = {name: getattr(variant, name) for name in options.overrides_of(variant.family)}
    given = {k: v for k, v in overrides.items() if k not in own or v is not None}
    return {'variant': variant.base, **own, **variant.options, **given}


def resolved_options(name: str, **overrides: Any) -> dict[str, Any]:
    """Returns every option of a network with its value: equal if and only if the networks are.

    Tuples become lists, as in JSON. A name that stands for a variant with options ('nf_resnet50')
    and the variant with these options give the same result.

    Raises:
      UsageError: no such model.
    """
    family = variant_info(name).family
    unset = {key for key in options.overrides_of(family) if overrides.get(key) is None}
    given = {key: value for key, value in overrides.items() if key not in unset}
    resolved = {'family': family} | fields.defaults(declared_options(name)) | given
    return {key: list(v) if isinstance(v, tuple) else v for key, v in resolved.items()}


def model_options(name: str) -> list[str]:
    """Returns the names of the options that `create_model(name, ...)` accepts."""
    return list(declared_options(name))


def declared_options(name: str) -> dict[str, fields.Option]:
    """Returns the options that `create_model(name, ...)` accepts, their defaults being its own."""
    variant = variant_info(name)
    own = {key: getattr(variant, key) for key in options.overrides_of(variant.family)}
    own |= variant.options
    return {
        key: option._replace(default=own.get(key, option.default))
        for key, option in fields.options(FAMILIES[variant.family]).items()
        if key != 'num_classes'
    }
