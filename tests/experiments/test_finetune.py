"""Fine-tuning: the recipe, the pretrained body, the new head, and what may stay frozen."""

import dataclasses
import json
import pathlib
import shutil

import chex
import jax
import numpy as np
import optax
import pytest
from PIL import Image

from configs import finetune
from experiments import classify, evaluate, train
from experiments import config as schema
from experiments.experiment import build
from experiments.run.init_weights import load_weights
from experiments.train_step import init_state
from nfnets_jax import augment, load_pretrained
from nfnets_jax.augment import IMAGENET_MEAN, IMAGENET_STD
from nfnets_jax.data.preprocessing import decode, resize_crop
from nfnets_jax.errors import UsageError
from nfnets_jax.pixel_format import PixelFormat
from nfnets_jax.weights import export, pretrained
from nfnets_jax.weights.checkpoints import CheckpointReader

HEAD = 'NF_ResNet/~/linear'


def write_folder(directory):
    rng = np.random.RandomState(0)
    for name, low in (('dark', 0), ('light', 128)):
        (directory / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.randint(low, low + 128, (20 + i, 30, 3), np.uint8)
            Image.fromarray(pixels).save(directory / name / f'{i}.png')
    return directory


def write_weights(path, blocks=1):
    metadata = pretrained.Metadata(
        model='NF-ResNet-8',
        options={'widths': (8,), 'depths': (blocks,)},
        num_classes=5,
        train_size=12,
        test_size=16,
        eval_mode='resize_crop_4',
    )
    rng = np.random.RandomState(0)

    def fill(leaf):
        return rng.standard_normal(leaf.shape).astype(np.float32)

    shapes = pretrained.variable_shapes(metadata)
    pretrained.save_weights(path, pretrained.Weights(*jax.tree.map(fill, shapes), metadata))
    return path


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """The folder and the weights, which no test changes; tests that do have copies."""
    root = tmp_path_factory.mktemp('made')
    return write_folder(root / 'pictures'), write_weights(root / 'w.safetensors')


@pytest.fixture
def folder(made, tmp_path):
    """Two classes of ten pictures of unequal sizes, dark ones and light ones."""
    return shutil.copytree(made[0], tmp_path / 'pictures')


@pytest.fixture
def weights(made, tmp_path):
    return pathlib.Path(shutil.copy(made[1], tmp_path))


@pytest.fixture(scope='module')
def base(made, tmp_path_factory):
    """A run that was fine-tuned from the weights."""
    directory = tmp_path_factory.mktemp('runs') / 'base'
    train.train(small(f'weights={made[1]},data={made[0]}'), directory, quiet=True)
    return directory


def small(arguments: str):
    config = finetune.get_config(arguments)
    config.batch_size = 8
    config.duration = '4 steps'
    config.eval.every, config.eval.batch_size = '4 steps', 8
    config.checkpoint = {'every': '4 steps', 'keep': 1}
    config.log_every = '2 steps'
    return config


def test_nfnets_have_the_papers_recipe():
    config = finetune.get_config('model=NFNet-F1,data=there')
    assert config.sam.rho == 0.05
    assert config.optimizer.weight_decay == 1e-5
    assert config.model.to_dict() == {
        'name': 'NFNet-F1',
        'drop_rate': 0.25,
        'stochdepth_rate': 0.1,
    }
    assert (config.data.image_size, config.data.test_image_size) == (224, 320)
    assert (config.duration, config.batch_size, config.ema) == ('15000 steps', 2048, 0.9999)
    assert (config.optimizer.learning_rate, config.optimizer.scale_lr_by_batch) == (0.1, False)


@pytest.mark.parametrize(
    ('images', 'chosen'),
    [
        (1, (1, '500 steps', '20%')),
        (3, (2, '500 steps', '20%')),
        (16, (8, '500 steps', '20%')),
        (63, (8, '500 steps', '20%')),
        (64, (8, '500 steps', '20%')),
        (1000, (64, '500 steps', '20%')),
        (2047, (128, '500 steps', '20%')),
        (3030, (256, '500 steps', '20%')),
        (19_999, (512, '500 steps', '20%')),
        (20_000, (512, '10000 steps', '5%')),
        (499_999, (512, '10000 steps', '5%')),
        (500_000, (2048, '15000 steps', '33.3%')),
    ],
)
def test_duration_warm_up_and_batch_follow_from_the_number_of_images(images, chosen, monkeypatch):
    """The steps, the steps of warm-up and the batch of BiT's HyperRule."""
    monkeypatch.setattr(finetune, 'open_source', lambda *_, **__: range(images))
    config = finetune.get_config('model=NFNet-F0,data=there')
    optimizer = config.optimizer
    assert (config.batch_size, config.duration, optimizer.schedule.warmup) == chosen
    told = schema.take_adaptations(config)
    rate = 0.1 * min(1, config.batch_size / 32)
    assert optimizer.learning_rate == rate
    line = (
        f'config.optimizer.learning_rate={rate} instead of 0.1, in proportion to a batch below 32'
    )
    assert (line in told) == (rate < 0.1)
    assert len(told) == (0 if images == 500_000 else 3 + (rate < 0.1))
    assert not schema.take_adaptations(config), 'it was told'
    config = finetune.get_config('model=NFNet-F0,data=there,recipe=published')
    optimizer = config.optimizer
    published = (2048, '15000 steps', '33.3%')
    assert optimizer.learning_rate == 0.1
    assert (config.batch_size, config.duration, optimizer.schedule.warmup) == published
    assert not schema.take_adaptations(config)


def test_what_the_command_line_overrides_is_not_told(monkeypatch):
    monkeypatch.setattr(finetune, 'open_source', lambda *_, **__: range(16))
    config = finetune.get_config('model=NFNet-F0,data=there')
    config.optimizer.schedule.warmup = '0 steps'
    config.batch_size, config.optimizer.learning_rate = 4, 0.2
    why = 'for there are 16 training images'
    assert schema.take_adaptations(config) == [
        f'config.duration=500 steps instead of 15000 steps, {why}'
    ]


def test_learning_rates_fall_from_the_head_to_the_stem(folder, tmp_path):
    weights = write_weights(tmp_path / 'two_blocks.safetensors', blocks=2)
    arguments = f'weights={weights},data={folder},layer_decay=0.5,freeze=.*/initial_conv/gain'
    groups = build(small(arguments)).optimizer.groups
    scales = {name.split('/')[2]: group.lr_scale for name, group in groups.items()}
    assert scales == {
        'linear': 1.0,
        'nf_res_block_1': 0.5,
        'nf_res_block': 0.25,
        'initial_conv': 0.125,
    }
    frozen = {name for name, group in groups.items() if group.freeze}
    assert frozen == {'NF_ResNet/~/initial_conv/gain'}


def test_resnets_have_it_without_regularisation():
    config = finetune.get_config('model=NF-ResNet-50,data=there')
    assert config.sam.rho == 0
    assert config.optimizer.weight_decay == 0
    assert (config.model.drop_rate, config.model.stochdepth_rate) == (0, 0)


@pytest.mark.parametrize(
    ('arguments', 'problem'),
    [
        ('', 'needs data'),
        ('data=x', 'needs model'),
        ('data=x,modell=NFNet-F0', "did you mean 'model'"),
        ('data=x,model', 'key=value'),
        ('data=x,model=NFNet-G0', "did you mean 'NFNet-F0'"),
        ('data=x,weights=absent.npz', r'absent\.npz: No such file'),
        ('data=x,model=NFNet-F0,recipe=papers', "must be 'published', or left out"),
        ('data=x,model=NFNet-F0,layer_decay=much', 'layer_decay=much: must be a number'),
        ('data=x,model=NFNet-F0,layer_decay=1.5', 'layer_decay=1.5: must be above 0'),
        ('data=x,model=SmallCNN,layer_decay=0.5', 'the network has no residual blocks'),
        ('data=x,model=NFNet-F0,freeze=body,layer_decay=0.5', 'freeze=body trains only the head'),
        ('data=x,model=NF-ResNet-8,freeze=stem,layer_decay=0.5', "match='stem' matches no"),
    ],
)
def test_wrong_arguments_are_told(arguments, problem):
    with pytest.raises(UsageError, match=problem):
        finetune.get_config(arguments)


def test_training_starts_from_the_weights_and_a_new_head(weights, folder):
    experiment = build(small(f'weights={weights},data={folder}'))
    assert experiment.image_spec.shape == (12, 12, 3)
    assert (experiment.image_spec.test_size, experiment.image_spec.test_mode) == (
        16,
        'resize_crop_4',
    )
    params, state, report = load_weights(experiment)
    assert set(report.new_head) == {f'{HEAD}/w', f'{HEAD}/b'}
    started = init_state(experiment, (params, state))
    source = load_pretrained(weights).params
    random = init_state(experiment).params
    for module in source:
        chex.assert_trees_all_equal(started.params[module], params[module])
        expected = random[module] if module == HEAD else source[module]
        chex.assert_trees_all_close(started.params[module], expected, rtol=1e-6)
    chex.assert_trees_all_equal(started.ema_params, started.params)


def test_a_frozen_body_stays_and_the_run_knows_what_it_is(weights, folder, tmp_path, capsys):
    config = small(f'weights={weights},data={folder},freeze=body')
    train.train(config, tmp_path / 'run')
    assert 'parameters matched; 2 new head' in capsys.readouterr().err
    source, tuned = load_pretrained(weights), load_pretrained(tmp_path / 'run', ema=False)
    for module in source.params:
        if module != HEAD:
            chex.assert_trees_all_equal(tuned.params[module], source.params[module])
    assert tuned.params[HEAD]['w'].shape == (8, 2)
    assert np.abs(tuned.params[HEAD]['b']).max() > 0  # it was 0
    assert tuned.metadata.class_names == ('dark', 'light')
    assert (tuned.metadata.test_size, tuned.metadata.eval_mode) == (16, 'resize_crop_4')
    # Evaluation needs the weights no more.
    weights.unlink()
    summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
    results = evaluate.evaluate(tmp_path / 'run')
    assert results['test/loss'] == pytest.approx(summary['final']['test/loss'], rel=1e-6)


def test_the_head_is_trained_first_and_a_resumed_run_is_bit_for_bit_the_same(
    weights, folder, tmp_path
):
    config = small(f'weights={weights},data={folder},head_first=2,layer_decay=0.5')
    config.optimizer.schedule.warmup = '0 steps'
    config.checkpoint = {'every': '1 steps', 'keep': 4}
    programs = {}
    train.train(config, tmp_path / 'run', quiet=True, programs=programs)
    source = load_pretrained(weights).params
    experiment = build(config)
    template = jax.eval_shape(lambda: init_state(experiment))

    def state(directory, step):
        return CheckpointReader(tmp_path / directory / 'checkpoints').restore(step, template)

    def moved(step):
        trained = state('run', step).params
        return {
            module
            for module, leaves in source.items()
            if any(not np.array_equal(trained[module][name], leaves[name]) for name in leaves)
        }

    assert (moved(2), moved(3)) == ({HEAD}, set(source))
    assert np.abs(state('run', 1).params[HEAD]['b']).max() > 0
    shutil.copytree(tmp_path / 'run', tmp_path / 'resumed')
    for step in (2, 3, 4):
        shutil.rmtree(tmp_path / 'resumed' / 'checkpoints' / str(step))
    (tmp_path / 'resumed' / 'summary.json').unlink()
    train.train(config, tmp_path / 'resumed', quiet=True, programs=programs)
    chex.assert_trees_all_equal(state('run', 4), state('resumed', 4))


def test_a_pattern_freezes_what_it_matches(weights, folder):
    config = small(f'weights={weights},data={folder},freeze=.*/initial_conv/.*')
    groups = build(config).optimizer.groups
    frozen = {name for name, group in groups.items() if group.freeze}
    assert frozen == {f'NF_ResNet/~/initial_conv/{leaf}' for leaf in ('w', 'gain', 'bias')}


@pytest.mark.parametrize(
    ('key', 'value', 'problem'),
    [
        ('name', 'NF-ResNet-50', r'weights of NF-ResNet-8, but config\.model\.name'),
        ('depths', (2,), r'config\.model\.depths=\[2\]: .* a network with \[1\]'),
    ],
)
def test_weights_of_another_network_are_refused(key, value, problem, weights, folder):
    config = small(f'weights={weights},data={folder}')
    with config.model.ignore_type():
        config.model[key] = value
    with pytest.raises(UsageError, match=problem):
        load_weights(build(config))


def test_networks_are_compared_by_what_is_built(weights, folder):
    """NF-ResNet-14 is NF-ResNet-8 but for the depths, which the config gives."""
    config = small(f'weights={weights},data={folder}')
    config.model.name = 'NF-ResNet-14'
    _, _, report = load_weights(build(config))
    assert report.fits


def test_timms_weights_are_read_under_the_name_that_version_0_1_0_gave_them(folder, tmp_path):
    sizes = {'widths': (16, 16), 'depths': (1, 1)}
    metadata = pretrained.Metadata(model='nf_resnet50', options=sizes, num_classes=2)
    rng = np.random.default_rng(0)
    params, state = jax.tree.map(
        lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32),
        pretrained.variable_shapes(metadata),
    )
    path = tmp_path / 'w.safetensors'
    pretrained.save_weights(path, pretrained.Weights(params, state, metadata))
    config = small(f'weights={path},data={folder}')
    config.model = {'name': 'NF-ResNet-50', 'conventions': 'timm', **sizes}
    config.init.new_head = False
    experiment = build(config)
    *variables, _ = load_weights(experiment)
    images = rng.normal(size=(2, 32, 32, 3)).astype(np.float32)
    outputs, expected = (
        jax.jit(lambda *variables, apply=model.apply: apply(*variables, None, images, False)[0])(
            *values
        )
        for model, values in (
            (experiment.model, variables),
            (pretrained.network(metadata), (params, state)),
        )
    )
    np.testing.assert_allclose(outputs['logits'], expected['logits'], rtol=1e-4, atol=1e-5)


