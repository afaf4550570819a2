"""Values in words: what others wrote, short and on one line."""

import hashlib
import re
import unicodedata
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


def safe_name(text: str) -> str:
    """Text as a name of at most 70 ASCII letters, digits, _ and -. Where letters are lost, a digest of the text stands for them.

    Spellings that are equal after Unicode's NFC give the same name.
    """
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", plain).strip("-")
    if 0 < len(name) <= 60 and not any(c.isalnum() and not c.isascii() for c in plain):
        return name
    digest = hashlib.sha256(unicodedata.normalize("NFC", text).encode(errors="surrogateescape")).hexdigest()
    return f"{name[:60].strip('-') or 'folder'}-{digest[:8]}"
