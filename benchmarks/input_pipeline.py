"""Measures the training input: pictures from disk to uint8 batches, and its peers beside it.

    python -m benchmarks.input_pipeline --pictures=DIR [--tensorflow=PYTHON] [--rounds=3]

`--pictures` holds JPEGs, at any depth. Every row reads the same files in random order, crops them
at random (8 to 100 % of the area), resizes to 224 pixels and flips, with as many threads as there
are cores. On a machine that others use, look at the CPU time. Peers:

    pillow   torchvision's way: Pillow decodes the whole picture, crops and resizes (bilinear)
    tf.data  the NFNets' way: decode_and_crop_jpeg, bicubic resize to float32. Run by the Python
             that --tensorflow names, where TensorFlow is installed
    tf.data, RandAugment   the same with four layers of RandAugment, which runs on the host there
    tf.data, recipe        and MixUp and CutMix: the authors read two pictures for each one they
                           hand out, where ours mixes those of a batch with one another

Rows take turns, each in a process of its own, which also tells its memory and the time to its first
batch; printed is the best of the rounds, and how many times the CPU time of nfnets_jax in the same
round it is, the median. tf.data works some batches ahead, unseen: give --batches=48 to compare.
'overhead' is the pipeline around pictures that cost nothing, 'augment' the published on-device
augmentation, RandAugment included, on this machine's device.
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    path = os.path.expanduser
    parser.add_argument(
        '--pictures', type=path, required=True, help='a directory of JPEGs, at any depth'
    )
    parser.add_argument('--tensorflow', type=path, help='a Python that has TensorFlow')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--batches', type=int, default=16)
    parser.add_argument('--threads', type=int, default=os.cpu_count())
    parser.add_argument('--row', choices=_ROWS, help='measure this one only, in this process')
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(args.row, args.pictures, args.batches, args.threads)))
        return
    python = dict.fromkeys(('nfnets_jax', 'pillow', 'overhead', 'augment'), sys.executable)
    if args.tensorflow:
        rows = ('tf.data', 'tf.data, RandAugment', 'tf.data, recipe')
        python |= dict.fromkeys(rows, args.tensorflow)
    results = {row: [] for row in python}
    for _ in range(args.rounds):
        for row, interpreter in python.items():
            command = [interpreter, __file__, f'--row={row}']
            for key in ('pictures', 'batches', 'threads'):
                command.append(f'--{key}={getattr(args, key)}')
            environment = os.environ | {'PYTHONPATH': str(pathlib.Path(__file__).parents[1])}
            result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=False)
            if result.returncode:  # What is wrong has been said.
                sys.exit(result.returncode)
            results[row].append(json.loads(result.stdout.splitlines()[-1]))
    print(f'{"":21}{"images/s":>9}{"CPU ms/image":>13}{"x":>6}{"first batch s":>14}{"MB":>6}')
    ours_cpu = [result['cpu'] for result in results['nfnets_jax']]
    for row, rounds in results.items():
        rate, cpu, first, memory = zip(*(result.values() for result in rounds), strict=True)
        times = statistics.median(a / b for a, b in zip(cpu, ours_cpu, strict=True))
        print(
            f'{row:21}{max(rate):9.0f}{min(cpu):13.3f}{times:6.2f}{min(first):14.2f}'
            f'{min(memory):6.0f}'
        )


def measure(row: str, pictures: str, batches: int, threads: int) -> dict:
    """Returns images per second, CPU milliseconds an image, seconds to the first batch, and MB."""
    paths = sorted(str(path) for path in pathlib.Path(pictures).rglob('*.JP*G'))
    paths += sorted(str(path) for path in pathlib.Path(pictures).rglob('*.jp*g'))
    if not paths:
        sys.exit(f'--pictures={pictures}: no JPEGs in it')
    stream = _ROWS[row](paths * (1 + BATCH_SIZE // len(paths)), threads)
    begun = time.perf_counter()
    next(stream)
    first = time.perf_counter() - begun
    next(stream)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in itertools.islice(stream, batches):
        pass
    images = batches * BATCH_SIZE
    return {
        'rate': images / (time.perf_counter() - wall),
        'cpu': (time.process_time() - cpu) / images * 1000,
        'first': first,
        'memory': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


class Files:
    """A source of encoded pictures, as `nfnets_jax.data.sources` describes it."""

    name, class_names = 'files', ('picture',)

    def __init__(self, paths):
        self._paths = paths

    def __len__(self):
        return len(self._paths)

    def __getitem__(self, index):
        return {'image': pathlib.Path(self._paths[index]).read_bytes(), 'label': 0}


def ours(paths, threads):
    """Bytes to uint8; the flip is the device's."""
    from nfnets_jax.data.pipeline import train_batches
    from nfnets_jax.data.preprocessing import make_transform

    transform = make_transform('random_crop', SIZE)
    return train_batches(
        Files(paths), batch_size=BATCH_SIZE, seed=0, transform=transform, num_threads=threads
    )


def overhead(paths, threads):
    """The pipeline around a transform that does nothing: what it costs besides the pictures."""
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
    """Decodes whole pictures in a pool of threads; no order is kept between epochs."""
    import random

    import numpy as np
    from PIL import Image

    from nfnets_jax.data.preprocessing import random_box

    rng = np.random.default_rng(0)

    def read(path):
        picture = Image.open(path).convert('RGB')
        box = random_box(rng, *picture.size[::-1], (0.08, 1), (3 / 4, 4 / 3))
        top, left, rows, columns = box or (0, 0, *picture.size[::-1])
        picture = picture.resize(
            (SIZE, SIZE), Image.Resampling.BILINEAR, (left, top, left + columns, top + rows)
        )
        return np.asarray(picture)[:, :: random.choice((1, -1))]

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        while True:
            yield np.stack(list(pool.map(read, random.sample(paths, BATCH_SIZE))))


def tf_data(paths, threads, randaugment=False, mix=False):
    """As `nfnets` of deepmind-research feeds its networks, from files instead of TFRecords."""
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
    """The published recipe on the device: flip, MixUp and CutMix, RandAugment, normalise."""
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
    if any(argument.startswith('--row') for argument in sys.argv):
        main()  # By a Python that may have TensorFlow and nothing of ours.
    else:
        from experiments.launch import cli

        with cli.guarded():
            main()
