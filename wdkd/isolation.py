"""Other people's binary formats, parsed by a process of its own: with little memory, no files to write, and ended when it hangs.

Nothing but the standard library here: this file is also what the process runs.
"""

import os
import resource
import runpy
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

MEMORY = 2**30
"""Bytes that the process may take, besides its threads' stacks."""
THREADS = 64
"""Of array_record."""
SILENCE = 30.0
"""Seconds between two messages, after which the process is taken to hang."""
LARGEST = 2**28
"""Bytes of the largest message that is taken."""

MESSAGE, DONE, FAILED = range(3)
HEAD = struct.Struct("!BQ")


def answers(script: str, question: bytes, silence: float = SILENCE) -> Iterator[bytes]:
    """What `answer(question)` of a script in wdkd/isolated yields, while it does.

    Raises:
      ValueError: if it raised anything, died or was silent for so many seconds; what was yielded before holds.
    """
    path = Path(__file__).with_name("isolated") / f"{script}.py"
    # -P: beside this file are modules with the names of other people's.
    command = [sys.executable, "-P", __file__, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            _ask(process, question)
            yield from _messages(process, silence)
        finally:
            process.kill()


def _ask(process: subprocess.Popen, question: bytes) -> None:
    try:
        process.stdin.write(question)
        process.stdin.close()
    except BrokenPipeError:
        pass  # It is dead; `_messages` says how it died.


def _messages(process: subprocess.Popen, silence: float) -> Iterator[bytes]:
    read = _reader(process.stdout.fileno(), silence)
    while True:
        head = read(HEAD.size)
        if len(head) < HEAD.size:
            raise ValueError(f"its reader ended: {_death(process.wait())}")
        kind, size = HEAD.unpack(head)
        if size > LARGEST:
            raise ValueError(f"a part of it has {size:,} bytes; at most {LARGEST:,} are read")
        content = read(size)
        if kind == DONE:
            return
        if kind == FAILED:
            raise ValueError(content.decode(errors="replace"))
        yield content


def _reader(handle: int, silence: float) -> Callable[[int], bytes]:
    """The function that reads so many bytes, or fewer where there are no more. Raises ValueError after so many seconds of nothing."""
    ready, buffer = select.poll(), bytearray()
    ready.register(handle, select.POLLIN)

    def read(size: int) -> bytes:
        while len(buffer) < size:
            if not ready.poll(silence * 1000):
                raise ValueError(f"its reader was silent for {silence:g} seconds")
            more = os.read(handle, 2**20)
            if not more:
                break
            buffer.extend(more)
        taken = bytes(buffer[:size])
        del buffer[:size]
        return taken

    return read


def _death(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


# --- in the process -----------------------------------------------------------------------------------------------------


def serve(script: str) -> None:
    """Runs a script's `answer` on what comes from stdin, and writes what it yields to stdout."""
    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    memory = MEMORY + THREADS * (2**23 if stack == resource.RLIM_INFINITY else stack)
    for kind, most in ((resource.RLIMIT_DATA, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; who asked ends this one.
    question = sys.stdin.buffer.read()
    try:
        for content in runpy.run_path(script)["answer"](question):
            _send(MESSAGE, content)
        _send(DONE, b"")
    except Exception as error:
        _send(FAILED, f"{type(error).__name__}: {error}"[:1000].encode(errors="replace"))


def _send(kind: int, content: bytes) -> None:
    sys.stdout.buffer.write(HEAD.pack(kind, len(content)) + content)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
