import json
import pathlib

import haiku as hk
import jax
import pytest

from nfnets_jax import models
from nfnets_jax.models import residual

SIZES = json.loads(
    (pathlib.Path(__file__).parent.parent / 'golden' / 'model_sizes.json').read_text()
)
# One of each kind, among them a test size that strides do not divide; the rest take a minute.
QUICK = {'NFNet-F0', 'NF-RegNet-B2', 'NF-ResNet50', 'ResNet50'}


@pytest.mark.parametrize(
    'listed', [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in SIZES]
)
def test_parameters_and_macs_are_the_published_ones(listed):
    name = listed.replace('ResNet', 'ResNet-')
    cost, published = models.model_cost(name), SIZES[listed]
    assert cost.parameters == published['params']
    assert models.variant_info(name).test_size == published['test_size']
    if published['macs_at_test_size'] is not None:
        assert cost.macs(published['test_size']) == published['macs_at_test_size']


def test_every_published_size_is_in_the_list():
    assert {name.replace('ResNet', 'ResNet-') for name in SIZES} <= set(models.list_models())


@pytest.mark.parametrize(
    ('name', 'overrides', 'parameters'),
    [
        # arXiv 1512.03385 counts 0.27 M for its ResNet-20, the report 272 k.
        ('ResNet-20', {}, 272_282),
        ('ResNet-20', {'preactivation': False}, 272_474),
        ('ResNet-20', {'norm': 'none'}, 271_690),
        ('NF-ResNet-20', {}, 272_483),
        ('SmallCNN', {'norm': 'none'}, 37_322),
    ],
)
def test_small_networks(name, overrides, parameters):
    assert models.model_cost(name, 10, **overrides).parameters == parameters


# As timm 1.0.31 counts them: sum(p.numel() for p in timm.create_model(name).parameters()).
TIMM = {
    'nfnet_l0': 35_074_488,
    'eca_nfnet_l0': 24_143_924,
    'eca_nfnet_l1': 41_407_728,
    'eca_nfnet_l2': 56_722_348,
    'eca_nfnet_l3': 72_036_968,
    'test_nfnet': 383_080,
    'nf_resnet26': 15_995_176,
    'nf_resnet50': 25_557_032,
    'nf_resnet101': 44_549_160,
    'nf_seresnet26': 17_395_976,
    'nf_seresnet50': 28_088_024,
    'nf_seresnet101': 49_326_872,
    'nf_ecaresnet26': 15_995_220,
    'nf_ecaresnet50': 25_557_118,
    'nf_ecaresnet101': 44_549_331,
    'nf_regnet_b0': 8_764_288,
    'nf_regnet_b1': 10_223_984,
    'nf_regnet_b2': 14_314_608,
    'nf_regnet_b3': 18_593_832,
    'nf_regnet_b4': 30_210_816,
    'nf_regnet_b5': 49_741_728,
    'dm_nfnet_f0': 71_489_284,
}
QUICK_TIMM = {'test_nfnet', 'eca_nfnet_l0', 'nf_seresnet26', 'nf_ecaresnet26', 'nf_regnet_b1'}


@pytest.mark.parametrize(
    'name', [pytest.param(n, marks=() if n in QUICK_TIMM else pytest.mark.slow) for n in TIMM]
)
def test_timms_networks_have_as_many_parameters_as_timm_counts(name):
    assert models.model_cost(name).parameters == TIMM[name]


def test_every_network_of_timms_is_counted():
    rows = map(models.variant_info, models.list_models())
    assert {row.name for row in rows if row.base} == TIMM.keys() - {'dm_nfnet_f0'}


def test_small_cnn_counts_as_the_report_does_with_running_statistics():
    network = hk.transform_with_state(lambda x: models.SmallCNN(10)(x, True))
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), 'float32')
    params, state = jax.eval_shape(network.init, jax.random.key(0), image)
    means_and_variances = [leaves['average'].size for leaves in state.values()]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert parameters + sum(means_and_variances) == 37_834


