"""Durations and learning-rate schedules.

A duration is a config value such as '5 epochs'. A schedule is a pure function step -> value. Both
count optimizer steps from 0, and step i uses the schedule at i. With a warm-up the first update is
therefore multiplied by zero, as in the authors' training.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax

from nfnets_jax import fields
from nfnets_jax.errors import UsageError, nearest
from nfnets_jax.fields import Field

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]

DURATION = "a duration like '500 steps', '30 epochs' or '10%'"
MAX_STEPS = 2**31 - 1  # Steps are counted in int32.

_DURATION = re.compile(r'(?P<amount>[+-]?(?:\d+\.?\d*|\.\d+))\s*(?P<unit>[a-z]*|%)', re.IGNORECASE)
_UNITS = {'': 'steps', 'step': 'steps', 'steps': 'steps', 'epoch': 'epochs', 'epochs': 'epochs'}


def num_steps(
    duration: int | str,
    *,
    steps_per_epoch: float,
    total_steps: int | None = None,
    key: str = 'duration',
    minimum: int = 1,
) -> int:
    """Returns a duration in optimizer steps.

    Args:
        duration: a number of steps (500, '500', '500 steps') or epochs ('30 epochs', '2.5
            epochs'), or a percentage of the whole training ('10%'). The result is rounded to the
            nearest step; a percentage above 0 is at least one step.
        steps_per_epoch: optimizer steps in one epoch; may be fractional.
        total_steps: steps of the whole training; None where a percentage has no meaning.
        key: the config key the duration came from, for messages.
        minimum: the fewest steps allowed, e.g. 0 for a warm-up that may be absent.

    Raises:
        UsageError: if the duration cannot be read, is shorter than `minimum` or longer than
            MAX_STEPS.
    """
    amount, unit = _parse(duration, key)
    if unit == '%':
        if total_steps is None:
            raise UsageError(
                f"{key}={duration!r}: give it in steps or epochs, '%' has no meaning here", key
            )
        steps = amount / 100 * total_steps
        if 0 < steps < 1:
            steps = 1
    elif unit == 'epochs':
        steps = amount * steps_per_epoch
    elif amount == int(amount):
        steps = amount
    else:
        raise UsageError(f'{key}={duration!r}: a number of steps must be whole', key)
    steps = round(steps)
    if amount < 0:
        raise UsageError(f'{key}={duration!r}: must be at least {minimum}', key)
    if steps < minimum:
        raise UsageError(f'{key}={duration!r} is {steps} steps: it must be at least {minimum}', key)
    if steps > MAX_STEPS:
        raise UsageError(
            f'{key}={duration!r} is {steps} steps: it must be at most {MAX_STEPS}', key
        )
    return steps


def canonical_duration(duration: int | str) -> str:
    """Returns the one spelling of a duration: '40 epochs' for '40 epoch', '500 steps' for 500.

    Raises:
        UsageError: if the duration cannot be read.
    """
    amount, unit = _parse(duration, 'duration')
    # Use an integer where possible, because a float rounds the largest values.
    number = int(amount) if amount == int(amount) else repr(amount)
    return f'{number}%' if unit == '%' else f'{number} {unit}'


def _parse(duration: int | str, key: str) -> tuple[float, str]:
    """Returns the amount and its unit: 'steps', 'epochs' or '%'."""
    if isinstance(duration, int) and not isinstance(duration, bool):
        return duration, 'steps'
    match = _DURATION.fullmatch(duration.strip()) if isinstance(duration, str) else None
    if match is None:
        raise UsageError(f'{key}={duration!r}: must be {DURATION}', key)
    unit = match['unit'].lower()
    if unit != '%' and unit not in _UNITS:
        raise UsageError(
            f'{key}={duration!r}: unknown unit {match["unit"]!r}'
            f'{nearest(unit, ("steps", "epochs", "%"))}',
            key,
        )
    return float(match['amount']), _UNITS.get(unit, unit)


def warmup_cosine(
    peak: jax.typing.ArrayLike,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    end_value: float = 0.0,
) -> Schedule:
    """Rises linearly from 0 to `peak`, then falls along half a cosine to `end_value`.

    Both papers use this schedule (arXiv 2101.08692; arXiv 2102.06171, section 5). It reaches
    `end_value` at `total_steps` and stays there.
    """

    def cosine(step):
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        fall = 0.5 * (peak - end_value) * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
        return fall + end_value

    return _warm_up(cosine, peak, warmup_steps)


def constant(value: jax.typing.ArrayLike, *, warmup_steps: int = 0) -> Schedule:
    """Stays at `value`, after an optional linear rise from 0."""
    return _warm_up(lambda step: jnp.full_like(step, value), value, warmup_steps)


def step_decay(
    peak: jax.typing.ArrayLike, *, boundaries: Sequence[int], factor: float, warmup_steps: int = 0
) -> Schedule:
    """Starts at `peak` and multiplies by `factor` at each boundary.

    Boundaries are steps counted from the start of training, including the warm-up.
    """

    def decayed(step):
        passed = sum((step >= boundary).astype(step.dtype) for boundary in boundaries)
        return peak * jnp.power(factor, jnp.asarray(passed, step.dtype))

    return _warm_up(decayed, peak, warmup_steps)


def _warm_up(schedule: Schedule, peak: jax.typing.ArrayLike, warmup_steps: int) -> Schedule:
    """Replaces the first `warmup_steps` values by a linear rise from 0 towards `peak`."""

    def warmed_up(step):
        step = jnp.asarray(step, jnp.float32)
        rise = peak * step / max(1, warmup_steps)
        return jnp.where(step < warmup_steps, rise, schedule(step))

    return warmed_up


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The fields of a schedule's config."""

    name: Annotated[
        Literal['cosine', 'constant', 'step', 'plateau'],
        Field('Shape after the warm-up; plateau: falls where the training loss falls no more.'),
    ] = 'cosine'
    warmup: Annotated[int | str, Field('Duration of the linear rise from 0.', wants=DURATION)] = (
        '0 steps'
    )
    end_value: Annotated[
        float,
        Field(
            'cosine: the learning rate at the end; plateau: the lowest. Scaled as the learning '
            'rate is.',
            low=0,
        ),
    ] = 0.0
    boundaries: Annotated[
        Sequence[int | str],
        Field('step: the learning rate falls here.', wants=f'a list, each entry {DURATION}'),
    ] = ('30%', '60%', '80%')
    factor: Annotated[float, Field('step, plateau: the factor that it falls by.', above=0)] = 0.1
    every: Annotated[
        int | str,
        Field('plateau: the period whose mean training loss is compared.', wants=DURATION),
    ] = '1 epoch'
    patience: Annotated[
        int,
        Field('plateau: periods in a row without a lower loss before each fall.', low=1),
    ] = 10


def default_config() -> dict:
    """Returns every field of a schedule's config with its default."""
    return fields.defaults(fields.options(ScheduleConfig))


def create(
    config,
    peak: jax.typing.ArrayLike,
    *,
    steps_per_epoch: float,
    total_steps: int,
    scale: float = 1.0,
    key: str = 'schedule',
) -> Schedule:
    """Returns the schedule that a config describes; of 'plateau' without the falls, see `plateau`.

    Args:
        config: fields as in `ScheduleConfig`, all present.
        peak: the value after the warm-up, before any decay.
        steps_per_epoch: optimizer steps in one epoch; may be fractional.
        total_steps: steps of the whole training.
        scale: multiplies `end_value`, as `peak` has been multiplied already.
        key: the config's own key, for messages.

    Raises:
        UsageError: naming the field that is wrong.
    """

    fields.check(fields.options(ScheduleConfig), config, key, whole=True)
    in_steps = functools.partial(_in_steps, steps_per_epoch, total_steps, key)
    warmup_steps = in_steps(config['warmup'], 'warmup', minimum=0)
    end_value = config['end_value']
    if end_value and config['name'] not in ('cosine', 'plateau'):
        raise UsageError(
            f'{key}.end_value={end_value}: {key}.name={config["name"]!r} has no end; '
            "choose 'cosine' or 'plateau', or 0",
            f'{key}.end_value',
            f'{key}.name',
        )
    match config['name']:
        case 'cosine':
            return warmup_cosine(
                peak,
                total_steps=total_steps,
                warmup_steps=warmup_steps,
                end_value=end_value * scale,
            )
        case 'constant' | 'plateau':
            return constant(peak, warmup_steps=warmup_steps)
    boundaries = [in_steps(each, 'boundaries', minimum=1) for each in config['boundaries']]
    return step_decay(
        peak, boundaries=boundaries, factor=config['factor'], warmup_steps=warmup_steps
    )


def plateau(
    config: Mapping,
    peak: jax.typing.ArrayLike,
    *,
    steps_per_epoch: float,
    total_steps: int,
    scale: float = 1.0,
    key: str = 'schedule',
) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation that multiplies updates by the falls of 'plateau' so far.

    `optax.contrib.reduce_on_plateau`: the mean of `value`, the training loss, over each period is
    compared with the least so far. It counts as lower below 0.9999 of that. The arguments and
    errors are those of `create`, which gives the warm-up.
    """
    if config['factor'] >= 1:
        raise UsageError(
            f"{key}.factor={config['factor']}: must be below 1 for {key}.name='plateau'",
            f'{key}.factor',
        )
    period = _in_steps(steps_per_epoch, total_steps, key, config['every'], 'every', minimum=1)
    return optax.contrib.reduce_on_plateau(
        config['factor'],
        config['patience'],
        accumulation_size=period,
        min_scale=config['end_value'] and config['end_value'] * scale / peak,
    )


def plateau_scale(opt_state: optax.OptState) -> jax.typing.ArrayLike:
    """Returns what the last update was multiplied by through `plateau`; 1 without one."""
    state = optax.tree.get(opt_state, 'ReduceLROnPlateauState')
    return 1.0 if state is None else state.scale


def _in_steps(
    steps_per_epoch: float,
    total_steps: int,
    key: str,
    duration: int | str,
    field: str,
    minimum: int,
) -> int:
    """Returns a duration of a schedule in steps; raises a UsageError if the training is shorter."""
    steps = num_steps(
        duration,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        key=f'{key}.{field}',
        minimum=minimum,
    )
    if steps > total_steps:
        raise UsageError(
            f'{key}.{field}={duration!r} is {steps} steps, '
            f'longer than the whole training ({total_steps})',
            f'{key}.{field}',
        )
    return steps
