import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from nfnets_jax import optimizers, schedules
from nfnets_jax.errors import UsageError

PARAM_TREES = pathlib.Path(__file__).parent / 'golden' / 'param_trees'
MODELS = sorted(path.stem for path in PARAM_TREES.glob('*.json'))

# A model in miniature: one of every kind of parameter the groups distinguish.
SHAPES = {
    'Net/~/conv': {'w': (3, 3, 2, 4), 'gain': (4,), 'bias': (4,)},
    'Net/~/block': {'skip_gain': ()},
    'Net/~/block/~/squeeze_excite/~/linear': {'w': (4, 2), 'b': (2,)},
    'Net/~/linear': {'w': (4, 3), 'b': (3,)},
}


def _trees(count, seed=0, scale=1.0):
    """Returns `count` trees of random f32 leaves with the shapes above."""
    rng = np.random.default_rng(seed)
    return [
        {
            module: {
                name: np.asarray(scale * rng.standard_normal(shape), np.float32)
                for name, shape in leaves.items()
            }
            for module, leaves in SHAPES.items()
        }
        for _ in range(count)
    ]


def _config(**changes):
    config = ml_collections.ConfigDict(optimizers.default_config())
    config.scale_lr_by_batch = False
    config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
    return config


def _create(config, params=None, batch_size=256):
    params = _trees(1)[0] if params is None else params
    return optimizers.create(
        config, params, batch_size=batch_size, steps_per_epoch=2, total_steps=8
    )


def _train(optimizer, params, gradients):
    """Returns the parameters after every update, and the last state."""
    params = jax.tree.map(jnp.asarray, params)
    opt_state = optimizer.transformation.init(params)

    @jax.jit
    def step(params, opt_state, gradient):
        updates, opt_state = optimizer.transformation.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    trajectory = []
    for gradient in gradients:
        params, opt_state = step(params, opt_state, gradient)
        trajectory.append(params)
    return trajectory, opt_state


def _agc_float64(w, g, clipping, eps):
    """Equation 3 of arXiv 2102.06171 with output units along the last axis, in float64."""
    axes = tuple(range(w.ndim - 1)) if w.ndim > 1 else None
    w_norm = np.sqrt(np.sum(w**2, axis=axes, keepdims=True))
    g_norm = np.sqrt(np.sum(g**2, axis=axes, keepdims=True))
    limit = clipping * np.maximum(w_norm, eps)
    return np.where(g_norm > limit, g * limit / np.maximum(g_norm, 1e-30), g)


