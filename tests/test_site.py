"""The documentation site builds without a warning and without network, and its links work."""

import html.parser
import os
import pathlib
import shutil
import urllib.parse

import pytest

from tests import processes

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """The built site, from a copy of what it is made of: the build writes beside its output."""
    source = tmp_path_factory.mktemp('site') / 'source'
    output = source.parent / 'build' / 'html'
    for name in ('docs', 'examples', 'nfnets_jax'):
        ignored = shutil.ignore_patterns('_build', '__pycache__')
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ('CHANGELOG.md', 'CONTRIBUTING.md', 'Dockerfile'):
        shutil.copy(ROOT / name, source)
    # Its many small objects make the default threshold of garbage collection dear.
    build = 'import gc, sys; gc.set_threshold(100_000, 50, 100)\n'
    build += 'from sphinx.cmd.build import main; sys.exit(main(sys.argv[1:]))'
    process = processes.run(
        ['-c', build, '--fail-on-warning', '--quiet', source / 'docs', output],
        cwd=source,
        env=os.environ | {'http_proxy': 'http://127.0.0.1:9', 'https_proxy': 'http://127.0.0.1:9'},
    )
    assert process.returncode == 0, process.stderr
    return output


class Page(html.parser.HTMLParser):
    """Collects what a page links to, what it loads, and the anchors that it has."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.anchors = [], [], set()
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors.update(filter(None, (values.get('id'), values.get('name'))))
        if tag == 'a' and values.get('href'):
            self.links.append(values['href'])
        if tag in ('img', 'script', 'iframe') and values.get('src'):
            self.loaded.append(values['src'])
        if tag == 'link' and values.get('rel') == 'stylesheet':
            self.loaded.append(values['href'])


def test_every_link_and_anchor_of_the_site_leads_somewhere(site):
    pages = {path: Page(path) for path in site.rglob('*.html')}
    assert len(pages) > 20
    broken = []
    for path, page in pages.items():
        for link in (*page.links, *page.loaded):
            url = urllib.parse.urlsplit(link)
            if url.scheme:
                continue
            target = (path.parent / urllib.parse.unquote(url.path)).resolve() if url.path else path
            found = target in pages or target.is_file()
            if found and url.fragment and target in pages:
                found = urllib.parse.unquote(url.fragment) in pages[target].anchors
            if not found:
                broken.append(f'{path.relative_to(site)}: {link}')
    assert not broken


def test_pages_load_nothing_from_other_hosts(site):
    for path in site.rglob('*.html'):
        for link in Page(path).loaded:
            assert not urllib.parse.urlsplit(link).netloc, f'{path.name} loads {link}'


@pytest.mark.parametrize('page', ['equations', 'tutorials/agc_in_five_minutes'])
def test_formulas_are_drawn_by_the_browser(site, page):
    text = (site / f'{page}.html').read_text(encoding='utf-8')
    assert '<mfrac>' in text
    assert r'\frac' not in text


def test_a_page_has_one_title(site):
    for path in site.rglob('*.html'):
        assert path.read_text(encoding='utf-8').count('<h1') <= 1, path.name  # search makes its own


@pytest.mark.parametrize(
    ('page', 'texts'),
    [
        ('reference/agc.html', ('adaptive_grad_clip', 'clipping_by_leaf', 'f32 scalar')),
        ('reference/models.html', ('create_model', 'ScaledWSConv2D')),
        ('agc.html', ('clipped_fraction',)),
        ('search.html', ('searchindex',)),
        ('changelog.html', ('0.2.0',)),
    ],
)
def test_pages_hold_what_they_are_for(site, page, texts):
    text = (site / page).read_text(encoding='utf-8')
    for part in texts:
        assert part in text
