"""Measures the training input from JPEG files to uint8 batches, beside Pillow and tf.data.

    python -m benchmarks.input_pipeline --images=DIR
    python -m benchmarks.input_pipeline --images=DIR --batches=48 --tensorflow=PATH/TO/PYTHON

`--images` holds JPEGs, at any depth. Every row reads the same files in random order, crops them at
random (8 to 100 % of the area), resizes to 224 pixels and flips, with as many threads as there are
cores. Compare the CPU time on a machine that runs other programs. Besides nfnets_jax:

    pillow   like torchvision: Pillow decodes the whole image, crops and resizes (bilinear)
    tf.data  like the NFNets: decode_and_crop_jpeg, bicubic resize to float32; run by the Python
             that --tensorflow names, which has TensorFlow
    tf.data, RandAugment   the same with four layers of RandAugment, which runs on the host there
    tf.data, recipe        the same with MixUp and CutMix: the authors read two images for each
                           example, where this one mixes the images of a batch with one another
    overhead  the pipeline around images that cost nothing
    augment   the published augmentation on this machine's device, with RandAugment

Rows take turns, each in its own process. Columns are the best of the rounds; `x` is the median
ratio to the CPU time of nfnets_jax in the same round. tf.data works some batches ahead: use
--batches=48 to compare.
"""

import argparse
import concurrent.futures
import functools
import itertools
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

SIZE, BATCH_SIZE = 224, 128


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    path = os.path.expanduser
    parser.add_argument('--images', '--pictures', type=path, required=True, help='with JPEGs')
    parser.add_argument('--tensorflow', type=path, help='a Python that has TensorFlow')
    parser.add_argument('--rounds', type=int, default=3, help='default: 3')
    parser.add_argument('--batches', type=int, default=16, help='default: 16')
    parser.add_argument('--threads', type=int, default=os.cpu_count(), help='default: one a core')
    parser.add_argument('--row', choices=_ROWS, help='measure only this row, in this process')
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure_row(args.row, args.images, args.batches, args.threads)))
        return
    # Here, because a Python with TensorFlow may have none of our packages.
    from benchmarks import timing
    from experiments.launch import cli

    with cli.guarded():
        timing.show(compare(args))


def compare(args: argparse.Namespace) -> list[dict]:
    """Measures all rows in processes of their own, in turns."""
    python = dict.fromkeys(('nfnets_jax', 'pillow', 'overhead', 'augment'), sys.executable)
    if args.tensorflow:
        rows = ('tf.data', 'tf.data, RandAugment', 'tf.data, recipe')
        python |= dict.fromkeys(rows, args.tensorflow)
    results = {row: [] for row in python}
    for _ in range(args.rounds):
        for row, interpreter in python.items():
            command = [interpreter, __file__, f'--row={row}']
            for key in ('images', 'batches', 'threads'):
                command.append(f'--{key}={getattr(args, key)}')
            environment = os.environ | {
                'PYTHONPATH': str(pathlib.Path(__file__).resolve().parents[1])
            }
            result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=False)
            if result.returncode:  # It has printed the error.
                sys.exit(result.returncode)
            results[row].append(json.loads(result.stdout.splitlines()[-1]))
    ours_cpu = [result['cpu'] for result in results['nfnets_jax']]
    rows = []
    for row, rounds in results.items():
        rate, cpu, first, memory = zip(*(result.values() for result in rounds), strict=True)
        ratio = statistics.median(a / b for a, b in zip(cpu, ours_cpu, strict=True))
        best = {'row': row, 'images/s': max(rate), 'CPU ms/image': min(cpu), 'x': ratio}
        rows.append(best | {'first batch s': min(first), 'MB': min(memory)})
    return rows


