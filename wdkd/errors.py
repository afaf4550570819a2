"""Ways for a run to end that are not bugs: each has a text of one line for the user and an exit code."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Bad input: the text has the value, the limit and the remedy. Entry points print it on one line and exit with code 2."""


class Diverged(UsageError):
    """A loss, a gradient or a parameter is not finite; the text names the quantity and the step."""

    def __init__(self, text: str, step: int = 0) -> None:
        super().__init__(text)
        self.step = step


class Busy(UsageError):
    """Another process is at work on the same directory; the text names it."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop, and it did: the same command goes on. Entry points print its text and exit with `EXIT_CODE`.

    Not an Exception, so that nothing that catches those goes on in its place.
    """

    EXIT_CODE = 75
    """EX_TEMPFAIL of sysexits.h, "try again later": no other end of a run has it."""


def unknown(what: str, value: object, known: Iterable[str]) -> UsageError:
    """The error for a name that is not among the known ones; suggests the nearest."""
    known = sorted(known)
    hint = suggestion(str(value), known)
    return UsageError(f"unknown {what} {str(value)[:200]!r}{hint or '.'} Known: {', '.join(known)}")


def suggestion(value: str, known: Iterable[str]) -> str:
    """The question whether the nearest known name was meant, to end a sentence with; empty if none is near."""
    near = difflib.get_close_matches(value[:200], sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