@pytest.mark.parametrize('nesterov', [True, False])
def test_published_chain_equals_the_float64_formula(nesterov):
    params, *gradients = _trees(8, scale=0.1)
    decay, momentum = 0.3, 0.9  # a large decay, so that clipping it by mistake would show
    config = _config(weight_decay=decay, momentum=momentum, nesterov=nesterov)
    config.schedule.warmup = '1 epoch'
    trajectory, _ = _train(_create(config), params, gradients)

    w = jax.tree.map(np.float64, params)
    buffer = jax.tree.map(np.zeros_like, w)
    learning_rates = [0, 0.05] + [0.05 * (1 + np.cos(np.pi * i / 6)) for i in range(5)]
    for i, gradient in enumerate(gradients):
        for module, leaves in SHAPES.items():
            for name in leaves:
                g = np.float64(gradient[module][name])
                if (module, name) != ('Net/~/linear', 'w'):
                    g = _agc_float64(w[module][name], g, 0.01, 1e-3)
                if name == 'w':
                    g = g + decay * w[module][name]
                v = buffer[module][name] = momentum * buffer[module][name] + g
                step = g + momentum * v if nesterov else v
                w[module][name] = w[module][name] - learning_rates[i] * step
        chex.assert_trees_all_close(trajectory[i], w, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('name', ['adam', 'adamw'])
def test_adam_decays_inside_or_outside(name):
    params, *gradients = _trees(4)
    config = _config(
        name=name,
        weight_decay=0.1,
        learning_rate=0.01,
        clip__name='none',
        schedule__name='constant',
    )
    trajectory, _ = _train(_create(config), params, gradients)

    w = jax.tree.map(np.float64, params)
    m, v = jax.tree.map(np.zeros_like, w), jax.tree.map(np.zeros_like, w)
    for t, gradient in enumerate(gradients, start=1):
        for module, leaves in SHAPES.items():
            for leaf in leaves:
                p, g = w[module][leaf], np.float64(gradient[module][leaf])
                decayed = 0.1 * p if leaf == 'w' else 0
                g = g + decayed if name == 'adam' else g
                m[module][leaf] = 0.9 * m[module][leaf] + 0.1 * g
                v[module][leaf] = 0.999 * v[module][leaf] + 0.001 * g**2
                step = m[module][leaf] / (1 - 0.9**t)
                step = step / (np.sqrt(v[module][leaf] / (1 - 0.999**t)) + 1e-8)
                step = step + decayed if name == 'adamw' else step
                w[module][leaf] = p - 0.01 * step
    chex.assert_trees_all_close(trajectory[-1], w, rtol=1e-4, atol=1e-6)


def _first_update(config, params, gradient):
    """Returns minus the first update, which with these settings is the clipped gradient."""
    config.update(
        {
            'learning_rate': 1.0,
            'momentum': 0.0,
            'weight_decay': 0.0,
            'schedule': {'name': 'constant'},
        }
    )
    transformation = _create(config, params).transformation
    updates, opt_state = jax.jit(transformation.update)(
        gradient, transformation.init(params), params
    )
    return jax.tree.map(lambda x: -np.asarray(x), updates), opt_state


def test_layer_wise_clipping_takes_one_norm_for_each_parameter():
    params, gradient = _trees(2)
    clipped, _ = _first_update(_config(clip__unitwise=False), params, gradient)
    w, g = (np.float64(tree['Net/~/conv']['w']).reshape(-1) for tree in (params, gradient))
    expected = _agc_float64(w, g, 0.01, 1e-3).reshape(3, 3, 2, 4)
    np.testing.assert_allclose(clipped['Net/~/conv']['w'], expected, rtol=1e-5)


@pytest.mark.parametrize('clip', ['agc', 'global_norm', 'leaf_norm'])
def test_numbers_may_be_data_of_a_compiled_program(clip):
    params, gradient = _trees(2)
    other = {'learning_rate': 0.3, 'weight_decay': 0.2, 'clip__clipping': 0.05}
    here, there = _create(_config(clip__name=clip)), _create(_config(clip__name=clip, **other))

    @jax.jit
    def first_two_updates(numbers):
        transformation = here.with_hyperparameters(numbers)
        opt_state = transformation.init(params)
        for _ in range(2):
            updates, opt_state = transformation.update(gradient, opt_state, params)
        return updates

    for optimizer in (here, there):
        updates = first_two_updates(jax.tree.map(jnp.float32, optimizer.hyperparameters))
        opt_state = optimizer.transformation.init(params)
        update = jax.jit(optimizer.transformation.update)
        for _ in range(2):
            expected, opt_state = update(gradient, opt_state, params)
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    assert first_two_updates._cache_size() == 1


@pytest.mark.parametrize('per_leaf', [False, True])
def test_a_norm_that_is_nan_counts_as_clipped_and_spreads(per_leaf):
    tx = optimizers.clip_by_norm(1.0, per_leaf=per_leaf)
    grads = {'bad': jnp.array([jnp.nan, 1.0]), 'good': jnp.array([0.5])}
    updates, state = tx.update(grads, tx.init(grads))
    assert np.isnan(updates['bad']).all()
    assert np.isnan(updates['good']).all() == (not per_leaf)
    assert state.clipped_fraction == (0.5 if per_leaf else 1)


def test_global_norm_leaves_out_what_is_not_clipped():
    params, gradient = _trees(2)
    config = _config(clip__name='global_norm', clip__clipping=0.5)
    clipped, opt_state = _first_update(config, params, gradient)
    head, head_clipped = gradient['Net/~/linear'].pop('w'), clipped['Net/~/linear'].pop('w')
    chex.assert_trees_all_equal(head, head_clipped)
    norm = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in jax.tree.leaves(gradient)))
    chex.assert_trees_all_close(
        clipped, jax.tree.map(lambda g: g * 0.5 / norm, gradient), rtol=1e-5
    )
    assert optax.tree.get(opt_state, 'clipped_fraction') == 1