def test_a_class_without_pictures_is_named_and_nothing_written(weights, folder, tmp_path):
    (folder / 'none').mkdir()
    with pytest.raises(UsageError, match=r'none: no images in this class directory'):
        train.train(small(f'weights={weights},data={folder}'), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_images_are_normalized_as_the_weights_were_trained(weights, folder, tmp_path):
    trained = load_pretrained(weights)
    half = {'mean': (127.5,) * 3, 'std': (127.0, 127.5, 128.0)}
    trained = trained._replace(metadata=dataclasses.replace(trained.metadata, **half))
    pretrained.save_weights(weights, trained)
    config = small(f'weights={weights},data={folder}')
    assert {key: config.data[key] for key in half} == half
    results = train.train(config, tmp_path / 'run', quiet=True)['final']
    tuned = load_pretrained(tmp_path / 'run')
    assert (tuned.metadata.mean, tuned.metadata.std) == (half['mean'], half['std'])

    # Training and evaluation compute by them, not ImageNet's.
    experiment = build(config)
    keys = augment.example_keys(0, 0, np.arange(4))
    gray = np.full((4, 12, 12, 3), 100, np.uint8)
    images, _ = jax.jit(experiment.augmentation)(keys, gray, np.zeros(4, np.int32))
    expected = (100 - np.array(half['mean'])) / half['std']
    np.testing.assert_allclose(images, np.broadcast_to(expected, images.shape), rtol=1e-5)
    source, transform = experiment.test_source, experiment.image_spec.test_transform
    rng = np.random.default_rng(0)
    pixels = np.stack([transform(source[i]['image'], rng) for i in range(len(source))])
    normalized = ((pixels - np.array(half['mean'])) / half['std']).astype(np.float32)
    apply = jax.jit(experiment.model.apply, static_argnums=4)
    outputs, _ = apply(tuned.params, tuned.state, None, normalized, False)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        outputs['logits'], np.array([source[i]['label'] for i in range(len(source))])
    )
    assert results['test_ema/loss'] == pytest.approx(float(losses.mean()), rel=1e-4)

    del config.data['std']
    with pytest.raises(UsageError, match=r'config\.data\.std=.* were trained with \(127\.0, '):
        load_weights(build(config))


