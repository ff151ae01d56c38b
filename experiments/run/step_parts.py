"""Assigns operations of a compiled training step to parts of the step, by their names."""

import itertools
import re

from experiments import train_step
from experiments.run import compiled_text
from experiments.run.compiled_text import Instruction, Program
from nfnets_jax.augment.definitions import OPERATIONS, WARPS

_BLOCK = re.compile(r'[/(]\w*block(?:_v\d)?(?:_(\d+))?(?=[/)])')


def part_of(instruction: Instruction, depths: tuple[int, ...]) -> str:
    """Returns the part of the step that an operation belongs to, such as 'stage 3'.

    Args:
      instruction: of a compiled program.
      depths: blocks of each stage of the network.
    """
    name = f'/{instruction.op_name}/'
    words = set(re.split(r'[/()]', name))
    if train_step.EXCHANGE in words or instruction.opcode.startswith(compiled_text.COLLECTIVES):
        return 'collectives'
    if train_step.AUGMENTATION in words:
        return 'augmentation'
    if words & {train_step.UPDATE, train_step.EMA}:
        return 'clipping and update'
    if 'standardize' in words:
        return 'weight standardization'
    if block := _BLOCK.search(name):
        index = int(block[1] or 0)
        ends = itertools.accumulate(depths)
        return f'stage {1 + sum(index >= end for end in ends)}'
    if any(word.startswith(('stem', 'initial_')) for word in words):
        return 'stem'
    if 'jvp(' in name or 'jvp' in words:
        return 'head and loss'
    return 'other' if instruction.op_name else 'without a name'


_STRUCTURE = re.compile(
    r'shard_map|_fun|cond|branch_\d+_fun|while|body|closed_call|~|checkpoint|rematted_computation|'
)


def layer_of(instruction: Instruction) -> str:
    """Returns the layer and the operation, such as 'nf_block_3/conv1/dot_general'."""
    name = instruction.op_name.split(';')[0]
    backward = 'transpose(jvp' in name
    name = re.sub(r'(?:transpose\()?\bjvp\(\w*\)\)?/', '', name)  # the network's own name
    while (shorter := re.sub(r'\b(?:transpose|jvp|vmap|jit)\(([^()]*)\)', r'\1', name)) != name:
        name = shorter
    words = [word for word in name.split('/') if not _STRUCTURE.fullmatch(word)]
    return ('/'.join(words) or instruction.opcode) + (' backward' if backward else '')


# RandAugment's branches, by the names of their operations: the first leaves an image as it is, and
# warps have two signs.
_BRANCHES = ['', *(name for name in OPERATIONS for _ in range(2 if name in WARPS else 1))]


def branch_shares(conditional: Instruction) -> list[float]:
    """Returns how often RandAugment takes each branch; evenly for a conditional of another."""
    count = len(conditional.called)
    if count != len(_BRANCHES):
        return [1 / count] * count
    return [(name != '') / len(OPERATIONS) / max(1, _BRANCHES.count(name)) for name in _BRANCHES]


def cycles(program: Program) -> float:
    """Returns the compiler's estimate of one call of a TPU's program."""
    return compiled_text.total(compiled_text.costs(program, weights=branch_shares))


GPU_KINDS = ('cuDNN calls', 'copies', 'transposes')


def gpu_kind(instruction: Instruction) -> str | None:
    """Returns the kind of a kernel that is worth counting, by the names that XLA gives."""
    if '__cudnn' in instruction.attribute('custom_call_target'):
        return 'cuDNN calls'
    if 'transpose' in instruction.name:
        return 'transposes'
    return 'copies' if 'copy' in instruction.name else None
