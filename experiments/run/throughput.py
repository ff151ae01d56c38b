"""How fast training goes and what it takes: compilation, evaluation and saving left out."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator

import jax

from experiments.run import accelerators
from nfnets_jax.data.pipeline import Prefetch


class Clock:
    """Measures images per second, what part of the devices' peak that is, memory and waiting.

    Args:
      batch_size: images per step, over all devices.
      batches: whose `wait_seconds` is looked at.
      flops_per_image: floating-point operations to train on one picture.
    """

    def __init__(self, batch_size: int, batches: Prefetch, flops_per_image: float):
        self._batch_size, self._batches = batch_size, batches
        self._flops = flops_per_image / jax.device_count()
        self._peak = accelerators.peak_flops(jax.devices()[0].device_kind)
        self._begun = time.perf_counter()
        self.compile_seconds: float | None = None
        self.seconds, self.images = 0.0, 0  # of training, so far
        self._restart()

    def tick(self, state) -> None:
        """Counts one step that has been dispatched; waits for the first, which compiles."""
        if self.compile_seconds is None:
            jax.block_until_ready(state)
            self.compile_seconds = time.perf_counter() - self._begun
            self._restart()
        else:
            self._steps += 1

    def read(self) -> dict[str, float]:
        """Returns the figures since the last reading; call it when the last step has finished.

        Returns:
          'images_per_second' over all devices; 'data_wait', the part of the time spent waiting for
          batches; 'tflops' per second and device, and 'mfu', the part of the device's peak that is
          (where that is known); 'memory_gib', see `memory_gib`; 'compile_seconds', of the first
          step, once.
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

    @contextlib.contextmanager
    def paused(self, state) -> Iterator[None]:
        """Leaves out what is done inside, but no step: waits for those that `state` comes from."""
        jax.block_until_ready(state)
        begun = time.perf_counter()
        yield
        self._started += time.perf_counter() - begun

    def _restart(self) -> None:
        self._started = time.perf_counter()
        self._waited = self._batches.wait_seconds
        self._steps = 0


def memory_gib() -> float:
    """Returns the most memory in use so far: of the fullest device of this process, or its own.

    Devices without memory of their own (CPUs) do not count it; the process's is looked at there.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peak = max(one.get('peak_bytes_in_use', 0) for one in stats)
    if not peak:
        kilobyte = 1 if sys.platform == 'darwin' else 1024  # macOS counts bytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte
    return peak / 2**30
