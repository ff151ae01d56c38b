"""Builds docs/config.md, the page of all fields of a config: `python docs/build_config.py`."""

import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping

DOCS = pathlib.Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

from experiments.config import Config  # noqa: E402
from experiments.run.data import ImageOptions  # noqa: E402
from experiments.study.schema import StudyConfig  # noqa: E402
from nfnets_jax.data.sources import SOURCES  # noqa: E402
from nfnets_jax.fields import REQUIRED, Option, options, sections  # noqa: E402
from nfnets_jax.models.registry import FAMILIES  # noqa: E402

INTRODUCTION = """# Fields of a config

This page is written from the declarations of the fields by `docs/build_config.py`. The commands
`experiments.train` and `experiments.study`, given `--config=FILE --help`, print the fields of one
file with its values, and the options of its model and data. `--config.KEY=VALUE` sets a field.
"""


def page() -> str:
    """Returns the text of the page."""
    return '\n\n'.join(_parts()) + '\n'


def _parts() -> Iterator[str]:
    yield INTRODUCTION.rstrip()
    yield from _sections(options(Config), 'config', '## Training')
    yield '## Data'
    yield from _sections(options(ImageOptions), 'config.data', '### Options of every source')
    for name, source in SOURCES.items():
        yield from _sections(options(source), 'config.data', f'### Options of {name}')
    yield '## Models'
    yield (
        'Options of `config.model`, and of `create_model`, with the defaults of the families. None '
        "keeps a network's own value."
    )
    yield _table(_model_rows())
    yield from _sections(options(StudyConfig), 'config', '## Studies')


def _sections(known: Mapping[str, Option], name: str, title: str) -> Iterator[str]:
    """Yields a table of the fields of a node, and then of those below it."""
    for node, _, found in sections(known, name):
        yield title if node == name else f'### {node}'
        yield _table(
            (f'{node}.{key}', option.wants, _default(option), option.field.doc)
            for key, option in found.items()
        )


def _model_rows() -> Iterator[tuple[str, str, str, str]]:
    rows: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for family, declaration in FAMILIES.items():
        for key, option in options(declaration).items():
            if key != 'num_classes':
                row = rows.setdefault((key, option.wants, option.field.doc), {})
                row.setdefault(_default(option), []).append(family)
    for (key, wants, doc), families in sorted(rows.items()):
        defaults = (f'{default} ({", ".join(names)})' for default, names in families.items())
        yield key, wants, '; '.join(defaults), doc


def _default(option: Option) -> str:
    return '' if option.default is REQUIRED else f'`{option.default!r}`'


def _table(rows: Iterable[tuple[str, str, str, str]]) -> str:
    lines = ['| field | must be | default | |', '|---|---|---|---|']
    for key, *cells in rows:
        text = ' | '.join(cell.replace('|', '\\|') for cell in cells)
        lines.append(f'| `{key}` | {text} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    (DOCS / 'config.md').write_text(page())
