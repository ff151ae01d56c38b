"""Writes the features of images: the network's output before its classifier.

    python -m experiments.embed --weights=W.safetensors --out=features.npz IMAGE_OR_DIRECTORY...
    python -m experiments.embed --workdir=runs/mine --out=features.parquet IMAGE_OR_DIRECTORY...

Directories are searched for images at any depth. Images are prepared as in the evaluation of the
weights. An unreadable image is named and left out, the others are still written, and the exit
status is 2. The suffix of --out selects the format:

    .npz      'path', text [images], and 'features', float32 [images, size]
    .parquet  columns of the same names; needs pyarrow, the extra 'parquet'
"""

import dataclasses
import io
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from absl import flags

from experiments.launch import cli, weights_flags
from experiments.run import image_files
from nfnets_jax import extras, files
from nfnets_jax.errors import UsageError
from nfnets_jax.weights import pretrained

FORMATS = ('.npz', '.parquet')


def embed(
    weights: pretrained.Weights, paths: Iterable[pathlib.Path], batch_size: int = 16
) -> Iterator[tuple[pathlib.Path, np.ndarray | str]]:
    """Yields for each image its features, float32 [size], or why it cannot be read.

    They are the 'pool' of the network: the mean of its last feature map, which the classifier
    reads.
    """
    metadata = dataclasses.replace(weights.metadata, num_classes=0, class_names=())
    return image_files.outputs(weights._replace(metadata=metadata), paths, batch_size)


def write_features(
    out: pathlib.Path, paths: Sequence[pathlib.Path], features: Sequence[np.ndarray]
) -> None:
    """Writes paths and features, atomically, in the format that the suffix of `out` names.

    Args:
      out: a file with a suffix of FORMATS.
      paths: of the images.
      features: of the images, at least one.
    """
    names, rows, content = [str(path) for path in paths], np.stack(features), io.BytesIO()
    if out.suffix == '.npz':
        np.savez(content, path=names, features=rows)
    else:
        with extras.optional():
            import pyarrow as pa
            import pyarrow.parquet
        # Parquet's text is UTF-8: undecodable bytes of file names become escapes.
        text = [name.encode(errors='backslashreplace').decode() for name in names]
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
        pyarrow.parquet.write_table(pa.table({'path': text, 'features': vectors}), content)
    files.atomic_write(out, content.getvalue())


def main(paths: list[str]) -> None:
    args = flags.FLAGS
    images = image_files.expand_directories(paths)
    out = pathlib.Path(args.out)
    cli.check_out(out, FORMATS)
    if out.suffix == '.parquet' and (missing := extras.how_to_install('pyarrow')):
        raise UsageError(missing)
    source, weights = weights_flags.load()
    image_files.announce(source, weights, images)
    embedded, features = [], []
    for path, result in embed(weights, images, args.batch_size):
        if isinstance(result, str):
            print(f'{path}: {result}', file=sys.stderr, flush=True)
        else:
            embedded.append(path)
            features.append(result)
    if embedded:
        write_features(out, embedded, features)
        print(f'{out}: {len(features[0])} features of each of {len(embedded):,} images')
    if unreadable := len(images) - len(embedded):
        raise UsageError(f'{unreadable} of {len(images)} images could not be read')


if __name__ == '__main__':
    weights_flags.define()
    cli.define_path('out', None, f'The file to write: {", ".join(FORMATS)}.', required=True)
    flags.DEFINE_integer('batch_size', 16, 'Images at a time.', lower_bound=1)
    cli.run(main, positional=True, groups=weights_flags.GROUP)
