import math

import chex
import jax
import numpy as np
import optax
import pytest

from nfnets_jax import schedules
from nfnets_jax.errors import UsageError


@pytest.mark.parametrize(
    ('duration', 'steps'),
    [
        (500, 500),
        ('500', 500),
        ('500 steps', 500),
        ('1 step', 1),
        ('30 epochs', 300),
        ('2.5 epochs', 25),
        ('.25 epochs', 2),  # 2.5 rounds to even
        ('1 Epoch', 10),
        ('10%', 20),
        ('50%', 100),
        ('0.7 %', 1),
        (' 7 steps ', 7),
        ('0.1%', 1),
        ('0.001%', 1),
    ],
)
def test_durations(duration, steps):
    assert schedules.num_steps(duration, steps_per_epoch=10, total_steps=200) == steps


@pytest.mark.parametrize(
    ('duration', 'message'),
    [
        (0, 'at least 1'),
        (-3, 'at least 1'),
        ('-1 epochs', 'at least 1'),
        ('-0.01 epochs', 'at least 1'),
        ('0.01 epochs', 'is 0 steps'),
        ('0%', 'at least 1'),
        (2**31, 'at most 2147483647'),
        ('1e9 epochs', 'like'),
        ('999999999 epochs', 'at most'),
        ('2.5 steps', 'whole'),
        ('3 epoches', "did you mean 'epochs'"),
        ('3 furlongs', 'unknown unit'),
        ('soon', 'like'),
        ('', 'like'),
        ('nan epochs', 'like'),
        (2.0, 'like'),
        (True, 'like'),
        (None, 'like'),
    ],
)
def test_bad_durations_name_their_key(duration, message):
    with pytest.raises(UsageError, match=message) as error:
        schedules.num_steps(duration, steps_per_epoch=10, total_steps=200, key='train.length')
    assert str(error.value).startswith('train.length=')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('one', 'other'),
    [
        ('40 epoch', '40 epochs'),
        ('40epochs', '40.0 Epochs'),
        ('50 %', '50%'),
        (500, '500 steps'),
        ('500', '500 step'),
        ('.5 epochs', '0.50 epochs'),
    ],
)
def test_spellings_of_one_duration_are_one(one, other):
    assert schedules.canonical_duration(one) == schedules.canonical_duration(other)
    told = schedules.num_steps(one, steps_per_epoch=10, total_steps=200)
    canonical = schedules.canonical_duration(one)
    assert schedules.num_steps(canonical, steps_per_epoch=10, total_steps=200) == told


@pytest.mark.parametrize(('one', 'other'), [('5 epochs', '5 steps'), ('5%', 5), ('1.5%', '1%')])
def test_durations_that_differ_stay_apart(one, other):
    assert schedules.canonical_duration(one) != schedules.canonical_duration(other)


@pytest.mark.parametrize(
    ('given', 'unit'), [('40ep', 'epochs'), ('3 iters', 'steps'), ('5 percent', '%')]
)
def test_units_of_other_trainers_are_understood_in_the_hint(given, unit):
    with pytest.raises(UsageError, match=f"did you mean '{unit}'"):
        schedules.num_steps(given, steps_per_epoch=10)


def test_percent_needs_a_whole():
    with pytest.raises(UsageError, match='no meaning'):
        schedules.num_steps('10%', steps_per_epoch=10)


def test_a_percentage_never_rounds_to_nothing_but_zero_percent_does():
    for minimum in (0, 1):
        assert schedules.num_steps('1%', steps_per_epoch=10, total_steps=6, minimum=minimum) == 1
    assert schedules.num_steps('0%', steps_per_epoch=10, total_steps=6, minimum=0) == 0


def test_absent_warmup_is_allowed_but_not_a_negative_one():
    assert schedules.num_steps(0, steps_per_epoch=10, minimum=0) == 0
    with pytest.raises(UsageError, match='at least 0'):
        schedules.num_steps('-0.01 epochs', steps_per_epoch=10, minimum=0)


def test_warmup_cosine_by_value():
    schedule = schedules.warmup_cosine(0.05, total_steps=6, warmup_steps=2)
    expected = [0, 0.025, 0.05, 0.025 * (1 + math.cos(math.pi / 4)), 0.025]
    expected += [0.025 * (1 - math.cos(math.pi / 4)), 0, 0]
    chex.assert_trees_all_close([float(schedule(i)) for i in range(8)], expected, atol=1e-8)


def test_cosine_ends_at_its_end_value():
    schedule = schedules.warmup_cosine(0.4, total_steps=12, warmup_steps=2, end_value=0.001)
    expected = [0, 0.2, 0.4, 0.2005, 0.001, 0.001]
    chex.assert_trees_all_close(
        [float(schedule(i)) for i in (0, 1, 2, 7, 12, 20)], expected, rtol=1e-6
    )
    optax_schedule = optax.warmup_cosine_decay_schedule(0.0, 0.4, 2, 12, end_value=0.001)
    steps = np.arange(14)
    chex.assert_trees_all_close(
        jax.vmap(schedule)(steps), jax.vmap(optax_schedule)(steps), rtol=1e-6, atol=1e-7
    )


def test_the_end_value_is_scaled_as_the_peak_is():
    config = schedules.default_config() | {'end_value': 0.01}
    schedule = schedules.create(config, 0.8, steps_per_epoch=1, total_steps=10, scale=4.0)
    chex.assert_trees_all_close(float(schedule(10)), 0.04, rtol=1e-6)


def test_cosine_without_warmup_starts_at_the_peak():
    schedule = schedules.warmup_cosine(2.0, total_steps=10)
    chex.assert_trees_all_close(
        [float(schedule(i)) for i in (0, 5, 10)], [2.0, 1.0, 0.0], atol=1e-6
    )


