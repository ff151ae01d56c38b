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

    def turns(self, step: int) -> bool:
        """Returns whether it begins or ends before a step: then call `turn`, and none under way."""
        return step == self._first < self._last or step == self._last and self._tracing

    def turn(self) -> None:
        """Begins, or writes the trace."""
        if self._tracing:
            self.close()
        else:
            jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
            self._tracing = True

    def close(self) -> None:
        """Writes the trace, if one is under way."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
