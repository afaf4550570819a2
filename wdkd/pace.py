"""When a run saves its state, and when it stops: the same on all of its processes."""

import time

from wdkd.config import TrainConfig
from wdkd.interruption import Interruption

GO_ON, SAVE, STOP = 0, 1, 2
"""What a process may wish for after a step; a larger one includes the smaller."""


class Pace:
    """Decides after each call of the step. A signal or the clock is one process's own, so several must agree.

    Each says its wish with the next call (`steps.Draw.wish`), and all hear the largest when that call is looked at (`progress.Log`).

    Args:
      leads: whether this process's clock counts.
      several: whether there are other processes.
    """

    def __init__(self, config: TrainConfig, interruption: Interruption, *, leads: bool, several: bool) -> None:
        self._config, self._interruption, self._leads, self._several = config, interruption, leads, several
        self._saved = time.monotonic()

    def wish(self) -> int:
        """What this process wants."""
        seconds = self._config.checkpoint_seconds
        late = self._leads and seconds is not None and time.monotonic() - self._saved >= seconds
        return STOP if self._interruption.requested else SAVE if late else GO_ON

    def due(self, step: int, agreed: int) -> int:
        """What is to be done after `step`, where the processes have agreed on `agreed`. The caller does it, however long it takes."""
        planned = SAVE if step % self._config.checkpoint_every == 0 or step == self._config.steps else GO_ON
        due = max(planned, agreed if self._several else self.wish())
        if due == STOP:
            self._interruption.acknowledge()
        return due

    def saved(self) -> None:
        """Starts the clock anew."""
        self._saved = time.monotonic()