def test_warmup_for_the_whole_training_is_finite():
    schedule = schedules.warmup_cosine(1.0, total_steps=4, warmup_steps=4)
    assert [float(schedule(i)) for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]


def test_constant_by_value():
    schedule = schedules.constant(0.5, warmup_steps=2)
    assert [float(schedule(i)) for i in (0, 1, 2, 1000)] == [0, 0.25, 0.5, 0.5]
    assert float(schedules.constant(0.5)(0)) == 0.5


def test_step_decay_by_value():
    schedule = schedules.step_decay(1.0, boundaries=(4, 6), factor=0.5, warmup_steps=2)
    values = [float(schedule(i)) for i in range(8)]
    assert values == [0, 0.5, 1, 1, 0.5, 0.5, 0.25, 0.25]


def falls(losses, period, patience, factor, floor=0.0):
    """Returns the factor of the rate at each loss: Keras' ReduceLROnPlateau, in plain Python."""
    scale, best, bad, scales = 1.0, np.inf, 0, []
    for end in range(1, len(losses) + 1):
        if end % period == 0:
            mean = sum(losses[end - period : end]) / period
            lower = mean < best * (1 - 1e-4)
            best, bad = (mean, 0) if lower else (best, bad + 1)
            if bad == patience:
                scale, bad = max(scale * factor, floor), 0
        scales.append(scale)
    return scales


@pytest.mark.parametrize(('period', 'patience', 'end_value'), [(1, 1, 0.0), (5, 2, 0.03)])
def test_plateau_falls_as_the_rule_says(period, patience, end_value):
    options = {'every': f'{period / 10} epochs', 'patience': patience, 'factor': 0.5}
    config = schedules.default_config() | {'name': 'plateau', 'end_value': end_value} | options
    durations = {'steps_per_epoch': 10, 'total_steps': 60}
    losses = np.exp(-np.arange(60) / 20).clip(0.3) + np.random.default_rng(0).normal(0, 0.05, 60)
    update = jax.jit(lambda *args, peak, value: make(peak).update(*args, value=value))

    def make(peak):
        return schedules.plateau(config, peak, scale=2.0, **durations)

    state, found = make(0.4).init(np.float32(0)), []
    for loss in losses:
        factor, state = update(np.float32(1), state, peak=np.float32(0.4), value=np.float32(loss))
        assert factor == schedules.plateau_scale(state)
        found.append(float(factor))
    expected = falls(losses.tolist(), period, patience, 0.5, floor=2 * end_value / 0.4)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert len(set(expected)) > 2
    assert min(found) > 0.1 or not end_value  # 0.15, where it would have been 0.125


def test_without_a_plateau_nothing_is_scaled():
    batch_norm = {'bn': {'scale': np.ones(2, np.float32)}}
    assert schedules.plateau_scale(optax.sgd(0.1, 0.9).init(batch_norm)) == 1


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'factor': 1.0}, r"schedule\.factor=1\.0: must be below 1 for schedule\.name='plateau'"),
        ({'every': '11 epochs'}, r"schedule\.every='11 epochs' is 110 steps, longer than .*100"),
    ],
)
def test_plateau_names_the_wrong_field(change, message):
    config = schedules.default_config() | {'name': 'plateau'} | change
    with pytest.raises(UsageError, match=message):
        schedules.plateau(config, 0.1, steps_per_epoch=10, total_steps=100)


@pytest.mark.parametrize('name', ['cosine', 'constant', 'step', 'plateau'])
def test_schedules_agree_inside_and_outside_of_jit(name):
    config = schedules.default_config() | {'name': name, 'warmup': '10%'}
    schedule = schedules.create(config, 0.1, steps_per_epoch=10, total_steps=100)
    steps = np.arange(101)
    inside = jax.jit(jax.vmap(schedule))(steps)
    chex.assert_type(inside, np.float32)
    outside = np.stack([schedule(int(step)) for step in steps])
    chex.assert_trees_all_close(inside, outside, rtol=1e-5, atol=1e-9)
    assert inside[0] == 0
    assert inside[10] == np.float32(0.1)


def test_create_reads_durations():
    config = schedules.default_config() | {
        'name': 'step',
        'warmup': '1 epoch',
        'boundaries': ('50%', '8 epochs'),
    }
    schedule = schedules.create(config, 1.0, steps_per_epoch=10, total_steps=100)
    values = [float(schedule(i)) for i in (5, 10, 49, 50, 79, 80)]
    chex.assert_trees_all_close(values, [0.5, 1.0, 1.0, 0.1, 0.1, 0.01], rtol=1e-6)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'name': 'cosinus'}, r"schedule\.name='cosinus'.*did you mean 'cosine'"),
        ({'warmup': '11 epochs'}, r"schedule\.warmup='11 epochs' is 110 steps, longer than .*100"),
        ({'warmup': -1}, r'schedule\.warmup=-1'),
        ({'end_value': -0.1}, r'schedule\.end_value=-0\.1: must be a number of at least 0'),
        ({'end_value': True}, r'schedule\.end_value=True: must be a number'),
        ({'name': 'step', 'end_value': 0.1}, r"end_value=0\.1: schedule\.name='step' has no end"),
        ({'name': 'step', 'factor': 0.0}, r'schedule\.factor=0\.0'),
        ({'name': 'plateau', 'patience': 0}, r'schedule\.patience=0: must be an integer of at lea'),
        ({'name': 'step', 'boundaries': ('5 parsecs',)}, r"schedule\.boundaries='5 parsecs'"),
    ],
)
def test_create_names_the_wrong_field(change, message):
    config = schedules.default_config() | change
    with pytest.raises(UsageError, match=message):
        schedules.create(config, 0.1, steps_per_epoch=10, total_steps=100)
