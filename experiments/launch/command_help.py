"""What `--help` says of a command: its docstring, and its flags in groups."""

import argparse
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags

WIDEST, NARROWEST = 80, 40  # columns
REQUIRED, OPTIONS = 'required', 'options'


def asked_for(argv: Sequence[str]) -> bool:
    """Returns whether the command line asks for help."""
    return any(argument in ('--help', '-help', '-h', '-?') for argument in argv)


def describe(doc: str, known: Iterable[flags.Flag], groups: Mapping[str, Sequence[str]]) -> str:
    """Returns the text, as wide as the terminal, within limits.

    Args:
      doc: docstring of the command: a sentence, examples that are indented, and paragraphs.
      known: the flags to list.
      groups: title -> names of flags. Those in none are options, or required.
    """
    described = parser(doc, add_help=False)
    title_of = {name: title for title, names in groups.items() for name in names}
    by_title: dict[str, list[flags.Flag]] = {title: [] for title in (REQUIRED, OPTIONS, *groups)}
    for flag in known:
        title = REQUIRED if _is_required(flag) else title_of.get(flag.name, OPTIONS)
        by_title[title].append(flag)
    for title, members in by_title.items():
        group = described.add_argument_group(title)
        for flag in members:
            text = re.sub('^<.*?>: ', '', flag.help) + _default(flag)  # absl adds the choices.
            group.add_argument(_usage(flag), action='store_true', help=text.replace('%', '%%'))
    return described.format_help()


def parser(doc: str, **options: Any) -> argparse.ArgumentParser:
    """Returns a parser whose --help begins with the docstring, as wide as the terminal."""
    columns = max(NARROWEST, min(WIDEST, shutil.get_terminal_size().columns))
    return argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description='\n\n'.join(_paragraphs(doc, columns)),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=columns * 3 // 8, width=columns
        ),
        **options,
    )


def _paragraphs(doc: str, columns: int) -> Iterator[str]:
    """Yields the paragraphs of a docstring, filled, with its lists and long commands folded."""
    for part in re.split(r'\n\s*\n', doc.strip()):
        if not part.startswith(' '):
            yield textwrap.fill(part, columns, break_on_hyphens=False)
        elif rows := _rows(part):
            yield '\n'.join(_fill_rows(rows, columns))
        else:
            joined = re.sub(r'(?: \\)?\n {8,}', ' ', part)
            yield '\n'.join(_fold(line, columns) for line in joined.splitlines())


def _rows(part: str) -> list[tuple[str, str]]:
    """Returns the terms and texts of an indented list; none if it is something else."""
    rows: list[tuple[str, str]] = []
    for line in part.splitlines():
        if row := re.fullmatch(r' {4}(\S.*?) {2,}(\S.*)', line):
            rows.append((row[1], row[2]))
        elif rows and line.startswith(5 * ' '):
            rows[-1] = (rows[-1][0], f'{rows[-1][1]} {line.strip()}')
        else:
            return []
    return rows


def _fill_rows(rows: Sequence[tuple[str, str]], columns: int) -> Iterator[str]:
    """Yields the lines of a list, its texts below one another."""
    start = min(6 + max(len(term) for term, _ in rows), columns // 2)
    for term, text in rows:
        lead = f'    {term}'
        if len(lead) > start - 2:
            yield lead
            lead = ''
        yield textwrap.fill(
            text,
            columns,
            initial_indent=lead.ljust(start),
            subsequent_indent=start * ' ',
            break_on_hyphens=False,
        )


def _fold(line: str, columns: int) -> str:
    """Returns a command in lines that a shell joins again; any other line as it is."""
    if not line.startswith(('    python ', '    pip ')):
        return line
    return ' \\\n'.join(
        textwrap.wrap(
            line,
            columns - 2,
            subsequent_indent=8 * ' ',
            break_on_hyphens=False,
            break_long_words=False,
        )
    )


def _is_required(flag: flags.Flag) -> bool:
    return any('must have a value other than None' in v.message for v in flag.validators)


def _default(flag: flags.Flag) -> str:
    """Returns the default in words; nothing for those that say nothing."""
    if flag.default in (None, '') or flag.default is False:
        return ''
    return f' (default: {str(flag.default_as_str).strip(chr(39))})'


_METAVARS = {'int': 'N', 'float': 'X', 'comma separated list of strings': 'A,B'}


def _usage(flag: flags.Flag) -> str:
    """Returns how a flag is written, such as '--workdir=PATH'."""
    if isinstance(flag, flags.BooleanFlag):
        return f'--[no]{flag.name}'
    if flag.name == 'config':
        value = 'FILE[:VARIANT]'
    elif isinstance(flag, flags.EnumFlag):
        value = '|'.join(flag.parser.enum_values)
    else:
        value = getattr(flag.parser, 'metavar', _METAVARS.get(flag.flag_type(), 'TEXT'))
    return f'--{flag.name}={value}'
