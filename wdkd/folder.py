"""A folder of images as its owner keeps it: which files there are, of which class. Looks at names, never into a file."""

import collections
import dataclasses
import hashlib
import os
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

from wdkd.errors import UsageError, suggestion
from wdkd.images import SUFFIXES
from wdkd.prepared import MAX_CLASSES
from wdkd.wording import shown

MAX_ENTRIES = 2_000_000
"""Files and folders in a folder that is read."""
MAX_NAME = 200
"""Characters of a class's name."""
VALIDATION = ("val", "valid", "validation")
"""Folders beside train/ that are left out: options draw the validation split."""
DOCUMENTS = ("readme", "license", "licence", "notice", "copying")
"""Files without a suffix that may stand beside the folders of classes."""
KINDS = "png, jpg, jpeg, webp or bmp"


@dataclasses.dataclass(frozen=True)
class File:
    """An image of a folder: its path below the folder, with forward slashes, its class (-1: none), bytes, and when it changed (ns)."""

    name: str
    label: int
    size: int
    changed: int


@dataclasses.dataclass(frozen=True)
class Listing:
    """The images of a folder, each part by class and then by name."""

    root: Path
    class_names: tuple[str, ...]
    """In the order of labels; empty where nothing says which classes there are."""
    train: tuple[File, ...]
    test: tuple[File, ...]
    """Those in test/; none: there is no such folder."""
    left_out: tuple[str, ...]
    """Files of other kinds and folders that are not looked at, in words."""

    @property
    def labelled(self) -> bool:
        """Whether the training images have classes."""
        return self.train[0].label >= 0

    @property
    def digest(self) -> str:
        """SHA-256 of all names, classes, sizes and times of change, wherever the folder itself is."""
        digest = hashlib.sha256()
        for part in (self.train, self.test):
            for file in part:
                digest.update(os.fsencode(file.name) + f"\0{file.label} {file.size} {file.changed}\n".encode())
            digest.update(b"\0")
        return digest.hexdigest()


def list_folder(folder: str | os.PathLike) -> Listing:
    """The images in CLASS/ of a folder, or of its train/, and in test/CLASS/; those directly in it have no class.

    Classes are called like their folders, in Unicode's NFC, and are sorted. Hidden files are passed over; links are followed where they
    stay in the folder.

    Raises:
      UsageError: if it is no folder or cannot be read, holds no image, has one class, an empty class, two whose names differ in case
        or spelling alone, a folder inside a class, classes in test/ that are not those of training, a link that leads out, or more
        than the limits.
    """
    reader = _Reader(Path(folder))
    top = reader.look(())
    folders = {name.casefold(): name for name in top.folders}
    test = folders.pop("test", None)
    beside = set(folders) - {"train", *VALIDATION}
    root, left_out = top, []
    if "train" in folders and not beside:
        if top.images:
            raise reader.error(f"has images beside train/, first {shown(top.images[0].name)}", "move them into the folder of a class")
        root = reader.look((folders["train"],))
        left_out = [f"{folders[name]}/" for name in VALIDATION if name in folders]
    names = [name for name in root.folders if root is not top or name != test]
    if names and root.images:
        count, first = len(root.images), shown(root.images[0].name)
        raise reader.error(
            f"has {count} images beside the folders of classes, first {first}", "move them into one, or into a folder of their own"
        )
    if not names and not root.images:
        raise reader.error(f"holds no images ({KINDS}) and no folders of them", "give a folder that has one folder for each class")
    train = reader.classes(root, names)
    tested = {} if test is None else reader.tested(reader.look((test,)), train)
    class_names = tuple(train or tested)
    return Listing(
        reader.root,
        class_names,
        _labelled(train) if train else tuple(root.images),
        _labelled(tested),
        tuple([*left_out, *(f"{count} files of type {kind or 'without suffix'}" for kind, count in sorted(reader.others.items()))]),
    )


@dataclasses.dataclass(frozen=True)
class _Level:
    """What is directly in one folder."""

    place: tuple[str, ...]
    folders: list[str]
    images: list[File]
    others: list[str]


