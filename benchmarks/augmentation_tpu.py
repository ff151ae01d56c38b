"""Estimates the cost of the augmentation on a TPU with the TPU's compiler; needs no TPU.

    pip install libtpu
    python -m benchmarks.augmentation_tpu [--targets=v5e:2x2,v6e:2x2] [--batch=32]
        [--image-size=192] [--magnitude=5] [--step=v5e:38.74,v6e:19.06] [--form=ours,groups]
        [--json=FILE]

The recipe is the published one: flip, MixUp and CutMix, four layers of RandAugment, normalization.
A conditional counts by the probability of its branches. `cycles` are in millions. They do not
include gathers and scatters of single elements, for which the compiler has no estimate; `elements`
counts these, with loops of unknown length counted once. So both are far too low for the
implementation of other platforms, --form=groups. `share` is the share of a training step, whose
million cycles --step gives.
"""

import importlib.metadata
import os
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from experiments.run import compiled_text
from nfnets_jax import augment
from nfnets_jax.augment import operations, packed_images
from nfnets_jax.augment.definitions import OPERATIONS, WARPS

# The operation of each branch: the first is the identity, and warps have two signs.
_BRANCHES = ['', *(name for name in OPERATIONS for _ in range(2 if name in WARPS else 1))]


def main(argv=None):
    options = {'targets': 'v5e:2x2,v6e:2x2', 'batch': 32, 'image_size': 192, 'magnitude': 5.0}
    parser = timing.parser(__doc__, **options)
    parser.add_argument('--step', default='v5e:38.74,v6e:19.06', help='million cycles of a step')
    parser.add_argument('--form', default='ours,groups', help='ours, or groups: as on a CPU')
    args = parser.parse_args(argv)
    try:
        libtpu = importlib.metadata.version('libtpu')
    except importlib.metadata.PackageNotFoundError:
        parser.error('the compiler for TPUs is missing: pip install libtpu')

    steps = dict(pair.split(':') for pair in args.step.split(',') if pair)
    settings = timing.about(**vars(args)) | {'libtpu': libtpu}
    rows = []
    for form in args.form.split(','):
        program = _recipe(form, args.batch, args.image_size, args.magnitude)
        for target in args.targets.split(','):
            found = compiled_text.parse(compile_text(*program, target=target))
            million = compiled_text.total(compiled_text.costs(found, weights=weights)) / 1e6
            step = steps.get(target.split(':')[0])
            rows.append(
                {
                    'form': form,
                    'target': target,
                    'cycles': million,
                    'share': million / float(step) if step else None,
                    'elements': sum(compiled_text.element_accesses(found).values()),
                    'loops of unknown length': len(compiled_text.unknown_loops(found)),
                }
            )
    print(f'jax {jax.__version__}, libtpu {libtpu}')
    timing.show(rows)
    timing.write(args.json, settings, rows)


def weights(conditional: compiled_text.Instruction) -> list[float]:
    """Returns how often RandAugment takes each branch; equal weights for other conditionals."""
    count = len(conditional.called)
    if count != len(_BRANCHES):
        return [1 / count] * count
    return [(name != '') / len(OPERATIONS) / max(1, _BRANCHES.count(name)) for name in _BRANCHES]


def compile_text(function, *shapes, target: str) -> str:
    """Returns the text of a function as compiled for the first chip of a TPU topology.

    Args:
      function: a function of arrays.
      shapes: its arguments, trees of `jax.ShapeDtypeStruct`.
      target: such as 'v5e:2x2'.
    """
    from jax.experimental import topologies

    # Do not look for a TPU, and let several processes compile at once.
    environment = {
        'TPU_SKIP_MDS_QUERY': '1',
        'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
        'TPU_WORKER_HOSTNAMES': 'localhost',
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    }
    with mock.patch.dict(os.environ, environment):
        topology = topologies.get_topology_desc(platform='tpu', topology_name=target)
        placed = jax.sharding.SingleDeviceSharding(topology.devices[0])
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), shapes
        )
        return jax.jit(function).lower(*shapes).compile().as_text()


def _recipe(form: str, batch: int, size: int, magnitude: float) -> tuple:
    """Returns the published augmentation and the shapes of its arguments."""
    config = {
        'flip': True,
        'mixup': 0.2,
        'cutmix': 1.0,
        'randaugment_layers': 4,
        'randaugment_magnitude': magnitude,
        'mix_pairs': 'distinct',
        'label_smoothing': 0.1,
    }
    count = batch * augment.images_per_example(config)
    apply = augment.make_augment(config, 1000, dtype=jnp.bfloat16)

    def function(step, images, labels):
        keys = augment.example_keys(0, step, jnp.arange(count))
        if form == 'ours':
            return apply(keys, images, labels)
        with mock.patch.object(packed_images, 'apply_operations', operations.grouped):
            return apply(keys, images, labels)

    return (
        function,
        jax.ShapeDtypeStruct((), np.int32),
        jax.ShapeDtypeStruct((count, size, size, 3), np.uint8),
        jax.ShapeDtypeStruct((count,), np.int32),
    )


if __name__ == '__main__':
    main()
