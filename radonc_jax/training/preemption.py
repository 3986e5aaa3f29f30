"""SIGTERM, which announces that a machine is taken away: where a run may end, and that it does."""

import contextlib
import signal

from jax.experimental import multihost_utils

from radonc_jax import command
from radonc_jax.parallel import several_processes


class Preemption:
    """From entering to leaving, SIGTERM ends the run by `command.Preempted`.

    A process alone catches the signal itself and ends at once, but within `deferred` only where
    `reached` or `check` is asked. Of several processes, JAX's service tells all of them of a signal
    to one, and names the question at which all of them hear of it; they end there together.
    """

    def __init__(self):
        self._told = self._defers = False
        self._asked = 0

    def __enter__(self) -> "Preemption":
        if not several_processes():  # else the service has taken the signal when they joined
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number, frame):
        self._told = True
        if not self._defers:
            raise command.Preempted("no step was under way")

    @contextlib.contextmanager
    def deferred(self):
        """While something must not be cut off: a step, or a checkpoint on its way to the disk."""
        self._defers = True
        try:
            yield
        finally:
            self._defers = False
        if not several_processes() and self._told:
            raise command.Preempted("no step was under way")

    def reached(self) -> bool:
        """Whether to save and stop here; once true it stays so.

        All processes must ask equally often: the service names one question, the first that no
        process has asked yet, and answers yes to that one alone.
        """
        if several_processes():
            self._asked += 1
            if multihost_utils.reached_preemption_sync_point(self._asked):
                self._told = True
        return self._told

    def check(self, done: str) -> None:
        """Ends the run if it is to end; asked as `reached`.

        Raises:
          command.Preempted: with `done`, which says how far the run was.
        """
        if self.reached():
            raise command.Preempted(done)

    def __exit__(self, *_):
        # From here on the signal ends the process again.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if several_processes() else self._before)
