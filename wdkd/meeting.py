"""The processes of a run meet over plain sockets before XLA joins them."""

import contextlib
import os
import re
import socket
import time

from wdkd.errors import UsageError
from wdkd.launcher import Launch


def meet(launch: Launch, timeout: int) -> dict[int, socket.socket]:
    """Returns when all processes have come to the coordinator, else raises UsageError.

    XLA must not be asked before: where a process does not come or a port is taken, it aborts with pages of C++.

    Returns:
      The open connections over which they have met, by process: to all others in process 0, to process 0 in the others.
    """
    host, port = address(launch.coordinator)
    try:
        socket.getaddrinfo(host, port)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"coordinator is {launch.coordinator}, but {host} is no known host; give its IP address") from error
    if launch.process_id == 0:
        return _await_others(launch, port, timeout)
    return {0: _report(launch, (host, port), timeout)}


def address(coordinator: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT or [HOST]:PORT. Raises UsageError if it is neither."""
    found = re.fullmatch(r"(?:\[(?P<six>[^][\s]+)\]|(?P<name>[^][:\s]+)):(?P<port>[0-9]{1,5})", coordinator)
    if found is None or not 1 <= int(found["port"]) <= 65535:
        raise UsageError(f"coordinator is {coordinator!r}; it must be HOST:PORT with a port between 1 and 65535, as 10.0.0.1:1234")
    return found["six"] or found["name"], int(found["port"])


GO = b"wdkd: all have come"


def _await_others(launch: Launch, port: int, timeout: int) -> dict[int, socket.socket]:
    """Process 0's part of `meet`: hears all others, lets them go on together, and leaves the port to XLA."""
    deadline = time.monotonic() + timeout
    names = {_name(process_id, launch.processes): process_id for process_id in range(1, launch.processes)}
    come: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as connections:
        with _open(launch.coordinator, port) as server:
            while missing := {name: i for name, i in names.items() if i not in come or _is_closed(come[i])}:
                server.settimeout(max(deadline - time.monotonic(), 1e-3))
                try:
                    connection = connections.enter_context(server.accept()[0])
                except TimeoutError:
                    absent = ", ".join([*missing][:8])
                    raise UsageError(f"{absent} did not come to the coordinator {launch.coordinator} {_advice(timeout)}") from None
                process_id = missing.get(_words(connection))
                if process_id is None:
                    connection.close()
                else:
                    come[process_id] = connection
        for connection in come.values():
            with contextlib.suppress(OSError):
                connection.sendall(GO)
        connections.pop_all()
    return come


def _open(coordinator: str, port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)
    except OSError as error:
        raise UsageError(
            f"process 0 cannot open the port of the coordinator {coordinator} ({os.strerror(error.errno)}); give another port"
        ) from error


def _words(connection: socket.socket) -> str | None:
    """What the other end says of itself; None if that is nothing within a second, or no text."""
    connection.settimeout(1)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return connection.recv(99).decode()
    return None


def _is_closed(connection: socket.socket) -> bool:
    """Whether the process at the other end has ended since it came; it may be started again."""
    connection.settimeout(0)
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _report(launch: Launch, to: tuple[str, int], timeout: int) -> socket.socket:
    """The other processes' part of `meet`: says to process 0 which this is, until it answers. Returns the connection."""
    deadline = time.monotonic() + timeout
    name = _name(launch.process_id, launch.processes)
    reached = False
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
            connection = opened.enter_context(socket.create_connection(to, timeout=left))
            reached = True
            connection.sendall(name.encode())
            if connection.recv(len(GO)) == GO:
                opened.pop_all()
                return connection
        time.sleep(0.2)
    if reached:
        raise UsageError(f"{name} reached the coordinator {launch.coordinator}, but not all others did {_advice(timeout)}")
    raise UsageError(f"{name} cannot reach the coordinator {launch.coordinator} {_advice(timeout)}")


def _name(process_id: int, processes: int) -> str:
    return f"process {process_id} of {processes}"


def _advice(timeout: int) -> str:
    return (
        f"within {timeout} s; start all processes in that time, process 0 at that address and each with its own --process-id, "
        "or set --connect-timeout higher"
    )
