"""Estimates the cost of the augmentation on a TPU with the TPU's compiler; needs no TPU.

    pip install 'nfnets_jax[tpu]'
    python -m benchmarks.augmentation_tpu
    python -m benchmarks.augmentation_tpu --targets=v5e:2x2 --form=ours

The recipe is the published one: flip, MixUp and CutMix, four layers of RandAugment, normalization.
A conditional counts by the probability of its branches. `cycles` are in millions. They do not
include gathers and scatters of single elements, for which the compiler has no estimate; `elements`
counts these, with loops of unknown length counted once. So both are far too low for the
implementation of other platforms, --form=groups. `share` is the share of a training step, whose
million cycles --step gives.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from experiments.run import compiled_text, step_parts, targets
from nfnets_jax import augment, extras
from nfnets_jax.augment import operations, packed_images


def main(argv=None):
    options = {'targets': 'v5e:2x2,v6e:2x2', 'batch': 32, 'image_size': 192, 'magnitude': 5.0}
    parser = timing.parser(__doc__, **options)
    parser.add_argument(
        '--step',
        default='v5e:33.45,v6e:19.06',
        help='million cycles of a step; default: v5e:33.45,v6e:19.06',
    )
    parser.add_argument('--form', default='ours,groups', help='ours, or groups: as on a CPU')
    args = parser.parse_args(argv)
    if missing := extras.how_to_install('libtpu'):
        parser.error(missing)
    steps = dict(pair.split(':') for pair in args.step.split(',') if pair)
    settings = timing.about(**vars(args))
    rows = []
    for form in args.form.split(','):
        program = _recipe(form, args.batch, args.image_size, args.magnitude)
        for target in args.targets.split(','):
            found = compiled_text.parse(compile_text(*program, target=target))
            million = step_parts.cycles(found) / 1e6
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
    print(settings['versions'])
    timing.show(rows)
    timing.write(args.json, settings, rows)


def compile_text(function, *shapes, target: str) -> str:
    """Returns the text of a function as compiled for the first chip of a TPU topology.

    Args:
      function: a function of arrays.
      shapes: its arguments, trees of `jax.ShapeDtypeStruct`.
      target: such as 'v5e:2x2'.
    """
    opened = targets.open_target(target)
    placed = jax.sharding.SingleDeviceSharding(opened.devices[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), shapes)
    return targets.compile_program(jax.jit(function).lower(*shapes), opened).text


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
