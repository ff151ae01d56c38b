"""How fast training goes: compilation, evaluation and saving left out."""

import contextlib
import time
from collections.abc import Iterator

import jax

from nfnets_jax.data.pipeline import Prefetch


class Clock:
    """Measures images per second, and the part of the time spent waiting for data.

    Args:
      batch_size: images per step, over all devices.
      batches: whose `wait_seconds` is looked at.
    """

    def __init__(self, batch_size: int, batches: Prefetch):
        self._batch_size, self._batches = batch_size, batches
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
        """Returns the figures since the last reading; call it when the last step has finished."""
        seconds = time.perf_counter() - self._started
        images = self._steps * self._batch_size
        waited = self._batches.wait_seconds - self._waited
        self.seconds += seconds
        self.images += images
        self._restart()
        if not images:
            return {}
        return {'images_per_second': images / seconds, 'data_wait': waited / seconds}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what is done inside."""
        begun = time.perf_counter()
        yield
        self._started += time.perf_counter() - begun

    def _restart(self) -> None:
        self._started = time.perf_counter()
        self._waited = self._batches.wait_seconds
        self._steps = 0
