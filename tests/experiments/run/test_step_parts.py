import pytest

from experiments.run import compiled_text, step_parts


def instruction(op_name, opcode='fusion', name='x', text=''):
    return compiled_text.Instruction(name, opcode, 'f32[2]', op_name, 1, text)


@pytest.mark.parametrize(
    ('op_name', 'part', 'layer'),
    [
        (
            'jit(_fun)/shard_map/jvp(NFNet)/nf_block_3/conv1/cond/branch_0_fun/conv_general_dilated',
            'stage 3',
            'nf_block_3/conv1/conv_general_dilated',
        ),
        (
            'jit(_fun)/shard_map/transpose(jvp(NFNet))/nf_block/conv0/standardize/mul',
            'weight standardization',
            'nf_block/conv0/standardize/mul backward',
        ),
        ('jit(_fun)/transpose(jvp(NFNet))/nf_block/add', 'stage 1', 'nf_block/add backward'),
        ('jit(_fun)/jvp(ResNet)/res_block_v2_1/add', 'stage 2', 'res_block_v2_1/add'),
        ('jit(_fun)/jvp(NFNet)/stem_conv0/add', 'stem', 'stem_conv0/add'),
        ('jit(_fun)/jvp(NFNet)/linear/dot', 'head and loss', 'linear/dot'),
        ('jit(_fun)/jvp()/reduce_sum', 'head and loss', 'reduce_sum'),
        ('jit(_fun)/augmentation/vmap(jit(clip))/max', 'augmentation', 'augmentation/clip/max'),
        ('jit(_fun)/shard_map/update/mul', 'clipping and update', 'update/mul'),
        ('jit(_fun)/moving_average/add', 'clipping and update', 'moving_average/add'),
        ('jit(_fun)/exchange/psum', 'collectives', 'exchange/psum'),
        ('jit(_fun)/add', 'other', 'add'),
        ('', 'without a name', 'fusion'),
    ],
)
def test_parts_and_layers(op_name, part, layer):
    assert step_parts.part_of(instruction(op_name), depths=(1, 2, 6, 3)) == part
    assert step_parts.layer_of(instruction(op_name)) == layer


def test_kinds_of_kernels():
    call = instruction('', 'custom-call', text='%a), custom_call_target="__cudnn$convForward"')
    assert step_parts.gpu_kind(call) == 'cuDNN calls'
    assert step_parts.gpu_kind(instruction('', name='input_transpose_fusion.6')) == 'transposes'
    assert step_parts.gpu_kind(instruction('', 'copy', name='copy.358')) == 'copies'
    assert step_parts.gpu_kind(instruction('', name='loop_add_fusion')) is None
