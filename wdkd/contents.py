"""The images that a folder lists, read: as arrays, and what is to be said of them."""

import dataclasses
import sys

import numpy as np
from rich.console import Console
from rich.progress import track

from wdkd.errors import UsageError
from wdkd.folder import File, Listing, list_folder
from wdkd.images import read_image
from wdkd.prepared import MAX_BYTES
from wdkd.subset import held_out
from wdkd.wording import shown

NAMED = 10
"""Unreadable files that are named, of all that are counted."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a folder's images besides their pixels. Kept beside the prepared set."""

    files: int
    unreadable: int
    first_unreadable: list[str]
    """NAMED of them, with what is wrong."""
    animated: int
    left_out: list[str]
    """Files of other kinds, in words."""
    train_labelled: bool
    test_labelled: bool
    held_out: int
    """Images that were set aside for evaluation; 0 where there is a test folder."""
    train: list[int]
    """Training images of each class; of an unlabelled folder, all of them."""
    test: list[int]

    def check(self, name: str, limit: float) -> None:
        """Raises UsageError where more than `limit` of the files could not be read."""
        if self.unreadable > limit * self.files:
            raise UsageError(
                f"{name}: {self.broken()}; that is more than data.max_unreadable, {limit:g} of all: restore or delete them, or raise it"
            )

    def broken(self) -> str:
        """How many files cannot be read, and the first of them."""
        more = f" and {self.unreadable - len(self.first_unreadable)} more" if self.unreadable > len(self.first_unreadable) else ""
        return f"{self.unreadable:,} of {self.files:,} images cannot be read: {', '.join(self.first_unreadable)}{more}"

    def remarks(self) -> list[str]:
        """What a user should know, a line each."""
        rest = sum(self.train) + self.held_out
        lines = [f"{self.broken()}; they are left out"] if self.unreadable else []
        if self.animated:
            lines.append(f"of {self.animated:,} animated images the first frame is taken")
        if self.left_out:
            lines.append(f"left out: {', '.join(self.left_out)}")
        if self.held_out:
            about = f"about {self.held_out / rest:.0%} of each class, " if self.train_labelled else ""
            lines.append(f"no test folder: {self.held_out:,} of {rest:,} images ({about}by a hash of names) are held out for evaluation")
        if not self.train_labelled:
            lines.append("the training images have no labels, so a student learns from the teacher alone")
        if not self.test_labelled:
            lines.append("no image has a label, so accuracy is not known, and evaluation is agreement with the teacher")
        return lines


@dataclasses.dataclass(frozen=True, eq=False)
class Contents:
    """A folder's images, uint8 (n, H, W, C), and labels, int32 (n,), -1 where there is none; in the order of the listing."""

    class_names: tuple[str, ...]
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    facts: Facts


def read_contents(listing: Listing, size: tuple[int, int], channels: int | None, test_share: float) -> Contents:
    """Reads every image as `images.read_image` does, with a bar on terminals; those that cannot be read are left out.

    Args:
      size: (height, width) of all images.
      channels: 1 or 3; None: 3, or 1 where every image is grey.
      test_share: of each class, what is held out where the listing has no test images.

    Raises:
      UsageError: if there are too many for memory, no image of a class can be read or be held out, or the folder has changed meanwhile.
    """
    files = (*listing.train, *listing.test)
    _check_size(listing, len(files), size, channels or 3)
    images = np.empty((len(files), *size, channels or 3), np.uint8)
    intact, broken, animated, grey = np.zeros(len(files), bool), [], 0, True
    title, console = f"reading {shown(listing.root.name)}", Console(stderr=True)
    for row, file in enumerate(track(files, title, console=console, disable=not sys.stderr.isatty(), transient=True)):
        try:
            image = read_image(listing.root / file.name, size, channels or 3)
        except ValueError as error:
            broken.append(f"{shown(file.name, 100)} ({shown(error, 80)})")
            continue
        images[row], intact[row] = image.pixels, True
        animated += image.animated
        grey = grey and bool((image.pixels == image.pixels[..., :1]).all())
    if list_folder(listing.root).digest != listing.digest:
        raise UsageError(f"{shown(listing.root, 300)} has changed while it was read; wait until it does not, then the same command goes on")
    if channels is None and grey:
        images = images[..., :1]
    train, test = _parts(listing, files, intact, test_share, broken)
    labels = np.array([file.label for file in files], np.int32)
    facts = Facts(
        files=len(files),
        unreadable=len(broken),
        first_unreadable=broken[:NAMED],
        animated=animated,
        left_out=list(listing.left_out),
        train_labelled=listing.labelled,
        test_labelled=bool((labels[test] >= 0).all()),
        held_out=0 if listing.test else len(test),
        train=_counts(labels[train], listing),
        test=_counts(labels[test], listing),
    )
    return Contents(listing.class_names, images[train], labels[train], images[test], labels[test], facts)


def _check_size(listing: Listing, count: int, size: tuple[int, int], channels: int) -> None:
    total = count * size[0] * size[1] * channels
    if total > MAX_BYTES:
        raise UsageError(
            f"{shown(listing.root, 300)} has {count:,} images, {total / 2**30:.1f} GiB as {size[0]}x{size[1]}x{channels}; "
            f"at most {MAX_BYTES / 2**30:.0f} GiB fit: give a smaller --data.image-size or fewer images"
        )


def _parts(listing: Listing, files: tuple[File, ...], intact: np.ndarray, share: float, broken: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the images to train on, and of those to evaluate on. Raises UsageError where a class has none of either."""
    rows = np.flatnonzero(intact)
    labels = np.array([files[row].label for row in rows], np.int32)
    if listing.test:
        tested = rows >= len(listing.train)
    else:
        tested = held_out([files[row].name for row in rows], labels, share) if len(rows) else np.zeros(0, bool)
    for part, name in ((~tested, "train on"), (tested, "evaluate on")):
        wanted = range(len(listing.class_names)) if listing.labelled or (listing.test and name == "evaluate on") else [-1]
        lacking = [label for label in wanted if label not in labels[part]]
        if lacking:
            whose = f" of class {shown(listing.class_names[lacking[0]])!r}" if lacking[0] >= 0 else ""
            why = f" ({len(broken):,} cannot be read, first {broken[0]})" if broken else ""
            remedy = "add some" if listing.test else "there must be at least 2, or a test folder: add some"
            raise UsageError(f"{shown(listing.root, 300)} has no image{whose} left to {name}{why}; {remedy}")
    return rows[~tested], rows[tested]


def _counts(labels: np.ndarray, listing: Listing) -> list[int]:
    if not len(labels) or labels[0] < 0:
        return [len(labels)]
    return np.bincount(labels, minlength=len(listing.class_names)).tolist()
