from experiments.train import train


def test_some_steps_are_traced(tiny, tmp_path):
    # Nothing but steps between the second and the fourth: a trace grows with all that Python does.
    config = tiny(profile='1 steps', duration='4 steps', eval__every=4, checkpoint__every=4)
    train(config, tmp_path / 'run', quiet=True)
    assert any((tmp_path / 'run' / 'profile').rglob('perfetto_trace.json.gz'))
