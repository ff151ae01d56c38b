"""Shared by all residual networks: the plan of the blocks, the body and the head."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from nfnets_jax import layers
from nfnets_jax.convolution import split_concat

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """Position and shape of a block in its network.

    Attributes:
      index: position in the whole network, from 0.
      in_channels, out_channels: number of channels of the block's input and output.
      stride: stride of the block.
      beta: 1 / expected standard deviation of the block's input at initialisation.
      stochdepth_rate: probability of dropping the branch, linear in the index.
      stage: stage of the network, from 1.
    """

    index: int
    in_channels: int
    out_channels: int
    stride: int
    beta: float
    stochdepth_rate: float
    stage: int

    @property
    def is_transition(self) -> bool:
        """Whether the shortcut changes shape and therefore needs a convolution."""
        return self.stride > 1 or self.in_channels != self.out_channels


def plan_blocks(
    in_channels: int,
    widths: Sequence[int],
    depths: Sequence[int],
    strides: Sequence[int],
    *,
    alpha: float = 0.0,
    stochdepth_rate: float = 0.0,
) -> list[BlockPlan]:
    """Lays out stages of blocks; the first of each stage has the stride and the new width.

    The input of block l has variance Var_l = Var_{l-1} + alpha^2 at initialisation. A transition
    block is the exception: its shortcut starts from the normalised signal too, which resets the
    variance to 1 before the branch is added ("NF-ResNets", section 3).
    """
    plans: list[BlockPlan] = []
    variance = 1.0
    stages = zip(widths, depths, strides, strict=True)
    for stage, (width, depth, stage_stride) in enumerate(stages, start=1):
        for position in range(depth):
            plan = BlockPlan(
                index=len(plans),
                stage=stage,
                in_channels=in_channels,
                out_channels=width,
                stride=stage_stride if position == 0 else 1,
                beta=1.0 / math.sqrt(variance),
                stochdepth_rate=stochdepth_rate * len(plans) / sum(depths),
            )
            plans.append(plan)
            in_channels = width
            variance = (1.0 if plan.is_transition else variance) + alpha**2
    return plans


class BlockInputs(NamedTuple):
    """Per-block inputs, passed as arrays so that identical blocks share one program.

    Attributes:
      beta: 1 / expected standard deviation of the block's input.
      stochdepth_rate: probability of dropping the branch.
      key: random key for dropping the branch; None where no branch is dropped.
    """

    beta: jax.typing.ArrayLike
    stochdepth_rate: jax.typing.ArrayLike
    key: Array | None

    def scale(self, x: Array) -> Array:
        """Returns x times beta, in the dtype of x."""
        return x * jnp.asarray(self.beta, x.dtype)

    def drop(self, branch: Array) -> Array:
        """Returns the branch after stochastic depth."""
        if self.key is None:
            return branch
        return layers.stochastic_depth(self.key, self.stochdepth_rate, branch)


# attention(x) -> gates in (0, 1), [N, 1, 1, C]
Attention = Callable[[Array], Array]
# block(x, inputs, is_training, ...) -> (output, residual branch before it is scaled and added)
Block = Callable[..., tuple[Array, Array]]


def weigh(
    branch: Array, alpha: float, skipinit_gain: float | hk.initializers.Initializer | None
) -> Array:
    """Returns the branch times alpha and, unless `skipinit_gain` is None, times a learned gain.

    The gain is the parameter 'skip_gain' of the block whose method calls this function. It starts
    at `skipinit_gain`.
    """
    if skipinit_gain is None:
        return branch * jnp.asarray(alpha, branch.dtype)
    init = layers.initializer(skipinit_gain, 'constant')
    gain = hk.get_parameter('skip_gain', (), jnp.float32, init=init)
    return branch * (gain * alpha).astype(branch.dtype)


def run_blocks(
    blocks: Sequence[Any],
    x: Array,
    is_training: bool,
    *block_args: bool,
    remat: bool,
    scan: bool,
    return_metrics: bool,
    return_features: bool,
) -> tuple[Array, dict[str, dict[str, Array]]]:
    """Applies the blocks to x in order.

    Args:
      blocks: modules of type Block with a `plan`.
      x: [N, H, W, C], the output of the stem.
      is_training: whether branches are dropped; passed to every block.
      *block_args: further arguments of every block.
      remat: recompute each block in the backward pass instead of storing its activations.
      scan: compile SHORTEST_LOOP or more consecutive identical blocks once, as the body of a loop.
        Results differ by rounding only. The loop works on a stacked copy of the parameters.
      return_metrics: whether to measure the signal.
      return_features: whether to return the output of every stage.

    Returns:
      The last block's output, and a dict with, on demand, 'signal': layers.signal_metrics, and
      'features': {'stem': x, 'stage1': its output, ...}, [N, H', W', C] each.
    """
    if hk.running_init():  # Both are useless here, and initial values must not depend on them.
        remat = scan = False
    activations: list[Array] = [x]
    branches: list[Array] = []
    features = {'stem': x}
    for group in _loops(blocks) if scan else [[block] for block in blocks]:
        inputs = [_block_inputs(block.plan, is_training) for block in group]
        outputs: Iterable[Array]
        inner: Iterable[Array]
        if len(group) > 1:
            x, outputs, inner = _scan(
                group, inputs, x, is_training, *block_args, remat=remat, keep=return_metrics
            )
        else:

            def apply(
                x: Array, inputs: BlockInputs, block: Block = group[0]
            ) -> tuple[Array, Array]:
                return block(x, inputs, is_training, *block_args)

            x, branch = (hk.remat(apply) if remat else apply)(x, inputs[0])
            outputs, inner = [x], [branch]
        features[f'stage{group[-1].plan.stage}'] = (
            x  # The last block of a stage overwrites the others.
        )
        if return_metrics:
            activations.extend(outputs)
            branches.extend(inner)
    extras = {}
    if return_metrics:
        extras['signal'] = layers.signal_metrics(activations, branches)
    if return_features:
        extras['features'] = features
    return x, extras


def _block_inputs(plan: BlockPlan, is_training: bool) -> BlockInputs:
    drops = is_training and plan.stochdepth_rate > 0
    return BlockInputs(plan.beta, plan.stochdepth_rate, hk.next_rng_key() if drops else None)


# Six identical blocks take as long to compile in a loop as without one: XLA compiles repeated
# operations once, and the operations in a loop differ from those of the blocks around it.
SHORTEST_LOOP = 6


def _loops(blocks: Sequence[Any]) -> Iterator[list[Any]]:
    """Yields groups of consecutive blocks: those worth a loop together, the others alone."""
    for _, equal in itertools.groupby(blocks, _kind):
        group = list(equal)
        yield from [group] if len(group) >= SHORTEST_LOOP else ([block] for block in group)


def _kind(block: Any) -> tuple:
    """Returns a key that is equal for consecutive blocks that can share one program."""
    plan = block.plan
    position = plan.index if plan.is_transition else -1
    return position, plan.stage, plan.stochdepth_rate > 0


def _scan(
    blocks: Sequence[Any],
    inputs: Sequence[BlockInputs],
    x: Array,
    *block_args: bool,
    remat: bool,
    keep: bool,
) -> tuple[Array, Iterable[Array], Iterable[Array]]:
    """Returns x after all blocks and, if `keep`, the outputs and the branches of each block."""
    names = [block.module_name for block in blocks]
    params, state = (
        [_under(name, names[0], tree) for name in names]
        for tree in (hk.get_params(), hk.get_current_state())
    )
    # Apply the first block, under its own names, with the parameters of each block in turn.
    first = hk.transform_with_state(lambda x, inputs: blocks[0](x, inputs, *block_args))

    def step(x: Array, each: tuple) -> tuple[Array, tuple]:
        params, state, block_inputs = each
        (x, branch), state = first.apply(params, state, None, x, block_inputs)
        return x, (state, x, branch) if keep else (state, (), ())

    # A loop stores all residuals of each block; outside of a loop XLA recomputes the cheap ones.
    # prevent_cse is off because a loop has nothing that CSE could merge.
    step = jax.checkpoint(step, prevent_cse=False, policy=None if remat else is_costly)
    stacked = jax.tree.map(_stack, *zip(params, state, inputs, strict=True))
    x, (states, outputs, branches) = jax.lax.scan(step, x, stacked)
    for i, name in enumerate(names):
        for module, values in _under(names[0], name, states).items():
            inside = _Named(hk.experimental.force_name(module))
            inside.set_state({leaf: value[i] for leaf, value in values.items()})
    return x, outputs, branches


def is_costly(primitive: Any, *_: Any, **__: Any) -> bool:
    """Policy for jax.checkpoint: whether to save a result rather than recompute it."""
    return primitive.name in _COSTLY


# custom_vjp_call stands for the convolutions of nfnets_jax.convolution.
_COSTLY = frozenset(
    {'conv_general_dilated', 'custom_vjp_call', 'dot_general', 'psum', 'reduce_window_max'}
)


def _under(name: str, new: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of module `name` and its submodules, renamed from `name` to `new`."""
    return {
        new + module.removeprefix(name): leaves
        for module, leaves in tree.items()
        if f'{module}/'.startswith(f'{name}/')
    }


