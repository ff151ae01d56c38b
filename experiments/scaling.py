"""Computes step time, memory and cost of training on accelerators. Nothing is measured.

    python -m experiments.scaling --models=NFNet-F0,NFNet-F5 --devices=v4:128,H100:64
    python -m experiments.scaling --calibrate

A step is 3 x 2 operations for each multiply-accumulate of the batch, at a share of the chip's peak;
one all-reduce of the float32 gradients, not overlapped with the computation, at the published
bandwidth; and the update, which reads and writes all parameters, momenta and averages. --calibrate
compares this with the step times that the NFNets paper measured, from which the shares come.

Memory is parameters, gradients, momenta and moving average in float32, and activations in bfloat16.
If the examples of a device do not fit, they are split in --config.accumulate parts of at least 8;
if that is not enough, blocks are recomputed in the backward pass. See docs/scaling.md.
"""

import dataclasses
import functools
from collections.abc import Iterator

from absl import flags

from experiments.launch import cli, output
from experiments.run import accelerators
from nfnets_jax import models
from nfnets_jax.errors import UsageError, nearest

IMAGES = 1_281_167  # in ImageNet's training set
# Milliseconds of a training step with 32 examples on a TPU v3 core and on a V100, measured in the
# NFNets paper (2102.06171).
PUBLISHED_MS = {
    'F0': (73.3, 56.7),
    'F1': (158.5, 133.9),
    'F2': (295.8, 226.3),
    'F3': (532.2, 524.5),
    'F4': (1033.3, 1190.6),
    'F5': (1398.5, 2177.1),
    'F6': (2774.1, None),
}
# Median shares of the peak that these reached: see --calibrate.
TPU_SHARE, GPU_SHARE = 0.35, 0.19
DEFAULT_MODELS = ','.join(f'NFNet-F{level}' for level in range(8))
DEFAULT_DEVICES = 'v4:128,v5e:128,v5p:128,v6e:128,H100:128,H200:128,H100:8,H200:8'


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Cost of one training step on each of several devices.

    Attributes:
      accumulate: gradient-accumulation steps.
      remat: whether blocks are recomputed in the backward pass.
      memory: bytes on a device.
      fits: whether the device has that memory.
      compute, all_reduce, update: seconds.
    """

    accumulate: int
    remat: bool
    memory: float
    fits: bool
    compute: float
    all_reduce: float
    update: float

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return self.compute + self.all_reduce + self.update


def estimate(
    name: str, device: accelerators.Device, count: int, batch: int, utilisation: float | None = None
) -> Estimate:
    """Returns the cost of a step of `batch` examples on `count` devices.

    Args:
      name, device, count, batch: model, kind and number of devices, examples over all of them.
      utilisation: share of the peak; None: TPU_SHARE or GPU_SHARE.

    Raises:
      UsageError: the batch does not split evenly over the devices.
    """
    if batch % count:
        raise UsageError(f'--batch={batch}: does not split evenly over {count} devices')
    rows = batch // count
    share = utilisation or default_share(device)
    parameters = 4 * _cost(name).parameters  # bytes
    for accumulate, remat in _splits(rows):
        # Parameters, gradient, momentum, average; and the sum over the parts so far.
        copies = 4 if accumulate == 1 else 5
        memory = copies * parameters + rows / accumulate * _bytes_per_image(name, remat)
        if fits := memory <= device.memory:
            break
    return Estimate(
        accumulate=accumulate,
        remat=remat,
        memory=memory,
        fits=fits,
        compute=rows * operations(name, remat) / (share * device.peak_flops),
        all_reduce=all_reduce_seconds(parameters, device, count),
        # Reads gradient, parameter, momentum and average, writes the last three; AGC reads two.
        update=9 * parameters / device.memory_bandwidth,
    )


def default_share(device: accelerators.Device) -> float:
    """Returns the share of the peak that the paper reached on devices of this kind."""
    return TPU_SHARE if device.kinds[0].startswith('TPU') else GPU_SHARE


def _splits(rows: int) -> Iterator[tuple[int, bool]]:
    """Yields (accumulate, remat) from the cheapest to the one that needs the least memory."""
    for remat, least in ((False, 8), (True, 1)):
        parts = 1
        while parts == 1 or (rows % parts == 0 and rows // parts >= least):
            yield parts, remat
            parts *= 2


def operations(name: str, remat: bool = False) -> float:
    """Returns the operations of training on one image of the training size."""
    passes = 4 if remat else 3
    return passes * 2 * _cost(name).macs(models.variant_info(name).train_size)


def all_reduce_seconds(size: float, device: accelerators.Device, count: int) -> float:
    """Returns the time to sum `size` bytes over all devices, at the bandwidth of their links.

    Every device sends its data twice, except its own part: to be summed, and to be distributed.
    Between boxes, each device sums its share of the box's data over the network.
    """
    linked = min(count, device.linked)
    seconds = 2 * size * (linked - 1) / linked / device.link_bytes
    if (boxes := -(-count // linked)) > 1:
        if device.network_bytes is None:
            raise UsageError(f'--devices={device.name}:{count}: a pod has {device.linked}')
        seconds += 2 * size / linked * (boxes - 1) / boxes / device.network_bytes
    return seconds


@functools.cache
def _cost(name: str) -> models.Cost:
    return models.model_cost(name)


@functools.cache
def _bytes_per_image(name: str, remat: bool) -> float:
    size = models.variant_info(name).train_size
    if not remat:
        return 2 * models.activation_bytes(name, size, 'convolutions', scan=True)
    return models.activation_bytes(name, size, 'blocks', scan=True) + _largest_block(name, size)


def _largest_block(name: str, size: int) -> float:
    """Returns the bytes that the largest residual block keeps for one image."""
    stages = len(models.variant_info(name).depths)
    ones = (1,) * stages

    def kept(depths: tuple[int, ...]) -> float:
        return models.activation_bytes(name, size, 'convolutions', depths=depths)

    return 2 * max(
        kept((*ones[:stage], 2, *ones[stage + 1 :])) - kept(ones) for stage in range(stages)
    )


def parse_devices(text: str) -> list[tuple[accelerators.Device, int]]:
    """Parses 'v4:128,H100:8': names in experiments.run.accelerators and numbers of devices."""
    known = {device.name: device for device in accelerators.DEVICES}
    parsed = []
    for item in text.split(','):
        name, _, count = item.partition(':')
        if name not in known:
            raise UsageError(f'--devices={text}: unknown {name!r}{nearest(name, known)}')
        if not count.isdecimal() or int(count) == 0:
            raise UsageError(f'--devices={text}: give how many, like {name}:128')
        parsed.append((known[name], int(count)))
    return parsed


HEADER = (
    *(f'{"model":<16}', f'{"devices":>11}', f'{"ms/step":>8}', f'{"images/s":>9}'),
    *('all-reduce', f'{"GB":>6}', 'parts', 'remat', f'{"hours":>7}', 'chip-hours', f'{"$":>8}'),
)


def row(
    name: str,
    device: accelerators.Device,
    count: int,
    batch: int,
    epochs: float,
    utilisation: float | None,
    price: float | None,
) -> tuple[str, ...]:
    """Returns the cells of a network on `count` devices."""
    result = estimate(name, device, count, batch, utilisation)
    steps = epochs * IMAGES / batch
    hours = steps * result.step / 3600
    cost = '-' if price is None else f'{hours * count * price:,.0f}'
    memory = f'{result.memory / 1e9:.1f}' + ('' if result.fits else '!')
    return (
        *(f'{name:<16}', f'{f"{count} x {device.name}":>11}', f'{1e3 * result.step:8.1f}'),
        *(f'{batch / result.step:9,.0f}', f'{result.all_reduce / result.step:10.1%}'),
        *(f'{memory:>6}', f'{result.accumulate:5}', f'{"yes" if result.remat else "":>5}'),
        *(f'{hours:7.1f}', f'{hours * count:10,.0f}', f'{cost:>8}'),
    )


def calibrate() -> Iterator[str]:
    """Yields lines that compare the measured steps of the paper with the computed ones."""
    v3, v100 = (accelerators.find_device(kind) for kind in ('TPU v3', 'Tesla V100-SXM2-16GB'))
    assert v3 is not None
    assert v100 is not None
    yield (
        f'{"model":<10}{"GFLOP/image":>12}{"v3 core ms":>12}{"computed":>10}{"share":>7}'
        f'{"V100 ms":>10}{"computed":>10}{"share":>7}'
    )
    for variant, measured in PUBLISHED_MS.items():
        name = f'NFNet-{variant}'
        work = 32 * operations(name)
        line = f'{name:<10}{operations(name) / 1e9:12.1f}'
        for device, width, ms in zip((v3, v100), (12, 10), measured, strict=True):
            computed = 1e3 * work / (default_share(device) * device.peak_flops)
            line += f'{ms or "-":>{width}}{computed:10.1f}'
            line += f'{1e3 * work / ms / device.peak_flops:7.1%}' if ms else f'{"-":>7}'
        yield line


def table() -> Iterator[str]:
    """Yields the lines of the table that the flags describe."""
    values = flags.FLAGS
    names, machines = values.models.split(','), parse_devices(values.devices)
    for name in names:
        # Errors come before the first line of the table.
        if models.variant_info(name).family == 'SmallCNN':
            raise UsageError(f'--models={values.models}: {name} is not computed: it has no blocks')
    share = (
        f'{values.utilisation:.0%}'
        if values.utilisation
        else (f'{TPU_SHARE:.0%} (TPUs) and {GPU_SHARE:.0%} (GPUs)')
    )
    yield f'COMPUTED, not measured: {share} of the peak'
    yield f'{values.batch:,} examples a step, {values.epochs} epochs of ImageNet'
    columns = output.terminal_columns()
    yield output.fold(HEADER, columns)
    options = values.batch, values.epochs, values.utilisation, values.price
    for name in names:
        for device, count in machines:
            yield output.fold(row(name, device, count, *options), columns)


def main() -> None:
    for line in calibrate() if flags.FLAGS.calibrate else table():
        print(line, flush=True)


if __name__ == '__main__':
    flags.DEFINE_string('models', DEFAULT_MODELS, 'Models, separated by commas.')
    flags.DEFINE_string('devices', DEFAULT_DEVICES, 'KIND:COUNT, separated by commas.')
    flags.DEFINE_integer('batch', 4096, 'Examples a step, over all devices.', lower_bound=1)
    flags.DEFINE_integer('epochs', 360, 'Epochs of ImageNet.', lower_bound=1)
    flags.DEFINE_float(
        'utilisation',
        None,
        'Share of the peak; by default that of the NFNets paper.',
        lower_bound=0.01,
        upper_bound=1,
    )
    flags.DEFINE_float('price', None, 'US dollars a chip-hour, for all devices.', lower_bound=0)
    flags.DEFINE_bool('calibrate', False, "Compare with the paper's measured steps instead.")
    cli.run(main)
