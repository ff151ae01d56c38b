"""Builds an optax chain from a config: clip -> weight decay -> momentum -> learning rate; EMA.

The order is the authors' (arXiv 2102.06171 and its code): the gradient, already averaged over
devices, is clipped; weight decay is then added INTO it, so that decay is never clipped but does
go through momentum; Nesterov momentum follows; the learning rate comes last.

An ordered list of rules over parameter names says which parameters are clipped, decayed or frozen;
the first match decides. Each parameter has exactly one rule, and each rule decides for at least one
parameter, so that a misspelt pattern cannot silently train another model than the intended one.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nfnets_jax import fields, schedules, unit_axes
from nfnets_jax.agc import adaptive_grad_clip
from nfnets_jax.errors import UsageError
from nfnets_jax.fields import Field


@dataclasses.dataclass(frozen=True)
class Group:
    """Rule for training the parameters whose whole name, 'module/name', matches a pattern."""

    match: Annotated[str, Field("Regular expression for whole names: '.*/w'.")]
    clip: Annotated[bool, Field('Clip their gradients.')] = True
    decay: Annotated[bool, Field('Decay them.')] = True
    freeze: Annotated[bool, Field('Do not train them, and keep no state for them.')] = False
    freeze_for: Annotated[
        int | str,
        Field(
            'How long their learning rate is 0 at the start; gradients are still computed.',
            wants=schedules.DURATION,
        ),
    ] = '0 steps'
    lr_scale: Annotated[float, Field('Factor of the learning rate.', low=0)] = 1.0


class Hyperparameters(NamedTuple):
    """Hyperparameters passed as arrays, so that changing them does not recompile.

    They are float32 scalars or floats. Runs that differ in nothing else share one program.
    """

    learning_rate: jax.typing.ArrayLike  # at its peak, already scaled by the batch
    clipping: jax.typing.ArrayLike
    weight_decay: jax.typing.ArrayLike


class Optimizer(NamedTuple):
    """The update rule, its learning-rate schedule and its hyperparameters."""

    transformation: optax.GradientTransformationExtraArgs
    learning_rate: schedules.Schedule  # times `schedules.plateau_scale` of the state
    groups: dict[str, Group]  # parameter name -> the rule that decides for it
    hyperparameters: Hyperparameters  # those of `transformation`
    # Returns the same transformation with other hyperparameters.
    with_hyperparameters: Callable[[Hyperparameters], optax.GradientTransformationExtraArgs]

    def last_rate(self, updates: int, opt_state: optax.OptState) -> float:
        """Returns the learning rate of the update that follows `updates` and left `opt_state`."""
        return float(self.learning_rate(updates) * schedules.plateau_scale(opt_state))


# The published groups. In every family a weight is called 'w', whereas gains, biases, skip gains
# and batch norm's scale and offset have other names; and the classifier is the one linear layer
# directly under the model (a squeeze-excite's has its block in between).
PUBLISHED_GROUPS = (
    {'match': r'[^/]+/~/linear/w', 'clip': False},
    {'match': r'.*/w'},
    {'match': r'.*', 'decay': False},
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """The fields of the clipping's config."""

    name: Annotated[
        Literal['agc', 'global_norm', 'leaf_norm', 'none'],
        Field('Adaptive gradient clipping, or clipping by one norm or by the norm of each leaf.'),
    ] = 'agc'
    clipping: Annotated[
        float,
        Field("agc: largest ratio to the unit's weight norm; others: largest norm.", above=0),
    ] = 0.01
    eps: Annotated[float, Field('agc: least weight norm.', above=0)] = 1e-3
    unitwise: Annotated[bool, Field('agc: by output unit, or each parameter whole.')] = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The fields of an optimizer's config."""

    name: Annotated[
        Literal['sgd', 'adam', 'adamw'],
        Field('Update rule; adam adds weight decay to the gradient, adamw to its update.'),
    ] = 'sgd'
    learning_rate: Annotated[float, Field('Learning rate at its peak.', low=0)] = 0.1
    scale_lr_by_batch: Annotated[bool, Field('Scale learning_rate by batch_size / 256.')] = True
    schedule: Annotated[schedules.ScheduleConfig, Field('Learning rate over time.')]
    momentum: Annotated[float, Field('sgd: momentum; 0: none.', low=0, below=1)] = 0.9
    nesterov: Annotated[bool, Field('sgd: Nesterov momentum.')] = True
    b1: Annotated[float, Field('adam, adamw: decay of the first moment.', low=0, below=1)] = 0.9
    b2: Annotated[float, Field('adam, adamw: decay of the second moment.', low=0, below=1)] = 0.999
    eps: Annotated[float, Field('adam, adamw: added to the denominator.', above=0)] = 1e-8
    weight_decay: Annotated[float, Field('Share of the weights in the gradient.', low=0)] = 2e-5
    clip: Annotated[ClipConfig, Field('Gradient clipping.')]
    groups: Annotated[
        Sequence[Group],
        Field('Which parameters are clipped, decayed or frozen; the first match decides.'),
    ] = PUBLISHED_GROUPS  # type: ignore[assignment]  # as a config writes them


