"""A trace of some steps, to see where their time goes."""

import os

import jax


class Trace:
    """Records what the host and the devices do during a few steps of training.

    It is written to `directory` for TensorBoard's profile plugin (`xprof`), and as
    perfetto_trace.json.gz for https://ui.perfetto.dev.

    Args:
      directory: of this process; made when there is something to write.
      first: the step before which it begins, after those that compile and warm up.
      steps: how many; 0: no trace.
    """

    def __init__(self, directory: str | os.PathLike, *, first: int, steps: int):
        self._directory, self._first, self._last = os.fspath(directory), first, first + steps
        self._tracing = False

    def before(self, step: int, state) -> None:
        """To be called before each step, with the state that the ones before have made or will."""
        if step == self._first < self._last:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
            self._tracing = True
        elif step == self._last and self._tracing:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Writes the trace, if one is under way."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
