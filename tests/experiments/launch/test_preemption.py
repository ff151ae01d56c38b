import os
import signal

import numpy as np
import pytest

from experiments.launch import output, preemption
from experiments.run import parallel


def test_a_request_is_heard_some_steps_after_it_was_sent():
    stop_signal = preemption.PreemptionSignal()
    mean = parallel.parallelize(lambda _, batch: batch['stop'].mean())
    nothing = parallel.replicate(np.zeros(()))

    def step():
        return stop_signal.reached(mean(nothing, {'stop': stop_signal.flag()}))

    assert [step() for _ in range(4)] == [False] * 4
    stop_signal.request()
    assert [step() for _ in range(3)] == [False, False, True]


def test_a_request_of_one_device_of_many_is_enough():
    stop_signal = preemption.PreemptionSignal()
    assert [stop_signal.reached(np.float32(1 / 4096)) for _ in range(3)] == [False, False, True]


def test_the_first_signal_asks_and_the_second_has_its_usual_effect():
    usual, interrupt = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with preemption.on_signals() as stop_signal:
        no = stop_signal.flag()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_signal.flag() is not no
        assert signal.getsignal(signal.SIGTERM) == usual
    assert signal.getsignal(signal.SIGINT) == interrupt


def test_a_closed_terminal_asks_too():
    with preemption.on_signals() as stop_signal:
        no = stop_signal.flag()
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop_signal.flag() is not no


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGHUP])
def test_a_job_started_to_ignore_a_signal_goes_on_ignoring_it(number):
    usual = signal.signal(number, signal.SIG_IGN)
    try:
        with preemption.on_signals() as stop_signal:
            no = stop_signal.flag()
            os.kill(os.getpid(), number)
            assert stop_signal.flag() is no
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop_signal.flag() is not no
    finally:
        signal.signal(number, usual)


def test_output_that_is_lost_asks_too(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(output, '_exit_status', None)
    stream = output.open_stream(writing, template=open(os.devnull, 'w'))  # noqa: SIM115
    with preemption.on_signals() as stop_signal:
        no = stop_signal.flag()
        print('nobody reads this', file=stream, flush=True)
        assert stop_signal.flag() is not no
    os.close(writing)
