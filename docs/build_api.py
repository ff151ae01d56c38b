"""Builds the API documentation from the docstrings: `python docs/build_api.py`, or `make docs`.

Writes HTML to docs/api/. Each public module is given by name: the names that
nfnets_jax/__init__.py imports on first use are documented where they are defined.
"""

import importlib
import pathlib
import sys

import pdoc
import pdoc.render

DOCS = pathlib.Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

import nfnets_jax  # noqa: E402

# All other modules are internal.
PUBLIC = (
    'agc',
    'unit_axes',
    'sam',
    'layers',
    'models.registry',
    'models.nfnet',
    'models.nf_resnet',
    'models.nf_regnet',
    'models.resnet',
    'models.skipinit_resnet',
    'models.fixup_resnet',
    'optimizers',
    'schedules',
    'augment.recipe',
    'augment.randaugment',
    'data.sources',
    'data.folder',
    'data.tfds',
    'data.preprocessing',
    'data.pipeline',
    'weights.pretrained',
    'weights.downloads',
    'weights.export',
    'errors',
)


def main(output=DOCS / 'api'):
    modules = [f'nfnets_jax.{name}' for name in PUBLIC]
    for module in map(importlib.import_module, modules):
        vars(module).pop('Array', None)  # Or pdoc documents all of jax.Array as ours.
    pdoc.render.configure(docformat='google', show_source=False, footer_text=nfnets_jax.__version__)
    pdoc.pdoc(*modules, output_directory=pathlib.Path(output))
    print(f'open {output}/index.html')


if __name__ == '__main__':
    main(*sys.argv[1:])
