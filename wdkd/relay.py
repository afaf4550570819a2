"""XLA's connections to its coordinator lead through a relay, so that they outlive the coordinator."""

import contextlib
import socket
import threading
import time

from wdkd.meeting import address

PATIENCE = 60.0
"""Seconds for the coordinator to open its port."""


def relay(coordinator: str) -> str:
    """The address of a port of this process that leads to the coordinator.

    XLA aborts a process within milliseconds of losing its coordinator, with pages of C++ and before anything else can be said. A
    connection to here stays open when the coordinator ends, so that XLA only misses the answers to its heartbeats, and aborts
    after the heartbeat timeout if the process has not ended otherwise by then.
    """
    server = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve, args=(server, address(coordinator)), daemon=True).start()
    return "{}:{}".format(*server.getsockname())


def _serve(server: socket.socket, to: tuple[str, int]) -> None:
    while True:
        threading.Thread(target=_join, args=(server.accept()[0], to), daemon=True).start()


def _join(near: socket.socket, to: tuple[str, int]) -> None:
    """Copies both ways until the near end is closed, which is this process's own."""
    with near, contextlib.suppress(OSError), _reach(to) as far:
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_copy, args=(far, near), daemon=True).start()
        _copy(near, far)
        far.shutdown(socket.SHUT_RDWR)


def _reach(to: tuple[str, int]) -> socket.socket:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            far = socket.create_connection(to, timeout=PATIENCE)
            far.settimeout(None)
            return far
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while received := source.recv(2**16):
            with contextlib.suppress(OSError):
                sink.sendall(received)
