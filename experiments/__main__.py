"""Lists the commands: `python -m experiments`."""

import ast
import pathlib
from collections.abc import Iterator

from experiments.launch import command_help, output

_ROOT = pathlib.Path(__file__).parent


def commands() -> Iterator[tuple[str, str]]:
    """Yields the name of each command and what its docstring says first, without importing it."""
    for path in sorted([*_ROOT.glob('*.py'), *_ROOT.glob('*/__main__.py')]):
        text = path.read_text(encoding='utf-8')
        if path != pathlib.Path(__file__) and "if __name__ == '__main__':" in text:
            name = path.parent.name if path.name == '__main__.py' else path.stem
            first_line = (ast.get_docstring(ast.parse(text)) or '').splitlines()[0]
            yield name, first_line.split('. ')[0].rstrip('.')


def main() -> None:
    rows = '\n'.join(f'    {name}  {text}' for name, text in commands())
    doc = f'Commands, as python -m experiments.NAME; each has --help:\n\n{rows}'
    with output.session():
        print(command_help.parser(doc, add_help=False).format_help(), end='')


if __name__ == '__main__':
    main()
