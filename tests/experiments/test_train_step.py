import dataclasses
import functools
import itertools
import pathlib
import re
import shutil
import tarfile
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.finetune import head_only
from experiments import train_step
from experiments.experiment import build, computed_per_device, init_variables
from experiments.run import parallel, step_metrics
from experiments.train import train
from experiments.train_step import (
    TrainState,
    compile_programs,
    init_state,
    make_eval_step,
    make_train_step,
)
from nfnets_jax import augment, optimizers
from tests.experiments.conftest import ONE_BLOCK, tiny_config
from tests.experiments.test_train import final_state

ROWS = 64


def batch(labels=None):
    """A made batch for `tiny`, placed on the devices."""
    rng = np.random.RandomState(0)
    return parallel.shard(
        {
            'image': rng.randint(0, 256, (ROWS, 8, 8, 3)).astype(np.uint8),
            'label': rng.randint(0, 10, ROWS).astype(np.int32) if labels is None else labels,
            'position': np.arange(ROWS, dtype=np.int32),
            'stop': np.zeros(jax.device_count(), np.float32),
        }
    )


_variables = {}


def begin(experiment):
    """The state before the first step; networks are initialized once for all tests."""
    config, shape = experiment.config, experiment.image_spec.shape
    key = f'{config.model.to_json_best_effort(sort_keys=True)} {config.seed} {shape}'
    if key not in _variables:
        init = jax.jit(lambda: init_variables(experiment.model, config.seed, shape))
        _variables[key] = jax.device_get(init())
    return parallel.replicate(init_state(experiment, _variables[key]))


class Steps(NamedTuple):
    """A training step, lowered and compiled, and the state after two of them."""

    lowered: jax.stages.Lowered
    compiled: jax.stages.Compiled
    state: TrainState


def two_steps(config):
    experiment = build(config)
    state = begin(experiment)
    lowered = make_train_step(experiment).lower(state, batch())
    compiled = lowered.compile()
    for _ in range(2):
        state, _ = compiled(state, batch())
    return Steps(lowered, compiled, jax.device_get(state))


@pytest.fixture(scope='module')
def plain():
    return two_steps(tiny_config())


@pytest.fixture(scope='module')
def low():
    return two_steps(tiny_config(gradient_dtype='bfloat16'))


@pytest.fixture(scope='module')
def head_alone():
    """Steps that train the head and leave the body as it is."""
    return two_steps(
        tiny_config(ema=0.9, optimizer__groups=FREEZE['body'], optimizer__schedule__name='constant')
    )