def test_leaf_norm_clips_each_leaf_by_itself():
    params, gradient = _trees(2)
    gradient['Net/~/block']['skip_gain'] = jnp.float32(0.1)
    gradient['Net/~/conv']['gain'][:] = 0
    config = _config(clip__name='leaf_norm', clip__clipping=0.5)
    clipped, opt_state = _first_update(config, params, gradient)
    chex.assert_trees_all_equal(clipped['Net/~/block'], gradient['Net/~/block'])
    chex.assert_trees_all_equal(clipped['Net/~/conv']['gain'], np.zeros(4, np.float32))
    for leaf in jax.tree.leaves(clipped['Net/~/block/~/squeeze_excite/~/linear']):
        np.testing.assert_allclose(np.linalg.norm(leaf), 0.5, rtol=1e-6)
    # 8 leaves, of which the classifier's weight is not looked at, and 2 were small enough.
    np.testing.assert_allclose(optax.tree.get(opt_state, 'clipped_fraction'), 5 / 7)


def test_agc_reports_its_clipped_fraction():
    params, gradient = _trees(2)
    _, all_clipped = _first_update(_config(), params, gradient)
    tiny = jax.tree.map(lambda g: jnp.float32(1e-6) * g, gradient)
    passed, none_clipped = _first_update(_config(), params, tiny)
    assert optax.tree.get(all_clipped, 'clipped_fraction') == 1
    assert optax.tree.get(none_clipped, 'clipped_fraction') == 0
    chex.assert_trees_all_equal(passed, tiny)


def test_no_clipping_passes_gradients_unchanged():
    params, gradient = _trees(2)
    passed, opt_state = _first_update(_config(clip__name='none'), params, gradient)
    chex.assert_trees_all_equal(passed, gradient)
    assert optax.tree.get(opt_state, 'clipped_fraction') is None


@pytest.mark.parametrize(
    ('name', 'clip'),
    [
        ('sgd', 'agc'),
        ('sgd', 'global_norm'),
        ('sgd', 'none'),
        ('adam', 'leaf_norm'),
        ('adamw', 'agc'),
    ],
)
def test_frozen_parameters_rest_and_cost_nothing(name, clip):
    params, *gradients = _trees(4)
    rules = ({'match': '.*conv/.*', 'freeze': True}, *optimizers.PUBLISHED_GROUPS)
    config = _config(name=name, clip__name=clip, clip__clipping=0.5, groups=rules)
    trajectory, opt_state = _train(_create(config), params, gradients)
    chex.assert_trees_all_equal(trajectory[-1]['Net/~/conv'], params['Net/~/conv'])
    conv_shapes = {leaf.shape for leaf in jax.tree.leaves(params['Net/~/conv'])}
    assert not conv_shapes & {leaf.shape for leaf in jax.tree.leaves(opt_state)}

    # What is left trains exactly as if the frozen parameters did not exist.
    rest = [{k: v for k, v in tree.items() if k != 'Net/~/conv'} for tree in (params, *gradients)]
    config.groups = optimizers.PUBLISHED_GROUPS
    alone, _ = _train(_create(config, rest[0]), rest[0], rest[1:])
    left = {k: v for k, v in trajectory[-1].items() if k != 'Net/~/conv'}
    chex.assert_trees_all_close(left, alone[-1], rtol=1e-6)


