"""A relay is as good as a direct connection, except that it stays open when its far end ends."""

import contextlib
import os
import socket
import threading
import time

import pytest

from wdkd.relay import relay

pytestmark = pytest.mark.timeout(60)
HERE = "127.0.0.1"


@contextlib.contextmanager
def relayed():
    """(near, far): both ends of a connection through a relay."""
    with contextlib.ExitStack() as opened:
        server = opened.enter_context(socket.create_server((HERE, 0)))
        near = opened.enter_context(connect(relay(f"{HERE}:{server.getsockname()[1]}")))
        far = opened.enter_context(server.accept()[0])
        yield near, far


def connect(address):
    host, port = address.split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def receive(connection, count):
    with connection.makefile("rb") as file:
        return file.read(count)


def test_everything_arrives_both_ways_at_once():
    there, back = os.urandom(5_000_000), os.urandom(5_000_000)
    with relayed() as (near, far):
        senders = [threading.Thread(target=end.sendall, args=(words,)) for end, words in ((near, there), (far, back))]
        got = {}
        readers = [threading.Thread(target=lambda end=end: got.update({end: receive(end, len(there))})) for end in (near, far)]
        for thread in senders + readers:
            thread.start()
        for thread in senders + readers:
            thread.join(20)
        assert got == {near: back, far: there}


def test_answers_are_not_held_back():
    with relayed() as (near, far):
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        began = time.monotonic()
        for _ in range(100):
            for one, other in ((near, far), (far, near)):
                one.sendall(b"a")
                time.sleep(0.001)  # Else they are passed on as one.
                one.sendall(b"b")
                assert receive(other, 2) == b"ab"
        assert time.monotonic() - began < 4, "a delayed acknowledgement takes 0.04 s"


def test_each_connection_has_its_own_far_end():
    with socket.create_server((HERE, 0)) as server:
        address = relay(f"{HERE}:{server.getsockname()[1]}")
        for words in (b"one", b"two"):
            with connect(address) as near, server.accept()[0] as far:
                near.sendall(words)
                assert receive(far, 3) == words


def test_a_coordinator_may_open_its_port_later():
    with socket.create_server((HERE, 0)) as server:
        port = server.getsockname()[1]
    with connect(relay(f"{HERE}:{port}")) as near:
        near.sendall(b"early")
        time.sleep(0.5)
        with socket.create_server((HERE, port)) as server, server.accept()[0] as far:
            assert receive(far, 5) == b"early"


def test_the_near_end_stays_open_when_the_far_end_ends():
    with relayed() as (near, far):
        far.close()
        near.settimeout(0.5)
        for _ in range(5):
            near.sendall(b"a heartbeat")
            with pytest.raises(TimeoutError):
                near.recv(1)


def test_the_far_end_is_closed_with_the_near_end():
    with relayed() as (near, far):
        near.close()
        assert far.recv(1) == b""
