"""Told to end: where a run hears of it, alone and as one of several processes."""

import os
import signal

import pytest
from jax.experimental import multihost_utils

from radonc_jax.command import Preempted
from radonc_jax.training import preemption
from radonc_jax.training.preemption import Preemption


def tell():
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_process_alone_ends_at_once_and_in_a_step_where_it_asks():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted), Preemption():
        tell()
        pytest.fail("it went on")
    with Preemption() as told, pytest.raises(Preempted, match="so far"), told.deferred():
        told.check("nothing yet")
        tell()
        assert told.reached() and told.reached()
        told.check("so far")
    # Told after the last question, it ends with the step.
    with Preemption() as told, pytest.raises(Preempted), told.deferred():
        tell()
    assert signal.getsignal(signal.SIGTERM) == before


def test_no_error_of_a_checkpoint_or_a_kernel_is_taken_for_the_notice():
    assert not issubclass(Preempted, Exception)


class Service:
    """As JAX's: it names the question after the last that any process has asked, and answers yes to
    that one alone."""

    def __init__(self):
        self.asked, self.named = 0, None

    def tell(self):
        self.named = self.asked + 1

    def reached(self, number):
        self.asked = max(self.asked, number)
        return number == self.named


@pytest.fixture
def service(monkeypatch):
    service, before = Service(), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(preemption, "several_processes", lambda: True)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", service.reached)
    yield service
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("told_after", [0, 1, 4])
def test_several_processes_hear_of_it_at_the_same_question(service, told_after):
    """One process is a question ahead of the other when the notice comes."""
    ahead, behind = Preemption(), Preemption()
    heard = {ahead: [], behind: []}
    for number in range(1, told_after + 1):
        heard[ahead].append(ahead.reached())
        if number < told_after:
            heard[behind].append(behind.reached())
    service.tell()
    for process, answers in heard.items():
        while len(answers) < told_after + 3:
            answers.append(process.reached())
    # Once heard it is not forgotten, however late it is acted on.
    assert heard[ahead] == heard[behind] == [False] * told_after + [True] * 3
