"""How a run is asked to stop: any of its processes may be, and all stop after the same step.

The request travels with the batch. Every process says in every step whether it has been asked; the
step's one all-reduce brings it to all; the host reads the answer some steps later, when it has
long been there. So no device waits for a host, and all hosts read the same.
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

# Steps between a step's start and the reading of its answer: enough for the devices to have work
# while the host reads, few enough to stop soon. The host cannot run further ahead than this.
_LAG = 2


class StopRequests:
    """Requests to stop, those of the other processes included."""

    def __init__(self):
        zeros = np.zeros(jax.local_device_count(), np.float32)
        self._no, self._yes = parallel.shard(zeros), parallel.shard(zeros + 1)
        self._answers: collections.deque[jax.Array] = collections.deque()
        self._requested = threading.Event()

    def request(self) -> None:
        """Asks the run to stop; from any thread, or a signal's handler."""
        self._requested.set()

    def flag(self) -> jax.Array:
        """Returns what belongs into this process's next batch: float32 [devices, 1]."""
        return self._yes if self._requested.is_set() else self._no

    def heard(self, answer: jax.Array) -> bool:
        """Returns whether a process was asked to stop, as of some steps ago.

        Args:
          answer: of the step just dispatched, the mean of all flags.
        """
        self._answers.append(answer)
        return len(self._answers) > _LAG and float(self._answers.popleft()) > 0


@contextlib.contextmanager
def on_signals() -> Iterator[StopRequests]:
    """Yields requests that signals make, and the loss of the output.

    SIGTERM, SIGINT and SIGHUP (a terminal that is closed) ask; a second one has its usual effect.
    A job that was started to ignore SIGINT or SIGHUP, as by nohup or in the background of a script,
    goes on ignoring them.
    """
    requests = StopRequests()
    previous: dict[int, Any] = {}  # what signal.signal returns

    def request(number, frame):
        del frame
        requests.request()
        signal.signal(number, previous[number])

    if threading.current_thread() is threading.main_thread():  # Elsewhere Python forbids it.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, request)
    try:
        with output.on_loss(requests.request):
            yield requests
    finally:
        for asked, handler in previous.items():
            signal.signal(asked, handler)
