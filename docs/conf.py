"""Configuration of the documentation site: `make docs`, then open docs/_build/html/index.html.

Everything is built from files of this repository, without network. Notebooks are shown with the
outputs that are stored in them; tests/test_tutorials.py executes them.
"""

import importlib.util
import os
import pathlib
import sys

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

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
html_math_renderer = 'mathml'

html_theme = 'furo'
html_title = f'nfnets_jax {release}'
html_show_copyright = False
html_static_path = ['site.css']
html_css_files = ['site.css']
html_theme_options = {
    'dark_css_variables': {
        'chart-filter': 'invert(0.9) hue-rotate(180deg)',  # Charts are drawn on white.
        'mystnb-source-border-color': 'var(--color-background-border)',
    }
}
highlight_language = 'text'  # as on GitHub
pygments_dark_style = 'github-dark'

# Docstrings have Google's sections, and names in single backticks.
default_role = 'code'
autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented_params'
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False  # They would show as jax.jaxlib._jax.Array.

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


def _write_formula(translator: HTML5Translator, node: nodes.Element) -> None:
    """Writes a formula as MathML, which browsers draw without a script or the network."""
    block = isinstance(node, nodes.math_block)
    formula = tex2mathml(node.astext(), as_block=block)
    translator.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer('mathml', (_write_formula, None), (_write_formula, None))
    app.connect('autodoc-skip-member', _skip_tuple_field)
    app.connect('source-read', _show_root_file)
    app.connect('source-read', _leave_out_of_menu)
