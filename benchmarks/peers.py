"""The networks on PyTorch, to measure beside ours: timm's, and small ResNets written here."""

import importlib.util
import time
from collections.abc import Callable

import jax

# timm's names of our networks: the authors' form of the NFNets, timm's own of the others.
NAMES = {
    **{f'NFNet-F{i}': f'dm_nfnet_f{i}' for i in range(7)},
    **{f'NF-RegNet-B{i}': f'nf_regnet_b{i}' for i in range(6)},
    **{f'NF-ResNet-{i}': f'nf_resnet{i}' for i in (50, 101)},
}


# ResNets for small images and their numbers of blocks in each of three stages.
SMALL = {
    f'{kind}-{6 * blocks + 2}': blocks for kind in ('ResNet', 'NF-ResNet') for blocks in (1, 3, 9)
}


def available(model: str, row: str) -> bool:
    """Returns whether the packages of a row are installed and have the network."""
    needed, models = (('torch', 'timm'), NAMES) if row.startswith('timm') else (('torch',), SMALL)
    return model in models and all(map(importlib.util.find_spec, needed))


def small_train_step(model: str, batch: int, size: int):
    """Returns (one training step, seconds for the first) of a network of `SMALL` without AGC.

    Momentum and decay are PyTorch's.
    """
    import torch

    network = small_resnet(model).to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    labels = torch.arange(batch) % 10
    optimizer = torch.optim.SGD(
        network.parameters(), 1e-3, momentum=0.9, nesterov=True, weight_decay=2e-5
    )

    def step():
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return _timed_first(step)


def small_resnet(model: str):
    """Returns a network of `SMALL` with 10 classes, like ours of that name."""
    import torch
    from torch import nn

    normalizer_free = model.startswith('NF-')

    class ScaledWSConv(nn.Conv2d):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

        def forward(self, x):
            variance, mean = torch.var_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
            scale = torch.rsqrt(torch.clamp(variance * self.weight[0].numel(), min=1e-4))
            weight = (self.weight - mean) * scale * self.gain
            return self._conv_forward(x, weight, self.bias)

    def conv(inputs, outputs, kernel, stride=1):
        kind = ScaledWSConv if normalizer_free else nn.Conv2d
        return kind(inputs, outputs, kernel, stride, kernel // 2, bias=normalizer_free)

    def norm(channels):
        return nn.Identity() if normalizer_free else nn.BatchNorm2d(channels)

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride, beta):
            super().__init__()
            self.beta = beta
            self.norm0, self.norm1 = norm(inputs), norm(outputs)
            self.conv0, self.conv1 = conv(inputs, outputs, 3, stride), conv(outputs, outputs, 3)
            self.shortcut = conv(inputs, outputs, 1, stride) if inputs != outputs else None
            self.skip_gain = nn.Parameter(torch.zeros(())) if normalizer_free else None

        def forward(self, x):
            out = self.norm0(x).relu()
            if normalizer_free:
                out = out * (RELU_GAIN * self.beta)
            shortcut = x if self.shortcut is None else self.shortcut(out)
            out = self.norm1(self.conv0(out)).relu()
            out = self.conv1(out * RELU_GAIN if normalizer_free else out)
            return shortcut + (0.2 * self.skip_gain * out if normalizer_free else out)

    blocks, inputs = [], 16
    variance = 1.0
    for outputs in (16, 32, 64):
        for _ in range(SMALL[model]):
            changes = inputs != outputs  # then the shortcut starts anew, with a variance of 1
            blocks.append(Block(inputs, outputs, 2 if changes else 1, variance**-0.5))
            variance, inputs = (1.0 if changes else variance) + 0.04, outputs
    last = nn.Identity() if normalizer_free else nn.BatchNorm2d(inputs)
    head = nn.Linear(inputs, 10)
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(conv(3, 16, 3), *blocks, last, nn.ReLU(), pool, nn.Flatten(), head)


RELU_GAIN = 1.7128585504496627


def train_step(
    model: str, batch: int, size: int, *, autocast: bool = False, compiled: bool = False, bare=False
):
    """Returns (one training step, seconds to compile) of timm's network.

    AGC and the moving average of the parameters are timm's, momentum and decay PyTorch's.

    Args:
      model: our name of the network.
      batch, size: number and side of the images.
      autocast: whether to compute in bfloat16 where PyTorch considers it safe.
      compiled: whether to use torch.compile.
      bare: whether to leave out AGC, weight decay and moving average.
    """
    import timm.utils
    import torch

    network, images = _network(model, batch, size)
    network.train()
    labels = torch.arange(batch, device=images.device)
    decay = 0 if bare else 2e-5
    optimizer = torch.optim.SGD(
        network.parameters(), 1e-3, momentum=0.9, nesterov=True, weight_decay=decay
    )
    average = None if bare else timm.utils.ModelEmaV3(network, decay=0.9999)
    forward = torch.compile(network) if compiled else network

    def step():
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            loss = torch.nn.functional.cross_entropy(forward(images), labels)
        loss.backward()
        if not bare:
            timm.utils.adaptive_clip_grad(network.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
        if average:
            average.update(network)
        return _finished(images)

    return _timed_first(step)


def inference(model: str, batch: int, size: int, *, autocast: bool, compiled: bool):
    """Returns (one batch of logits, seconds to compile); see `train_step`."""
    import torch

    network, images = _network(model, batch, size)
    network.eval()
    forward = torch.compile(network) if compiled else network

    @torch.inference_mode()
    def run():
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            forward(images)
        return _finished(images)

    return _timed_first(run)


def _network(model: str, batch: int, size: int):
    import timm
    import torch

    device = 'cuda' if jax.default_backend() == 'gpu' and torch.cuda.is_available() else 'cpu'
    network = timm.create_model(NAMES[model]).to(device, memory_format=torch.channels_last)
    images = torch.randn(batch, 3, size, size, device=device)
    return network, images.to(memory_format=torch.channels_last)


def _finished(images) -> None:
    if images.is_cuda:
        import torch

        torch.cuda.synchronize()


def _timed_first(run: Callable[[], None]) -> tuple[Callable[[], None], float]:
    start = time.perf_counter()
    run()
    return run, time.perf_counter() - start