class _Reader:
    """Lists the parts of a folder, and counts what it has seen of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.others: collections.Counter[str] = collections.Counter()
        self._seen = 0
        try:
            self._real = root.resolve(strict=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise self.error("does not exist, or cannot be reached", "give the folder that has one folder for each class") from error
        if not root.is_dir():
            raise self.error("is a file", "give the folder that has one folder for each class")

    def error(self, problem: str, remedy: str, place: Iterable[str] = ()) -> UsageError:
        """What is wrong with the folder, or a place in it, and what to do."""
        return UsageError(f"{shown(self.root.joinpath(*place), 300)} {problem}; {remedy}")

    def look(self, place: tuple[str, ...]) -> _Level:
        """The folders, images and other files of a place. Raises UsageError where it cannot be read, or a link leads out."""
        found = _Level(place, [], [], [])
        try:
            with os.scandir(self.root.joinpath(*place)) as entries:
                for entry in entries:
                    if not entry.name.startswith("."):
                        self._sort(entry, found)
        except OSError as error:
            where = os.path.relpath(error.filename, self.root) if error.filename else ""
            raise self.error(f"cannot be read: {error.strerror or error}", "restore it or its permissions", (where,)) from error
        found.folders.sort(key=_spelling)
        found.images.sort(key=lambda file: _spelling(file.name))
        return found

    def _sort(self, entry: os.DirEntry, into: _Level) -> None:
        self._seen += 1
        if self._seen > MAX_ENTRIES:
            raise self.error(f"holds more than {MAX_ENTRIES:,} files", "give a smaller folder")
        if entry.is_symlink() and not self._is_within(entry.path):
            place = (os.path.relpath(entry.path, self.root),)
            raise self.error(f"is a link that leads nowhere or out of {shown(self.root, 200)}", "put the file itself there", place)
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.is_dir():
            into.folders.append(entry.name)
        elif suffix in SUFFIXES:
            about = entry.stat()
            into.images.append(File("/".join((*into.place, entry.name)), -1, about.st_size, about.st_mtime_ns))
        else:
            self.others[shown(suffix)] += 1
            into.others.append(entry.name)

    def _is_within(self, link: str) -> bool:
        try:
            return Path(link).resolve(strict=True).is_relative_to(self._real)
        except (OSError, RuntimeError):  # RuntimeError: it leads to itself.
            return False

    def classes(self, level: _Level, names: list[str]) -> dict[str, list[File]]:
        """{class: its images} of the folders of a level, in the order of labels; none for no names."""
        if not names:
            return {}
        self._check_names(level, names)
        found = {}
        for spelled in names:
            inside = self.look((*level.place, spelled))
            if inside.folders:
                remedy = f"move its images up into {shown(spelled)}"
                raise self.error("is a folder inside a class", remedy, (*inside.place, inside.folders[0]))
            found[_class_name(spelled)] = inside.images
        if empty := [name for name, images in found.items() if not images]:
            raise self.error(f"has no images ({KINDS}) in {_some(empty)}", "add some, or delete the folder", level.place)
        return dict(sorted(found.items()))

    def _check_names(self, level: _Level, names: list[str]) -> None:
        for name in level.others:
            if not os.path.splitext(name)[1] and name.casefold() not in DOCUMENTS:
                raise self.error("is a file where the folder of a class belongs", "move it away", (*level.place, name))
        if len(names) < 2:
            remedy = "there must be at least 2, with a folder each"
            raise self.error(f"has one class, {shown(names[0])!r}", remedy, level.place)
        if len(names) > MAX_CLASSES:
            raise self.error(f"has {len(names):,} classes", f"there must be 2 to {MAX_CLASSES:,}", level.place)
        same: dict[str, str] = {}
        for name in names:
            if not _is_readable(name):
                remedy = f"rename it: at most {MAX_NAME} characters of Unicode, and no control characters"
                raise self.error("is a folder whose name cannot be that of a class", remedy, (*level.place, name))
            twin = same.setdefault(_class_name(name).casefold(), name)
            if twin != name:
                pair = f"{ascii(twin)} and {ascii(name)}"  # On a screen they may look the same.
                raise self.error(f"has two classes that differ in spelling alone, {pair}", "rename or merge them", level.place)

    def tested(self, level: _Level, train: Mapping[str, list[File]]) -> dict[str, list[File]]:
        """The classes of test/, which must be those of training where that has any."""
        if level.images or not level.folders:
            what = f"images of its own, first {shown(level.images[0].name)}" if level.images else "no folders"
            raise self.error(f"has {what}", "it must have one folder for each class, or be moved away", level.place)
        found = self.classes(level, level.folders)
        for name in found if train else ():
            if name not in train:
                hint = suggestion(name, train) or "; rename it, or move it away"
                raise self.error(f"has a class {shown(name)!r}, which training has not", hint.lstrip("; "), level.place)
        if missing := [name for name in train if name not in found]:
            raise self.error(f"lacks the classes {_some(missing)}", "add them, or move it away and a share is held out", level.place)
        return found


def _class_name(folder: str) -> str:
    return unicodedata.normalize("NFC", folder).strip()


def _spelling(name: str) -> tuple[str, bytes]:
    return unicodedata.normalize("NFC", name), os.fsencode(name)


def _is_readable(name: str) -> bool:
    """Whether a name is text: no control characters or ends of lines, nothing that is no Unicode, not blank."""
    wrong = {"Cc", "Cs", "Zl", "Zp"} & {unicodedata.category(c) for c in name}
    return not wrong and 0 < len(_class_name(name)) <= MAX_NAME


def _labelled(classes: Mapping[str, list[File]]) -> tuple[File, ...]:
    return tuple(dataclasses.replace(file, label=label) for label, files in enumerate(classes.values()) for file in files)


def _some(names: list[str]) -> str:
    return ", ".join(shown(name) for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
