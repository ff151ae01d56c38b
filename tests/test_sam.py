"""SAM: against an analytic quadratic, the published two steps, and its promises."""

import functools

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nfnets_jax import adaptive_grad_clip, sam_value_and_grad

RHO = 0.05


def normal(*shape, seed=0):
    return jax.device_put(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def network(batch, is_training=True):
    """A small network with everything that can go wrong: batch norm's state and dropout."""
    x = hk.Linear(8)(batch['x'])
    x = hk.BatchNorm(True, True, 0.9)(x, is_training)
    x = jnp.tanh(x)
    return hk.Linear(3)(hk.dropout(hk.next_rng_key(), 0.5, x))


MODEL = hk.transform_with_state(network)
BATCH = {'x': normal(10, 4), 'label': jnp.arange(10) % 3}
PARAMS, STATE = jax.jit(MODEL.init)(jax.random.key(0), BATCH)


def loss_fn(params, batch, state, key):
    logits, state = MODEL.apply(params, state, key, batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
    return jnp.mean(losses), (state, logits)


LOSS_GRAD = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))


def dense_loss(params, batch):
    """Without randomness or state, for what is compared between different batches."""
    hidden = jnp.tanh(batch['x'] @ params['w1'] + params['b1'])
    logits = hidden @ params['w2']
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']))


DENSE = {'w1': normal(4, 8, seed=1), 'b1': normal(8, seed=2), 'w2': normal(8, 3, seed=3)}


DENSE_GRAD = jax.jit(jax.value_and_grad(dense_loss))


def two_steps(value_and_grad, params, batch, first, rho=RHO):
    """Algorithm 1 of the paper in float64 for the ascent; `first` is the ascent's batch."""
    _, grads = value_and_grad(params, first)
    wide = [np.asarray(g, np.float64) for g in jax.tree.leaves(grads)]
    norm = np.sqrt(sum(np.sum(g**2) for g in wide))
    moved = jax.tree.map(
        lambda w, g: jnp.asarray(np.asarray(w) + rho * np.asarray(g, np.float64) / norm, w.dtype),
        params,
        grads,
    )
    return value_and_grad(moved, batch)


def test_quadratic():
    # f(w) = w.A.w / 2: the gradient at w + rho * g / |g|, g = A w, is A (w + rho * A w / |A w|).
    hessian = np.diag([1.0, 4.0, 0.5])
    w = np.array([3.0, -1.0, 2.0])
    top = w + 0.3 * hessian @ w / np.linalg.norm(hessian @ w)

    def loss(params, batch):
        vector = jnp.concatenate([params['a'], params['b']])
        return jnp.mean(batch) * vector @ jnp.asarray(hessian, jnp.float32) @ vector / 2

    params = {'a': jnp.asarray(w[:1], jnp.float32), 'b': jnp.asarray(w[1:], jnp.float32)}
    value, grad = jax.jit(sam_value_and_grad(loss, 0.3))(params, jnp.ones(4))
    np.testing.assert_allclose(value, top @ hessian @ top / 2, rtol=1e-6)
    np.testing.assert_allclose(grad['a'], (hessian @ top)[:1], rtol=1e-6)
    np.testing.assert_allclose(grad['b'], (hessian @ top)[1:], rtol=1e-6)


def test_adaptive_quadratic():
    # ASAM: the step is rho T^2 g / |T g| with T = |w| + 0.01.
    hessian, w = np.diag([1.0, 4.0, 0.5]), np.array([3.0, -1.0, 0.0])
    size, slope = np.abs(w) + 0.01, hessian @ w
    top = w + 0.5 * size**2 * slope / np.linalg.norm(size * slope)
    fn = sam_value_and_grad(
        lambda w, batch: w @ jnp.asarray(hessian, jnp.float32) @ w / 2, 0.5, adaptive=True
    )
    _, grad = jax.jit(fn)(jnp.asarray(w, jnp.float32), jnp.ones(1))
    np.testing.assert_allclose(grad, hessian @ top, rtol=1e-5)


