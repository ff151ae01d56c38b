"""On excerpts of what libtpu wrote; nothing is compiled here."""

import pathlib

import pytest

from experiments.run import compiled_text

# As the compiler writes it for a v5e, less what is not read: layouts, most of the configs.
TEXT = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(s32[8,4])->s32[8,4]}

FileNames
1 "f.py"

%fused (param_0: s32[256], param_1: s32[64,1]) -> s32[64] {
  %param_0 = s32[256]{0:T(256)} parameter(0)
  %param_1 = s32[64,1]{1,0:T(8,128)S(1)} parameter(1)
  ROOT %gather.1 = s32[64]{0:T(128)} gather(%param_0, %param_1), offset_dims={}, \
collapsed_slice_dims={0}, start_index_map={0}, index_vector_dim=1, slice_sizes={1}
}

%invert (squeeze.2: (s32[1,4])) -> (s32[1,4]) {
  %squeeze.2 = (s32[1,4]{1,0:T(8,128)S(1)}) parameter(0)
  %get.1 = s32[1,4]{1,0:T(8,128)S(1)} get-tuple-element(%squeeze.2), index=0
  %not.0 = s32[1,4]{1,0:T(8,128)S(1)} not(%get.1), \
metadata={op_name="jit(f)/while/body/cond/branch_0_fun/not"}, \
backend_config={"window_config":{"estimated_cycles":"2000","cost_model_type":"X"}}
  ROOT %tuple.48 = (s32[1,4]{1,0:T(8,128)S(1)}) tuple(%not.0)
}

%look_up (squeeze.4: (s32[1,4])) -> (s32[1,4]) {
  %squeeze.4 = (s32[1,4]{1,0:T(8,128)S(1)}) parameter(0)
  %get.2 = s32[1,4]{1,0:T(8,128)S(1)} get-tuple-element(%squeeze.4), index=0
  %fusion.2 = s32[1,4]{1,0:T(8,128)S(1)} fusion(%get.2), kind=kLoop, calls=%fused, \
metadata={op_name="jit(f)/while/body/cond/branch_1_fun/gather"}
  %copy.1 = s32[1,4]{1,0:T(8,128)S(1)} copy(%fusion.2), \
backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %tuple.49 = (s32[1,4]{1,0:T(8,128)S(1)}) tuple(%copy.1)
}

%body (arg.0: (s32[], s32[8,4])) -> (s32[], s32[8,4]) {
  %arg.0 = (s32[]{:T(128)}, /*index=1*/s32[8,4]{1,0:T(8,128)S(1)}) parameter(0)
  %get.3 = s32[]{:T(128)} get-tuple-element(%arg.0), index=0
  %slice.1 = s32[1,4]{1,0:T(8,128)} dynamic-slice(%get.3), dynamic_slice_sizes={1,4}, \
metadata={op_name="jit(f)/while/body/dynamic_slice"}, \
backend_config={"window_config":{"estimated_cycles":"1800"}}
  %cond.0 = (s32[1,4]{1,0:T(8,128)S(1)}) conditional(%get.3, %slice.1, %slice.1), \
branch_computations={%invert, %look_up}, metadata={op_name="jit(f)/while/body/cond"}
  ROOT %tuple.1 = (s32[]{:T(128)}, s32[8,4]{1,0:T(8,128)}) tuple(%get.3, %cond.0)
}

%condition (arg.1: (s32[], s32[8,4])) -> pred[] {
  %constant.99 = s32[]{:T(128)} constant(8)
  %arg.1 = (s32[]{:T(128)}, s32[8,4]{1,0:T(8,128)S(1)}) parameter(0)
  %get.4 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt.17 = pred[]{:T(512)} compare(%get.4, %constant.99), direction=LT, \
metadata={op_name="jit(f)/while/cond/lt"}
}

