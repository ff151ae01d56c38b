"""Writes the metrics of a run to metrics.jsonl, TensorBoard and, on demand, Weights & Biases.

A run that was killed and resumed leaves the same record as an uninterrupted one: metrics after the
checkpoint that it resumes from are dropped, because they will be written again.
"""

import contextlib
import errno
import io
import json
import math
import os
import pathlib
import secrets
import time
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from experiments.run import parallel
from nfnets_jax import files
from nfnets_jax.errors import UsageError, first_line

METRICS_FILE = 'metrics.jsonl'
_WANDB_ID_FILE = 'wandb_id'

Scalars = Mapping[str, float | int]


class _Sink(Protocol):
    """A destination of scalars; a write is flushed when it returns."""

    def write(self, step: int, scalars: Scalars) -> None: ...

    def close(self) -> None: ...


class Writer:
    """Writes scalars to every sink, and images to TensorBoard; from `open_writer`."""

    def __init__(self, sinks: list[_Sink]):
        self._sinks = sinks

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes the scalars of a step.

        Args:
            step: steps done so far.
            scalars: name -> a number, or a NumPy or JAX array of one number.

        Raises:
            UsageError: they cannot be written.
        """
        if not self._sinks:
            return
        scalars = {name: _number(name, value) for name, value in scalars.items()}
        for sink in self._sinks:
            try:
                sink.write(int(step), scalars)
            except OSError as error:
                raise UsageError(
                    f'the metrics of step {step} cannot be written: {error.strerror or error}'
                ) from error

    def write_images(self, name: str, images: np.ndarray) -> None:
        """Writes images, uint8 [N, H, W, C] with 1 or 3 channels, as one picture; others: nothing.

        Raises:
            UsageError: they cannot be written.
        """
        for sink in self._sinks:
            if isinstance(sink, _TensorBoard) and images.shape[-1] in (1, 3):
                try:
                    sink.write_image(name, _side_by_side(images))
                except OSError as error:
                    raise UsageError(
                        f'{name} cannot be written: {error.strerror or error}'
                    ) from error

    def close(self) -> None:
        """Closes all destinations; later writes are lost."""
        while self._sinks:
            # Every write has been flushed: only a failed one can fail again.
            with contextlib.suppress(OSError):
                self._sinks.pop().close()


def check_destinations(workdir: str | os.PathLike, config: ConfigDict) -> None:
    """Raises the UsageErrors of `open_writer` on process 0, before anything is written."""
    if not parallel.is_primary():
        return
    if config.wandb.project:
        _import_wandb(config)
    path = pathlib.Path(workdir) / METRICS_FILE
    if path.is_file():
        _whole_lines(path)


def _import_wandb(config: ConfigDict):
    try:
        import wandb
    except ImportError:
        raise UsageError(
            f'config.wandb.project={config.wandb.project!r} needs Weights & Biases: '
            "pip install 'nfnets_jax[tracking]'",
            'config.wandb.project',
        ) from None
    return wandb


def open_writer(
    workdir: str | os.PathLike,
    *,
    config: ConfigDict,
    start_step: int = 0,
) -> Writer:
    """Opens the record of a new or resumed run; in other processes than 0 it writes nothing.

    Args:
        workdir: the run's directory, which exists.
        config: the config of the run; its field `wandb` holds project, entity, name, mode.
        start_step: steps done so far. Later records are dropped, and at 0 all of them.

    Raises:
        UsageError: Weights & Biases cannot be used, or metrics.jsonl is damaged elsewhere than at
            its end. Then nothing has been dropped.
    """
    check_destinations(workdir, config)
    if not parallel.is_primary():
        return Writer([])
    workdir = pathlib.Path(workdir)
    # First, because it can fail.
    wandb = [_Wandb(workdir, config)] if config.wandb.project else []
    tensorboard = _TensorBoard(workdir, start_step)
    if start_step == 0:
        tensorboard.write_text('config', json.dumps(config.to_dict(), indent=2, default=str))
    return Writer([_JsonLines(workdir, start_step), tensorboard, *wandb])


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, float | int]]:
    """Returns the lines of a run's metrics.jsonl, oldest first; a null is read as NaN.

    A last line that a killed run left unfinished is not returned.

    Raises:
        UsageError: there is no such file, or it is damaged elsewhere than at its end.
    """
    path = pathlib.Path(workdir) / METRICS_FILE
    if not path.exists():
        raise UsageError(f'{path} does not exist: no run has written its metrics there')
    return [
        {name: math.nan if value is None else value for name, value in record.items()}
        for _, record in _whole_lines(path)
    ]


def _number(name: str, value: Any) -> float | int:
    number = np.asarray(value).item() if np.size(value) == 1 else None
    if not isinstance(number, int | float):
        raise TypeError(f'metric {name!r} is not one number: {value!r}')
    return number


def _side_by_side(images: np.ndarray, columns: int = 8) -> np.ndarray:
    """Returns images [N, H, W, C] as one, in rows with white lines between."""
    blank = -len(images) % min(columns, len(images))
    pads = ((0, blank), (1, 1), (1, 1), (0, 0))
    images = np.pad(images, pads, constant_values=255)
    count, height, width, channels = images.shape
    columns = min(columns, count)
    rows = images.reshape(count // columns, columns, height, width, channels)
    return rows.swapaxes(1, 2).reshape(-1, columns * width, channels)


def _whole_lines(path: pathlib.Path) -> list[tuple[bytes, dict]]:
    """Returns each whole line as bytes and parsed."""
    *lines, _ = path.read_bytes().split(b'\n')  # The part after the last newline is unfinished.
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            int(record['step'])
        except (ValueError, TypeError, KeyError):
            raise UsageError(
                f'{path}, line {number}, is not an object with a step: repair or remove it'
            ) from None
        parsed.append((line + b'\n', record))
    return parsed


class _JsonLines:
    """metrics.jsonl: one object a line, with `step`; null stands for NaN and infinity.

    Lines are appended and flushed one by one.
    """

    def __init__(self, workdir: pathlib.Path, start_step: int):
        path = workdir / METRICS_FILE
        if path.exists():
            kept = [raw for raw, record in _whole_lines(path) if 0 < start_step >= record['step']]
            files.atomic_write(path, b''.join(kept))
        self._file = path.open('a', encoding='utf-8')

    def write(self, step: int, scalars: Scalars) -> None:
        if not os.fstat(self._file.fileno()).st_nlink:
            raise FileNotFoundError(errno.ENOENT, f'{self._file.name} has vanished')
        finite = {name: x if math.isfinite(x) else None for name, x in scalars.items()}
        self._file.write(json.dumps({'step': step, **finite}, allow_nan=False) + '\n')
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    """TensorBoard's event files, written without TensorFlow.

    TensorBoard's own EventFileWriter imports TensorFlow if it is installed (seconds, and pages of
    log), and a kill loses up to two minutes of events. Writing its record format does neither.
    """

    def __init__(self, workdir: pathlib.Path, start_step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._metadata, self._tensor = summary_pb2.SummaryMetadata, tensor_pb2.TensorProto
        # TensorBoard reads the files in the order of their names, and the clock may have been set
        # back since the last one.
        earlier = [name.suffixes[-2:] for name in workdir.glob('events.out.tfevents.*.*')]
        latest = max((int(second[1:]) for second, _ in earlier if second[1:].isdigit()), default=0)
        second = max(int(time.time()), latest)
        path = workdir / f'events.out.tfevents.{second:010d}.{len(earlier):04d}'
        self._records = RecordWriter(path.open('xb'))
        self._add(file_version='brain.Event:2')
        # Tells TensorBoard to forget what earlier files hold from this step on.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(step=start_step + 1 if start_step else 0, session_log=start)

    def write(self, step: int, scalars: Scalars) -> None:
        values = [self._summary.Value(tag=name, simple_value=x) for name, x in scalars.items()]
        self._add(step=step, summary=self._summary(value=values))

    def write_text(self, name: str, text: str) -> None:
        """Writes a text, which TensorBoard shows as Markdown: as a block of code."""
        plugin = self._metadata.PluginData(plugin_name='text')
        tensor = self._tensor(dtype='DT_STRING', string_val=[f'```\n{text}\n```'.encode()])
        metadata = self._metadata(plugin_data=plugin)
        value = self._summary.Value(tag=name, metadata=metadata, tensor=tensor)
        self._add(step=0, summary=self._summary(value=[value]))

    def write_image(self, name: str, image: np.ndarray) -> None:
        """Writes an image, uint8 [H, W, 1 or 3]."""
        png = io.BytesIO()
        Image.fromarray(image.squeeze()).save(png, format='png')
        height, width, channels = image.shape
        encoded = self._summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=png.getvalue()
        )
        value = self._summary.Value(tag=name, image=encoded)
        self._add(step=0, summary=self._summary(value=[value]))

    def close(self) -> None:
        self._records.close()

    def _add(self, **fields) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._records.flush()


class _Wandb:
    """A Weights & Biases run, continued under the same id.

    wandb ignores steps that were recorded before a kill. Nothing is lost by that, because a resumed
    run repeats them exactly.
    """

    def __init__(self, workdir: pathlib.Path, config: ConfigDict):
        wandb = _import_wandb(config)
        id_file = workdir / _WANDB_ID_FILE
        if not id_file.exists():
            files.atomic_write(id_file, secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=config.wandb.project,
                entity=config.wandb.entity or None,
                name=config.wandb.name or None,
                mode=config.wandb.mode,
                id=id_file.read_text(),
                resume='allow',
                dir=str(workdir),
                config=config.to_dict(),
                allow_val_change=True,  # e.g. log_every, when a run is continued
            )
        except wandb.Error as error:
            raise UsageError(
                f'config.wandb.project={config.wandb.project!r}: {first_line(error)} '
                '(--config.wandb.mode=offline needs no account)',
                'config.wandb.project',
                'config.wandb.mode',
            ) from error

    def write(self, step: int, scalars: Scalars) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()
