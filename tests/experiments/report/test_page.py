import base64
import html.parser
import json
import re
import shutil

import pytest

from experiments.report import page, reading

VOID = {'meta', 'link', 'br', 'img'}


class _Checker(html.parser.HTMLParser):
    """Collects what a page is made of, and fails where elements are not closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.elements, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.elements.append((tag, attrs))
        if 'id' in attrs:
            self.ids.append(attrs['id'])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ('script', 'style'):
            self.text.append(data)


def _parse(text):
    checker = _Checker()
    checker.feed(text)
    assert checker.open == []
    return checker


def _render(*found):
    return page.render(found, command='python -m experiments.report', made='today')


@pytest.fixture
def text(study):
    return _render(study)


def test_page_is_well_formed_and_says_what_came_out(text):
    checker = _parse(text)
    assert len(checker.ids) == len(set(checker.ids))
    words = ' '.join(checker.text)
    assert 'Is it small?' in words
    for verdict in ('agrees (seeds alone)', 'does not (seeds alone)', 'too noisy to say'):
        assert len([t for t in checker.text if t.strip() == verdict]) == 1
    assert 'python -m experiments.study --workdir=S --jobs=2' in words
    assert 'jax 0.10.2' in words
    assert '0.4 (the smallest tried)' in words
    assert 'at the edge of the grid' in words
    assert 'the loss was not finite at step 15' in words


def test_page_needs_nothing_else(text):
    for tag, attrs in _parse(text).elements:
        assert tag not in ('img', 'iframe', 'object', 'embed')
        for name in ('src', 'href'):
            assert not re.match(r'(?i)\s*(https?:|//|file:)', attrs.get(name) or ''), (tag, attrs)
    assert "default-src 'none'" in text
    assert '@import' not in text.split('<script')[0]


def test_figures_are_told_to_those_who_do_not_see_them(text):
    elements = _parse(text).elements
    figures = [attrs for tag, attrs in elements if tag == 'figure']
    plots = [attrs for _, attrs in elements if attrs.get('class') == 'plot']
    assert len(figures) == len(plots) == 5
    assert all(attrs['role'] == 'img' and len(attrs['aria-label']) > 30 for attrs in plots)
    assert all('aria-labelledby' in attrs for attrs in figures)
    assert text.count('The same as a table') == 5


def test_several_studies_have_an_overview(write_study, study_fields):
    first = reading.load(write_study(study_fields, 'first'))
    second = reading.load(write_study(study_fields | {'title': 'Another'}, 'second'))
    checker = _parse(_render(first, second))
    assert len(checker.ids) == len(set(checker.ids))
    links = [attrs['href'] for tag, attrs in checker.elements if tag == 'a']
    assert {'#s1', '#s2'} <= set(links)
    assert {link[1:] for link in links} <= set(checker.ids)


def test_an_unfinished_study_says_so(write_study, study_fields):
    study_fields['trials'][0] |= {'state': 'running', 'metrics': {}}
    words = ' '.join(_parse(_render(reading.load(write_study(study_fields)))).text)
    assert '1 running. What follows is what there is so far.' in words


def test_a_study_that_has_not_begun_has_a_page(write_study, study_fields):
    for trial in study_fields['trials']:
        trial |= {'state': 'pending', 'metrics': {}}
    words = ' '.join(_parse(_render(reading.load(write_study(study_fields)))).text)
    assert '0 of 48 trials are complete; 48 pending.' in words
    assert words.count('cannot say') == 3
    assert 'The curves: no trial has recorded test/top1 at two steps yet.' in words


EVIL = '</script><script>window.pwned=1</script><img src=x onerror="window.pwned=1">\'"&'


def _evil(fields):
    """Puts markup into every text that a study may hold."""
    for key in ('name', 'title', 'question', 'setting', 'size', 'command', 'hardware'):
        fields[key] = EVIL
    fields['commands'] = [EVIL]
    fields['versions'] = {EVIL: EVIL}
    fields['arms'] = {arm: arm + EVIL for arm in fields['axes']['arm']}
    for claim in fields['claims']:
        claim |= {'text': EVIL, 'source': EVIL}
    for spec in fields['charts']:
        spec |= {'title': EVIL, 'x_label': EVIL}
    for trial in fields['trials']:
        trial['error'] = EVIL
    return fields


def test_texts_are_no_markup(write_study, study_fields):
    clean = _parse(_render(reading.load(write_study(study_fields, 'clean'))))
    dirty = _parse(_render(reading.load(write_study(_evil(study_fields), 'dirty'))))
    assert [tag for tag, _ in dirty.elements] == [tag for tag, _ in clean.elements]
    assert not any(name.startswith('on') for _, attrs in dirty.elements for name in attrs)


CHROMIUM, DRIVER = shutil.which('chromium'), shutil.which('chromedriver')


@pytest.fixture(scope='module')
def browser():
    selenium = pytest.importorskip('selenium.webdriver')
    if not CHROMIUM or not DRIVER:
        pytest.skip('needs chromium and chromium-driver')
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage'):
        options.add_argument(argument)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    driver = selenium.Chrome(options, selenium.ChromeService(DRIVER))
    yield driver
    driver.quit()


def _open(browser, file, *, width=1200, scheme='light'):
    size = {'width': width, 'height': 900, 'deviceScaleFactor': 1, 'mobile': width < 600}
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)
    features = {'features': [{'name': 'prefers-color-scheme', 'value': scheme}]}
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', features)
    browser.get(file.as_uri())
    assert browser.get_log('browser') == []


@pytest.fixture
def file(text, tmp_path):
    path = tmp_path / 'report.html'
    path.write_text(text)
    return path


def _css(browser, selector, name):
    script = 'return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]'
    return browser.execute_script(script, selector, name)


@pytest.mark.slow
@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [1200, 360])
def test_every_figure_is_drawn_and_nothing_sticks_out(browser, file, width, scheme):
    _open(browser, file, width=width, scheme=scheme)
    assert len(browser.find_elements('css selector', '.plot .main-svg')) >= 5
    assert browser.execute_script('return document.documentElement.scrollWidth') <= width
    ink = _css(browser, '.plot .xtick text', 'fill')
    assert (ink == 'rgb(232, 234, 237)') is (scheme == 'dark')
    assert _css(browser, 'body', 'color') == ink


@pytest.mark.slow
def test_the_legend_shows_and_hides(browser, file):
    _open(browser, file)
    figure = browser.find_element('css selector', 'figure')  # the curves: a band and a line each
    buttons = figure.find_elements('css selector', 'button')

    def drawn():
        return len(figure.find_elements('css selector', '.scatterlayer .trace .lines path'))

    before = drawn()
    buttons[1].click()
    assert buttons[1].get_attribute('aria-pressed') == 'false'
    assert drawn() == before - 2
    buttons[1].send_keys(' ')  # by keyboard
    assert buttons[1].get_attribute('aria-pressed') == 'true'
    assert drawn() == before
    webdriver = pytest.importorskip('selenium.webdriver')
    webdriver.ActionChains(browser).double_click(buttons[0]).perform()
    assert [b.get_attribute('aria-pressed') for b in buttons] == ['true', 'false', 'false']
    assert drawn() == before - 4
    assert browser.get_log('browser') == []


@pytest.mark.slow
def test_a_point_tells_its_seeds(browser, file):
    _open(browser, file)
    webdriver = pytest.importorskip('selenium.webdriver')
    point = browser.find_element('css selector', '.scatterlayer .trace .points path')
    browser.execute_script('arguments[0].scrollIntoView({block: "center"})', point)
    webdriver.ActionChains(browser).move_to_element(point).perform()
    hover = browser.find_element('css selector', '.hoverlayer .hovertext')
    assert 'range' in hover.text


@pytest.mark.slow
def test_the_theme_may_change_and_print_is_light(browser, file):
    _open(browser, file, scheme='dark')
    browser.find_element('css selector', 'figure button').click()
    browser.execute_script('dispatchEvent(new Event("beforeprint"))')
    assert _css(browser, '.plot .xtick text', 'fill') == 'rgb(27, 31, 36)'
    browser.execute_script('dispatchEvent(new Event("afterprint"))')
    assert _css(browser, '.plot .xtick text', 'fill') == 'rgb(232, 234, 237)'
    pressed = browser.find_element('css selector', 'figure button').get_attribute('aria-pressed')
    assert pressed == 'false'
    pdf = base64.b64decode(browser.execute_cdp_cmd('Page.printToPDF', {})['data'])
    assert pdf.startswith(b'%PDF')
    assert len(pdf) > 50_000


@pytest.mark.slow
def test_markup_in_texts_runs_nowhere(browser, write_study, study_fields, tmp_path):
    path = tmp_path / 'evil.html'
    path.write_text(_render(reading.load(write_study(_evil(study_fields)))))
    _open(browser, path)
    assert browser.execute_script('return window.pwned') is None
    assert '</script>' in browser.find_element('css selector', '.question').text
    labels = json.dumps([e.text for e in browser.find_elements('css selector', '.xtitle')])
    assert 'onerror' in labels