def test_a_network_that_is_unknown_is_not_called_a_mistake_of_the_data(folder):
    config = schema.default_config()
    config.data = {'name': 'folder', 'path': str(folder)}
    config.model.name = 'NF-ResNet-9'
    with pytest.raises(UsageError, match=r"^config\.model: unknown 'NF-ResNet-9' \(did you mean"):
        build(config)


@pytest.mark.parametrize('freeze', [pytest.param('', marks=pytest.mark.slow), ',freeze=body'])
def test_the_directory_of_a_run_is_fine_tuned_from_the_command_line(
    base, folder, tmp_path, command, freeze
):
    """Metadata are read while flags are parsed: before JAX may be used."""
    arguments = f'configs/finetune.py:weights={base},data={folder}{freeze}'
    process = command(
        *('train', f'--config={arguments}', f'--workdir={tmp_path}/run', '--config.duration=2'),
        devices=1,
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err.count('parameters matched') == 1
    assert 'config.batch_size=8 instead of 2048, for there are 16 training images\n' in err
    assert 'config.optimizer.schedule.warmup=20% instead of 33.3%, for there are 16 ' in err
    assert 'steps: 2 of 8 images' in err
    assert load_pretrained(tmp_path / 'run').metadata.class_names == ('dark', 'light')
    assert f'report: {tmp_path}/run/report/test\n' in err
    assert (tmp_path / 'run' / 'report' / 'test' / 'summary.json').exists()


def test_weights_that_do_not_say_what_they_are_are_read_once(folder, tmp_path, monkeypatch):
    whole = pretrained.Metadata(model='NF-ResNet-8', num_classes=5)
    rng = np.random.RandomState(0)
    shapes = pretrained.variable_shapes(whole)
    filled = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)
    np.savez(tmp_path / 'plain.npz', **pretrained.flatten(filled[0]))
    read = []
    real = pretrained.weight_files.read
    monkeypatch.setattr(
        pretrained.weight_files, 'read', lambda path: read.append(path) or real(path)
    )
    config = small(f'weights={tmp_path}/plain.npz,data={folder}')
    assert config.model.name == 'NF-ResNet-8'
    params, *_ = load_weights(build(config))
    assert len(read) == 1
    module = 'NF_ResNet/~/initial_conv'
    np.testing.assert_array_equal(params[module]['w'], filled[0][module]['w'])


