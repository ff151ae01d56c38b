from experiments.train import train


def test_some_steps_are_traced(tiny, tmp_path):
    train(tiny(profile='2 steps'), tmp_path / 'run', quiet=True)
    assert any((tmp_path / 'run' / 'profile').rglob('perfetto_trace.json.gz'))
