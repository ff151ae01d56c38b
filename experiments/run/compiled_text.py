"""Reads the text of a program compiled for a TPU or a GPU: what each part costs.

`compiled.as_text()` holds the scheduled program. The compiler writes `estimated_cycles` beside
nearly every instruction; nothing here needs libtpu, or runs anything. An estimate is not a
measurement, and there is none for gathers and scatters of single elements, which become loops on
the core: `element_accesses` finds those. Nor is there one for collectives, nor for anything on a
GPU, where `kernels` tells what is launched and which bytes that reads and writes.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

_COMPUTATION = re.compile(r'^(ENTRY )?%([^\s(]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)$')
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,]*)\]')
_CALLED = re.compile(r'\b(?:to_apply|body|condition|calls|branch_computations)=(\{[^}]*\}|%\S+)')


# What computes, and has no estimate in some programs.
_UNESTIMATED = ('gather', 'scatter', 'reduce-window', 'sort', 'custom-call', 'fusion')


class Instruction(NamedTuple):
    """One instruction of a compiled program.

    Attributes:
      name: unique in the program, without the percent sign.
      opcode: of HLO, such as 'fusion'.
      shape: of the result, as the text has it; a tuple's in parentheses.
      op_name: the JAX operations that it came from, joined by slashes; of a fusion without a name
        that of the last operation in it; '' where unknown.
      cycles: the compiler's estimate for one execution, or None.
      text: the operands and attributes.
    """

    name: str
    opcode: str
    shape: str
    op_name: str
    cycles: int | None
    text: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands, in order."""
        return _names(self.text.split(')')[0])

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that the instruction calls, as the text orders them."""
        return tuple(name for part in _CALLED.findall(self.text) for name in _names(part))

    def attribute(self, key: str) -> str:
        """Returns what stands after `key=`, without braces; '' where there is no such key."""
        found = re.search(rf'\b{key}=(?:\{{([^}}]*)\}}|([^,\s]+))', self.text)
        return (found[1] or found[2] or '') if found else ''


class Program(NamedTuple):
    """A compiled program: its computations by name, and which one is the entry."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str


class Cost(NamedTuple):
    """An instruction and how often one call of the program executes it, on average."""

    instruction: Instruction
    executions: float

    @property
    def cycles(self) -> float:
        """All executions together; 0 where the compiler gave no estimate."""
        return (self.instruction.cycles or 0) * self.executions


def parse(text: str) -> Program:
    """Returns the program of `compiled.as_text()`.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry, name = None, None
    found: list[Instruction] = []
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            name, found = start[2], []
            entry = name if start[1] else entry
        elif line == '}' and name:
            computations[name] = tuple(found)
            name = None
        elif name and (match := _INSTRUCTION.match(line)):
            found.append(_instruction(*match.groups()))
    if entry is None:
        raise ValueError('not the text of a compiled program: it has no ENTRY computation')
    named = {
        name: tuple(_with_name(x, computations) for x in found)
        for name, found in computations.items()
    }
    return Program(named, entry)


def _with_name(x: Instruction, computations: Mapping[str, Sequence[Instruction]]) -> Instruction:
    if x.op_name or x.opcode != 'fusion':
        return x
    inside = [y.op_name for name in x.called for y in computations.get(name, ()) if y.op_name]
    return x._replace(op_name=inside[-1]) if inside else x


def costs(
    program: Program,
    *,
    weights: Callable[[Instruction], Sequence[float]] | None = None,
    trips: float = 1,
) -> list[Cost]:
    """Returns every instruction that runs on its own, with the number of its executions.

    Instructions inside of a fusion are part of the fusion. One without a name has that of the loop,
    conditional or call that it is in.

    Args:
      program: from `parse`.
      weights: conditional -> the share of executions that takes each branch; evenly by default.
      trips: of a loop whose trip count depends on data; `unknown_loops` finds those.
    """

    def walk(computation: str, executions: float, caller: str = '') -> Iterator[Cost]:
        for instruction in program.computations[computation]:
            name = instruction.op_name or caller
            yield Cost(instruction._replace(op_name=name), executions)
            called = instruction.called
            if instruction.opcode == 'while':
                condition, body = called
                counted = trip_count(program, instruction)
                turns = trips if counted is None else counted
                yield from walk(condition, executions * (turns + 1), name)
                yield from walk(body, executions * turns, name)
            elif instruction.opcode == 'conditional':
                shares = weights(instruction) if weights else [1 / len(called)] * len(called)
                for branch, share in zip(called, shares, strict=True):
                    yield from walk(branch, executions * share, name)
            elif instruction.opcode in ('call', 'async-start'):
                for each in called:
                    yield from walk(each, executions, name)

    return list(walk(program.entry, 1))


def total(found: Sequence[Cost]) -> float:
    """Returns the estimated cycles of one call of the program."""
    return sum(cost.cycles for cost in found)


def by(
    amounts: Iterable[tuple[Instruction, float]], key: Callable[[Instruction], str]
) -> dict[str, float]:
    """Returns the sums of cycles or bytes by what `key` makes of an instruction, greatest first."""
    sums: dict[str, float] = {}
    for instruction, amount in amounts:
        if amount:
            name = key(instruction)
            sums[name] = sums.get(name, 0) + amount
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def trip_count(program: Program, loop: Instruction) -> int | None:
    """Returns how often a loop runs that counts from 0 by 1, as those of `fori_loop` and `scan` do.

    None where its condition is no comparison of a counter with a constant.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
        return int(known[1])
    condition, body = loop.called
    *_, root = program.computations[condition]
    if root.opcode != 'compare' or root.attribute('direction') != 'LT':
        return None
    by_name = {x.name: x for x in program.computations[condition]}
    operands = [by_name.get(name) for name in root.operands]
    limits = [x for x in operands if x is not None and x.opcode == 'constant']
    counters = [x for x in operands if x is not None and x.opcode == 'get-tuple-element']
    if len(limits) != 1 or len(counters) != 1:
        return None
    return int(limits[0].text.split(')')[0])


