"""What `--help` says of a config file: its variants, and every field that its config may have."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from nfnets_jax.fields import REQUIRED, Option

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
    yield from _node('config', '', known, config)


def _node(
    name: str, doc: str, known: Mapping[str, Option], values: Mapping[str, Any]
) -> Iterator[str]:
    """Yields the fields of a node, and then its inner nodes and the entries of its lists."""
    yield ''
    yield from _wrap(f'{name}: {doc}' if doc else name, 0)
    for key, option in known.items():
        if not option.inner:
            value = values.get(key, option.default)
            value = value.to_dict() if isinstance(value, ConfigDict) else value
            entries = value if option.entries else ()
            given = '' if entries or value is REQUIRED else f' = {value!r}'
            yield from _wrap(f'{key}{given}  ({option.wants})')
            yield from _wrap(option.field.doc, 6)
            for i, entry in enumerate(entries):
                yield from _wrap(f'[{i}] = {entry!r}', 6)
    for key, option in known.items():
        if inner := option.inner:
            yield from _node(f'{name}.{key}', option.field.doc, inner, values.get(key) or {})
        elif inner := option.entries:
            yield from _node(f'{name}.{key}[i]', 'each of them has', inner, {})


def _wrap(text: str, indent: int = 2) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=' ' * indent,
        subsequent_indent=' ' * (indent if indent > 2 else indent + 4),
        break_on_hyphens=False,
    )