def test_macs_by_hand():
    cost = models.model_cost('SmallCNN', 10)
    convolutions = 9 * 32 * (30**2 * 3 + 28**2 * 32 + 12**2 * 32 + 10**2 * 32)
    linears = 32 * 128 + 128 * 32 + 32 * 10
    assert cost.macs(32) == convolutions + linears


def test_operations_follow_the_area():
    cost = models.model_cost('NF-ResNet-8', 10)
    linears = cost.macs(0)
    assert cost.macs((32, 96)) - linears == 3 * (cost.macs(32) - linears)
    wide, square = (models.activation_bytes('NF-ResNet-8', size) for size in ((16, 64), 32))
    assert abs(wide / square - 1) < 0.01


def test_training_by_hand():
    cost, prefix = models.model_cost('SmallCNN', 10), 'SmallCNN/~/'
    first, *others = (9 * 32 * n for n in (30**2 * 3, 28**2 * 32, 12**2 * 32, 10**2 * 32))
    hidden, head = 32 * 128 + 128 * 32, 32 * 10
    forward = first + sum(others) + hidden + head
    modules = {module.name for module in cost.modules}
    assert cost.training_macs(32) == 3 * forward
    head_only = modules - {f'{prefix}linear_2'}
    assert cost.training_macs(32, head_only) == forward + 2 * head
    # Gradients pass through frozen layers, but end at the lowest one that is trained.
    assert cost.training_macs(32, {f'{prefix}conv0', f'{prefix}bn0', f'{prefix}linear'}) == (
        3 * forward - 2 * first - 32 * 128
    )
    # The first normalization comes between the first two convolutions.
    only_bn = modules - {f'{prefix}bn0'}
    assert cost.training_macs(32, only_bn) == forward + (forward - first)


def test_activations_by_hand():
    def bytes_of(saved):  # The stem and two blocks of two convolutions each, none of which shrinks.
        return models.activation_bytes('NF-ResNet-8', 8, saved, widths=(16,), depths=(2,))

    picture, plane, pool = 2 * 8 * 8 * 3, 2 * 8 * 8 * 16, 4 * 16
    assert (
        bytes_of('convolutions') == picture + 5 * plane
    )  # The last convolution's is for the gain.
    # What goes into the first block, between the two and out of the last, the signs of the latter's
    # entries (a byte each) for the last ReLU, and the classifier's input.
    assert bytes_of('blocks') == picture + 3 * plane + plane / 2 + pool
    assert bytes_of('all') > 2 * bytes_of('convolutions')


@pytest.mark.parametrize(
    'saved',
    [
        'convolutions',
        *(pytest.param(saved, marks=pytest.mark.slow) for saved in ('all', 'blocks')),
    ],
)
def test_activations_grow_with_the_picture_and_a_scan_keeps_no_more(saved, monkeypatch):
    monkeypatch.setattr(residual, 'SHORTEST_LOOP', 2)
    options = {'widths': (16, 32), 'depths': (1, 3), 'group_size': 8}

    def bytes_of(size, **more):
        return models.activation_bytes('NFNet-F0', size, saved, **options, **more)

    large = bytes_of(128)
    assert large == pytest.approx(4 * bytes_of(64), rel=0.03)
    scanned = bytes_of(128, scan=True)
    if saved == 'all':  # Of the two blocks in a loop only what is costly is.
        assert scanned < 0.95 * large
    else:
        assert scanned == pytest.approx(large, rel=0.01)


def test_activations_are_without_the_weights_that_a_loop_stacks():
    options = {'widths': (16, 64), 'scan': True}
    few, more, most = (
        models.activation_bytes('NF-ResNet-8', 8, 'blocks', depths=(1, n), **options)
        for n in (13, 14, 15)
    )
    assert more - few == most - more > 0


def test_activations_of_other_channels():
    options = {'widths': (8,), 'depths': (1,)}
    gray = models.activation_bytes('NF-ResNet-8', 8, channels=1, **options)
    assert 0 < gray < models.activation_bytes('NF-ResNet-8', 8, **options)