def test_adaptive_does_not_mind_the_scale_of_the_weights():
    # The same function with w1 twice and w2 half as large: ASAM's loss is the same, SAM's is not.
    def loss(params, batch):
        return jnp.mean((batch @ params['w1'] @ params['w2']) ** 2)

    params = {'w1': normal(4, 8, seed=1), 'w2': normal(8, 1, seed=2)}
    scaled = {'w1': params['w1'] * 4, 'w2': params['w2'] / 4}
    for adaptive, tolerance in ((True, 0.02), (False, None)):
        fn = jax.jit(sam_value_and_grad(loss, 0.5, adaptive=adaptive))
        values = [fn(p, BATCH['x'])[0] for p in (params, scaled)]
        if tolerance:
            np.testing.assert_allclose(*values, rtol=tolerance)
        else:
            assert abs(values[0] / values[1] - 1) > 0.1


@pytest.mark.parametrize(('fraction', 'examples'), [(1.0, 10), (0.2, 2), (0.21, 3), (1e-9, 1)])
def test_two_steps_of_the_paper(fraction, examples):
    fn = jax.jit(sam_value_and_grad(dense_loss, RHO, ascent_fraction=fraction))
    value, grad = fn(DENSE, BATCH)
    first = jax.tree.map(lambda leaf: leaf[:examples], BATCH)
    expected_value, expected = two_steps(DENSE_GRAD, DENSE, BATCH, first)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    chex.assert_trees_all_close(grad, expected, rtol=1e-4, atol=1e-6)
    _, plain = DENSE_GRAD(DENSE, BATCH)
    assert np.max(np.abs(plain['w2'] - grad['w2'])) > 1e-4  # Or the test tells nothing.


def test_fraction_is_meant_in_decimal():
    # 0.07 * 100 is a little more than 7 in floating point.
    seen = []

    def loss(w, batch):
        seen.append(batch.shape[0])
        return jnp.sum(w * jnp.mean(batch))

    sam_value_and_grad(loss, ascent_fraction=0.07)(jnp.ones(2), jnp.ones(100))
    assert seen == [7, 100]


@pytest.mark.parametrize(
    ('fraction', 'adaptive'),
    [
        (1.0, False),
        (0.3, True),
        pytest.param(0.3, False, marks=pytest.mark.slow),
        pytest.param(1.0, True, marks=pytest.mark.slow),
    ],
)
def test_rho_zero_is_the_plain_gradient_bit_for_bit(fraction, adaptive):
    key = jax.random.key(1)
    fn = sam_value_and_grad(loss_fn, 0.0, ascent_fraction=fraction, has_aux=True, adaptive=adaptive)
    (value, _), grad = jax.jit(fn)(PARAMS, BATCH, STATE, key)
    (plain_value, _), plain = LOSS_GRAD(PARAMS, BATCH, STATE, key)
    chex.assert_trees_all_equal((value, grad), (plain_value, plain))


def test_rho_zero_keeps_the_sign_of_zero():
    def loss(w, batch):
        return jnp.where(jnp.signbit(w), 2 * w, 3 * w) * batch

    _, grad = sam_value_and_grad(loss, 0.0)(jnp.asarray(-0.0), 1.0)
    assert grad == 2


class TestAux:
    key = jax.random.key(2)

    def passes(self, fraction):
        """The auxiliary outputs of the plain loss at both points."""
        first_batch = jax.tree.map(lambda leaf: leaf[: int(10 * fraction)], BATCH)
        (_, first), ascent = jax.value_and_grad(loss_fn, has_aux=True)(
            PARAMS, first_batch, STATE, self.key
        )
        norm = optax.tree.norm(ascent)
        top = jax.tree.map(lambda w, g: w + RHO * g / norm, PARAMS, ascent)
        value, final = loss_fn(top, BATCH, STATE, self.key)
        return value, first, final

    def run(self, fraction, **options):
        """What is returned with auxiliary outputs, and what is expected; in one program."""
        fn = sam_value_and_grad(loss_fn, RHO, ascent_fraction=fraction, has_aux=True, **options)

        @jax.jit
        def both():
            return fn(PARAMS, BATCH, STATE, self.key), self.passes(fraction)

        return both()

    # Of a part of the examples, test_of_both_passes looks at the same outputs.
    @pytest.mark.parametrize('fraction', [1.0, pytest.param(0.4, marks=pytest.mark.slow)])
    def test_from_the_first_pass(self, fraction):
        ((value, (state, logits)), _), expected = self.run(fraction)
        expected_value, (expected_state, expected_logits), _ = expected
        chex.assert_trees_all_close(state, expected_state, rtol=1e-6)
        chex.assert_trees_all_close(logits, expected_logits, rtol=1e-6)
        np.testing.assert_allclose(value, expected_value, rtol=1e-5)

    def test_of_both_passes(self):
        ((_, (first, final)), _), expected = self.run(0.4, both_aux=True)
        _, expected_first, expected_final = expected
        chex.assert_trees_all_close(first, expected_first, rtol=1e-6)
        chex.assert_trees_all_close(final, expected_final, rtol=1e-4, atol=1e-6)
        assert first[1].shape == (4, 3)
        assert final[1].shape == (10, 3)

    def test_same_dropout_key_in_both_passes(self):
        # The gradient of a loss that is all dropout: with other masks the passes would differ.
        def loss(w, batch, key):
            mask = jax.random.bernoulli(key, 0.5, w.shape)
            return jnp.sum(w * mask), mask

        fn = sam_value_and_grad(loss, RHO, has_aux=True, both_aux=True)
        (_, (first, final)), grad = jax.jit(fn)(jnp.ones(64), jnp.ones(4), self.key)
        np.testing.assert_array_equal(first, final)
        np.testing.assert_array_equal(grad, first)


