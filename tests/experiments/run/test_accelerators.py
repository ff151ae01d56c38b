import pytest

from experiments.run import accelerators


@pytest.mark.parametrize(
    ('kind', 'name', 'tflops'),
    [
        ('TPU v3', 'v3', 61.5),  # a core: half of a chip
        ('TPU v4', 'v4', 275),
        ('TPU v5 lite', 'v5e', 197),
        ('TPU v5', 'v5p', 459),
        ('TPU v5p', 'v5p', 459),
        ('TPU v6 lite', 'v6e', 918),
        ('Tesla V100-SXM2-16GB', 'V100', 125),
        ('NVIDIA A100-SXM4-40GB', 'A100', 312),
        ('NVIDIA A100-SXM4-80GB', 'A100 80GB', 312),
        ('NVIDIA H100 80GB HBM3', 'H100', 989),
        ('NVIDIA H100 PCIe', 'H100 PCIe', 756),
        ('NVIDIA H200', 'H200', 989),
    ],
)
def test_kinds_as_jax_calls_them(kind, name, tflops):
    assert accelerators.find_device(kind).name == name
    assert accelerators.peak_flops(kind) == tflops * 1e12


def test_what_is_not_known_has_no_peak():
    assert accelerators.peak_flops('cpu') is None


def test_no_kind_hides_another():
    for device in accelerators.DEVICES:
        for kind in device.kinds:
            assert accelerators.find_device(kind) is device
