"""A folder of one's own images, prepared by TFDS in the cache: once for what it holds, whatever it is called and wherever it is."""

import dataclasses
import hashlib
import os
from pathlib import Path

from wdkd.cache import cache_directory, discard
from wdkd.config import DataConfig
from wdkd.contents import Contents, Facts, read_contents
from wdkd.datasets.folder import Folder
from wdkd.errors import UsageError
from wdkd.files import read_json, write_json
from wdkd.folder import list_folder
from wdkd.notes import note
from wdkd.prepared import build, is_prepared, keep
from wdkd.typed_json import from_dict, to_dict
from wdkd.wording import shown

FACTS = "folder.json"
MAX_FACTS = 2**20
MANY = 2000
"""Images that take long enough to say so."""
OPTIONS = ("image_size", "channels", "test_share", "max_unreadable")
"""Of DataConfig: those that are for folders alone."""


def check_options(config: DataConfig) -> None:
    """Raises UsageError for an option that would have no effect, with or without a folder."""
    if config.folder is not None and config.data_dir is not None:
        raise UsageError("data.data_dir is for TFDS sets; images of data.folder are prepared in $WDKD_CACHE_DIR: leave it out")
    defaults = {field.name: field.default for field in dataclasses.fields(DataConfig)}
    given = [name for name in OPTIONS if getattr(config, name) != defaults[name]]
    if config.folder is None and (given or config.name == "folder"):
        raise UsageError(f"{'data.' + given[0] if given else 'preset folder'} is for images of your own; give --data.folder DIR")


def prepare_folder(config: DataConfig) -> tuple[Path, Facts]:
    """Where the images of `config.folder` are prepared, as they are now, and what is known of them; prepared now if need be.

    Any number of processes may do so at once. Of a folder that is no longer there, what was prepared of it last is taken, with a word.

    Raises:
      UsageError: as `list_folder` and `read_contents`, if too many files cannot be read, or there is no room to write.
    """
    height, width = config.image_hw
    options = f"{height} {width} {config.channels} {config.test_share!r}"
    last = cache_directory() / "folders" / f"last-{_digest(os.path.abspath(config.folder), options)}.json"
    if not os.path.lexists(config.folder) and (found := _remembered(last)) is not None:
        final, facts = found
        note(f"{shown(config.folder, 300)} is no longer there; the images that were prepared from it last are used")
    else:
        listing = list_folder(config.folder)
        final = cache_directory() / "folders" / _digest(listing.digest, options) / str(Folder.VERSION)
        facts = _facts(final)
        if facts is None:
            count = len(listing.train) + len(listing.test)
            if count >= MANY:
                note(f"{config.dataset}: {count:,} images are read and prepared; the next start takes them from the cache")
            contents = read_contents(listing, (height, width), config.channels, config.test_share)
            facts = contents.facts
            facts.check(shown(config.folder, 300), config.max_unreadable)
            if _facts(final) is None:  # Still: another process may have been faster.
                discard(final)
            final = keep(final, lambda data_dir: _write(contents, data_dir))
        _remember(last, final)
    facts.check(shown(config.folder, 300), config.max_unreadable)
    for line in facts.remarks():
        note(f"{config.dataset}: {line}")
    return final, facts


def _write(contents: Contents, data_dir: Path) -> Path:
    directory = build(Folder(contents, data_dir=data_dir, file_format="array_record"))
    write_json(directory / FACTS, to_dict(contents.facts))
    return directory


def _facts(directory: Path) -> Facts | None:
    """What is written beside a prepared set, or None where that is not there whole."""
    try:
        return from_dict(Facts, read_json(directory / FACTS, MAX_FACTS)) if is_prepared(directory) else None
    except UsageError:
        return None


def _digest(*texts: str) -> str:
    return hashlib.sha256(os.fsencode("\0".join(texts))).hexdigest()[:32]


# --- what was prepared of a path last -----------------------------------------------------------------------------------


def _remember(last: Path, final: Path) -> None:
    """Notes where a path's images are; where that cannot be, they are found again as long as the folder is there."""
    try:
        if not last.exists() or read_json(last, MAX_FACTS) != final.parent.name:
            write_json(last, final.parent.name)
    except UsageError:
        return


def _remembered(last: Path) -> tuple[Path, Facts] | None:
    try:
        name = read_json(last, MAX_FACTS)
    except UsageError:
        return None
    directory = last.parent / os.path.basename(str(name)) / str(Folder.VERSION)
    facts = _facts(directory)
    return None if facts is None else (directory, facts)