class TestDevices:
    """Each device has its own examples, and the mean is taken of the final gradient."""

    shards = jax.tree.map(lambda leaf: leaf[:8].reshape(4, 2, *leaf.shape[1:]), BATCH)

    def mean_gradient(self, **kwargs):
        fn = sam_value_and_grad(dense_loss, RHO, **kwargs)

        def step(params, batch):
            _, grad = fn(params, batch)
            return jax.lax.pmean(grad, 'devices')

        mapped = jax.pmap(step, 'devices', in_axes=(None, 0), out_axes=None)
        return mapped(DENSE, self.shards)

    def expected(self, firsts):
        grads = [
            two_steps(DENSE_GRAD, DENSE, jax.tree.map(lambda x, i=i: x[i], self.shards), first)[1]
            for i, first in enumerate(firsts)
        ]
        return jax.tree.map(lambda *g: sum(g) / len(g), *grads)

    @pytest.mark.parametrize('fraction', [1.0, 0.5])
    def test_per_device_ascent(self, fraction):
        firsts = [
            jax.tree.map(lambda x, i=i: x[i][: int(2 * fraction)], self.shards) for i in range(4)
        ]
        got = self.mean_gradient(ascent_fraction=fraction)
        chex.assert_trees_all_close(got, self.expected(firsts), rtol=1e-4, atol=1e-6)

    def test_synchronised_ascent_is_that_of_one_device(self):
        whole = jax.tree.map(lambda leaf: leaf[:8], BATCH)
        got = self.mean_gradient(axis_name='devices')
        _, one_device = jax.jit(sam_value_and_grad(dense_loss, RHO))(DENSE, whole)
        chex.assert_trees_all_close(got, one_device, rtol=1e-4, atol=1e-6)
        per_device = self.mean_gradient()
        assert np.max(np.abs(per_device['w2'] - got['w2'])) > 1e-6


def test_rho_by_step():
    schedule = optax.linear_schedule(0.0, 0.1, 10)
    fn = jax.jit(sam_value_and_grad(dense_loss, schedule))
    by_value = jax.jit(lambda rho: sam_value_and_grad(dense_loss, rho)(DENSE, BATCH))
    for step in (0, 5, 10):
        expected = by_value(0.01 * step)
        chex.assert_trees_all_close(fn(DENSE, BATCH, step=jnp.asarray(step)), expected, rtol=1e-5)


def test_rho_traced_and_keywords_handed_on():
    def loss(params, batch, power, *, weight):
        return weight * jnp.sum(jnp.abs(params) ** power) * jnp.mean(batch)

    @jax.jit
    def gradient(rho):
        return sam_value_and_grad(loss, rho)(jnp.array([3.0, 4.0]), jnp.ones(2), 2, weight=0.5)[1]

    np.testing.assert_allclose(gradient(1.0), [3.6, 4.8], rtol=1e-6)
    np.testing.assert_allclose(gradient(5.0), [6.0, 8.0], rtol=1e-6)


@pytest.mark.parametrize('adaptive', [False, True])
def test_zero_gradient(adaptive):
    fn = sam_value_and_grad(lambda w, batch: jnp.sum(w**2) * jnp.mean(batch), adaptive=adaptive)
    value, grad = jax.jit(fn)(jnp.zeros(3), jnp.ones(2))
    assert value == 0
    np.testing.assert_array_equal(grad, 0)


