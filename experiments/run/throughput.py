"""Speed and memory of training, without compilation, evaluation and saving."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator

import jax

from experiments.experiment import Experiment
from experiments.run import accelerators, parallel
from nfnets_jax import models
from nfnets_jax.data.pipeline import Prefetch


def flops_per_image(experiment: Experiment) -> float:
    """Returns the operations of a forward and a backward pass for one training image.

    As usual, a multiply-accumulate of a convolution or linear layer counts as two. Gradients that
    frozen parameters do not need are left out, and so is the extra work of SAM and remat.
    """
    options = experiment.config.model.to_dict()
    num_classes = len(experiment.train_source.class_names)
    cost = models.model_cost(options.pop('name'), num_classes, **options)
    groups = experiment.optimizer.groups
    trained = {name.rpartition('/')[0] for name, group in groups.items() if not group.freeze}
    frozen = {module.name for module in cost.modules} - trained
    return 2 * cost.training_macs(experiment.image_spec.shape[:2], frozen)


# Steps after the first one in which page faults are counted, and the least that deserves a line:
# compilation takes up to a third longer where memory is kept.
FAULTS_COUNTED_IN = 10
_FAULTS_WORTH_A_LINE = 50, 0.1  # MB a step, part of the processor time


class Throughput:
    """Measures images per second, their part of the devices' peak, memory and waiting for data.

    Args:
      batch_size: images per step, over all devices.
      batches: the input; its `wait_seconds` is read.
      flops_per_image: floating-point operations to train on one image.
    """

    def __init__(self, batch_size: int, batches: Prefetch, flops_per_image: float):
        self._batch_size, self._batches = batch_size, batches
        self._flops = flops_per_image / parallel.device_count()
        self._peak = accelerators.peak_flops(jax.devices()[0].device_kind)
        self._begun = time.perf_counter()
        self.compile_seconds: float | None = None
        self.seconds, self.images = 0.0, 0  # of training so far
        self._restart()

    def tick(self, state) -> None:
        """Counts one dispatched step; waits for the first, which compiles."""
        if self.compile_seconds is None:
            jax.block_until_ready(state)
            self.compile_seconds = time.perf_counter() - self._begun
            self._usage = resource.getrusage(resource.RUSAGE_SELF)
            self._restart()
        else:
            self._steps += 1

    def read(self) -> dict[str, float]:
        """Returns the figures since the last call; call it when the last step has finished.

        Returns:
          'images_per_second' over all devices; 'data_wait', the part of the time spent waiting for
          batches; 'tflops' per second and device, and 'mfu', its part of the device's peak (if the
          peak is known); 'memory_gib', see `memory_gib`; 'compile_seconds' of the first step, once.
        """
        figures = {'memory_gib': memory_gib()}
        if not self.seconds and self.compile_seconds is not None:
            figures['compile_seconds'] = self.compile_seconds
        seconds = time.perf_counter() - self._started
        images = self._steps * self._batch_size
        waited = self._batches.wait_seconds - self._waited
        self.seconds += seconds
        self.images += images
        self._restart()
        if not images:
            return figures
        flops = images / seconds * self._flops
        if self._peak:
            figures['mfu'] = flops / self._peak
        return figures | {
            'images_per_second': images / seconds,
            'tflops': flops / 1e12,
            'data_wait': waited / seconds,
        }

    def describe_faults(self, state) -> str | None:
        """Returns what page faults cost on a CPU, in a line; None if they cost little.

        Call it once, `FAULTS_COUNTED_IN` steps after the first one.
        """
        if jax.devices()[0].platform != 'cpu':
            return None
        jax.block_until_ready(state)
        used = resource.getrusage(resource.RUSAGE_SELF)
        system, user, faults = (
            getattr(used, name) - getattr(self._usage, name)
            for name in ('ru_stime', 'ru_utime', 'ru_minflt')
        )
        megabytes = faults * resource.getpagesize() / FAULTS_COUNTED_IN / 1e6
        share = system / max(system + user, 1e-9)
        least_megabytes, least_share = _FAULTS_WORTH_A_LINE
        if megabytes < least_megabytes or share < least_share:
            return None
        return (
            f'each step allocates {megabytes:,.0f} MB anew, and the system takes {share:.0%} of '
            'the processor time: --keep_memory makes steps faster'
        )

    @contextlib.contextmanager
    def paused(self, state) -> Iterator[None]:
        """Leaves out the time of the block; waits first for the steps that compute `state`."""
        jax.block_until_ready(state)
        begun = time.perf_counter()
        yield
        self._started += time.perf_counter() - begun

    def _restart(self) -> None:
        self._started = time.perf_counter()
        self._waited = self._batches.wait_seconds
        self._steps = 0


def memory_gib() -> float:
    """Returns the peak memory in GiB of the fullest local device.

    Devices without memory of their own (CPUs) do not count it; there it is that of the process.
    """
    stats = [device.memory_stats() or {} for device in parallel.local_devices()]
    peak = max(one.get('peak_bytes_in_use', 0) for one in stats)
    if not peak:
        kilobyte = 1 if sys.platform == 'darwin' else 1024  # macOS counts bytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte
    return peak / 2**30
