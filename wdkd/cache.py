"""Folders that this package can make again: where they are, and how they appear whole or not at all."""

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def cache_directory() -> Path:
    """Where this package keeps what it can make again: $WDKD_CACHE_DIR, else ~/.cache/wdkd."""
    return Path(os.environ.get("WDKD_CACHE_DIR") or "~/.cache/wdkd").expanduser()


@contextlib.contextmanager
def temporary_beside(final: Path) -> Iterator[Path]:
    """A new folder on the same file system as `final`, gone at the end unless it was renamed."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=final.parent))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, final: Path) -> None:
    """Renames a finished folder. If another process was faster, its folder stays: it has the same contents."""
    temporary.chmod(0o755)
    try:
        temporary.rename(final)
    except OSError:
        if not final.is_dir():
            raise


def warn_unwritable(path: Path, error: OSError) -> None:
    logging.getLogger(__name__).warning(
        "cannot keep a cache in %s (%s); set WDKD_CACHE_DIR to a folder that can be written", path.parent, error.strerror or error
    )
