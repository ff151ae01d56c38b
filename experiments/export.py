"""Writes weights for use elsewhere; the suffix of --out selects the format.

    python -m experiments.export --workdir=runs/digits --out=digits.safetensors
    python -m experiments.export --weights=F0_haiku.npz --out=F0.stablehlo

.safetensors: parameters, with the metadata that classify and fine-tuning need. .stablehlo: a
program for `jax.export.deserialize(...).call(pixels)`, which runs without this package. .onnx: the
same for ONNX runtimes; needs jax2onnx. See docs/pretrained.md.
"""

import dataclasses
import pathlib
import sys
from typing import Any

from absl import flags

from experiments.launch import cli, weights_flags
from nfnets_jax import files
from nfnets_jax.data.preprocessing import make_transform
from nfnets_jax.errors import UsageError
from nfnets_jax.weights import export, pretrained

FORMATS = ('.safetensors', '.stablehlo', '.onnx')


def export_weights(weights: pretrained.Weights, out: pathlib.Path) -> None:
    """Writes weights in the format that the suffix of `out` names.

    Raises:
      UsageError: the format or the model is unknown, or the file cannot be written.
    """
    check_export(weights, out)
    if out.suffix == '.safetensors':
        pretrained.save_weights(out, weights)
    else:
        convert = export.to_onnx if out.suffix == '.onnx' else export.to_stablehlo
        files.atomic_write(out, convert(weights))


def check_export(weights: pretrained.Weights, out: pathlib.Path) -> None:
    """Raises the UsageErrors of `export_weights` that are known before anything is converted."""
    cli.check_out(out, FORMATS)
    if weights.metadata.model is None:
        raise UsageError('the parameters are not those of a known model: see --model')


def override(metadata: pretrained.Metadata, **values: Any) -> pretrained.Metadata:
    """Returns metadata with the values that are not None replaced and checked."""
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
    """Returns the lines of a file without the empty ones at its end.

    Raises:
      UsageError: the file cannot be read, or names no class.
    """
    try:
        names = tuple(pathlib.Path(path).read_text(encoding='utf-8').rstrip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f'--classes={path} cannot be read: {error}') from error
    if not names:
        raise UsageError(f'--classes={path} is empty: write the names of the classes, one a line')
    return names


def main() -> None:
    args = flags.FLAGS
    source, weights = weights_flags.load()
    metadata = override(
        weights.metadata,
        test_size=args.test_size,
        eval_mode=args.eval_mode,
        class_names=read_class_names(args.classes) if args.classes else None,
    )
    out, weights = pathlib.Path(args.out), weights._replace(metadata=metadata)
    check_export(weights, out)
    print(f'{source}: {pretrained.describe(weights)}; writing {out}', file=sys.stderr, flush=True)
    export_weights(weights, out)
    print(f'{out}: {pretrained.describe(weights)}, {out.stat().st_size / 1e6:.1f} MB')


if __name__ == '__main__':
    weights_flags.define()
    cli.define_path('out', None, f'The file to write: {", ".join(FORMATS)}.', required=True)
    cli.define_image_size('test_size', 'Another size of test images in pixels.')
    flags.DEFINE_string('eval_mode', None, 'Another evaluation preprocessing.')
    cli.define_path('classes', None, 'File with the names of the classes, one a line.')
    cli.run(main, groups=weights_flags.GROUP)
