"""Values in words: what others wrote, short and on one line."""

from typing import Any

LENGTH = 60


def shown(value: Any, length: int = LENGTH) -> str:
    """A value as it is where that is short and printable, else as Python writes it, without its middle.

    Control characters would break the line or the terminal; what is no Unicode, as a file name may be, cannot be written at all.
    """
    text = str(value)
    if not text.isprintable():
        text = ascii(text)
    return text if len(text) <= length else f"{text[: length // 2]}...{text[-length // 4 :]}"
