from experiments.study import measurements
from tests.experiments.conftest import tiny_config


def test_the_memory_of_a_step_is_that_of_its_activations(monkeypatch):
    model = {'name': 'NF-ResNet-8', 'widths': (8,), 'depths': (1,)}
    compiled = measurements.Compiled()
    step = measurements.step_memory(tiny_config(model=model), None, compiled)
    layer = 64 / 4 * 8 * 8 * 8 * 4 / 2**20  # one device of four, float32
    # Three are kept for the backward pass at the least.
    assert 3 * layer < step['memory/step_mib'] < 30 * layer

    # Another seed and another learning rate are data to the same program.
    monkeypatch.setattr(measurements, 'make_train_step', None)
    other = tiny_config(model=model, seed=1, optimizer__learning_rate=0.5)
    assert measurements.step_memory(other, None, compiled) == step