def default_config() -> dict:
    """Returns every field of an optimizer's config, with the published value where there is one."""
    return fields.defaults(fields.options(OptimizerConfig))


def create(
    config: Mapping,
    params: optax.Params,
    *,
    batch_size: int,
    steps_per_epoch: float,
    total_steps: int,
    key: str = 'optimizer',
) -> Optimizer:
    """Returns the optimizer that a config describes.

    Args:
        config: fields as in `OptimizerConfig`, all present.
        params: the model's parameters, or their shapes.
        batch_size: examples per step over all devices.
        steps_per_epoch: optimizer steps in one epoch; may be fractional.
        total_steps: steps of the whole training.
        key: the config's own key, for messages.

    Returns:
        An `Optimizer`. Its transformation takes float32 gradients that are already averaged over
        devices, and needs `params` in `update`; with the schedule 'plateau' also `value`, the
        training loss. All trees may be whole, or the trained part that `partition` returns; the
        state is the same. Unless nothing is clipped, the state holds the fraction of clipped units,
        `optax.tree.get(opt_state, 'clipped_fraction')`.

    Raises:
        UsageError: naming the field that is wrong.
    """
    check(config, key)
    groups = assign_groups(config['groups'], params, key=f'{key}.groups')
    trained = [group for group in groups.values() if not group.freeze]
    if not trained:
        raise UsageError(f'{key}.groups freezes every parameter', f'{key}.groups')
    if config['clip']['name'] != 'none' and not any(group.clip for group in trained):
        raise UsageError(
            f'{key}.clip.name={config["clip"]["name"]!r} clips nothing: {key}.groups exempts or '
            "freezes every parameter; say 'none'",
            f'{key}.clip.name',
            f'{key}.groups',
        )

    def marked(field: str) -> Callable[[optax.Params], optax.Params]:
        # A function of the tree, because optax replaces frozen parameters by empty nodes.
        return lambda tree: jax.tree.map_with_path(
            lambda path, _: getattr(groups[_name(path)], field), tree
        )

    def steps_frozen(index: int, rule: Group) -> int:
        duration, where = rule.freeze_for, f'{key}.groups[{index}].freeze_for'
        steps = schedules.num_steps(
            duration,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
            key=where,
            minimum=0,
        )
        if steps >= total_steps:
            raise UsageError(
                f'{where}={duration!r} is {steps} steps, the whole training ({total_steps}): '
                'shorten it, or say freeze=True',
                where,
            )
        return steps

    rules = [Group(**rule) for rule in config['groups']]
    starts = {rule.freeze_for: steps_frozen(i, rule) for i, rule in enumerate(rules)}

    scale = batch_size / 256 if config['scale_lr_by_batch'] else 1.0
    peak = config['learning_rate'] * scale
    schedule = config['schedule']
    falls = schedule['name'] == 'plateau'
    if falls and schedule['end_value'] > config['learning_rate']:
        raise UsageError(
            f'{key}.schedule.end_value={schedule["end_value"]}: must be at most '
            f'{key}.learning_rate={config["learning_rate"]}',
            f'{key}.schedule.end_value',
            f'{key}.learning_rate',
        )
    scheduled: dict[str, Any] = {
        'steps_per_epoch': steps_per_epoch,
        'total_steps': total_steps,
        'scale': scale,
        'key': f'{key}.schedule',
    }

    def with_hyperparameters(
        hyperparameters: Hyperparameters,
    ) -> optax.GradientTransformationExtraArgs:
        peak = hyperparameters.learning_rate
        clip = _clip(config['clip'], hyperparameters.clipping, marked('clip'))
        decay = optax.add_decayed_weights(hyperparameters.weight_decay, marked('decay'))
        adam = _promoting(optax.scale_by_adam(config['b1'], config['b2'], config['eps']))
        match config['name']:
            case 'sgd':
                # Without momentum there is no state to keep.
                momentum, nesterov = config['momentum'], config['nesterov']
                direction = optax.trace(momentum, nesterov) if momentum else optax.identity()
                steps = (clip, decay, direction)
            case 'adam':
                steps = (clip, decay, adam)
            case 'adamw':
                steps = (clip, adam, decay)
        transformation = optax.chain(
            *steps,
            _scale_leaves(marked('lr_scale')),
            *(
                optax.masked(
                    optax.scale_by_schedule(lambda step, start=start: step >= start),
                    lambda tree, duration=duration: jax.tree.map(
                        lambda of_leaf: of_leaf == duration, marked('freeze_for')(tree)
                    ),
                )
                for duration, start in starts.items()
                if start  # Without it there is no state, as in earlier versions.
            ),
            optax.scale_by_learning_rate(schedules.create(schedule, peak, **scheduled)),
            *([_promoting(schedules.plateau(schedule, peak, **scheduled))] if falls else []),
        )
        if len(trained) == len(groups):
            return optax.with_extra_args_support(transformation)
        return optax.partition(
            {'trained': transformation, 'frozen': optax.set_to_zero()},
            lambda tree: jax.tree.map(
                lambda freeze: 'frozen' if freeze else 'trained', marked('freeze')(tree)
            ),
        )

    hyperparameters = Hyperparameters(peak, config['clip']['clipping'], config['weight_decay'])
    return Optimizer(
        with_hyperparameters(hyperparameters),
        schedules.create(schedule, peak, **scheduled),
        groups,
        hyperparameters,
        with_hyperparameters,
    )


