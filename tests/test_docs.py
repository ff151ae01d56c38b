"""Links, anchors and file names in the documents lead to files that exist, and tables are whole."""

import pathlib
import re
import runpy

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = sorted(
    [
        *(ROOT / f'{name}.md' for name in ('README', 'CONTRIBUTING', 'CHANGELOG')),
        *(ROOT / 'docs').rglob('*.md'),
    ]
)
# Files of other projects, and the names of modules in earlier versions.
FOREIGN = {'pretrain.py', 'small.py'}
OLD_NAMES = re.compile(r'<!-- old names -->.*?<!-- /old names -->', re.S)


def prose(text):
    return re.sub(r'^```.*?^```', '', OLD_NAMES.sub('', text), flags=re.M | re.S)


def anchors(text):
    """Anchors that GitHub gives the headings of a document."""
    found = set()
    for heading in re.findall(
        r'^#+ +(.+?) *$', re.sub(r'^```.*?^```', '', text, flags=re.M | re.S), re.M
    ):
        plain = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', heading).lower()
        found.add(re.sub(r'[^\w\- ]', '', plain).replace(' ', '-'))
    return found | set(re.findall(r'(?:id|name)="([^"]+)"', text))


def broken(document, text):
    """Links and names of files in the text of a document that lead nowhere."""
    faults = []
    for link in re.findall(r'\]\(([^)\s]+)\)', prose(text)):
        if re.match(r'[a-z]+:', link):
            continue
        path, _, anchor = link.partition('#')
        target = document.parent / path if path else document
        if not target.exists():
            faults.append(link)
        elif anchor and target.suffix == '.md':
            content = text if target == document else target.read_text()
            if anchor not in anchors(content):
                faults.append(link)
    for name in re.findall(r'`([\w./-]+\.py)`', prose(text)):
        if name in FOREIGN:
            continue
        if '/' in name:
            exists = (ROOT / name).exists() or (document.parent / name).exists()
        else:
            parts = (
                'nfnets_jax',
                'experiments',
                'configs',
                'benchmarks',
                'examples',
                'tests',
                'docs',
            )
            exists = any(next((ROOT / part).rglob(name), None) for part in parts)
        if not exists:
            faults.append(name)
    for name, test in re.findall(r'`([\w./-]+\.py)::(\w+)`', prose(text)):
        path = ROOT / name
        if not path.exists() or not re.search(rf'^def {test}\(', path.read_text(), re.M):
            faults.append(f'{name}::{test}')
    return faults


def torn_tables(text):
    """First lines of tables that have no header, or rows of different numbers of cells."""
    faults = []
    for table in re.findall(r'^(?:\|.*\n?)+', prose(text), re.M):
        rows = table.splitlines()
        rows_of_code = [re.sub(r'`[^`]*`', '', row).replace('\\|', '') for row in rows]
        headed = len(rows) > 1 and re.fullmatch(r'[|: -]+', rows[1])
        if not headed or len({row.count('|') for row in rows_of_code}) > 1:
            faults.append(rows[0])
    return faults


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_links_and_file_names_exist(document):
    assert not broken(document, document.read_text())


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_tables_are_whole(document):
    assert not torn_tables(document.read_text())


def test_the_page_of_fields_is_that_of_their_declarations():
    page = runpy.run_path(str(ROOT / 'docs' / 'build_config.py'))['page']()
    assert (ROOT / 'docs' / 'config.md').read_text() == page, 'run `python docs/build_config.py`'


@pytest.mark.parametrize(
    'text',
    [
        '[a](missing.md)',
        '[a](README.md#missing)',
        '[a](#missing)',
        '`experiments/missing.py`',
        '`missing.py`',
        '`tests/test_agc.py::test_missing`',
    ],
)
def test_a_broken_one_is_found(text):
    assert broken(ROOT / 'CHANGELOG.md', text)


def test_a_torn_table_is_found():
    whole = '| a | b |\n|---|---|\n| 1 | `x | y` |\n| 2 | \\|x\\| |\n'
    assert not torn_tables(whole)
    assert torn_tables(f'{whole}\n| 3 | 4 |\n') == ['| 3 | 4 |']
    assert torn_tables(f'{whole}| 3 |\n') == ['| a | b |']
