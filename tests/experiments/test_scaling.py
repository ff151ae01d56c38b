import types

import pytest

from experiments import scaling
from experiments.run import accelerators
from nfnets_jax.errors import UsageError

V5E = accelerators.find_device('TPU v5 lite')
H100 = accelerators.find_device('NVIDIA H100 80GB HBM3')


def test_operations_are_those_of_the_paper():
    # 12.38 GMACs at 256 px are 6.96 at 192; two operations each, three times.
    assert scaling.operations('NFNet-F0') == pytest.approx(6 * 12.38e9 * (192 / 256) ** 2, rel=0.01)
    assert scaling.operations('NFNet-F0', remat=True) == 4 / 3 * scaling.operations('NFNet-F0')


def test_all_reduce_sends_everything_twice():
    assert scaling.all_reduce_seconds(1e9, V5E, 1) == 0
    # A pod: 255/256 of 2 GB at 200 GB/s.
    assert scaling.all_reduce_seconds(1e9, V5E, 256) == pytest.approx(0.01 * 255 / 256)
    # Boxes of eight: NVLink, and an eighth of the data between four boxes at 50 GB/s.
    links, network = 2 * 7 / 8 / 450, 2 / 8 * 3 / 4 / 50
    assert scaling.all_reduce_seconds(1e9, H100, 32) == pytest.approx(links + network)
    # The last box need not be full.
    assert scaling.all_reduce_seconds(1e9, H100, 12) > 2 * 7 / 8 / 450 + 2 / 8 * 1 / 2 / 50 - 1e-9
    with pytest.raises(UsageError, match='--devices=v5e:512: a pod has 256'):
        scaling.all_reduce_seconds(1e9, V5E, 512)


def test_what_does_not_fit_is_taken_in_parts_and_then_computed_anew():
    def chosen(count):
        result = scaling.estimate('NF-ResNet-50', V5E, count, 4096)
        return result.accumulate, result.remat, result.fits

    assert chosen(256) == (1, False, True)
    parts, remat, fits = chosen(1)
    assert (parts > 1, remat, fits) == (True, False, True)
    assert list(scaling._splits(32)) == [
        (1, False), (2, False), (4, False), (1, True), (2, True), (4, True), (8, True), (16, True),
        (32, True),
    ]  # fmt: skip


def test_more_devices_are_faster_by_less_than_their_number():
    one, many = (scaling.estimate('NF-ResNet-50', V5E, n, 4096, utilisation=0.35) for n in (8, 64))
    assert one.compute == pytest.approx(8 * many.compute)
    assert one.step / 8 < many.step < one.step
    assert one.compute == pytest.approx(
        512 * scaling.operations('NF-ResNet-50') / (0.35 * 197e12), rel=1e-6
    )


@pytest.mark.slow  # F6 is traced whole
def test_calibration_implies_the_shares_that_are_assumed():
    lines = [line.split() for line in scaling.calibrate()][1:]
    tpu = sorted(float(line[4].rstrip('%')) for line in lines)
    gpu = sorted(float(line[7].rstrip('%')) for line in lines if line[7] != '-')
    assert tpu[len(tpu) // 2] == pytest.approx(100 * scaling.TPU_SHARE, abs=0.5)
    middle = (gpu[len(gpu) // 2 - 1] + gpu[len(gpu) // 2]) / 2
    assert middle == pytest.approx(100 * scaling.GPU_SHARE, abs=0.5)


@pytest.mark.parametrize(
    ('text', 'problem'),
    [
        ('v5:128', r"--devices=v5:128: unknown 'v5' \(did you mean 'v5"),
        ('v5e', 'give how many, like v5e:128'),
        ('v5e:none', 'give how many'),
        ('v5e:0', 'give how many'),
    ],
)
def test_devices_that_cannot_be_read(text, problem):
    with pytest.raises(UsageError, match=problem):
        scaling.parse_devices(text)


def test_what_cannot_be_computed_is_told_before_the_table(monkeypatch):
    values = types.SimpleNamespace(models='NFNet-F0,SmallCNN', devices='v5e:8')
    monkeypatch.setattr(scaling.flags, 'FLAGS', values)
    with pytest.raises(UsageError, match='^--models=NFNet-F0,SmallCNN: SmallCNN is not computed'):
        next(scaling.table())


def test_a_batch_that_does_not_split_is_told():
    with pytest.raises(UsageError, match='--batch=100: does not split evenly over 8 devices'):
        scaling.estimate('NF-ResNet-50', V5E, 8, 100)
