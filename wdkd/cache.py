"""Folders that this package can make again: where they are, and how they appear whole or not at all."""

import contextlib
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from wdkd.wording import shown

UNFINISHED = ".unfinished-"
ABANDONED = 24 * 3600.0
"""Seconds without a change after which nobody is at work in an unfinished folder any more."""


def cache_directory() -> Path:
    """Where this package keeps what it can make again: $WDKD_CACHE_DIR, else ~/.cache/wdkd."""
    return Path(os.path.expanduser(os.environ.get("WDKD_CACHE_DIR") or "~/.cache/wdkd"))


@contextlib.contextmanager
def temporary_beside(final: Path) -> Iterator[Path]:
    """A new folder on the same file system as `final`, gone at the end unless it was renamed.

    Those that killed processes have left there go too.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    for path in final.parent.glob(f"{UNFINISHED}*"):
        if _is_abandoned(path):
            discard(path)
    temporary = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=final.parent))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            return False
        changes = [path.lstat().st_mtime for path in (folder, *folder.iterdir())]
    except OSError:  # Its owner, or another who cleans up, was faster.
        return False
    return time.time() - max(changes) > ABANDONED


def discard(path: Path) -> None:
    """Removes a folder, or a link to one and not what it points to; as much of it as can be removed."""
    if path.is_symlink():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def publish(temporary: Path, final: Path) -> None:
    """Renames a finished folder. If another process was faster, its folder stays: it has the same contents."""
    temporary.chmod(0o755)
    try:
        temporary.rename(final)
    except OSError:
        if not final.is_dir():
            raise


def warn_unwritable(path: Path, error: Exception) -> None:
    """Says that there is no cache, why, and what to do."""
    why = shown(getattr(error, "strerror", None) or error, 200)
    logging.getLogger(__name__).warning(
        "cannot keep a cache in %s (%s); set WDKD_CACHE_DIR to a folder that can be written", shown(path.parent, 300), why
    )