@pytest.mark.parametrize('kind', ['file', 'run'])
def test_metadata_that_are_written_down_are_read_without_an_array(made, base, monkeypatch, kind):
    path = base if kind == 'run' else made[1]
    expected = load_pretrained(path).metadata

    def refuse(*args, **options):
        raise AssertionError('an array was read')

    monkeypatch.setattr(pretrained.weight_files, 'read', refuse)
    monkeypatch.setattr('nfnets_jax.weights.checkpoints.CheckpointReader', refuse)
    assert pretrained.load_metadata(path) == expected
    with pytest.raises(UsageError, match='weights of NFNet-F0: they are those of NF-ResNet-8'):
        pretrained.load_metadata(path, 'NFNet-F0')


def test_six_steps_are_a_duration_like_any(weights, folder):
    config = finetune.get_config(f'weights={weights},data={folder}')
    config.duration = '6 steps'
    experiment = build(config)
    assert (experiment.log_every, experiment.eval_every, experiment.checkpoint_every) == (1, 1, 1)


@pytest.mark.slow
def test_images_that_are_not_square_from_the_command_line_to_the_program(
    weights, folder, tmp_path, command
):
    """The config has integers; a run resumes, and evaluate, classify and export know its size."""
    run = tmp_path / 'run'
    arguments = (
        f'--config=configs/finetune.py:weights={weights},data={folder}',
        *('--config.data.image_size=12,20', '--config.data.test_image_size=(16, 24)'),
        *('--config.augment.mixup=0.2', '--config.augment.randaugment_layers=1'),
        *('--config.augment.erasing=0.5', '--config.augment.shift=2', f'--workdir={run}'),
    )
    for _ in range(2):  # The second time it resumes, and has nothing left to do.
        process = command('train', *arguments, '--config.duration=2', devices=1)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    config = json.loads((run / 'config.json').read_text())
    assert config['data']['image_size'] == [12, 20]
    tuned = load_pretrained(run)
    assert (tuned.metadata.train_size, tuned.metadata.test_size) == ((12, 20), (16, 24))
    assert '16x24 px' in pretrained.describe(tuned)
    assert evaluate.evaluate(run) == evaluate.evaluate(run, image_size=(16, 24))
    assert evaluate.evaluate(run) != evaluate.evaluate(run, image_size=(24, 16))
    path = folder / 'dark' / '0.png'
    ((_, guesses),) = classify.classify(tuned, [path], top=2)
    program = jax.export.deserialize(bytearray(export.to_stablehlo(tuned)))
    pixels = np.float32(resize_crop(path.read_bytes(), (16, 24), (20, 28)))[None]
    expected = np.asarray(jax.nn.softmax(program.call(pixels)[0]))
    for guess in guesses:
        assert guess.probability == pytest.approx(expected[guess.label], rel=1e-4)
    # Weights of this size are fine-tuned at it, or at another that is an integer again.
    assert small(f'weights={run},data={folder}').data.image_size == (12, 20)
    process = command(
        *('train', f'--config=configs/finetune.py:weights={run},data={folder}'),
        *('--config.data.image_size=12', '--config.data.test_image_size=0', '--config.duration=1'),
        f'--workdir={tmp_path}/again',
        devices=1,
    )
    _, err = process.communicate(timeout=300)
    assert err.startswith('error: config.data.test_image_size=0: must be a side in pixels, or hei')