@pytest.mark.parametrize('name', ['sgd', 'adam'])
def test_the_trained_part_alone_updates_like_the_whole(name):
    params, *gradients = _trees(4)
    rules = ({'match': '.*(conv|linear)/b.*', 'freeze': True}, *optimizers.PUBLISHED_GROUPS)
    optimizer = _create(_config(name=name, groups=rules))
    trajectory, opt_state = _train(optimizer, params, gradients)

    trained, frozen = optimizers.partition(params, optimizer.groups)
    names = [optimizers._name(path) for path, _ in jax.tree.leaves_with_path(frozen)]
    assert names == [
        *('Net/~/block/~/squeeze_excite/~/linear/b', 'Net/~/conv/bias', 'Net/~/linear/b')
    ]
    assert len(jax.tree.leaves(trained)) == len(jax.tree.leaves(params)) - 3
    chex.assert_trees_all_equal(optimizers.combine(trained, frozen), params)

    part = [optimizers.partition(tree, optimizer.groups)[0] for tree in gradients]
    alone, state = _train(optimizer, trained, part)
    # Equal in structure too, so that either can be saved and the other be restored.
    chex.assert_trees_all_equal(state, opt_state, strict=True)
    chex.assert_trees_all_equal(optimizers.combine(alone[-1], frozen), trajectory[-1])


def test_training_the_classifier_alone():
    params, *gradients = _trees(3)
    head = {'match': '[^/]+/~/linear/.*', 'clip': False, 'decay': False}
    rest = {'match': '.*', 'freeze': True}
    for clip in ('agc', 'global_norm', 'leaf_norm'):
        with pytest.raises(UsageError, match=f"optimizer.clip.name='{clip}' clips nothing.*'none'"):
            _create(_config(clip__name=clip, groups=(head, rest)))
    trajectory, _ = _train(
        _create(_config(clip__name='none', groups=(head, rest))), params, gradients
    )
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), params, trajectory[-1])
    assert {name for name, leaves in moved.items() if any(leaves.values())} == {'Net/~/linear'}
    with pytest.raises(UsageError, match=r'optimizer\.groups freezes every parameter'):
        _create(_config(groups=(rest,)))


def test_lr_scale_multiplies_the_step_of_its_group_alone():
    params, *gradients = _trees(4)
    rules = [{'match': r'Net/~/linear/b', 'decay': False}, *optimizers.PUBLISHED_GROUPS]
    plain, _ = _train(_create(_config(groups=tuple(rules), clip__name='none')), params, gradients)
    rules[0] = rules[0] | {'lr_scale': 10.0}
    scaled, _ = _train(_create(_config(groups=tuple(rules), clip__name='none')), params, gradients)
    steps = [
        np.asarray(tree[-1]['Net/~/linear'].pop('b')) - params['Net/~/linear']['b']
        for tree in (plain, scaled)
    ]
    np.testing.assert_allclose(steps[1], 10 * steps[0], rtol=1e-4)
    chex.assert_trees_all_equal(plain[-1], scaled[-1])


