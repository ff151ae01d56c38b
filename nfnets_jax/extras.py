"""Optional packages: which extra of `pip install 'nfnets_jax[...]'` brings each of them."""

import contextlib
import importlib.util
from collections.abc import Iterator

# import name -> extra, as in pyproject.toml
EXTRAS = {
    'haiku': 'models',
    'safetensors': 'models',
    'absl': 'train',
    'cv2': 'train',
    'flatbuffers': 'train',
    'grain': 'train',
    'importlib_resources': 'train',
    'matplotlib': 'train',
    'ml_collections': 'train',
    'optuna': 'train',
    'orbax': 'train',
    'PIL': 'train',
    'plotly': 'train',
    'scipy': 'train',
    'simplejpeg': 'train',
    'sklearn': 'train',
    'tensorboard': 'train',
    'tensorflow_datasets': 'train',
    'tqdm': 'train',
    'wandb': 'tracking',
    'jax2onnx': 'onnx',
    'pyarrow': 'parquet',
    'tifffile': 'tiff',
    'imagecodecs': 'tiff',
    'onnxruntime': 'onnx',
    'libtpu': 'tpu',
    'jax_cuda12_plugin': 'cuda',
}


def how_to_install(module: str | None) -> str | None:
    """Returns a line that names the extra to install; None if nothing optional is missing.

    Args:
      module: the name of what could not be imported, as `ImportError.name` holds it.
    """
    package = (module or '').partition('.')[0]
    if package not in EXTRAS or importlib.util.find_spec(package):
        return None
    return f"{package} is not installed: pip install 'nfnets_jax[{EXTRAS[package]}]'"


@contextlib.contextmanager
def optional() -> Iterator[None]:
    """Wraps imports of optional packages: the error of a missing one names its extra.

    Raises:
      ModuleNotFoundError: as the import does, with the line of `how_to_install` as its message.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if line := how_to_install(error.name):
            raise ModuleNotFoundError(line, name=error.name) from None
        raise
