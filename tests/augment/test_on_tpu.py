"""What a TPU would run of the augmentation: nothing that visits pixels one by one."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import augmentation_tpu
from experiments.run import compiled_text, device_cached
from nfnets_jax import augment

SIZE, BATCH = 32, 8
PUBLISHED = {
    'flip': True,
    'mixup': 0.2,
    'cutmix': 1.0,
    'randaugment_layers': 4,
    'randaugment_magnitude': 5.0,
}
CONFIGS = {
    'published': PUBLISHED,
    'distinct pairs': PUBLISHED | {'mix_pairs': 'distinct'},
    'autoaugment': {'autoaugment': True},
    'erasing': {'erasing': 0.5},
    'shift-crop': {'shift': 4, 'shift_fill': 'reflect'},
}


def program(name):
    """Returns a function and the shapes of its arguments."""
    step = jax.ShapeDtypeStruct((), np.int32)
    if name == 'take':
        batch = {
            'image': jax.ShapeDtypeStruct((1, 64, SIZE, SIZE, 3), np.uint8),
            'label': jax.ShapeDtypeStruct((1, 64), np.int32),
            'order': jax.ShapeDtypeStruct((1, 128), np.int32),
            'first': jax.ShapeDtypeStruct((1,), np.uint32),
            'position': jax.ShapeDtypeStruct((BATCH,), np.int32),
        }
        return (lambda batch, step: device_cached.take(batch, step, BATCH)), batch, step

    config = CONFIGS[name]
    count = BATCH * augment.images_per_example(config)
    apply = augment.make_augment(config, 10)

    def function(step, images, labels):
        return apply(augment.example_keys(0, step, jnp.arange(count)), images, labels)

    images = jax.ShapeDtypeStruct((count, SIZE, SIZE, 3), np.uint8)
    return function, step, images, jax.ShapeDtypeStruct((count,), np.int32)


def single_elements(text):
    """The elements that each gather or scatter of StableHLO visits one by one."""
    found = []
    gathers = r'"stablehlo\.gather".*?slice_sizes = array<i64: ([\d, ]+)>.*-> tensor<([\dx]+)x\w+>'
    for sizes, shape in re.findall(gathers, text):
        if np.prod([int(size) for size in sizes.split(',')]) == 1:
            found.append(int(np.prod([int(n) for n in shape.split('x')])))
    # A scatter names its updates behind its body; those that move rows have window dimensions.
    scatters = r'"stablehlo\.scatter"(.*?)\}\) : \(.*?, tensor<([\dx]+)x\w+>\) ->'
    for attributes, shape in re.findall(scatters, text, re.DOTALL):
        if 'update_window_dims = [' not in attributes:
            found.append(int(np.prod([int(n) for n in shape.split('x')])))
    return found


PIXELS = SIZE * SIZE  # of one image; far more than one number for each


@pytest.mark.parametrize('name', [*CONFIGS, 'take'])
def test_no_single_pixels_as_lowered(name):
    function, *shapes = program(name)
    traced = jax.jit(function).trace(*shapes)
    text = traced.lower(lowering_platforms=('tpu',)).as_text()
    assert max(single_elements(text), default=0) < PIXELS
    if name in ('published', 'autoaugment'):  # The form of other platforms has them.
        text = traced.lower(lowering_platforms=('cpu',)).as_text()
        assert max(single_elements(text)) > PIXELS


@pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed: pip install libtpu'
)
@pytest.mark.parametrize('name', [*CONFIGS, 'take'])
def test_no_single_pixels_as_compiled(name):
    text = augmentation_tpu.compile_text(*program(name), target='v5e:2x2')
    compiled = compiled_text.parse(text)
    assert max(compiled_text.element_accesses(compiled).values(), default=0) < PIXELS
