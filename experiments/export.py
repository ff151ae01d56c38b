"""Writes weights to be used elsewhere; the suffix of --out says as what.

    python -m experiments.export --workdir=runs/digits --out=digits.safetensors
    python -m experiments.export --weights=F0_haiku.npz --out=F0.stablehlo

.safetensors: parameters with all that classify and fine-tuning need to know. .stablehlo: a program
for `jax.export.deserialize(...).call(pixels)`, runnable without this package. .onnx: the same for
ONNX runtimes; needs jax2onnx. See docs/pretrained.md.
"""

import dataclasses
import pathlib
from typing import Any

import jax
from absl import flags

from experiments import cli
from nfnets_jax import export, pretrained, weight_files
from nfnets_jax.data.preprocessing import make_transform
from nfnets_jax.errors import UsageError, nearest

FORMATS = ('.safetensors', '.stablehlo', '.onnx')

_WORKDIR = flags.DEFINE_string('workdir', None, 'A run to take the weights from.')
_WEIGHTS = flags.DEFINE_string('weights', None, 'Or a file: see nfnets_jax.load_pretrained.')
_CHECKPOINT = flags.DEFINE_string('checkpoint', 'latest', "Of a run: 'latest', 'best', a step.")
_EMA = flags.DEFINE_bool('ema', True, 'Of a run: the moving average, where there is one.')
_MODEL = flags.DEFINE_string('model', None, 'To be told if it is another.')
_OUT = flags.DEFINE_string('out', None, f'The file to write: {", ".join(FORMATS)}.', required=True)
_SIZE = flags.DEFINE_integer('test_size', None, 'Pixels, instead of the published.', lower_bound=1)
_MODE = flags.DEFINE_string('eval_mode', None, 'Preprocessing, instead of the published.')
_CLASSES = flags.DEFINE_string('classes', None, 'A file with the name of each class, one a line.')


def export_weights(weights: pretrained.Weights, out: pathlib.Path) -> None:
    """Writes weights as the suffix of `out` says.

    Raises:
      UsageError: no such format, no known model, or the file cannot be written.
    """
    if out.suffix not in FORMATS:
        raise UsageError(f'--out={out}: unknown suffix{nearest(out.suffix, FORMATS)}')
    if weights.metadata.model is None:
        raise UsageError('these are the parameters of no known model: see --model')
    if out.suffix == '.safetensors':
        pretrained.save_weights(out, weights)
    else:
        convert = export.to_onnx if out.suffix == '.onnx' else export.to_stablehlo
        weight_files.write_bytes(out, convert(weights))


def override(metadata: pretrained.Metadata, **values: Any) -> pretrained.Metadata:
    """Returns metadata with the values that are not None put in; they are checked."""
    given = {name: value for name, value in values.items() if value is not None}
    metadata = dataclasses.replace(metadata, **given)
    if metadata.test_size:
        make_transform(metadata.eval_mode, metadata.test_size)
    if len(metadata.class_names) not in (0, metadata.num_classes):
        raise UsageError(
            f'--classes names {len(metadata.class_names)} classes, but the weights have '
            f'{metadata.num_classes}'
        )
    return metadata


def read_class_names(path: str) -> tuple[str, ...]:
    """Returns the lines of a file, the empty ones at its end left out."""
    try:
        return tuple(pathlib.Path(path).read_text().rstrip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f'--classes={path} cannot be read: {error}') from error


def main() -> None:
    if (_WORKDIR.value is None) == (_WEIGHTS.value is None):
        raise UsageError('give one of --workdir and --weights')
    weights = pretrained.load_pretrained(
        _WORKDIR.value or _WEIGHTS.value,
        _MODEL.value,
        checkpoint=_CHECKPOINT.value,
        ema=_EMA.value,
    )
    metadata = override(
        weights.metadata,
        test_size=_SIZE.value,
        eval_mode=_MODE.value,
        class_names=read_class_names(_CLASSES.value) if _CLASSES.value else None,
    )
    out = pathlib.Path(_OUT.value)
    export_weights(weights._replace(metadata=metadata), out)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(weights.params))
    print(
        f'{out}: {metadata.model}, {parameters:,} parameters, {metadata.num_classes} classes, '
        f'{metadata.test_size} px ({metadata.eval_mode}), {out.stat().st_size / 1e6:.1f} MB'
    )


if __name__ == '__main__':
    cli.run(main)