def test_parameters_that_are_frozen_at_first_wait_for_their_step():
    """Gradients do not depend on parameters here, so that updates are those of the plain run."""
    params, *gradients = _trees(6)
    quiet = {'clip__name': 'none', 'weight_decay': 0.0, 'schedule__warmup': '1 steps'}
    plain, plain_state = _train(_create(_config(**quiet)), params, gradients)
    head, *body = optimizers.PUBLISHED_GROUPS
    rules = (head, *(rule | {'freeze_for': '25%'} for rule in body))  # 2 of 8 steps
    optimizer = _create(_config(groups=rules, **quiet))
    trajectory, state = _train(optimizer, params, gradients)
    plain, trajectory = jax.device_get((plain, trajectory))
    for step, tree in enumerate(trajectory, 1):
        chex.assert_trees_all_equal(tree['Net/~/linear']['w'], plain[step - 1]['Net/~/linear']['w'])
        missed = plain[min(step, 2) - 1]['Net/~/conv']
        expected = jax.tree.map(
            lambda start, now, missed: start + (now - missed),
            *(params['Net/~/conv'], plain[step - 1]['Net/~/conv'], missed),
        )
        chex.assert_trees_all_close(tree['Net/~/conv'], expected, atol=1e-6)
        if step <= 2:
            chex.assert_trees_all_equal(tree['Net/~/conv'], params['Net/~/conv'])
    # Where nothing waits, the state is that of earlier versions.
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(plain_state)) + 1
    rules = (head, *(rule | {'freeze_for': '8 steps'} for rule in body))
    with pytest.raises(
        UsageError, match=r"groups\[1\]\.freeze_for='8 steps' is 8 steps, the whole"
    ):
        _create(_config(groups=rules))


@pytest.mark.parametrize('name', ['sgd', 'adamw'])
def test_plateau_scales_what_a_constant_rate_would_do(name):
    """Gradients do not depend on parameters here, so that without decay updates are the same."""
    params, *gradients = _trees(9)
    frozen = {'match': '.*conv/.*', 'freeze': True}
    groups = (frozen, *optimizers.PUBLISHED_GROUPS)
    changes = {'name': name, 'clip__name': 'none', 'weight_decay': 0.0, 'groups': groups}
    changes |= {'schedule__warmup': '2 steps', 'schedule__every': '1 epoch'}
    plateau = {'schedule__name': 'plateau', 'schedule__patience': 1, 'schedule__factor': 0.5}
    constant = _create(_config(**changes, schedule__name='constant')).transformation
    created = _create(_config(**changes, **plateau))
    optimizer = created.transformation
    with jax.numpy_dtype_promotion('strict'):
        states = constant.init(params), optimizer.init(params)
        update_constant, update = jax.jit(constant.update), jax.jit(optimizer.update)
        losses, scales = [3, 2, 3, 3, 2, 2, 2, 2], [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25]
        for gradient, loss, scale in zip(gradients, losses, scales, strict=True):
            updates, plain = update_constant(gradient, states[0], params, value=np.float32(loss))
            found, state = update(gradient, states[1], params, value=np.float32(loss))
            expected = jax.tree.map(lambda x, s=scale: np.asarray(x) * np.float32(s), updates)
            chex.assert_trees_all_equal(found, expected)
            states = plain, state
            assert schedules.plateau_scale(state) == scale
        assert created.last_rate(8, state) == created.learning_rate(8) * 0.25
    # Runs without it have the state of earlier versions.
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(plain)) + 6


@pytest.mark.parametrize('batch_size', [64, 256, 4096])
def test_learning_rate_scales_with_the_batch(batch_size):
    config = _config(scale_lr_by_batch=True, schedule__name='constant')
    scaled = _create(config, batch_size=batch_size).learning_rate
    assert float(scaled(0)) == np.float32(0.1 * batch_size / 256)
    config.scale_lr_by_batch = False
    assert float(_create(config, batch_size=batch_size).learning_rate(0)) == np.float32(0.1)


@pytest.mark.parametrize('model', MODELS)
def test_published_groups_on_every_family(model):
    tree = json.loads((PARAM_TREES / f'{model}.json').read_text())
    params = {
        module: {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in leaves.items()}
        for module, leaves in tree.items()
    }
    groups = optimizers.assign_groups(optimizers.PUBLISHED_GROUPS, params)
    top = next(iter(tree)).split('/')[0]
    assert len(groups) == sum(map(len, tree.values()))
    assert [name for name, group in groups.items() if not group.clip] == [f'{top}/~/linear/w']
    for module, leaves in tree.items():
        for name, shape in leaves.items():
            # Batch norm's scale and offset are vectors that broadcast: [1, 1, 1, C].
            is_weight = sum(size > 1 for size in shape) > 1
            assert groups[f'{module}/{name}'].decay == is_weight, (module, name, shape)


