"""Every process of a run learns at once when another one has ended: connections that stay open as long as the run goes on."""

import atexit
import contextlib
import os
import re
import socket
import threading
from collections.abc import Mapping

GRACE = 2.0
"""Seconds for the main thread to come to an end with an error of its own, as where all processes find the same option wrong."""
LEAVING = 10.0
"""Seconds after which a process that is ending is ended: it may be waiting for the one that is no more."""
SILENCE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 60_000}
"""The kernel gives up a machine that has vanished after 20 + 4 · 10 seconds without an answer, or 60,000 ms if something was said to it."""
LONGEST = 100
"""Bytes of a message at most."""
GOODBYE = b"goodbye\n"


class Lifeline:
    """The connections of this process to others, a star around process 0. A thread listens to each until all have said goodbye.

    The kernel closes the connections of a process that dies, however it dies. Process 0, which has one to every other, passes
    the news on. Then each process prints one line and ends with code 2, unless its main thread has an error of its own to end
    with (`leave`).

    Args:
      process_id: which process this is, of how many `processes`.
      connections: to all others in process 0, to process 0 in the others; by process.
    """

    def __init__(self, process_id: int, processes: int, connections: Mapping[int, socket.socket]) -> None:
        self._process_id, self._processes, self._connections = process_id, processes, dict(connections)
        self._parted: set[int] = set()
        self._ended: int | None = None
        self._noting, self._outcome = threading.Lock(), threading.Lock()
        self._told, self._leaving, self._over = threading.Event(), threading.Event(), threading.Event()
        for peer, connection in self._connections.items():
            _notice_silence(connection)
            threading.Thread(target=self._listen, args=(peer, connection), daemon=True).start()

    def goodbye(self, patience: float | None = None) -> bool:
        """Says that this process has come to its proper end, and waits until all have, or `patience` seconds. Returns whether they have."""
        if self._process_id == 0:
            self._hear(0, GOODBYE)
        else:
            self._tell(GOODBYE)
        return self._over.wait(patience)

    def news(self, patience: float = 0.0) -> str | None:
        """What to say of the process that has ended; None if in `patience` seconds none has."""
        return self._line() if self._told.wait(patience) else None

    def leave(self, code: int) -> None:
        """Tells the others that this process ends, and has it end with `code` when its main thread does.

        That is without what JAX does then, which is to wait minutes for the others and to print pages if they do not come. Does
        not return if the process is being ended already.
        """
        if not self._outcome.acquire(blocking=False):
            threading.Event().wait()
        self._leaving.set()
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        atexit.register(os._exit, code)
        watchdog = threading.Timer(LEAVING, os._exit, (code,))
        watchdog.daemon = True
        watchdog.start()

    def _listen(self, peer: int, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection.makefile("rb") as lines:
            while line := lines.readline(LONGEST):
                self._hear(peer, line)
        self._hear(peer, b"ended %d\n" % peer)

    def _hear(self, peer: int, line: bytes) -> None:
        if line == GOODBYE:
            self._note_goodbye(peer)
        elif ended := re.fullmatch(rb"ended ([0-9]{1,9})\n", line):
            self._note_end(int(ended[1]))

    def _note_goodbye(self, peer: int) -> None:
        with self._noting:
            self._parted.add(peer)
            # Process 0 says it last, when it has heard it from all.
            if self._ended is None and (self._process_id != 0 or len(self._parted) == self._processes):
                if self._process_id == 0:
                    self._tell(GOODBYE)
                self._over.set()  # The main thread goes on, and the process may end.

    def _note_end(self, ended: int) -> None:
        """Passes on that a process has ended, and ends this one."""
        with self._noting:
            if self._over.is_set() or self._leaving.is_set() or self._ended is not None:
                return
            self._ended = ended
        if self._process_id == 0:
            self._tell(b"ended %d\n" % ended)
        self._told.set()
        if not self._leaving.wait(GRACE) and self._outcome.acquire(blocking=False):
            # A bar that shows the progress has left the cursor hidden at the end of its line.
            _say(("\n\033[?25h" if os.isatty(2) else "") + f"error: {self._line()}\n")
            os._exit(2)

    def _tell(self, message: bytes) -> None:
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(message)

    def _line(self) -> str:
        return (
            f"process {self._ended} of {self._processes} has ended; this one stops too, "
            "and the same command on all of them goes on from the last checkpoint"
        )


def _notice_silence(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in SILENCE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _say(text: str) -> None:
    # Not by sys.stderr, which the main thread may hold.
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
