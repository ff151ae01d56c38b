"""Every picture is classified or named; the preprocessing is that of the weights."""

import io
import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import classify
from nfnets_jax.data.preprocessing import crop_resize, resize_crop
from nfnets_jax.weights import pretrained

METADATA = pretrained.Metadata(
    model='NF-ResNet-8',
    options={'widths': (8, 8), 'depths': (1, 1)},
    num_classes=3,
    class_names=('cat', 'dog', 'owl'),
    test_size=16,
)


def make_weights(**changes) -> pretrained.Weights:
    metadata = pretrained.dataclasses.replace(METADATA, **changes)
    rng = np.random.RandomState(0)

    def fill(leaf):
        return rng.standard_normal(leaf.shape).astype(np.float32)

    shapes = pretrained.variable_shapes(metadata)
    return pretrained.Weights(*jax.tree.map(fill, shapes), metadata)


@pytest.fixture(scope='module')
def weights():
    return make_weights()


def picture(height=40, width=60) -> Image.Image:
    pixels = np.random.RandomState(height).randint(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def save(path: pathlib.Path, image: Image.Image, **options) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@pytest.fixture
def odd_pictures(tmp_path):
    """Pictures of every odd kind, by their name, that are pictures all the same."""
    sixteen_bits = Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27)
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = [picture(30), picture(31).resize((60, 30))]
    return {
        'cmyk': save(tmp_path / 'cmyk.jpg', picture().convert('CMYK')),
        'grey': save(tmp_path / 'grey.png', picture().convert('L')),
        '16 bits': save(tmp_path / '16.png', sixteen_bits),
        'palette': save(tmp_path / 'p.png', picture().convert('P')),
        'transparent': save(tmp_path / 'a.png', picture().convert('RGBA')),
        'animated': save(tmp_path / 'a.gif', frames[0], save_all=True, append_images=frames[1:]),
        'turned': save(tmp_path / 't.jpg', picture(), exif=turned),
        '1x1': save(tmp_path / '1.png', picture(1, 1)),
        'a line': save(tmp_path / 'line.png', picture(1, 500)),
    }


@pytest.fixture
def bad_pictures(tmp_path):
    truncated = io.BytesIO()
    picture().save(truncated, 'JPEG')
    contents = {
        'text.jpg': b'this is no picture',
        'empty.png': b'',
        'truncated.jpg': truncated.getvalue()[: truncated.tell() // 2],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    save(tmp_path / 'huge.png', Image.new('1', (20_000, 20_000)))
    return [tmp_path / name for name in (*contents, 'huge.png', 'absent.jpg')]


def test_good_odd_and_bad_pictures_each_get_what_they_deserve(weights, odd_pictures, bad_pictures):
    paths = [*bad_pictures[:2], *odd_pictures.values(), *bad_pictures[2:]]
    results = list(classify.classify(weights, paths, top=2, batch_size=4))
    assert [path for path, _ in results] == paths
    for path, result in results:
        if path in bad_pictures:
            assert isinstance(result, str), path
            assert '\n' not in result
            continue
        assert len(result) == 2
        assert result[0].probability >= result[1].probability
        assert result[0].name == METADATA.class_names[result[0].label]
    problems = dict(results)
    assert 'not an image' in problems[bad_pictures[0]]
    assert 'pixels; make the image smaller' in problems[bad_pictures[3]]
    assert 'No such file' in problems[bad_pictures[4]]


@pytest.mark.parametrize(
    ('mode', 'prepare'),
    [
        ('crop_resize', lambda encoded: crop_resize(encoded, 16)),
        ('resize_crop_4', lambda encoded: resize_crop(encoded, 16, 20)),
    ],
)
def test_probabilities_are_the_models_with_the_weights_preprocessing(mode, prepare, tmp_path):
    weights = make_weights(eval_mode=mode, mean=(100.0,) * 3, std=(50.0,) * 3)
    path = save(tmp_path / 'p.png', picture())
    ((_, guesses),) = classify.classify(weights, [path], top=9, batch_size=2)
    images = (prepare(path.read_bytes())[None] - 100.0) / 50
    network = pretrained.network(weights.metadata)
    outputs, _ = network.apply(weights.params, {}, None, np.float32(images), False)
    expected = np.asarray(jax.nn.softmax(outputs['logits'][0]))
    assert len(guesses) == 3
    for guess in guesses:
        assert guess.probability == pytest.approx(expected[guess.label], rel=1e-4)
    assert guesses[0].label == expected.argmax()


def test_the_command(command, weights, tmp_path):
    file = tmp_path / 'w.safetensors'
    pretrained.save_weights(file, weights)
    good = save(tmp_path / 'good.png', picture())
    bad = tmp_path / 'bad.png'
    bad.write_text('no picture')
    process = command('classify', f'--weights={file}', '--top=1', '--json', bad, good, devices=1)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    (line,) = map(json.loads, out.splitlines())
    assert line['picture'] == str(good)
    ((_, ((label, name, probability),)),) = classify.classify(weights, [good], top=1)
    assert line['classes'][0]['label'] == label
    assert line['classes'][0]['name'] == name
    assert line['classes'][0]['probability'] == pytest.approx(probability, rel=1e-4)
    assert f'{bad}: cannot be decoded: not an image' in err
    assert err.splitlines()[-1] == 'error: 1 of 2 images could not be read'
