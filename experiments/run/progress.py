"""Progress of a run: a bar if the output is a terminal, else a line from time to time."""

import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from tqdm import tqdm

from experiments.run import parallel

# The metrics that are shown, in this order.
_SHOWN = {
    'loss': 'loss {:.3f}',
    'top1': 'top-1 {:.1%}',
    'images_per_second': '{:,.0f} images/s',
}


class Progress(contextlib.AbstractContextManager):
    """Shows step, loss, top-1, images/s and the time left, on process 0.

    Args:
        total_steps: steps of the whole run.
        stream: where to write; standard error by default.
        enabled: whether to write at all.
        interval: seconds between plain lines, except the first and the last.
        clock: returns seconds.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        stream: TextIO | None = None,
        enabled: bool = True,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stream = sys.stderr if stream is None else stream
        self._enabled = enabled and parallel.is_primary()
        self._total = total_steps
        self._interval = interval
        self._clock = clock
        self._begun: tuple[int, float] | None = None  # the first step seen, and when
        self._pending: tuple[int, Mapping[str, float]] | None = None  # not yet shown
        self._shown_at = -float('inf')
        self._bar: tqdm | None = None
        self._is_terminal = self._enabled and self._stream.isatty()

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Shows that `step` steps are done.

        Args:
            step: steps done, including those of earlier sessions.
            metrics: new metrics, if any; loss, top1 (a fraction) and images_per_second are shown.
        """
        if not self._enabled:
            return
        if self._is_terminal and self._bar is None:
            # Not earlier, because the first step compiles: the time left is counted from its end.
            self._bar = tqdm(
                total=self._total,
                initial=step,
                file=self._stream,
                dynamic_ncols=True,
                bar_format='step {n_fmt}/{total_fmt} |{bar}| {desc}{remaining} left',
            )
        if self._bar is not None:
            if metrics:
                self._bar.set_description_str(f'{_describe(metrics)}  ', refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = self._clock()
        # The time left is counted from the end of the first step, which compiles.
        self._begun = self._begun or (step, now)
        if metrics:
            self._pending = (step, metrics)
            if now - self._shown_at >= self._interval or step >= self._total:
                self._show(now)

    def log(self, line: str) -> None:
        """Writes a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        elif self._enabled:
            print(line, file=self._stream, flush=True)

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Shows where the run ended."""
        if self._bar is not None:
            self._bar.close()
            self._bar, self._is_terminal = None, False
        elif self._pending:
            self._show(self._clock())

    def _show(self, now: float) -> None:
        assert self._pending is not None
        assert self._begun is not None
        step, metrics = self._pending
        first_step, since = self._begun
        line = f'step {step}/{self._total}  {_describe(metrics)}'
        if first_step < step < self._total:
            left = (self._total - step) * (now - since) / (step - first_step)
            line += f'  {tqdm.format_interval(left)} left'
        print(line, file=self._stream, flush=True)
        self._pending, self._shown_at = None, now


def _describe(metrics: Mapping[str, float]) -> str:
    return '  '.join(form.format(metrics[name]) for name, form in _SHOWN.items() if name in metrics)