def test_parts_of_a_batch_add_up_to_the_whole(plain, tiny):
    whole, in_parts = plain.state, two_steps(tiny(accumulate=4)).state
    chex.assert_trees_all_close(in_parts.params, whole.params, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(
        step_metrics.means(in_parts.window), step_metrics.means(whole.window), rtol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    'changes',
    [
        {'sam__rho': 0.05, 'sam__ascent_fraction': 0.5},
        {'model': {'name': 'ResNet-8', 'cross_replica_axis': 'devices', **ONE_BLOCK}},
        {'model__stochdepth_rate': 0.5},
        {'precision': 'bfloat16', 'ema': 0.0},
    ],
    ids=['sam', 'batchnorm', 'stochastic_depth', 'bfloat16'],
)
def test_parts_go_with_every_way_to_train(tiny, changes):
    state = two_steps(tiny(accumulate=2, **changes)).state
    chex.assert_tree_all_finite(state)


def test_everything_is_averaged_over_the_devices_in_one_operation(plain):
    (averaged,) = re.findall(r'= (.*) all-reduce\(', plain.compiled.as_text())
    leaves = jax.tree.leaves(plain.state.params)
    assert averaged.count('f32[') == len(leaves) + 3  # loss, top-1, stop


def test_gradients_are_averaged_in_the_dtype_asked_for(low):
    program = low.lowered.as_text()
    averaged = re.findall(r'all_reduce"?\(.*?\) : \(tensor<(\w+)>', program, re.DOTALL)
    dtypes = [shape.split('x')[-1] for shape in averaged]
    assert dtypes.count('bf16') == len(jax.tree.leaves(low.state.params))


def test_low_precision_gradients_change_little(low, plain):
    means = step_metrics.means(low.state.window), step_metrics.means(plain.state.window)
    assert means[0]['loss'] == pytest.approx(means[1]['loss'], rel=1e-3)
    assert means[0]['gradient_norm'] != means[1]['gradient_norm']
    assert {x.dtype for x in jax.tree.leaves(low.state.params)} == {np.dtype('float32')}


def test_steps_that_are_not_finite_are_left_out_and_counted(tiny):
    experiment = build(tiny(skip_nonfinite=1, optimizer__schedule__name='constant'))
    augmentation = experiment.augmentation

    def broken(keys, images, labels):
        images, targets = augmentation(keys, images, jnp.abs(labels))
        return jnp.where(jnp.min(labels) < 0, jnp.nan, images), targets

    step, state = (
        make_train_step(dataclasses.replace(experiment, augmentation=broken)),
        begin(experiment),
    )
    bad = batch(np.full(ROWS, -1, np.int32))
    state, _ = step(state, batch())
    before = jax.device_get(state)

    state, _ = step(state, bad)
    after = jax.device_get(state)
    chex.assert_trees_all_equal(
        after._replace(step=before.step, window=before.window), before, strict=True
    )
    assert after.step == 2
    assert step_metrics.nonfinite_steps(after.window) == 1
    assert step_metrics.lost_at(after.window) is None

    state, _ = step(state, batch())
    assert np.any(jax.tree.leaves(state.params)[0] != jax.tree.leaves(before.params)[0])
    for _ in range(2):
        state, _ = step(state, bad)
    assert step_metrics.lost_at(state.window) == 5
    assert step_metrics.nonfinite_steps(state.window) == 3
    chex.assert_tree_all_finite(state.params)


def test_runs_that_differ_in_numbers_share_their_programs(tiny):
    programs = {}
    changes = {
        'seed': 1,
        'optimizer__learning_rate': 0.3,
        'optimizer__clip__clipping': 0.5,
        'optimizer__weight_decay': 0.1,
    }

    def two_steps_with(programs, **changes):
        experiment = build(tiny(**changes))
        init, step, _ = compile_programs(experiment, programs)
        state = parallel.replicate(init_state(experiment, init=init))
        for _ in range(2):
            state, _ = step(state, batch())
        return jax.device_get((state.params, step_metrics.means(state.window)))

    shared = [two_steps_with(programs, **config) for config in ({}, changes)]
    assert len(programs) == 1
    chex.assert_trees_all_equal(shared[1], two_steps_with({}, **changes))
    assert shared[0][1]['loss'] != shared[1][1]['loss']

    compile_programs(build(tiny(ema=0.9)), programs)
    assert len(programs) == 2


FREEZE = {
    'nothing': optimizers.PUBLISHED_GROUPS,
    'body': head_only(),
    'stem': ({'match': '.*/initial_conv/.*', 'freeze': True}, *optimizers.PUBLISHED_GROUPS),
}
# With these the update is the gradient. A smooth activation: at the kink of a ReLU float32 and
# float64 may go different ways.
PLAIN_SGD = {
    'model__activation': 'silu',
    'augment__shift': 0,
    'ema': 0.0,
    'optimizer__learning_rate': 1.0,
    'optimizer__scale_lr_by_batch': False,
    'optimizer__schedule__name': 'constant',
    'optimizer__momentum': 0.0,
    'optimizer__weight_decay': 0.0,
    'optimizer__clip__name': 'none',
}
RHO, ASCENT = 0.5, 0.45  # of 64 and 16 rows: 29 and 8, which parts of 16 and 4 divide and do not


@pytest.fixture
def few_devices(monkeypatch):
    """A function that leaves the first `count` of the test's devices."""

    def leave(count):
        local = jax.local_devices()[:count]
        monkeypatch.setattr(jax, 'local_devices', lambda: local)
        for name in ('device_count', 'local_device_count'):
            monkeypatch.setattr(jax, name, lambda: count)

    return leave


@functools.cache
def reference_gradient(freeze, rho, devices):
    """Returns the gradient over the trained parameters in float64, by module and name.

    One device computes it of the whole batch; for SAM it climbs by each share of it in turn.
    """
    experiment = build(tiny_config(optimizer__groups=FREEZE[freeze], **PLAIN_SGD))
    params = jax.device_get(init_state(experiment).params)
    rows = jax.device_get(batch())
    images = rows['image'].reshape(devices, ROWS // devices, 8, 8, 3).astype(np.float64)
    images = (images - augment.IMAGENET_MEAN) / augment.IMAGENET_STD
    labels = rows['label'].reshape(devices, -1)
    rest = {
        module: {
            k: v for k, v in leaves.items() if experiment.optimizer.groups[f'{module}/{k}'].freeze
        }
        for module, leaves in params.items()
    }
    trained = {
        module: {k: v.astype(np.float64) for k, v in leaves.items() if k not in rest[module]}
        for module, leaves in params.items()
    }

    def loss(trained, images, labels):
        whole = {module: {**rest[module], **trained[module]} for module in params}
        outputs, _ = experiment.model.apply(whole, {}, None, images, True)
        chances = jax.nn.log_softmax(outputs['logits'].astype(jnp.float64))
        return -jnp.mean(jnp.take_along_axis(chances, labels[:, None], axis=1))

    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(loss))
        total = jax.tree.map(np.zeros_like, trained)
        for images, labels in zip(images, labels, strict=True):  # noqa: B020, a device's share
            top = trained
            if rho:
                some = -(-len(images) * 45 // 100)
                ascent = jax.device_get(gradient(trained, images[:some], labels[:some]))
                norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(ascent)))
                top = jax.tree.map(lambda w, g, n=norm: w + rho * g / n, trained, ascent)
            share = jax.device_get(gradient(top, images, labels))
            total = jax.tree.map(lambda x, y: x + y / devices, total, share)
    return total


