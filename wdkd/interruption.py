"""SIGTERM, Ctrl-C and a closed terminal: a run ends at its next step boundary, and in any case within seconds."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from wdkd.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 8.0
"""Seconds that a step, or what else the main thread is busy with, has to come to an end."""


class Interruption:
    """A context in which a signal raises `Interrupted` in the main thread, or within `deferred` is noted for it to look at.

    Python runs handlers in the main thread between two of its instructions, which may be a minute away while XLA compiles. So
    a thread waits for the signal too, and ends the process `GRACE` seconds later, or at a second signal, unless the main thread
    has said that it is on its way (`acknowledge`). Ending it so is as safe as kill -9: what is saved is whole.

    Outside of the main thread it does nothing.
    """

    def __init__(self, grace: float = GRACE) -> None:
        self.requested = False
        """Whether a signal has come."""
        self._grace, self._deferred = grace, False
        self._acknowledged = threading.Event()
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in SIGNALS:
            # What ignores a signal, as nohup and shells' background jobs do, goes on ignoring it.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._pipe is None:
            return
        self.acknowledge()
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not Python that set it.
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._pipe[1])  # Ends the thread, which closes the other end.
        self._pipe = None

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals are noted in `requested`. Raises `Interrupted` at the end if one came and nobody acted on it."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self.check()

    def acknowledge(self) -> None:
        """Takes back the time limit: what must be saved is being saved, and the run ends then."""
        self._acknowledged.set()

    def check(self) -> None:
        """Raises `Interrupted` if a signal has come."""
        if self.requested:
            self.acknowledge()
            raise Interrupted("stopped by a signal; the same command goes on from the last checkpoint")

    def _handle(self, number: int, frame: Any) -> None:
        self.requested = True
        if not self._deferred:
            self.check()

    def _watch(self, pipe: int) -> None:
        with open(pipe, "rb", buffering=0) as signals:
            while come := signals.read(1):
                if come[0] in SIGNALS:
                    break
            if not come:
                return
            watchdog = threading.Thread(target=self._give_up_after_grace, daemon=True)
            watchdog.start()
            while come := signals.read(1):
                if come[0] in SIGNALS:
                    _give_up("stopped at once by a second signal")

    def _give_up_after_grace(self) -> None:
        if not self._acknowledged.wait(self._grace):
            _give_up(f"stopped by a signal, {self._grace:g} s after it and in the middle of a step")


def _give_up(why: str) -> None:
    print(f"error: {why}; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
    os._exit(Interrupted.EXIT_CODE)