# Blocks of each network; its layers are these, the stem and the head.
BLOCKS = {model: 12 if model == 'NFNet-F0' else 16 for model in MODELS}


@pytest.mark.parametrize('model', MODELS)
def test_learning_rates_fall_from_block_to_block_on_every_family(model):
    tree = json.loads((PARAM_TREES / f'{model}.json').read_text())
    params = {
        module: {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in leaves.items()}
        for module, leaves in tree.items()
    }
    plain = optimizers.assign_groups(optimizers.PUBLISHED_GROUPS, params)
    rules = optimizers.layer_decay_groups(params, 0.75)
    groups = optimizers.assign_groups(rules, params)
    assert {name: (group.clip, group.decay, group.freeze) for name, group in groups.items()} == {
        name: (group.clip, group.decay, group.freeze) for name, group in plain.items()
    }
    for name, group in groups.items():
        part = (name.split('/') + [''])[2]
        if 'block' in part:
            index = part.removeprefix('res_block_v2').rpartition('_')[2]
            layer = 1 + (int(index) if index.isdecimal() else 0)
        elif part.startswith('final'):
            layer = BLOCKS[model]
        elif part.startswith(('stem', 'initial')):
            layer = 0
        else:  # the head, and Fixup's biases outside of blocks
            layer = BLOCKS[model] + 1
        expected = 0.75 ** (BLOCKS[model] + 1 - layer)  # timm's formula
        assert group.lr_scale == pytest.approx(expected, rel=1e-12), name


def test_layers_keep_the_order_and_the_factors_of_the_rules():
    params = {
        'Net/~/initial_conv': {'w': (3,), 'gain': (3,)},
        'Net/~/block': {'w': (3,), 'gain': (3,)},
        'Net/~/block_1/~/conv0': {'w': (3,)},
        'Net/~/linear': {'w': (3,)},
    }
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, np.float32),
        params,
        is_leaf=lambda x: type(x) is tuple,
    )
    rules = (
        {'match': '.*/gain|Net/~/linear/w', 'lr_scale': 10.0, 'clip': False},
        {'match': '.*/initial_conv/.*', 'freeze': True},
        {'match': '.*'},
    )
    groups = optimizers.assign_groups(optimizers.layer_decay_groups(params, 0.5, rules), params)
    found = {name: (group.lr_scale, group.clip, group.freeze) for name, group in groups.items()}
    assert found == {
        'Net/~/initial_conv/w': (0.125, True, True),
        'Net/~/initial_conv/gain': (1.25, False, False),
        'Net/~/block/w': (0.25, True, False),
        'Net/~/block/gain': (2.5, False, False),
        'Net/~/block_1/~/conv0/w': (0.5, True, False),
        'Net/~/linear/w': (10.0, False, False),
    }


def test_there_are_published_parameter_trees():
    assert len(MODELS) == 7


