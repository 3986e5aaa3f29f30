"""`train`, told to end at a chosen moment: python tests/told.py MOMENT alone|several ...

`several` puts a stand-in in the place of the service that tells several processes: it names the
question after the last that was asked, and answers yes to that one alone, as JAX's does.
"""

import os
import signal
import sys

from jax.experimental import multihost_utils

from radonc_jax import command, loading, tracking, train
from radonc_jax.decoding.journal import Journal
from radonc_jax.evaluation import run as evaluation
from radonc_jax.training import preemption

moment, how = sys.argv.pop(1), sys.argv.pop(1)
asked, named = 0, None


def reached(number):
    global asked
    assert number == asked + 1
    asked = number
    return number == named


def tell():
    global named
    if how == "alone":
        os.kill(os.getpid(), signal.SIGTERM)
    elif named is None:
        named = asked + 1


def tell_in(owner, name, now):
    """Tells when a function is called with arguments for which `now` is true, then goes on."""
    real = getattr(owner, name)

    def patched(*arguments, **options):
        if now(*arguments, **options):
            tell()
        return real(*arguments, **options)

    setattr(owner, name, patched)


def logs(step, split):
    return lambda self, number, of, *_, **__: (number, of) == (step, split)


if how == "several":
    preemption.several_processes = lambda: True
    multihost_utils.reached_preemption_sync_point = reached
match moment:
    case "weights":
        tell_in(loading, "load_base", lambda *_: True)
    case "validation":
        tell_in(evaluation, "evaluate", lambda *_, split, **__: split == "validation")
    case "before the last step":
        tell_in(tracking.Run, "log", logs(5, "train"))
    case "last validation":
        tell_in(tracking.Run, "log", logs(6, "validation"))
    case "third validation":
        tell_in(tracking.Run, "log", logs(3, "validation"))
    case "answers":
        tell_in(Journal, "add", lambda self, *_: self.path.stat().st_size > 0)
command.run(train.main, stopped="stopped: the same command goes on from the last checkpoint")
