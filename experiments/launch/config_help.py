"""What `--help` says of a config file: its variants, and every field that its config may have."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from nfnets_jax.fields import REQUIRED, Option, sections

WIDTH = 80


def describe(
    path: str, variants: Sequence[str], known: Mapping[str, Option], config: Mapping[str, Any]
) -> Iterator[str]:
    """Yields lines of at most `WIDTH` columns, unless a single word is longer.

    Args:
      path: of the config file.
      variants: what may follow the path and a colon.
      known: the options of the config.
      config: the values of the file.
    """
    yield f'\n{path}:\n'
    if variants:
        yield from _wrap(f'--config={path}:VARIANT, where VARIANT is one of: {" ".join(variants)}')
    yield from _wrap('--config.KEY=VALUE sets one of these fields, here with their values.')
    for node, doc, options in sections(known, 'config'):
        yield ''
        yield from _wrap(f'{node}: {doc}' if doc else node, 0)
        values: Any = config
        for key in node.split('.')[1:]:
            values = values.get(key, {})  # {} for the entries of a list
        for key, option in options.items():
            yield from _field(key, option, values.get(key, option.default))


def _field(key: str, option: Option, value: Any) -> Iterator[str]:
    value = value.to_dict() if isinstance(value, ConfigDict) else value
    entries = value if option.entries else ()
    given = '' if entries or value is REQUIRED else f' = {value!r}'
    yield from _wrap(f'{key}{given}  ({option.wants})')
    yield from _wrap(option.field.doc, 6)
    for i, entry in enumerate(entries):
        yield from _wrap(f'[{i}] = {entry!r}', 6)


def _wrap(text: str, indent: int = 2) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=' ' * indent,
        subsequent_indent=' ' * (indent if indent > 2 else indent + 4),
        break_on_hyphens=False,
    )