def partition(
    params: optax.Params, groups: Mapping[str, Group]
) -> tuple[optax.Params, optax.Params]:
    """Splits parameters into (trained, frozen), two trees that each lack the leaves of the other.

    A missing leaf is an `optax.MaskedNode`, an empty pytree. Differentiating, averaging, measuring
    or updating the trained tree therefore skips the frozen leaves at no cost. `combine` is the
    inverse.

    Args:
        params: a tree of parameters, named as in `groups`.
        groups: the rule of each parameter, by name, as in `Optimizer.groups`.
    """

    def leaves_that(freeze: bool) -> optax.Params:
        return jax.tree.map_with_path(
            lambda path, leaf: leaf if groups[_name(path)].freeze == freeze else optax.MaskedNode(),
            params,
        )

    return leaves_that(freeze=False), leaves_that(freeze=True)


def combine(trained: optax.Params, frozen: optax.Params) -> optax.Params:
    """Merges the two trees that `partition` returns."""

    def is_missing(node) -> bool:
        return isinstance(node, optax.MaskedNode)

    return jax.tree.map(
        lambda ours, theirs: theirs if is_missing(ours) else ours,
        trained,
        frozen,
        is_leaf=is_missing,
    )


def assign_groups(
    rules: Sequence[Mapping], params: optax.Params, *, key: str = 'groups'
) -> dict[str, Group]:
    """Returns {parameter name: the first rule whose pattern matches the whole name}.

    Raises:
        UsageError: if a rule is malformed or decides for no parameter, or if a parameter
            has no rule.
    """
    fields.check_value(fields.options(OptimizerConfig)['groups'], rules, key)
    parsed = [Group(**rule) for rule in rules]
    for i, rule in enumerate(parsed):
        try:
            re.compile(rule.match)
        except re.error as error:
            raise UsageError(
                f'{key}[{i}].match={rule.match!r}: must be a regular expression: {error}',
                f'{key}[{i}].match',
            ) from None
    names = [_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    groups: dict[str, Group] = {}
    for i, rule in enumerate(parsed):
        matched = [name for name in names if re.fullmatch(rule.match, name)]
        if not matched:
            raise UsageError(
                f'{key}[{i}].match={rule.match!r} matches no parameter of this model; '
                f'it must match a whole name, like {names[0]!r}',
                f'{key}[{i}].match',
            )
        decided = {name: rule for name in matched if name not in groups}
        if not decided:
            raise UsageError(
                f'{key}[{i}].match={rule.match!r} has no effect: earlier rules match all of its '
                f'{len(matched)} parameters; move it up or leave it out',
                f'{key}[{i}].match',
            )
        groups |= decided
    if missing := [name for name in names if name not in groups]:
        raise UsageError(
            f'{key}: no rule matches the parameter {missing[0]!r} '
            f"({len(missing)} in all); a last rule with match='.*' covers the rest",
            key,
        )
    return {name: groups[name] for name in names}


def layer_decay_groups(
    params: optax.Params, decay: float, rules: Sequence[Mapping] = PUBLISHED_GROUPS
) -> tuple[dict, ...]:
    """Returns rules whose learning rates fall by a factor from the head of a network to its stem.

    A layer is a residual block, or the stem; the last block includes the convolution after it. Each
    has `decay` times the learning rate of the layer above it. The head keeps its own, as do
    parameters outside of all layers. timm's `param_groups_layer_decay` has the same layers: blocks,
    not stages. A deep network therefore needs a factor nearer to 1: with 0.75, the stem of NFNet-F0
    (12 blocks) has 2 % of the learning rate, that of F3 (48 blocks) a millionth.

    Args:
        params: the model's parameters, or their shapes.
        decay: factor for each layer, like 0.75.
        rules: rules for all layers, of which each layer gets a copy with its own `lr_scale`.

    Raises:
        UsageError: the network has no blocks, or a rule is wrong, see `assign_groups`.
    """
    if not 0 < decay <= 1:
        raise UsageError(f'layer_decay={decay}: must be above 0 and at most 1')
    groups = assign_groups(rules, params)
    found = filter(None, map(_BLOCK.match, groups))
    blocks = {int(match['index'] or 0): match['module'] for match in found}
    if not blocks:
        raise UsageError(f'layer_decay={decay}: the network has no residual blocks')
    layers = [f'{blocks[index]}/' for index in sorted(blocks)]
    layers[-1] = f'{layers[-1]}|{_AFTER_BLOCKS}'

    def deciding(names: Sequence[str]) -> list[Mapping]:
        kept = {groups[name] for name in names}
        return [rule for rule in rules if Group(**rule) in kept]

    made, rest = [], list(groups)
    for depth, layer in enumerate((*reversed(layers), _STEM), 1):
        names = [name for name in rest if re.match(layer, name)]
        rest = [name for name in rest if name not in names]
        made += [
            {
                **rule,
                'match': f'(?={layer})(?:{rule["match"]})',
                'lr_scale': rule.get('lr_scale', 1.0) * decay**depth,
            }
            for rule in deciding(names)
        ]
    return (*made, *map(dict, deciding(rest)))


_STEM = r'[^/]+/~/(?:stem_conv\d+|initial_conv)/'
_BLOCK = re.compile(r'(?P<module>[^/]+/~/\w*block\w*?(?:_(?P<index>\d+))?)/')
_AFTER_BLOCKS = r'[^/]+/~/(?:final_conv|final_bn)/'


def ema_decay(step: jax.typing.ArrayLike, max_decay: float = 0.99999) -> jax.Array:
    """Returns the decay of the parameters' moving average after update `step` (from 0).

    min(max_decay, (1 + t) / (10 + t)): early on the average forgets fast, so that it is not
    dragged down by the initialisation.
    """
    t = jnp.asarray(step, jnp.float32)
    return jnp.minimum(max_decay, (1 + t) / (10 + t))


def ema_update(ema: optax.Params, new: optax.Params, decay: jax.typing.ArrayLike) -> optax.Params:
    """Returns decay * ema + (1 - decay) * new, leaf by leaf; leaves that are not floats are new.

    The code takes a step towards `new`, so that the average of equal values stays exact.
    """

    def leaf(old, new):
        if not jnp.issubdtype(old.dtype, jnp.floating):
            return new  # e.g. the counters of batch norm's own averages
        return old + ((1 - decay) * (new.astype(old.dtype) - old)).astype(old.dtype)

    return jax.tree.map(leaf, ema, new)


class ClipByNormState(NamedTuple):
    clipped_fraction: jax.Array  # float32, fraction of the norms clipped in the last update


def clip_by_norm(max_norm: jax.typing.ArrayLike, *, per_leaf: bool) -> optax.GradientTransformation:
    """Scales gradients down to at most `max_norm`: by one global norm, or leaf by leaf.

    Args:
        max_norm: the largest Euclidean norm that stays unchanged.
        per_leaf: use the norm of each leaf instead of one norm over all leaves.

    Returns:
        A transformation whose state holds `clipped_fraction`: the fraction of clipped leaves if
        `per_leaf`, else 0 or 1. A NaN norm counts as clipped and makes all its leaves NaN.
    """

    def init(params):
        del params
        return ClipByNormState(jnp.zeros((), jnp.float32))

    def update(updates, state, params=None):
        del state, params
        leaves, structure = jax.tree.flatten(updates)
        if not leaves:  # e.g. for a label of optax.partition without parameters
            return updates, ClipByNormState(jnp.zeros((), jnp.float32))
        limit = jnp.asarray(max_norm, jnp.float32)
        squares = jnp.stack([jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves])
        norms = jnp.sqrt(squares if per_leaf else jnp.sum(squares, keepdims=True))
        within = norms <= limit
        scales = jnp.where(within, 1, limit / norms)
        scales = jnp.broadcast_to(scales, squares.shape)
        leaves = [
            leaf * scale.astype(leaf.dtype) for leaf, scale in zip(leaves, scales, strict=True)
        ]
        clipped = ClipByNormState(jnp.mean(~within, dtype=jnp.float32))
        return jax.tree.unflatten(structure, leaves), clipped

    return optax.GradientTransformation(init, update)


def _clip(
    config: Mapping, clipping: jax.typing.ArrayLike, mask: Callable
) -> optax.GradientTransformation:
    match config['name']:
        case 'agc':
            axis = None if config['unitwise'] else unit_axes.per_tensor
            return adaptive_grad_clip(clipping, config['eps'], axis, mask=mask)
        case 'global_norm' | 'leaf_norm':
            per_leaf = config['name'] == 'leaf_norm'
            return optax.masked(clip_by_norm(clipping, per_leaf=per_leaf), mask)
        case 'none':
            return optax.identity()


def _promoting(
    transformation: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Permits the mixed dtypes of optax if jax_numpy_dtype_promotion is 'strict'."""
    transformation = optax.with_extra_args_support(transformation)

    def update(updates, state, params=None, **more):
        with jax.numpy_dtype_promotion('standard'):
            return transformation.update(updates, state, params, **more)

    return optax.GradientTransformationExtraArgs(transformation.init, update)


def _scale_leaves(factors: Callable[[optax.Params], optax.Params]):
    """Multiplies each leaf by its own constant."""
    return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors(updates)))


def _name(path) -> str:
    """Returns 'module/name', the name of a parameter in rules and in the published weights."""
    return jax.tree_util.keystr(path, simple=True, separator='/')


def check(config: Mapping, key: str = 'optimizer') -> None:
    """Raises UsageError for the first field that is unknown, missing or out of range."""
    fields.check(fields.options(OptimizerConfig), config, key, whole=True)
