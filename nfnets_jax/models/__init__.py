"""Every network of the two papers, its baselines, and the table that describes them."""

from nfnets_jax import extras

with extras.optional():
    import haiku  # noqa: F401  every network is a Haiku module

from nfnets_jax.models.cost import Cost, activation_bytes, model_cost
from nfnets_jax.models.fixup_resnet import FixupResNet
from nfnets_jax.models.nf_regnet import NFRegNet
from nfnets_jax.models.nf_resnet import NFResNet
from nfnets_jax.models.nfnet import NFNet
from nfnets_jax.models.registry import build, create_model, model_options, resolved_options
from nfnets_jax.models.resnet import ResNet
from nfnets_jax.models.skipinit_resnet import SkipInitResNet
from nfnets_jax.models.small_cnn import SmallCNN
from nfnets_jax.models.variants import Variant, find_variant, list_models, variant_info

__all__ = [
    'Cost',
    'FixupResNet',
    'NFNet',
    'NFRegNet',
    'NFResNet',
    'ResNet',
    'SkipInitResNet',
    'SmallCNN',
    'Variant',
    'activation_bytes',
    'build',
    'create_model',
    'find_variant',
    'list_models',
    'model_cost',
    'model_options',
    'resolved_options',
    'variant_info',
]
