"""Stops a run on a signal to any of its processes; all processes stop after the same step.

Every batch carries a flag of its process. The all-reduce of the training step averages the flags,
and the host reads the average some steps later, when it has long been computed. So no device waits
for a host, and all hosts read the same value.
"""

import collections
import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from experiments.launch import output
from experiments.run import parallel

# Steps between dispatching a step and reading its flag: enough for the devices to have work while
# the host reads, few enough to stop soon. The host cannot run further ahead than this.
_LAG = 2


class PreemptionSignal:
    """A request to stop, to this or another process of the run."""

    def __init__(self):
        zeros = np.zeros(len(parallel.local_devices()), np.float32)
        self._no, self._yes = parallel.shard(zeros), parallel.shard(zeros + 1)
        self._pending: collections.deque[jax.Array] = collections.deque()
        self._requested = threading.Event()

    def request(self) -> None:
        """Requests that the run stops; callable from any thread and from signal handlers."""
        self._requested.set()

    def flag(self) -> jax.Array:
        """Returns the flag of this process for the next batch: float32 [devices, 1]."""
        return self._yes if self._requested.is_set() else self._no

    def reached(self, stop: jax.Array) -> bool:
        """Returns whether any process had been requested to stop, as of some steps ago.

        Args:
          stop: the mean of all flags, a metric of the step just dispatched.
        """
        self._pending.append(stop)
        return len(self._pending) > _LAG and float(self._pending.popleft()) > 0


@contextlib.contextmanager
def on_signals() -> Iterator[PreemptionSignal]:
    """Yields a PreemptionSignal that signals to this process, or the loss of its output, request.

    The signals are SIGTERM, SIGINT and SIGHUP (a closed terminal); a second one has its usual
    effect. A job that was started to ignore SIGINT or SIGHUP, as by nohup or in the background of a
    script, still ignores them.
    """
    preemption = PreemptionSignal()
    previous: dict[int, Any] = {}  # what signal.signal returns

    def request(number, frame):
        del frame
        preemption.request()
        signal.signal(number, previous[number])

    if threading.current_thread() is threading.main_thread():  # Python forbids it in others.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, request)
    try:
        with output.on_loss(preemption.request):
            yield preemption
    finally:
        for handled, handler in previous.items():
            signal.signal(handled, handler)
