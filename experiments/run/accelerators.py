"""Peak figures of accelerators, for MFU and for planning.

`DEVICES` is the only table of hardware figures. Peak operations are dense bfloat16 (float16 on a
V100, which has no bfloat16). Sources:

  TPUs    docs.cloud.google.com/tpu/docs/v3, v4, v5e, v5p and v6e. The bandwidth of a chip's links
          is the published all-reduce bandwidth of a pod divided by its chips; v5p: 4,800 Gbit/s.
          Another version of the page on v6e says 1,600 GB/s of memory.
  GPUs    V100 and the SXM forms of A100, H100 and H200 from pages that repeat NVIDIA's data sheets.
          Figures of PCIe and NVL cards, and of the V100's links, are from memory and UNVERIFIED.
          Links are in one direction.
  network ASSUMED: one card for each GPU, of 100, 200 or 400 Gbit/s (V100, A100, Hopper).
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """A chip, or half of it where JAX makes a device of each core (TPU v2 and v3).

    Attributes:
      name: short, 'v5e' or 'H100'.
      kinds: prefixes of `jax.Device.device_kind`.
      peak_flops: dense bfloat16 operations a second, a multiply-accumulate counting two.
      memory: bytes.
      memory_bandwidth: bytes a second.
      link_bytes: bandwidth to its neighbours, bytes a second in all directions together.
      linked: the most devices that these links connect: a pod, a box.
      network_bytes: bandwidth to other boxes, bytes a second; None: pods only.
    """

    name: str
    kinds: tuple[str, ...]
    peak_flops: float
    memory: float
    memory_bandwidth: float
    link_bytes: float
    linked: int
    network_bytes: float | None


def _device(name, kinds, tflops, memory_gb, memory_gbps, link_gbps, linked, network_gbps):
    return Device(
        name=name,
        kinds=kinds,
        peak_flops=tflops * 1e12,
        memory=memory_gb * 1e9,
        memory_bandwidth=memory_gbps * 1e9,
        link_bytes=link_gbps * 1e9,
        linked=linked,
        network_bytes=network_gbps and network_gbps * 1e9,
    )


# TFLOP/s, GB, GB/s, GB/s over links, linked, GB/s over the network. The first match counts, so a
# longer kind comes before its own prefix.
DEVICES = (
    _device('v3', ('TPU v3',), 61.5, 17.2, 450, 166, 2048, None),
    _device('v4', ('TPU v4',), 275, 34.4, 1200, 268, 4096, None),
    _device('v5e', ('TPU v5 lite', 'TPU v5e'), 197, 16, 819, 200, 256, None),
    _device('v5p', ('TPU v5p', 'TPU v5'), 459, 95, 2765, 600, 8960, None),
    _device('v6e', ('TPU v6 lite', 'TPU v6e'), 918, 32, 1638, 400, 256, None),
    _device('V100', ('Tesla V100-SXM',), 125, 16, 900, 150, 8, 12.5),
    _device('A100', ('NVIDIA A100-SXM4-40GB',), 312, 40, 1555, 300, 8, 25),
    _device('A100 80GB', ('NVIDIA A100-SXM4-80GB',), 312, 80, 2039, 300, 8, 25),
    _device('A100 PCIe', ('NVIDIA A100',), 312, 40, 1555, 32, 8, 25),
    _device('H100 PCIe', ('NVIDIA H100 PCIe',), 756, 80, 2000, 64, 8, 50),
    _device('H100 NVL', ('NVIDIA H100 NVL',), 835, 94, 3900, 64, 8, 50),
    _device('H100', ('NVIDIA H100',), 989, 80, 3350, 450, 8, 50),
    _device('H200 NVL', ('NVIDIA H200 NVL',), 835, 141, 4800, 64, 8, 50),
    _device('H200', ('NVIDIA H200',), 989, 141, 4800, 450, 8, 50),
)


def find_device(device_kind: str) -> Device | None:
    """Returns the device of a JAX device kind ('NVIDIA H100 80GB HBM3'), or None if unknown."""
    return next((device for device in DEVICES if device_kind.startswith(device.kinds)), None)


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak dense bfloat16 operations a second of a JAX device kind.

    None if it is unknown, as on a CPU.
    """
    device = find_device(device_kind)
    return device.peak_flops if device else None
