"""The processes of a run meet over a plain socket before XLA joins them."""

import contextlib
import os
import re
import socket
import time

from wdkd.errors import UsageError
from wdkd.launcher import Launch


def meet(launch: Launch, timeout: int) -> None:
    """Returns when all processes have come to the coordinator, else raises UsageError.

    XLA must not be asked before: where a process does not come or a port is taken, it aborts with pages of C++.
    """
    address = re.fullmatch(r"(?:\[(?P<six>[^][\s]+)\]|(?P<name>[^][:\s]+)):(?P<port>[0-9]{1,5})", launch.coordinator)
    if address is None or not 1 <= int(address["port"]) <= 65535:
        raise UsageError(f"coordinator is {launch.coordinator!r}; it must be HOST:PORT with a port between 1 and 65535, as 10.0.0.1:1234")
    host, port = address["six"] or address["name"], int(address["port"])
    try:
        socket.getaddrinfo(host, port)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"coordinator is {launch.coordinator}, but {host} is no known host; give its IP address") from error
    if launch.process_id == 0:
        _await_others(launch, port, timeout)
    else:
        _report(launch, (host, port), timeout)


GO = b"wdkd: all have come"


def _await_others(launch: Launch, port: int, timeout: int) -> None:
    """Process 0's part of `meet`: hears all others, lets them go on together, and leaves the port to XLA."""
    deadline = time.monotonic() + timeout
    missing = [_name(process_id, launch.processes) for process_id in range(1, launch.processes)]
    both = socket.has_dualstack_ipv6()
    with contextlib.ExitStack() as connections:
        try:
            family = socket.AF_INET6 if both else socket.AF_INET
            server = connections.enter_context(socket.create_server(("", port), family=family, dualstack_ipv6=both))
        except OSError as error:
            raise UsageError(
                f"process 0 cannot open the port of the coordinator {launch.coordinator} ({os.strerror(error.errno)}); give another port"
            ) from error
        come = []
        while missing:
            server.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                connection = connections.enter_context(server.accept()[0])
            except TimeoutError:
                absent = ", ".join(missing[:8])
                raise UsageError(f"{absent} did not come to the coordinator {launch.coordinator} {_advice(timeout)}") from None
            connection.settimeout(1)
            with contextlib.suppress(OSError, ValueError):  # ValueError: it is not one that is missing.
                missing.remove(connection.recv(99).decode())
                come.append(connection)
        for connection in come:
            with contextlib.suppress(OSError):
                connection.sendall(GO)


def _report(launch: Launch, address: tuple[str, int], timeout: int) -> None:
    """The other processes' part of `meet`: says to process 0 which this is, until it answers."""
    deadline = time.monotonic() + timeout
    name = _name(launch.process_id, launch.processes)
    reached = False
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=left) as connection:
            reached = True
            connection.sendall(name.encode())
            if connection.recv(99) == GO:
                return
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