def test_scale_of_the_loss_cancels():
    """Loss scaling, and squares that would leave float32's range."""
    scaled = jax.jit(
        lambda scale: sam_value_and_grad(lambda p, b: scale * dense_loss(p, b))(DENSE, BATCH)
    )
    expected_value, expected = scaled(1.0)
    for scale in (1e-30, 1e-20, 1e18, 1e30):
        value, grad = scaled(scale)
        np.testing.assert_allclose(value / scale, expected_value, rtol=1e-5)
        unscaled = jax.tree.map(lambda g, scale=scale: g / scale, grad)
        chex.assert_trees_all_close(unscaled, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_low_precision_parameters(dtype):
    # The norm of 4096 float16 numbers of 60 is 3840; its square does not fit float16.
    def loss(w, batch):
        return 30 * jnp.sum(w * w) * jnp.mean(batch)

    w, batch = jnp.ones(4096, dtype), jnp.ones(2, dtype)
    fn = jax.jit(sam_value_and_grad(lambda w, b: loss(w, b).astype(np.float32), 64.0))
    _, grad = fn(w, batch)
    assert grad.dtype == dtype
    np.testing.assert_allclose(np.asarray(grad).astype(np.float32), 60 * 2, rtol=1e-2)


def test_not_finite_shows():
    def loss(w, batch):
        return jnp.sum(w * jnp.asarray([1.0, np.inf])) * jnp.mean(batch)

    fn = jax.jit(sam_value_and_grad(lambda w, batch: loss(w, batch) + jnp.sum(w**2)))
    _, grad = fn(jnp.ones(2), jnp.ones(2))
    assert not np.any(np.isfinite(grad))


def test_trains_with_clipping_of_the_final_gradient():
    tx = optax.chain(adaptive_grad_clip(0.1), optax.sgd(0.5, momentum=0.9))
    grad_fn = sam_value_and_grad(dense_loss, RHO, ascent_fraction=0.2)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state):
        value, grad = grad_fn(params, BATCH)
        updates, opt_state = tx.update(grad, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    params, opt_state = jax.tree.map(jnp.copy, DENSE), tx.init(DENSE)
    values = []
    for _ in range(60):
        params, opt_state, value = step(params, opt_state)
        values.append(float(value))
    assert values[-1] < 0.3 * values[0]


@pytest.mark.parametrize('fraction', [0.0, -0.1, 1.1, np.nan])
def test_bad_fraction(fraction):
    with pytest.raises(ValueError, match=r'ascent_fraction must be in \(0, 1\]'):
        sam_value_and_grad(dense_loss, ascent_fraction=fraction)


@pytest.mark.parametrize('rho', [-0.05, np.nan])
def test_bad_rho(rho):
    with pytest.raises(ValueError, match='rho must be >= 0'):
        sam_value_and_grad(dense_loss, rho)


def test_bad_calls():
    with pytest.raises(ValueError, match='keyword step='):
        sam_value_and_grad(dense_loss, lambda step: 0.1)(DENSE, BATCH)
    with pytest.raises(ValueError, match='both_aux=True needs has_aux=True'):
        sam_value_and_grad(dense_loss, both_aux=True)
    fn = sam_value_and_grad(dense_loss, ascent_fraction=0.5)
    with pytest.raises(ValueError, match='temperature: .* no leading axis; pass it after batch'):
        fn(DENSE, BATCH | {'temperature': 1.0})


def test_a_gradient_that_is_accumulated_is_finished_before_the_descent():
    def in_two_parts(loss_fn, has_aux):
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=has_aux)

        def mean(params, batch):
            halves = (jax.tree.map(lambda leaf, i=i: leaf[5 * i :][:5], batch) for i in (0, 1))
            parts = [value_and_grad(params, half) for half in halves]
            return jax.tree.map(lambda x, y: (x + y) / 2, *parts)

        return mean

    expected = jax.jit(sam_value_and_grad(dense_loss, RHO))(DENSE, BATCH)
    accumulated = sam_value_and_grad(dense_loss, RHO, value_and_grad=in_two_parts)
    chex.assert_trees_all_close(jax.jit(accumulated)(DENSE, BATCH), expected, rtol=1e-5, atol=1e-6)
    of_each_half = jax.jit(in_two_parts(sam_as_loss, has_aux=False))
    assert not np.allclose(of_each_half(DENSE, BATCH)[0], expected[0], rtol=1e-4)


def sam_as_loss(params, batch):
    """The loss at the top of the ascent by these examples alone."""
    return sam_value_and_grad(dense_loss, RHO)(params, batch)[0]