_QUICK = {('nothing', RHO, 4, 4), ('body', RHO, 4, 4)}


@pytest.mark.parametrize(
    ('freeze', 'rho', 'accumulate', 'devices'),
    [
        pytest.param(*case, marks=() if case in _QUICK else pytest.mark.slow)
        for case in itertools.product(FREEZE, (0.0, RHO), (1, 4), (1, 4))
    ],
)
def test_the_gradient_is_that_of_float64(freeze, rho, accumulate, devices, tiny, few_devices):
    reference = reference_gradient(freeze, rho, devices)
    few_devices(devices)
    experiment = build(
        tiny(
            optimizer__groups=FREEZE[freeze],
            accumulate=accumulate,
            sam__rho=rho,
            sam__ascent_fraction=ASCENT,
            **PLAIN_SGD,
        )
    )
    state = begin(experiment)
    before = jax.device_get(state.params)
    state, _ = make_train_step(experiment)(state, batch())
    after, sums = jax.device_get((state.params, state.window))
    gradient = jax.tree.map(lambda x, y: x.astype(np.float64) - y, before, after)
    error, size = 0.0, 0.0
    for module, leaves in gradient.items():
        for name, leaf in leaves.items():
            if name in reference[module]:
                error += np.sum((leaf - reference[module][name]) ** 2)
                size += np.sum(reference[module][name] ** 2)
            else:
                assert not leaf.any()
    assert np.sqrt(error / size) < 5e-6
    # What is logged is of the trained parameters, too.
    assert sums['gradient_norm'] == pytest.approx(np.sqrt(size), rel=1e-5)


@pytest.mark.slow
def test_with_sam_the_number_of_devices_makes_a_difference():
    """The gradient at four ascents of 16 examples is another than that at one of 64."""
    one, other = (
        jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
        for tree in (reference_gradient('nothing', RHO, 1), reference_gradient('nothing', RHO, 4))
    )
    assert jnp.linalg.norm(one - other) > 0.02 * jnp.linalg.norm(one)


def test_frozen_parameters_cost_a_forward_pass_and_no_all_reduce(head_alone, plain):
    head, whole = (steps.compiled.cost_analysis()['flops'] for steps in (head_alone, plain))
    assert head < 0.45 * whole
    (averaged,) = re.findall(r'= (.*) all-reduce\(', head_alone.compiled.as_text())
    assert averaged.count('f32[') == 2 + 3  # the head's w and b; loss, top-1, stop