def _stack(*leaves: jax.typing.ArrayLike) -> Array:
    return split_concat.join([jnp.expand_dims(leaf, 0) for leaf in leaves], 0)


class _Named(hk.Module):
    """Sets the state of a module by its name."""

    def set_state(self, values: Mapping[str, Array]) -> None:
        for name, value in values.items():
            hk.set_state(name, value)


def make_classifier(
    num_classes: int, w_init: hk.initializers.Initializer | None
) -> layers.Linear | None:
    """Returns the last linear layer of a network; None for 0 classes, a network of features."""
    return layers.Linear(num_classes, w_init) if num_classes else None


def classify(
    features: Array,
    classifier: Callable[[Array], Array] | None,
    drop_rate: float,
    is_training: bool,
) -> dict[str, Array]:
    """Applies global average pooling, dropout and the classifier, in float32 for all dtypes.

    Returns:
      'pool', [N, C] before dropout, and with a classifier 'logits', [N, classes].
    """
    pool = jnp.mean(features.astype(jnp.float32), (1, 2))
    if classifier is None:
        return {'pool': pool}
    dropped = pool
    if is_training and drop_rate > 0:
        with jax.numpy_dtype_promotion('standard'):  # Haiku's dropout multiplies by a bool.
            dropped = hk.dropout(hk.next_rng_key(), drop_rate, pool)
    return {'pool': pool, 'logits': classifier(dropped)}
