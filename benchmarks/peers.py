"""timm's networks on PyTorch, to measure beside ours; needs torch and timm."""

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


def available(model: str) -> bool:
    """Returns whether timm is installed and has the network."""
    return model in NAMES and all(map(importlib.util.find_spec, ('torch', 'timm')))


def train_step(
    model: str, batch: int, size: int, *, autocast: bool = False, compiled: bool = False, bare=False
):
    """Returns (one training step, seconds to compile).

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