@pytest.mark.parametrize('skip_nonfinite', [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_frozen_parameter_whose_gradient_would_be_lost_does_not_matter(tiny, skip_nonfinite):
    """The square root of a frozen 0 has no gradient, and none is taken."""
    experiment = build(tiny(optimizer__groups=FREEZE['stem'], skip_nonfinite=skip_nonfinite))
    stem = 'NF_ResNet/~/initial_conv'

    def apply(params, *args):
        outputs, state = experiment.model.apply(params, *args)
        root = jnp.sum(jnp.sqrt(params[stem]['bias']))
        return outputs | {'logits': outputs['logits'] + root}, state

    state = begin(experiment)
    assert not state.params[stem]['bias'].any()
    state, _ = make_train_step(
        dataclasses.replace(experiment, model=experiment.model._replace(apply=apply))
    )(state, batch())
    assert step_metrics.nonfinite_steps(state.window) == 0
    chex.assert_tree_all_finite(state.params)


def test_the_average_of_frozen_parameters_is_the_parameters(head_alone):
    state = head_alone.state
    head = 'NF_ResNet/~/linear'
    average, params = (
        {module: leaves for module, leaves in tree.items() if module != head}
        for tree in (state.ema_params, state.params)
    )
    chex.assert_trees_all_equal(average, params)
    assert np.any(state.ema_params[head]['b'] != state.params[head]['b'])


def test_a_run_with_frozen_parameters_of_an_earlier_version_goes_on(tiny, tmp_path):
    """Of 8 steps, saved at 4 and 8 when gradients were still taken of all parameters."""
    stored = pathlib.Path(__file__).parents[1] / 'golden' / 'run-with-frozen-parameters.tar.gz'
    with tarfile.open(stored) as archive:
        archive.extractall(tmp_path, filter='data')
    before = final_state(tmp_path)
    assert before.step == 8
    shutil.rmtree(tmp_path / 'checkpoints' / '8')
    config = tiny(
        duration='8 steps',
        augment__shift=0,
        eval__every='4 steps',
        checkpoint__every='4 steps',
        optimizer__groups=FREEZE['body'],
    )
    train(config, tmp_path, quiet=True)
    after = final_state(tmp_path)
    assert after.step == 8
    # The momentum alone: what AGC reports on the last update was a dict once, and is not kept.
    states = (
        (state.params, state.ema_params, optax.tree.get(state.opt_state, 'trace'))
        for state in (after, before)
    )
    chex.assert_trees_all_close(*states, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ('changes', 'named'),
    [
        ({}, []),
        ({'sam__rho': 0.05}, ['the ascent of SAM']),
        ({'model': {'name': 'ResNet-8', **ONE_BLOCK}}, ['the statistics of batch norm']),
        ({'model': {'name': 'ResNet-8', 'cross_replica_axis': 'devices', **ONE_BLOCK}}, []),
        ({'model__drop_rate': 0.1, 'model__stochdepth_rate': 0.1}, ['dropout', 'stochastic depth']),
    ],
)
def test_what_depends_on_the_number_of_devices_is_known(tiny, changes, named):
    experiment = build(tiny(**changes))
    state = jax.eval_shape(lambda: init_state(experiment)).state
    assert computed_per_device(experiment.config, has_statistics=bool(state)) == named


@pytest.fixture
def split_cpu(monkeypatch):
    """The four devices of the tests count as the cores of one CPU."""
    monkeypatch.setattr(parallel, '_cpu_is_split', True)


@pytest.mark.parametrize(
    ('changes', 'cores'),
    [
        ({}, 4),
        ({'model': {'name': 'ResNet-8', **ONE_BLOCK}}, 4),
        ({'batch_size': 40}, 2),  # 10 images a core could not be mixed
        ({'batch_size': 62}, 1),
        ({'accumulate': 2}, 1),
        ({'sam__rho': 0.05}, 1),
        ({'model__stochdepth_rate': 0.1}, 1),
    ],
)
def test_as_many_cores_train_as_leave_the_result_alone(tiny, split_cpu, changes, cores):
    assert len(build(tiny(**changes)).devices) == cores


def test_the_cores_of_a_cpu_compute_what_one_device_does(tiny, split_cpu):
    """Batch norm included: its statistics are those of the whole batch."""
    config = tiny(model={'name': 'ResNet-8', **ONE_BLOCK}, augment__mixup=0.2)
    cores = two_steps(config).state
    assert parallel.device_count() == 4
    with parallel.using(jax.devices()[:1]):
        one = two_steps(config).state
    chex.assert_trees_all_close(cores.params, one.params, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(cores.state, one.state, rtol=1e-4, atol=1e-5)


MIXED = {
    'augment__flip': True,
    'augment__mixup': 0.2,
    'augment__cutmix': 1.0,
    'augment__erasing': 0.5,
    'augment__label_smoothing': 0.1,
}


@pytest.mark.parametrize('precision', [pytest.param('float32', marks=pytest.mark.slow), 'bfloat16'])
@pytest.mark.parametrize(
    'changes',
    [
        {'augment__randaugment_layers': 2, 'accumulate': 2, 'skip_nonfinite': 1, **MIXED}
        | {'sam__rho': 0.05, 'sam__ascent_fraction': 0.3},
        {'augment__autoaugment': True, 'augment__mix_first': False, **MIXED},
        {'optimizer__name': 'adam', 'optimizer__clip__name': 'global_norm'}
        | {'optimizer__schedule__name': 'step', 'optimizer__schedule__warmup': '2 steps'},
        {'optimizer__name': 'adamw', 'optimizer__clip__name': 'leaf_norm'}
        | {'optimizer__groups': FREEZE['stem'], 'gradient_dtype': 'bfloat16'},
        {'model': {'name': 'ResNet-8', **ONE_BLOCK}},
        {'model': {'name': 'NF-ResNet-8', 'widths': (8,), 'depths': (7,)}}
        | {'model__scan': True, 'model__remat': True},
        {'model': {'name': 'NFNet-F0', 'widths': (16,), 'group_size': 8, 'depths': (2,)}}
        | {'model__drop_rate': 0.2, 'model__stochdepth_rate': 0.1},
    ],
    ids=['randaugment', 'autoaugment', 'adam', 'adamw', 'batchnorm', 'scan', 'nfnet'],
)
def test_the_steps_trace_under_strict_promotion(tiny, changes, precision):
    # Keys of a model that is given whole come after it.
    experiment = build(tiny(precision=precision, **changes))
    shapes = jax.eval_shape(batch)
    with jax.numpy_dtype_promotion('strict'):
        state = jax.eval_shape(lambda: init_state(experiment))
        after, _ = jax.eval_shape(make_train_step(experiment), state, shapes)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        mask = jax.ShapeDtypeStruct(shapes['label'].shape, jnp.float32)
        found = jax.eval_shape(
            make_eval_step(experiment),
            state.variables(),
            shapes | {'mask': mask, 'index': shapes['position']},
        )
    assert found['sums']
    assert {leaf.dtype for leaf in jax.tree.leaves(found['sums'])} == {np.dtype('float32')}


def test_a_state_has_the_same_dtypes_under_x64(tiny):
    """Or a run could not go on without the flag, or with it."""
    experiment = build(tiny(model={'name': 'ResNet-8', **ONE_BLOCK}, optimizer__name='adam'))
    state = jax.eval_shape(lambda: init_state(experiment))
    with jax.enable_x64(True):
        chex.assert_trees_all_equal_shapes_and_dtypes(
            jax.eval_shape(lambda: init_state(experiment)), state
        )


@pytest.mark.parametrize('classes', [3, 9, 10])
def test_top_5_is_left_out_under_ten_classes(classes):
    logits = np.random.default_rng(0).normal(size=(32, classes)).astype(np.float32)
    labels, mask = np.arange(32) % classes, (np.arange(32) < 30).astype(np.float32)
    metrics = jax.jit(train_step._metrics)(logits, labels, mask)
    sums = {name: np.sum(values) for name, values in metrics.items()}
    ranked = np.argsort(-logits, axis=1)[:30]
    expected = {f'top{k}': np.sum(ranked[:, :k] == labels[:30, None]) for k in (1, 5)}
    if classes < 10:
        del expected['top5']
    assert {name: value for name, value in sums.items() if 'top' in name} == expected