@pytest.fixture
def data_of(folder, tmp_path):
    """A function that returns data of so many channels, their options and one image's file."""

    def make(channels):
        if channels == 1:
            return folder, {}, folder / 'dark' / '0.png'
        rng = np.random.default_rng(0)
        images = rng.uniform(-1, 1, (40, 18, 22, channels)).astype(np.float32)
        labels = np.arange(40) % 2
        arrays = {'train_images': images, 'train_labels': labels}
        np.savez(tmp_path / 'many.npz', **arrays, test_images=images[:8], test_labels=labels[:8])
        np.save(tmp_path / '0.npy', images[0])
        return tmp_path / 'many.npz', {'value_range': (-1.0, 1.0)}, tmp_path / '0.npy'

    return make


@pytest.mark.parametrize('channels', [1, 5])
def test_the_stem_is_fitted_to_other_channels(weights, data_of, channels):
    """As by `from_pretrained`."""
    data, options, _ = data_of(channels)
    config = small(f'weights={weights},data={data},channels={channels}')
    config.data.update(options)
    experiment = build(config)
    assert experiment.image_spec.shape == (12, 12, channels)
    fitted = pretrained.from_pretrained(weights, channels=channels)
    params, _, report = load_weights(experiment)
    assert report.fits
    stem = 'NF_ResNet/~/initial_conv'
    np.testing.assert_array_equal(params[stem]['w'], fitted.params[stem]['w'])
    assert config.data.get('mean') is None or config.data.mean == fitted.metadata.mean
    assert experiment.image_spec.mean == fitted.metadata.mean


