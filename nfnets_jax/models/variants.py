"""Every published network as data: one `Variant` per name, for models, configs and evaluation.

Sizes, depths and rates come from the two papers and the authors' code. Accuracies are ImageNet
top-1 and top-5 in percent, single crop at `test_size`, from the tables of the papers or timm, as
`source` says.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from nfnets_jax.errors import UsageError, nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """Architecture of one network of a family, and how it was trained and tested.

    Attributes:
      family: name of the family, 'NFNet'.
      variant: name within the family, 'F0'; timm's name for timm's networks, 'eca_nfnet_l0'.
      base: for timm's networks, the published variant that `options` modify.
      options: options of `create_model` that differ from the defaults of the family.
      widths: output channels of each stage, before the width multiplier.
      depths: residual blocks of each stage.
      train_size: side of the training images in pixels.
      test_size: side of the test images in pixels.
      eval_mode: how the authors prepare a test image, a mode of
        `data.preprocessing.make_transform`.
      mean, std: normalisation that the authors test with, three values on a scale of 0..255; None
        for ImageNet's.
      width: default width multiplier.
      block: residual branch of the ResNets, 1x1-3x3-1x1 or 3x3-3x3.
      stem: 'imagenet' downsamples the image before the first block, 'small' keeps its size.
      drop_rate: dropout rate before the classifier.
      stochdepth_rate: stochastic-depth rate of the published recipe.
      randaugment: magnitude in the published recipe (4 layers), None without RandAugment.
      top1, top5: published ImageNet accuracies, None if unpublished.
      source: publication of the accuracies.
    """

    family: str
    variant: str
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    train_size: int
    test_size: int
    eval_mode: str = 'crop_resize'
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    width: float = 1.0
    block: Literal['bottleneck', 'basic'] = 'bottleneck'
    stem: Literal['imagenet', 'small'] = 'imagenet'
    drop_rate: float = 0.0
    stochdepth_rate: float = 0.0
    randaugment: int | None = None
    top1: float | None = None
    top5: float | None = None
    source: str | None = None
    base: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        if self.base:
            return self.variant
        return f'{self.family}-{self.variant}' if self.variant else self.family

    @property
    def channels(self) -> tuple[int, ...]:
        """Output channels of each stage, after the width multiplier."""
        return tuple(int(width * self.width) for width in self.widths)


def _nfnets():
    table = '2102.06171'
    with_sam = f'{table}, with SAM'
    rows = [  # train, test, drop, RandAugment, top-1, top-5
        (192, 256, 0.2, 5, 83.6, 96.8, table),
        (224, 320, 0.3, 10, 84.7, 97.1, table),
        (256, 352, 0.4, 10, 85.1, 97.3, table),
        (320, 416, 0.4, 15, 85.7, 97.5, table),
        (384, 512, 0.5, 15, 85.9, 97.6, table),
        (416, 544, 0.5, 15, 86.0, 97.6, table),
        (448, 576, 0.5, 15, 86.5, 97.9, with_sam),
        (480, 608, 0.5, 15, None, None, None),
    ]
    for plus, widths in (('', (256, 512, 1536, 1536)), ('+', (384, 768, 2048, 2048))):
        for level, (train, test, drop, magnitude, top1, top5, source) in enumerate(rows):
            yield Variant(
                family='NFNet',
                variant=f'F{level}{plus}',
                widths=widths,
                depths=tuple((level + 1) * depth for depth in (1, 2, 6, 3)),
                train_size=train,
                test_size=test,
                eval_mode='resize_crop_32',
                drop_rate=drop,
                stochdepth_rate=0.25,
                randaugment=magnitude,
                top1=None if plus else top1,
                top5=None if plus else top5,
                source=None if plus else source,
            )


def _nf_regnets():
    rows = [
        ((48, 104, 208, 440), (1, 3, 6, 6), 192, 224, 0.2),
        ((48, 104, 208, 440), (2, 4, 7, 7), 224, 256, 0.2),
        ((56, 112, 232, 488), (2, 4, 8, 8), 240, 272, 0.3),
        ((56, 128, 248, 528), (2, 5, 9, 9), 288, 320, 0.3),
        ((64, 144, 288, 616), (2, 6, 11, 11), 320, 384, 0.4),
        ((80, 168, 336, 704), (3, 7, 14, 14), 384, 456, 0.4),
        ((88, 184, 376, 792), (3, 8, 16, 16), 448, 528, 0.5),
        ((96, 208, 416, 880), (4, 10, 19, 19), 512, 600, 0.5),
        ((104, 232, 456, 968), (4, 11, 22, 22), 600, 672, 0.5),
    ]
    for level, (widths, depths, train, test, drop) in enumerate(rows):
        yield Variant(
            family='NF-RegNet',
            variant=f'B{level}',
            widths=widths,
            depths=depths,
            train_size=train,
            test_size=test,
            width=0.75,
            drop_rate=drop,
            stochdepth_rate=0.1,
        )


def _resnets(family: str, small: bool):
    if small:  # The CIFAR networks of arXiv 1512.03385, section 4.2: 6n + 2 layers.
        for layers in (8, 14, 20, 32, 44, 56, 110):
            yield Variant(
                family=family,
                variant=str(layers),
                widths=(16, 32, 64),
                depths=((layers - 2) // 6,) * 3,
                train_size=32,
                test_size=32,
                block='basic',
                stem='small',
            )
    for layers, depths in {
        50: (3, 4, 6, 3),
        101: (3, 4, 23, 3),
        152: (3, 8, 36, 3),
        200: (3, 24, 36, 3),
        288: (24, 24, 24, 24),
        600: (50, 50, 50, 50),
    }.items():
        yield Variant(
            family=family,
            variant=str(layers),
            widths=(64, 128, 256, 512),
            depths=depths,
            train_size=224,
            test_size=224,
            width=4.0,
        )


def _timms() -> Iterator[Variant]:
    """Yields timm's networks that the papers do not have, and timm's versions of those they have.

    Sizes, depths and options come from timm's models/nfnet.py. Accuracies come from its
    results-imagenet.csv, for the weights published under the same name, at the test size.
    """
    source = 'timm, results-imagenet.csv'
    gains = {'conventions': 'timm_gains'}
    light: dict[str, Any] = gains | {'expansion': 0.25, 'group_size': 64, 'activation': 'silu'}
    eca = {'use_eca': True}
    se: dict[str, Any] = {'se_ratio': 0.25}
    tiny = light | se | {'group_size': 8, 'final_conv_mult': 1.5, 'stem_width': 128}
    nfnets = [  # name, multiple of the depths, train, test, options, top-1, top-5
        ('nfnet_l0', 1, 224, 288, light | se | {'final_conv_mult': 1.5}, 82.766, 96.494),
        ('eca_nfnet_l0', 1, 224, 288, light | eca | {'final_conv_mult': 1.5}, 82.590, 96.486),
        ('eca_nfnet_l1', 2, 256, 320, light | eca, 84.062, 97.026),
        ('eca_nfnet_l2', 3, 320, 384, light | eca, 84.710, 97.256),
        ('eca_nfnet_l3', 4, 352, 448, light | eca, None, None),
    ]
    for name, multiple, train, test, options, top1, top5 in nfnets:
        yield Variant(
            family='NFNet',
            variant=name,
            base='F0',
            options=options,
            widths=(256, 512, 1536, 1536),
            depths=tuple(multiple * depth for depth in (1, 2, 6, 3)),
            train_size=train,
            test_size=test,
            eval_mode='timm_center_1.0',
            top1=top1,
            top5=top5,
            source=source if top1 else None,
        )
    yield Variant(
        family='NFNet',
        variant='test_nfnet',
        base='F0',
        options=tiny,
        widths=(32, 64, 96, 128),
        depths=(1, 1, 1, 1),
        train_size=160,
        test_size=160,
        eval_mode='timm_center_0.95',
        mean=(127.5, 127.5, 127.5),
        std=(127.5, 127.5, 127.5),
        top1=47.634,
        top5=72.880,
        source=source,
    )
    attentions: dict[str, dict[str, Any]] = {
        '': {},
        'se': {'use_se': True, 'se_ratio': 1 / 16},
        'eca': eca,
    }
    for attention, options in attentions.items():
        for layers, depths in {26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}.items():
            is_trained = (attention, layers) == ('', 50)
            yield Variant(
                family='NF-ResNet',
                variant=f'nf_{attention}resnet{layers}',
                base='50',
                options=gains | options,
                widths=(64, 128, 256, 512),
                depths=depths,
                train_size=256 if is_trained else 224,
                test_size=288 if is_trained else 224,
                eval_mode='timm_center_0.94' if is_trained else 'timm_center_0.9',
                width=4.0,
                top1=80.658 if is_trained else None,
                top5=95.350 if is_trained else None,
                source=source if is_trained else None,
            )
    sizes = {0: (192, 256), 1: (256, 288)}  # All others use the published sizes.
    for published in list(_nf_regnets())[:6]:
        level = int(published.variant[1:])
        train, test = sizes.get(level, (published.train_size, published.test_size))
        yield dataclasses.replace(
            published,
            variant=f'nf_regnet_b{level}',
            base=published.variant,
            options=gains | {'fc_init': 0.01},
            train_size=train,
            test_size=test,
            eval_mode='timm_center_0.9',
            drop_rate=0.0,
            stochdepth_rate=0.0,
            top1=79.368 if level == 1 else None,
            top5=94.726 if level == 1 else None,
            source=source if level == 1 else None,
        )


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        *_nfnets(),
        *_nf_regnets(),
        *_resnets('NF-ResNet', small=True),
        *_resnets('ResNet', small=True),
        *_resnets('SkipInit-ResNet', small=True),
        *_resnets('Fixup-ResNet', small=True),
        Variant(family='SmallCNN', variant='', widths=(), depths=(), train_size=32, test_size=32),
        *_timms(),
    )
}

# Aliases of networks above: timm's names for networks that compute the same as the authors'.
ALIASES: dict[str, str] = {f'dm_nfnet_f{level}': f'NFNet-F{level}' for level in range(7)}


def list_models() -> list[str]:
    """Returns the names that `create_model` and `variant_info` accept, grouped by family.

    Both also accept timm's dm_nfnet_f0 to f6, as aliases of NFNet-F0 to F6.
    """
    return list(VARIANTS)


def variant_info(name: str) -> Variant:
    """Returns the data of a model, as in `variant_info('NFNet-F0').train_size`.

    Accepts timm's names too ('dm_nfnet_f0'); the result has the name of this package.

    Raises:
      UsageError: no model has that name.
    """
    if (variant := find_variant(name)) is None:
        raise UsageError(f'model: unknown {name!r}{nearest(name, VARIANTS, ALIASES)}')
    return variant


def find_variant(name: Any) -> Variant | None:
    """Returns the data of the model with this name or alias, or None if there is none."""
    return VARIANTS.get(ALIASES.get(name, name)) if isinstance(name, str) else None
