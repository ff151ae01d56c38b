"""Plots the signal through a network at initialisation, block by block.

    python -m experiments.signal_propagation --model=NF-ResNet-50
    python -m experiments.signal_propagation --model=NFNet-F0 --against=ResNet-50 --gain=0.5

Three panels, as in the signal propagation plots of arXiv 2101.08692 (section 3): the squared mean
of the channels and their variance, averaged over the channels, and the variance of each residual
branch before it is scaled and added. The input is Gaussian noise. Learned gains on residual
branches, which start at zero and would hide the branches, are set to --gain.
"""

import pathlib
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.launch import cli
from experiments.run import curves, parallel
from nfnets_jax import models
from nfnets_jax.errors import UsageError

_PANELS = (
    ('avg_sq_mean', 'Squared channel mean'),
    ('avg_var', 'Channel variance'),
    ('res_avg_var', 'Variance of the residual branch'),
)
# Okabe and Ito's colours, which stay apart for colour-blind readers.
_COLOURS = ('#0072B2', '#D55E00')


def counterpart(name: str) -> str:
    """Returns the batch-normalised ResNet of the depth of a model, or ResNet-50."""
    resnet = f'ResNet-{models.variant_info(name).variant}'
    return resnet if resnet in models.list_models() else 'ResNet-50'


def measure_signal(
    name: str, *, size: int, batch_size: int, seed: int = 0, gain: float = 1.0, **options: Any
) -> dict[str, np.ndarray]:
    """Returns `layers.signal_metrics` of a model in training mode with random weights.

    Args:
      name: name of the model.
      size: side of the images of noise, in pixels.
      batch_size: number of images.
      seed: seed of the weights and the noise.
      gain: value of the gains on residual branches.
      **options: options of the model, see `models.create_model`.
    """
    if models.variant_info(name).family == 'SmallCNN':
        raise UsageError(f'model: {name} has no residual blocks to measure')
    network = hk.transform_with_state(
        lambda x: models.create_model(
            name, 10, **{'drop_rate': 0.0, 'stochdepth_rate': 0.0} | options
        )(x, True, return_metrics=True)
    )
    key_x, key_w = jax.random.split(jax.random.key(seed))
    images = jax.random.normal(key_x, (batch_size, size, size, 3))
    params, state = jax.jit(network.init)(key_w, images)
    params = hk.data_structures.map(
        lambda module, leaf, value: jnp.full_like(value, gain) if leaf == 'skip_gain' else value,
        params,
    )
    # A device axis of one, for networks that average statistics over devices.
    apply = jax.jit(jax.vmap(network.apply, (None, None, None, 0), axis_name=parallel.AXIS))
    out, _ = apply(params, state, None, images[None])
    return jax.tree.map(lambda x: x[0], jax.device_get(out['signal']))


def draw(signals: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Returns the figure for {model name: its signal metrics}."""
    figure = Figure(figsize=(13, 4), dpi=120, layout='constrained')
    for axes, (metric, title) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for (name, signal), colour in zip(signals.items(), _COLOURS, strict=False):
            # Branches start at block 1, activations at the stem, 0.
            first = int(metric == 'res_avg_var')
            blocks = np.arange(len(signal[metric])) + first
            axes.plot(blocks, signal[metric], color=colour, marker='o', markersize=3, label=name)
        axes.set_title(title)
        axes.set_xlabel('block (0: stem)' if not first else 'block')
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        values = np.concatenate([signal[metric] for signal in signals.values()])
        if values.min() > 0 and values.max() > 20 * values.min():
            axes.set_yscale('log')
        else:
            axes.set_ylim(bottom=0)
        axes.spines[['top', 'right']].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.suptitle('Signal propagation at initialisation')
    return figure


def main() -> None:
    args = flags.FLAGS
    out = pathlib.Path(args.out)
    cli.check_out(out, curves.FIGURE_SUFFIXES)
    size = args.size or models.variant_info(args.model).train_size
    options = {'batch_size': args.batch_size, 'seed': args.seed, 'gain': args.gain}
    signals = {
        name: measure_signal(name, size=size, **options)
        for name in dict.fromkeys([args.model, args.against or counterpart(args.model)])
    }
    curves.write_figure(out, draw(signals))
    for name, signal in signals.items():
        print(f'{name}: channel variance', *(f'{value:.2f}' for value in signal['avg_var']))
    print(f'wrote {out}')


if __name__ == '__main__':
    flags.DEFINE_string('model', 'NF-ResNet-50', 'Model to plot.')
    flags.DEFINE_string('against', None, 'Model to compare with; by default a similar ResNet.')
    flags.DEFINE_integer('size', None, 'Pixels; by default the training size.', lower_bound=1)
    flags.DEFINE_integer('batch_size', 4, 'Images for the statistics.', lower_bound=1)
    flags.DEFINE_integer('seed', 0, 'Seed of the weights and the input.')
    flags.DEFINE_float('gain', 1.0, 'Value of the gains on residual branches.')
    cli.define_path('out', 'signal_propagation.png', 'Image file to write.')
    cli.run(main)
