"""The checks that options, and what is read from files, have in common. Each raises UsageError with the value and the limit."""

import math
import os
import re
import reprlib
import sys
from typing import Any

from wdkd.errors import UsageError
from wdkd.wording import shown

MAX_RADIUS = 1e6
"""Of a ball around images, in units of pixels in [0, 1]: there is none that far away."""
MOST = 2**31 - 1
"""Largest whole number of what nothing else limits: steps and images are counted in 32 bits."""
NAME = re.compile(r"(?=.{1,100}$)[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)?")
"""What a data set, a network or a method may be called; of TFDS's sets, some have a configuration after a slash."""


def require(condition: bool, name: str, value: Any, limit: str) -> None:
    """The option `name` must be `limit`; it is `value`."""
    if not condition:
        raise UsageError(f"{name} is {shown(value)}; it must be {limit}")


def require_count(name: str, value: int, *, least: int = 1, most: int = MOST, rest: str = "") -> None:
    """A whole number from `least` to `most`; `rest` is said after the limit: a unit, or what else it may be."""
    require(value >= least, name, value, f"at least {least}{rest}")
    require(value <= most, name, value, f"at most {most}{rest}")


def require_number(name: str, value: float | None, most: float = sys.float_info.max) -> None:
    """A finite number from 0 to `most`; or None."""
    require(value is None or (math.isfinite(value) and value >= 0), name, value, "finite and at least 0")
    require(value is None or value <= most, name, value, f"at most {most:g}")


def require_fraction(name: str, value: float | None) -> None:
    """A number from 0 to 1, or above by an error of rounding; or None."""
    require(value is None or 0 <= value <= 1 + 1e-6, name, value, "between 0 and 1")


def require_text(name: str, value: str | None) -> None:
    """Something that can be printed on a line; or None."""
    require(value is None or (value.isprintable() and len(value) <= 1000), name, reprlib.repr(value), "at most 1000 printable characters")


def require_name(name: str, value: str) -> None:
    """Names become parts of paths, of plots and of lines of text."""
    require(bool(NAME.fullmatch(value)), name, reprlib.repr(value), "a name of at most 100 letters, digits and _ - . /")


def require_path(name: str, value: str | None) -> None:
    """Something that the operating system takes for a path, on one line; or None."""
    if value is not None:
        require(_is_path(value), name, reprlib.repr(value), "a path without control characters, of at most 4095 bytes")


def _is_path(value: str) -> bool:
    try:
        return 0 < len(os.fsencode(value)) < 4096 and not re.search(r"[\0-\x1f\x7f]", value)
    except UnicodeEncodeError:
        return False
