"""Command lines parsed by tyro, errors on one line with exit code 2. Imports no JAX: some scripts run where there is none."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from wdkd.errors import Interrupted, UsageError
from wdkd.wording import shown

Arguments = TypeVar("Arguments")


def main(
    cls: type[Arguments],
    function: Callable[[Arguments], Any],
    *,
    description: str | None,
    default: Arguments | None = None,
    flags: bool = False,
) -> None:
    """Parses sys.argv into `cls` and calls `function` with it; UsageError ends the process with one line and code 2.

    `flags`: an option that is False by default takes no value.
    """
    try:
        function(parse(cls, sys.argv[1:], description=description, default=default, flags=flags))
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output, such as head, has seen enough; Python would flush once more at exit and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except UsageError as error:
        fail(str(error))
    except Interrupted as error:
        fail(str(error), code=Interrupted.EXIT_CODE)
    except KeyboardInterrupt:
        fail("interrupted", code=130)
    except MemoryError:
        fail("there is not enough memory; use smaller options or a larger machine")


def fail(text: str, code: int = 2) -> None:
    """Prints an error on one line of stderr and ends the process."""
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    raise SystemExit(code)


def parse(
    cls: type[Arguments], argv: Sequence[str], *, description: str | None, default: Arguments | None = None, flags: bool = False
) -> Arguments:
    """The arguments as an instance of `cls`. Raises UsageError, with tyro's words on one line, for arguments that do not parse."""
    printed = io.StringIO()
    extra = ({} if default is None else {"default": default}) | ({} if flags else {"config": (tyro.conf.FlagConversionOff,)})
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(cls, args=list(argv), description=description, **extra)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(_one_line(printed.getvalue())) from None


def _one_line(box: str) -> str:
    """tyro's boxed message without its frame."""
    # Where the terminal is not known to take UTF-8, the frame is made of these: + - |
    words = re.sub(r"[╭╮╰╯│─]+", " ", box).split()
    return shown(" ".join(word for word in words if not set(word) <= set("+-|")), 900)
