"""Configuration of the documentation site: `make docs`, then open docs/_build/html/index.html.

Everything is built from files of this repository, without network. Notebooks are shown with the
outputs that are stored in them; tests/test_tutorials.py executes them.
"""

import importlib.util
import os
import pathlib
import sys

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

DOCS = pathlib.Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import nfnets_jax  # noqa: E402

project = 'nfnets_jax'
author = 'nfnets_jax maintainers'
version = release = nfnets_jax.__version__

extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
exclude_patterns = ['_build']
nb_execution_mode = 'off'
myst_heading_anchors = 4  # as on GitHub, so that links between guides work in both places
myst_enable_extensions = ['dollarmath']
html_math_renderer = 'mathjax'

html_theme = 'furo'
html_title = f'nfnets_jax {release}'

# Docstrings have Google's sections, and names in single backticks.
default_role = 'code'
autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented_params'
napoleon_use_ivar = True
napoleon_use_rtype = False

if importlib.util.find_spec('haiku') is None:
    raise RuntimeError("the API pages need the networks: pip install 'nfnets_jax[train,docs]'")

# Pages that show a file of the repository's root.
_ROOT_FILES = {'changelog': 'CHANGELOG.md', 'contributing': 'CONTRIBUTING.md'}


def _show_root_file(app: Sphinx, page: str, source: list[str]) -> None:
    """Puts a file of the root in the place of its page, its links as seen from docs/."""
    del app
    if file := _ROOT_FILES.get(page):
        text = (DOCS.parent / file).read_text(encoding='utf-8')
        for other, name in _ROOT_FILES.items():
            text = text.replace(f']({name}', f']({other}.md')
        source[0] = text.replace('](docs/', '](')


def _leave_out_of_menu(app: Sphinx, page: str, source: list[str]) -> None:
    """Permits the page of a study to be in no menu: the overview of the results links to it."""
    del app
    if page.startswith('results/') and not page.endswith('README'):
        source[0] = f'---\norphan: true\n---\n{source[0]}'


def _skip_tuple_field(app: Sphinx, what: str, name: str, field: object, skip: bool, *_) -> bool:
    """Skips the fields of named tuples, which the docstring of the class describes."""
    return skip or type(field).__name__ == '_tuplegetter'


def setup(app: Sphinx) -> None:
    app.connect('autodoc-skip-member', _skip_tuple_field)
    app.connect('source-read', _show_root_file)
    app.connect('source-read', _leave_out_of_menu)
    app.add_lexer('mermaid', TextLexer)  # drawn by GitHub; drawing it here would need the network