@pytest.mark.parametrize('channels', [pytest.param(1, marks=pytest.mark.slow), 5])
def test_the_pipeline_and_the_commands_read_other_channels(weights, data_of, tmp_path, channels):
    data, options, path = data_of(channels)
    config = small(f'weights={weights},data={data},channels={channels}')
    config.data.update(options)
    mean = build(config).image_spec.mean

    summary = train.train(config, tmp_path / 'run', quiet=True)
    metadata = pretrained.load_metadata(tmp_path / 'run')
    assert (metadata.channels, metadata.mean) == (channels, mean)
    assert metadata.pixels == PixelFormat(channels, options.get('value_range'))
    split, report = 'test' if options else None, str(tmp_path / 'report')
    found = evaluate.evaluate(tmp_path / 'run', other=str(data), split=split, report=report)
    assert set(found) == {'step', *summary['final']}
    assert (tmp_path / 'report' / 'worst.png').exists()
    tuned = load_pretrained(tmp_path / 'run')
    ((_, guesses),) = classify.classify(tuned, [path], top=2)
    pixels = decode(path.read_bytes(), metadata.pixels)
    program = jax.export.deserialize(bytearray(export.to_stablehlo(tuned)))
    logits = program.call(np.float32(resize_crop(pixels, 16, 20, metadata.pixels))[None])[0]
    for guess in guesses:
        assert guess.probability == pytest.approx(float(jax.nn.softmax(logits)[guess.label]), 1e-4)
    # The run is fine-tuned again with its own channels.
    again = small(f'weights={tmp_path}/run,data={data}')
    assert again.model.channels == channels
    assert load_weights(build(again))[2].fits


@pytest.mark.parametrize('channels', ['0', '-1', 'gray', '1.5'])
def test_channels_must_be_a_number(channels):
    with pytest.raises(UsageError, match=f'channels={channels}: must be a positive integer'):
        finetune.get_config(f'model=NFNet-F0,data=there,channels={channels}')


def test_weights_of_one_channel_are_not_fitted_to_another_number(weights, folder, tmp_path):
    gray = tmp_path / 'gray.safetensors'
    network = pretrained.from_pretrained(weights, channels=1)
    pretrained.save_weights(gray, pretrained.Weights(*network[1:]))
    config = small(f'weights={gray},data={folder}')
    config.model.channels = 3
    config.data.mean, config.data.std = IMAGENET_MEAN, IMAGENET_STD
    match = r'config.model.channels=3: must be 3 or fitted from 3, the weights have 1'
    with pytest.raises(UsageError, match=match):
        load_weights(build(config))