def unknown_loops(program: Program) -> list[Instruction]:
    """Returns the loops whose trip count depends on data."""
    return [x for x in _all(program) if x.opcode == 'while' and trip_count(program, x) is None]


def without_estimate(program: Program, opcodes: Sequence[str] = _UNESTIMATED) -> list[Instruction]:
    """Returns the instructions of these opcodes that run on their own, and have no estimate.

    Their time is missing in every sum.
    """
    found = {cost.instruction.name: cost.instruction for cost in costs(program)}
    return [x for x in found.values() if x.cycles is None and x.opcode in opcodes]


def element_accesses(program: Program) -> dict[str, int]:
    """Returns the elements that each gather or scatter reads or writes one by one: name -> number.

    Those that move slices of several elements, such as whole images, are left out. Instructions
    inside of fusions count, too; the number is that of one execution.
    """
    shapes = {x.name: x.shape for x in _all(program)}
    found = {}
    for x in _all(program):
        if x.opcode == 'gather' and _product(x.attribute('slice_sizes')) == 1:
            found[x.name] = elements(x.shape)
        elif x.opcode == 'scatter' and not x.attribute('update_window_dims'):
            updates = x.operands[-1]  # of one operand; of several, each has its updates
            found[x.name] = elements(shapes[updates])
    return found


class Kernel(NamedTuple):
    """What a GPU launches, how often, and the bytes that all executions read and write."""

    instruction: Instruction
    executions: float
    bytes: float


def kernels(program: Program) -> list[Kernel]:
    """Returns all instructions that become kernels or calls of libraries on a GPU.

    A kernel is taken to read all of its operands, and to write its result, once. The scratch that
    a library is offered does not count: 34 MB for each matrix product on an H100.
    """
    shapes = {
        x.name: _SCRATCH.sub(')', x.shape) if x.opcode == 'custom-call' else x.shape
        for x in _all(program)
    }
    return [
        Kernel(x, executions, executions * sum(size(shapes[y]) for y in (x.name, *x.operands)))
        for x, executions in costs(program)
        if not _NO_KERNEL.fullmatch(x.opcode)
    ]


# The last array of the tuple that a call of cuBLAS or cuDNN returns, a vector of bytes.
_SCRATCH = re.compile(r',\s*[su]8\[\d+\][^,()]*\)$')

# What launches nothing by itself.
_NO_KERNEL = re.compile(
    'parameter|constant|tuple|get-tuple-element|bitcast|while|conditional|call|after-all|domain|'
    'opt-barrier|partition-id|replica-id|async-start|.*-done'
)


def collectives(program: Program) -> list[tuple[str, int]]:
    """Returns (kind, bytes of the result) of each exchange between devices: 'all-reduce', ..."""
    return [
        (x.opcode.removesuffix('-start'), size(x.shape))
        for x, _ in costs(program)
        if x.opcode.removesuffix('-start') in COLLECTIVES
    ]


COLLECTIVES = (
    'all-reduce',
    'all-gather',
    'all-to-all',
    'reduce-scatter',
    'collective-permute',
    'collective-broadcast',
)


def size(shape: str) -> int:
    """Returns the bytes of an array, or of all arrays of a tuple."""
    return sum(_product(dims) * _bits(dtype) // 8 for dtype, dims in _ARRAY.findall(shape))


def _bits(dtype: str) -> int:
    """Returns the bits of an element, such as 16 for 'bf16' and 8 for 'f8e4m3fn' and 'pred'."""
    found = re.match(r'[a-z]+(\d+)', dtype)
    return int(found[1]) if found else 8


def elements(shape: str) -> int:
    """Returns the number of elements of an array, such as 's32[4,3,256]{2,1,0}'."""
    found = _ARRAY.search(shape)
    assert found is not None, shape
    return _product(found[2])


def _product(numbers: str) -> int:
    return math.prod(map(int, filter(None, numbers.split(','))))


def _all(program: Program) -> Iterator[Instruction]:
    return (x for computation in program.computations.values() for x in computation)


def _names(text: str) -> list[str]:
    return re.findall(r'%([^\s,(){}]+)', text)


def _instruction(name: str, shape: str, opcode: str, text: str) -> Instruction:
    op_name = re.search(r'op_name="([^"]*)"', text)
    cycles = re.search(r'"estimated_cycles":"(\d+)"', text)
    return Instruction(
        name, opcode, shape, op_name[1] if op_name else '', int(cycles[1]) if cycles else None, text
    )
