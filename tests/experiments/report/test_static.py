import matplotlib.image
import pytest

from experiments.report import charts, interactive, reading, static
from nfnets_jax.errors import UsageError
from tests.experiments.report.conftest import chart, fields, write


@pytest.fixture(scope='module')
def written_once(tmp_path_factory):
    """What is written of the study, and where."""
    directory = tmp_path_factory.mktemp('static')
    study = reading.load(write(directory / 'study', fields()))
    folder = directory / 'docs' / 'results'
    return static.write([study], folder, made='now'), folder


def test_pictures_and_a_readme_that_names_them(written_once):
    written, folder = written_once
    assert sorted(path.name for path in folder.iterdir()) == sorted(written)
    assert len([name for name in written if name.endswith('.png')]) == 5
    text = (folder / 'small-digits.md').read_text()
    assert all(f']({name})' in text for name in written if name.endswith('.png'))
    assert '| AGC is better than nothing | the paper | agrees (seeds alone) |' in text
    assert 'python -m experiments.study --workdir=S --jobs=2' in text
    screen = (folder / 'README.md').read_text()
    assert '| [A small study](small-digits.md) | AGC is better than nothing | agrees' in screen
    assert r'corrected p \< 0.0001' in screen
    assert 'small-digits-trials.csv' in text
    for name in [name for name in written if name.endswith('.png')]:
        picture = matplotlib.image.imread(folder / name)
        assert picture.shape[1] == 960
        assert picture.std() > 0.01


@pytest.mark.parametrize('kind', ['bars', 'line'])
def test_a_category_without_a_result_yet_has_its_room(write_study, study_fields, kind):
    for trial in study_fields['trials']:
        if trial['axes']['arm'] == 'agc':
            trial |= {'state': 'pending', 'metrics': {}}
    study_fields['charts'] = [chart(kind, 'arm', where={'batch_size': 32})]
    found = reading.load(write_study(study_fields))
    (drawn,) = charts.build(found, found.charts[0])
    assert static.draw(drawn).axes[0].get_xlim() == (-0.5, 2.5)
    assert interactive.figure(drawn)['layout']['xaxis']['range'] == [-0.5, 2.5]


@pytest.mark.parametrize('length', [20, 40, 80])
def test_a_legend_is_in_the_picture(write_study, study_fields, length):
    study_fields['arms'] = {name: name.ljust(length, 'n') for name in study_fields['axes']['arm']}
    study = reading.load(write_study(study_fields))
    figure = static.draw(charts.build(study, study.charts[0])[0])
    figure.canvas.draw()
    extent = figure.legends[0].get_window_extent()
    assert extent.x0 >= 0
    assert extent.x1 <= figure.bbox.x1


def test_the_same_study_gives_the_same_files(written_once, study, tmp_path):
    names, folder = written_once
    assert static.write([study], tmp_path / 'again', made='now') == names
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / 'again' / name).read_bytes(), name


def test_two_studies_do_not_overwrite_one_another(study):
    static.check_slugs([study])
    with pytest.raises(UsageError, match=r'would both be written as small-digits-\*'):
        static.check_slugs([study, study])


def test_markdown_is_text(write_study, study_fields, tmp_path):
    study_fields |= {'title': 'a | b <b>*c*</b>\n# d', 'charts': []}
    study = reading.load(write_study(study_fields))
    static.write([study], tmp_path / 'out', made='now')
    text = (tmp_path / 'out' / 'small-digits.md').read_text()
    assert text.splitlines()[0] == r'# a \| b \<b\>\*c\*\</b\> \# d'


def test_dollars_are_no_formula(write_study, study_fields):
    study_fields['charts'][0]['title'] = 'from $1 to $x_{ y'
    study = reading.load(write_study(study_fields))
    figure = static.draw(charts.build(study, study.charts[0])[0])
    figure.canvas.draw()
    assert figure.axes[0].get_title(loc='left') == 'from $1 to $x_{ y'


def test_a_directory_that_cannot_be_written(study, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UsageError, match='--static=.*cannot be written'):
        static.write([study], tmp_path / 'file' / 'below', made='now')
