"""The one exception that means "you can fix this": its text is one line with the value, the limit and the remedy."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Bad input. Entry points print its text on one line and exit with code 2."""


def unknown(what: str, value: object, known: Iterable[str]) -> UsageError:
    """The error for a name that is not among the known ones; suggests the nearest."""
    known = sorted(known)
    near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return UsageError(f"unknown {what} {value!r}{hint} Known: {', '.join(known)}")
