import numpy as np
import pytest

from experiments import signal_propagation
from nfnets_jax.errors import UsageError


def test_counterpart_is_the_batch_normalised_resnet_as_deep():
    assert signal_propagation.counterpart('NF-ResNet-101') == 'ResNet-101'
    assert signal_propagation.counterpart('SkipInit-ResNet-20') == 'ResNet-20'
    assert signal_propagation.counterpart('NFNet-F0') == 'ResNet-50'


def test_measured_and_drawn(tmp_path):
    signal = signal_propagation.measure_signal('NF-ResNet-8', size=16, batch_size=8)
    assert {metric: values.shape for metric, values in signal.items()} == {
        'avg_sq_mean': (4,),
        'avg_var': (4,),
        'res_avg_var': (3,),
    }
    # Unit variance in the branches, alpha^2 of it added by the first block.
    np.testing.assert_allclose(signal['res_avg_var'], 1, rtol=0.4)
    assert signal['avg_var'][1] / signal['avg_var'][0] == pytest.approx(1.04, abs=0.02)

    signals = {'one': signal, 'twice that': {name: 2 * x for name, x in signal.items()}}
    figure = signal_propagation.draw(signals)
    figure.savefig(tmp_path / 'signal.png')
    assert (tmp_path / 'signal.png').stat().st_size > 10_000
    for axes, metric in zip(figure.axes, ('avg_sq_mean', 'avg_var', 'res_avg_var'), strict=True):
        for line, signal in zip(axes.lines, signals.values(), strict=True):
            np.testing.assert_array_equal(line.get_ydata(), signal[metric])


def test_a_gain_of_zero_leaves_the_shortcut_alone():
    signal = signal_propagation.measure_signal('NF-ResNet-8', size=16, batch_size=4, gain=0.0)
    assert signal['avg_var'][1] == pytest.approx(signal['avg_var'][0])


def test_a_network_without_blocks_has_nothing_to_measure():
    with pytest.raises(UsageError, match='SmallCNN has no residual blocks'):
        signal_propagation.measure_signal('SmallCNN', size=32, batch_size=1)