@pytest.mark.parametrize(
    ('rules', 'message'),
    [
        (
            [{'match': '.*/gian'}, {'match': '.*'}],
            r"g\[0\]\.match='\.\*/gian' matches no parameter",
        ),
        ([{'match': 'w'}, {'match': '.*'}], 'must match a whole name, like'),
        ([{'match': '.*'}, {'match': '.*/w'}], r'g\[1\].*no effect.* 3 parameters.*move it up'),
        (
            [{'match': '.*/w'}],
            r"no rule matches the parameter 'Net/~/block/skip_gain' \(5 in all\)",
        ),
        ([], 'no rule matches'),
        ([{'match': '.*', 'frozen': True}], r"unknown key g\[0\]\.frozen.*'freeze'"),
        ([{'match': '.*', 'decay': 0.1}], r'g\[0\]\.decay=0\.1: .*True or False'),
        ([{'match': '.*', 'lr_scale': -1.0}], r'g\[0\]\.lr_scale=-1\.0'),
        ([{'match': '(.*'}], r'g\[0\]\.match=.* must be a regular expression: missing \)'),
        ([{'clip': True}], r'g\[0\]\.match is missing'),
        (['.*/w'], r"g\[0\]='\.\*/w': must be a mapping of fields: match, clip"),
    ],
)
def test_bad_rules(rules, message):
    with pytest.raises(UsageError, match=message) as error:
        optimizers.assign_groups(rules, _trees(1)[0], key='g')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'name': 'sdg'}, r"optimizer\.name='sdg'.*did you mean 'sgd'"),
        ({'learning_rate': -0.1}, r'optimizer\.learning_rate=-0\.1.*at least 0'),
        ({'learning_rate': float('nan')}, r'optimizer\.learning_rate=nan'),
        ({'weight_decay': '2e-5'}, r"optimizer\.weight_decay='2e-5'"),
        ({'momentum': 1.0}, r'optimizer\.momentum=1\.0.*below 1'),
        ({'eps': 0.0}, r'optimizer\.eps=0\.0.*above 0'),
        ({'momentun': 0.9}, r"unknown key optimizer\.momentun.*did you mean 'momentum'"),
        ({'clip': {'name': 'agc', 'clipping': 0.01}}, r'optimizer\.clip\.eps is missing'),
        (
            {'clip': {'name': 'agc', 'clipping': 0.0, 'eps': 1e-3, 'unitwise': True}},
            r'optimizer\.clip\.clipping=0\.0',
        ),
        (
            {'clip': {'name': 'acg', 'clipping': 0.1, 'eps': 1e-3, 'unitwise': True}},
            r"clip\.name='acg'.*'agc'",
        ),
        ({'clip': 'agc'}, r"optimizer\.clip='agc': must be a mapping of fields: name, clipping"),
        ({'nesterov': 'no'}, r"optimizer\.nesterov='no': must be True or False"),
        ({'schedule': {}}, r'optimizer\.schedule\.name is missing'),
        (
            {'schedule': schedules.default_config() | {'name': 'plateau', 'end_value': 1.0}},
            r'optimizer\.schedule\.end_value=1\.0: must be at most optimizer\.learning_rate=0\.1',
        ),
        ({'groups': ({'match': 'x'},)}, r"optimizer\.groups\[0\]\.match='x'"),
    ],
)
def test_bad_config_names_its_key(change, message):
    with pytest.raises(UsageError, match=message):
        _create(optimizers.default_config() | change)


def test_ema_decay_warms_up():
    steps = np.array([0, 9, 90, 10**7])
    expected = [0.1, 10 / 19, 0.91, 0.99999]
    chex.assert_trees_all_close(
        [float(optimizers.ema_decay(t)) for t in steps], expected, rtol=1e-6
    )
    assert float(optimizers.ema_decay(90, max_decay=0.5)) == 0.5


def test_ema_update_by_value():
    new, *later = _trees(6)
    average, expected = new, jax.tree.map(np.float64, new)
    update = jax.jit(lambda old, new, t: optimizers.ema_update(old, new, optimizers.ema_decay(t)))
    for t, tree in enumerate(later):
        average = update(average, tree, t)
        decay = (1 + t) / (10 + t)
        expected = jax.tree.map(lambda a, b, d=decay: d * a + (1 - d) * b, expected, tree)
    chex.assert_trees_all_close(average, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal_dtypes(average, new)


def test_ema_of_equal_values_is_that_value_and_counters_are_taken_anew():
    tree = {'average': jnp.float32(1 / 3), 'counter': jnp.int32(7)}
    old = tree | {'counter': jnp.int32(6)}
    chex.assert_trees_all_equal(optimizers.ema_update(old, tree, 0.99999), tree)
