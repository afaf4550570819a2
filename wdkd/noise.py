"""What orbax and tensorstore print of a failure that they raise as well: tracebacks, which would bury the one line that says what to do."""

import logging
import sys
from collections.abc import Callable
from typing import Any


def quieten() -> None:
    """Takes it off stderr. Called again, it does nothing more."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").addFilter(_is_no_repetition)
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook(sys.unraisablehook)


def _is_no_repetition(record: logging.LogRecord) -> bool:
    """False of an array's failure that nobody waited for any more, because another one had been raised already."""
    error = record.exc_info[1] if record.exc_info else None
    return not ("never retrieved" in record.getMessage() and "tensorstore_spec" in str(error))


class _Hook:
    """Of a save that failed, tensorstore tells an event loop that orbax has closed by then."""

    def __init__(self, before: Callable[[Any], Any]) -> None:
        self._before = before

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._before(unraisable)