def measure_row(row: str, images: str, batches: int, threads: int) -> dict:
    """Returns images per second, CPU milliseconds an image, seconds to the first batch, and MB."""
    paths = sorted(str(path) for path in pathlib.Path(images).rglob('*.JP*G'))
    paths += sorted(str(path) for path in pathlib.Path(images).rglob('*.jp*g'))
    if not paths:
        sys.exit(f'--images={images}: no JPEGs in it')
    stream = _ROWS[row](paths * (1 + BATCH_SIZE // len(paths)), threads)
    begun = time.perf_counter()
    next(stream)
    first = time.perf_counter() - begun
    next(stream)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in itertools.islice(stream, batches):
        pass
    count = batches * BATCH_SIZE
    return {
        'rate': count / (time.perf_counter() - wall),
        'cpu': (time.process_time() - cpu) / count * 1000,
        'first': first,
        'memory': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


class Files:
    """A source of encoded images, see `nfnets_jax.data.sources`."""

    name, class_names = 'files', ('image',)

    def __init__(self, paths):
        self._paths = paths

    def __len__(self):
        return len(self._paths)

    def __getitem__(self, index):
        return {'image': pathlib.Path(self._paths[index]).read_bytes(), 'label': 0}


def ours(paths, threads):
    """Yields our batches; the flip is left to the device."""
    from nfnets_jax.data.pipeline import train_batches
    from nfnets_jax.data.preprocessing import make_transform

    transform = make_transform('random_crop', SIZE)
    return train_batches(
        Files(paths), batch_size=BATCH_SIZE, seed=0, transform=transform, num_threads=threads
    )


def overhead(paths, threads):
    """Yields batches of a constant: the cost of the pipeline without the images."""
    import numpy as np

    from nfnets_jax.data.pipeline import train_batches

    nothing = np.zeros((2, 2, 3), np.uint8)
    return train_batches(
        Files(paths),
        batch_size=BATCH_SIZE,
        seed=0,
        transform=lambda image, rng: nothing,
        num_threads=threads,
    )


def pillow(paths, threads):
    """Yields batches of whole decoded images from a thread pool, without epochs."""
    import random

    import numpy as np
    from PIL import Image

    from nfnets_jax.data.preprocessing import random_box

    rng = np.random.default_rng(0)

    def read(path):
        image = Image.open(path).convert('RGB')
        box = random_box(rng, *image.size[::-1], (0.08, 1), (3 / 4, 4 / 3))
        top, left, rows, columns = box or (0, 0, *image.size[::-1])
        part = (left, top, left + columns, top + rows)
        image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, part)
        return np.asarray(image)[:, :: random.choice((1, -1))]

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        while True:
            yield np.stack(list(pool.map(read, random.sample(paths, BATCH_SIZE))))


def tf_data(paths, threads, randaugment=False, mix=False):
    """Yields batches like `nfnets` of deepmind-research, from files instead of TFRecords."""
    import tensorflow as tf

    from benchmarks.tf_randaugment import mix_halves
    from benchmarks.tf_randaugment import randaugment as distort

    def read(path):
        encoded = tf.io.read_file(path)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(encoded),
            tf.zeros([1, 0, 4]),
            min_object_covered=0.1,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.stack([begin[0], begin[1], size[0], size[1]])
        image = tf.image.decode_and_crop_jpeg(encoded, window, channels=3)
        image = tf.image.random_flip_left_right(image)
        image = tf.image.resize(image, (SIZE, SIZE), tf.image.ResizeMethod.BICUBIC)
        if randaugment:
            image = tf.cast(distort(tf.saturate_cast(image, tf.uint8)), tf.float32)
        return (image - 120.0) / 58.0

    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    options.deterministic = False
    data = tf.data.Dataset.from_tensor_slices(paths).with_options(options)
    data = data.repeat().shuffle(10 * BATCH_SIZE).map(read, tf.data.AUTOTUNE)
    data = data.batch(BATCH_SIZE * (1 + mix))
    if mix:
        data = data.map(mix_halves, tf.data.AUTOTUNE)
    return data.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()


def augmentation(paths, threads):
    """Yields the published recipe's output: flip, MixUp, CutMix, RandAugment, normalization."""
    del threads
    import jax
    import jax.numpy as jnp

    from nfnets_jax import augment

    batch = next(ours(paths, os.cpu_count()))
    config = {'flip': True, 'mixup': 0.2, 'cutmix': 1.0, 'randaugment_layers': 4}
    apply = augment.make_augment(config, 1000, dtype=jnp.bfloat16)

    @jax.jit
    def step(number, images, labels):
        return apply(augment.example_keys(0, number, jnp.arange(BATCH_SIZE)), images, labels)

    images, labels = jax.device_put((batch['image'], batch['label']))
    for number in itertools.count():
        yield jax.block_until_ready(step(number, images, labels))


_ROWS = {
    'nfnets_jax': ours,
    'pillow': pillow,
    'tf.data': tf_data,
    'tf.data, RandAugment': functools.partial(tf_data, randaugment=True),
    'tf.data, recipe': functools.partial(tf_data, randaugment=True, mix=True),
    'overhead': overhead,
    'augment': augmentation,
}

if __name__ == '__main__':
    main()