ENTRY %main.9 (images.1: s32[8,4]) -> s32[8,4] {
  %images.1 = s32[8,4]{1,0:T(8,128)} parameter(0), metadata={op_name="images"}
  %add.1 = s32[8,4]{1,0:T(8,128)} add(%images.1, %images.1), \
metadata={op_name="jit(f)/add"}, backend_config={"window_config":{"estimated_cycles":"3000"}}
  %scatter.1 = s32[8,4]{1,0:T(8,128)} scatter(%add.1, %images.1, %images.1), \
update_window_dims={}, inserted_window_dims={0,1}, scatter_dims_to_operand_dims={0,1}
  %gather.2 = s32[2,4]{1,0:T(8,128)} gather(%scatter.1, %add.1), offset_dims={1}, \
slice_sizes={1,4}
  ROOT %while.3 = (s32[]{:T(128)}, s32[8,4]{1,0}) while(%add.1), condition=%condition, \
body=%body, metadata={op_name="jit(f)/while"}
}
"""


@pytest.fixture(scope='module')
def program():
    return compiled_text.parse(TEXT)


def test_parse(program):
    assert program.entry == 'main.9'
    assert len(program.computations) == 6
    add = program.computations['main.9'][1]
    assert add[:5] == ('add.1', 'add', 's32[8,4]{1,0:T(8,128)}', 'jit(f)/add', 3000)
    assert add.operands == ['images.1', 'images.1']
    with pytest.raises(ValueError, match='ENTRY'):
        compiled_text.parse('func.func public @main()')


def test_loops_and_conditionals_count_as_often_as_they_run(program):
    assert compiled_text.total(compiled_text.costs(program)) == 3000 + 8 * (1800 + 2100 / 2)

    def first(conditional):
        assert conditional.called == ('invert', 'look_up')
        return 1, 0

    found = compiled_text.costs(program, weights=first)
    assert compiled_text.total(found) == 3000 + 8 * (1800 + 2000)
    amounts = [(cost.instruction, cost.cycles) for cost in found]
    assert compiled_text.by(amounts, lambda x: x.op_name.split('/')[1]) == {
        'while': 8 * 3800,
        'add': 3000,
    }


def test_loops_whose_turns_are_unknown(program):
    """One that ends when the data say so counts `trips` times, and is named."""
    assert compiled_text.unknown_loops(program) == []
    unknown = compiled_text.parse(TEXT.replace('direction=LT', 'direction=NE'))
    assert [x.name for x in compiled_text.unknown_loops(unknown)] == ['while.3']
    assert compiled_text.total(compiled_text.costs(unknown, trips=2)) == 3000 + 2 * 2850


def test_accesses_to_single_elements(program):
    """In fusions too; rows of several elements are none."""
    assert compiled_text.element_accesses(program) == {'gather.1': 64, 'scatter.1': 32}
    missing = [x.name for x in compiled_text.without_estimate(program)]
    assert missing == ['scatter.1', 'gather.2', 'fusion.2']


@pytest.fixture(scope='module')
def gpu_program():
    return compiled_text.parse((pathlib.Path(__file__).parent / 'compiled/H100.txt').read_text())


def test_sizes():
    assert compiled_text.size('bf16[4,3]{1,0}') == 24
    assert compiled_text.size('(f32[], pred[7]{0}, /*index=2*/f8e4m3fn[2]{0}, u8[0]{0})') == 13


def test_what_a_gpu_launches(gpu_program):
    """A loop's body as often as it runs; nothing for tuples and for the end of an exchange."""
    kernels = compiled_text.kernels(gpu_program)
    found = {x.instruction.name: (x.executions, x.bytes) for x in kernels}
    weight, images, outputs, reduced = 4 * 432, 4 * 6144, 4 * 32768, 4 * 78048
    assert found == {
        'wrapped_compare': (15, 15 * 5),
        'copy.358': (14, 14 * 2 * 4 * 768),
        'input_transpose_fusion.6': (1, 2 * weight),
        'cudnn-conv-bias-activation.33': (1, images + weight + outputs),
        'wrapped_concatenate': (1, outputs + reduced),
        'all-reduce-start': (1, 2 * reduced),
    }


def test_the_scratch_of_a_library_is_not_what_it_writes():
    text = """HloModule product

ENTRY %main (a: bf16[8,4], b: bf16[4,2]) -> bf16[8,2] {
  %a = bf16[8,4]{1,0} parameter(0)
  %b = bf16[4,2]{1,0} parameter(1)
  %product = (bf16[8,2]{1,0}, s8[33554432]{0}) custom-call(%a, %b)
  ROOT %result = bf16[8,2]{1,0} get-tuple-element(%product), index=0
}
"""
    program = compiled_text.parse(text)
    assert [kernel.bytes for kernel in compiled_text.kernels(program)] == [2 * (32 + 8 + 16)]
    fusion = compiled_text.parse(text.replace('custom-call(', 'fusion('))
    (kernel,) = compiled_text.kernels(fusion)
    assert kernel.bytes == 2 * (32 + 8 + 16) + 33554432


def test_what_devices_exchange(gpu_program, program):
    assert compiled_text.collectives(gpu_program) == [('all-reduce', 4 * 78048)]
    assert compiled_text.collectives(program) == []


def test_names_of_what_has_none(program, gpu_program):
    """A fusion is called after the last operation in it, and what is in a loop after the loop."""
    (copy,) = [x for x, _ in compiled_text.costs(gpu_program) if x.name == 'copy.358']
    assert copy.op_name == 'jit(_fun)/shard_map/augmentation/while'
    (copy,) = [x for x, _ in compiled_text.costs(program) if x.name == 'copy.1']
    assert copy.op_name == 'jit(f)/while/body/cond'
    named = TEXT.replace(
        'slice_sizes={1}', 'slice_sizes={1}, metadata={op_name="jit(f)/gather"}'
    ).replace('metadata={op_name="jit(f)/while/body/cond/branch_1_fun/gather"}', 'x=1')
    (fusion,) = compiled_text.parse(named).computations['look_up'][2:3]
    assert fusion.op_name == 'jit(f)/gather'
