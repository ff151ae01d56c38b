"""A profile of some steps, to see where their time goes."""

import os

import jax

from experiments.run import parallel


class Trace:
    """Records what the host and the devices do during a few training steps, on process 0.

    It is written to `directory` for TensorBoard's profile plugin (`xprof`), and as
    perfetto_trace.json.gz for https://ui.perfetto.dev.

    Args:
      directory: directory of the trace, created when the trace is written.
      first: the step before which the trace starts; the steps before it compile and warm up.
      steps: number of steps; 0: no trace.
    """

    def __init__(self, directory: str | os.PathLike, *, first: int, steps: int):
        steps = steps if parallel.is_primary() else 0
        self._directory, self._first, self._last = os.fspath(directory), first, first + steps
        self._tracing = False

    def should_toggle(self, step: int) -> bool:
        """Returns whether to call `toggle` before a step, when no other step is running."""
        return step == self._first < self._last or step == self._last and self._tracing

    def toggle(self) -> None:
        """Starts the trace, or ends and writes it."""
        if self._tracing:
            self.close()
        else:
            jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
            self._tracing = True

    def close(self) -> None:
        """Writes the trace if it is being recorded."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
