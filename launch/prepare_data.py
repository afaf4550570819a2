"""Downloads data sets, or takes a folder of images, and prepares them with TFDS, in the format that training reads without tensorflow."""

import dataclasses
import importlib.util
import os
import queue
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path

import rich
import rich.markup
import rich.table
import tensorflow_datasets as tfds
import tyro

from wdkd import command_line
from wdkd.archives import check_folder, check_published
from wdkd.config import DataConfig
from wdkd.data import UNLABELLED, load_dataset
from wdkd.errors import UsageError
from wdkd.prepared import (
    by,
    check_features,
    data_directory,
    digits_directory,
    find_prepared,
    known_datasets,
    open_prepared,
    unknown_dataset,
)
from wdkd.prepared_folder import OPTIONS, check_options
from wdkd.wording import shown

CONNECT_SECONDS = 5.0
"""How long a download host may take to answer; TFDS itself would try for minutes."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to prepare, and where."""

    name: tyro.conf.UseAppendAction[tuple[str, ...]]
    """TFDS name of a set, as cifar10 or emnist/balanced; repeat the option for more. digits needs no download."""
    data_dir: str | None = None
    """Where TFDS keeps prepared sets; unset: $TFDS_DATA_DIR, else ~/tensorflow_datasets. Digits go to $WDKD_CACHE_DIR."""
    archive: Path | None = None
    """A file downloaded by hand, under its original name, with the set's other files beside it; for one set at a time."""
    folder: str | None = None
    """A folder of your own images instead; the options below are those of --data.folder and must be the same in training."""
    image_size: tuple[int, ...] = DataConfig.image_size
    """Height and width that its images are resized and cropped to; one number: both."""
    channels: int | None = DataConfig.channels
    """1: grey; 3: RGB; None: 3, or 1 where all of them are grey."""
    test_share: float = DataConfig.test_share
    """Share of each class that is held out for evaluation where it has no test/."""
    max_unreadable: float = DataConfig.max_unreadable
    """Share of its images that may be broken."""


def main(args: Arguments) -> None:
    """Prepares every set named, or the folder. Raises UsageError on the first that cannot be."""
    options = {name: getattr(args, name) for name in OPTIONS}
    config = DataConfig(name="folder", folder=args.folder, validation_size=0, **options)
    if args.folder is not None:
        if args.name or args.data_dir is not None or args.archive is not None:
            raise UsageError("--name, --data-dir and --archive are for TFDS sets, and --folder is for images of your own; give one of them")
        prepare_own(config)
        return
    if not args.name:
        raise UsageError("no data set named; give --name NAME, or --folder DIR")
    check_options(dataclasses.replace(config, name=args.name[0]))
    if args.archive is not None and len(args.name) > 1:
        raise UsageError(f"--archive is for one data set, and --name names {len(args.name)}; prepare them one by one")
    for name in args.name:
        prepare(name, data_directory(args.data_dir), args.archive)


def prepare(name: str, data_dir: Path, archive: Path | None) -> None:
    """Prepares one set below data_dir, unless it is there already, and says where it is. Raises UsageError."""
    if name == "digits":
        load_dataset(DataConfig())  # Prepares them, again where they are damaged.
    directory = digits_directory() if name == "digits" else find_prepared(name, data_dir)
    if directory is not None:
        open_prepared(name, directory)
        print(f"{name} is prepared in {directory}")
        return
    if name.split("/")[0] not in known_datasets():
        raise unknown_dataset(name, data_dir)
    require_files(tfds.builder_cls(name.split("/")[0]), name, data_dir, archive)
    if importlib.util.find_spec("tensorflow") is None:
        raise UsageError(f"preparing {name!r} needs tensorflow, which is not installed; run pip install -e '.[prepare]'")
    download(name, data_dir, archive)
    dataset = load_dataset(DataConfig(name=name, data_dir=str(data_dir)))
    size = "x".join(map(str, dataset.image_shape))
    counts = f"{len(dataset.train_labels)} training and {len(dataset.test_labels)} test images of {size}, {dataset.num_classes} classes"
    print(f"{name} {dataset.version} is prepared in {find_prepared(name, data_dir)}: {counts}")


def prepare_own(config: DataConfig) -> None:
    """Prepares a folder of images and prints how many there are of each class. Raises UsageError."""
    dataset = load_dataset(config.check())
    table = rich.table.Table()
    for head, justify in (("class", "left"), ("training", "right"), ("test", "right")):
        table.add_column(head, justify=justify, overflow="fold")
    for label, name in enumerate(dataset.class_names):
        counts = ((labels == label).sum() for labels in (dataset.train_labels, dataset.test_labels))
        table.add_row(rich.markup.escape(name), *map(str, counts))
    without = [(labels == UNLABELLED).sum() for labels in (dataset.train_labels, dataset.test_labels)]
    if any(without):
        table.add_row("(no label)", *map(str, without))
    table.add_section()
    table.add_row("all", str(len(dataset.train_labels)), str(len(dataset.test_labels)))
    print(f"{dataset.name}: images of {by(dataset.image_shape)}")
    rich.print(table)


def require_files(builder_cls: type[tfds.core.DatasetBuilder], name: str, data_dir: Path, archive: Path | None) -> None:
    """Raises UsageError unless what the set is made from is at hand, or can be downloaded to a place that can be written."""
    require_writable(data_dir)
    if archive is not None and not os.path.isfile(archive):
        raise UsageError(f"archive {shown(archive, 300)} does not exist, or is no file; give the file as it was downloaded")
    infos = builder_cls.url_infos or {}
    if archive is not None:
        require_published(infos, archive)
    instructions = builder_cls.MANUAL_DOWNLOAD_INSTRUCTIONS
    if instructions:
        if archive is None:
            raise UsageError(
                f"{name!r} must be downloaded by hand; then give --archive FILE. TFDS says: {' '.join(instructions.split()):.300}"
            )
        check_folder(folder_of(archive))
        return
    files = {url: info.filename for url, info in infos.items() if info.filename}
    if archive is not None and archive.name not in files.values():
        raise UsageError(
            f"archive {shown(archive.name)!r} is not a file of {name!r}; its files are {_some(files.values())}: keep the original name"
        )
    missing = {url: file for url, file in files.items() if archive is None or not (folder_of(archive) / file).is_file()}
    hosts = {urllib.parse.urlsplit(url).netloc for url in missing}
    if missing and not any_reachable(missing):
        raise UsageError(
            f"cannot reach {_some(hosts)} to download {name!r}; connect to the network, "
            f"or put {_some(missing.values())} in one folder and give --archive FOLDER/{next(iter(missing.values()))}"
        )


def folder_of(archive: Path) -> Path:
    """Where TFDS looks for a set's files by their names."""
    return Path(os.path.abspath(archive)).parent


def require_published(infos: Mapping[str, tfds.download.checksums.UrlInfo], archive: Path) -> None:
    """Raises UsageError where a file beside the archive, or itself, has the name of a published file and is another.

    `infos`: what TFDS knows of the published files, by URL.
    """
    published: dict[str, list[tuple[int, str]]] = {}
    for url, info in infos.items():
        published.setdefault(info.filename or url.rsplit("/", 1)[-1], []).append((int(info.size), info.checksum))
    for file, known in published.items():
        if os.path.exists(folder_of(archive) / file):
            check_published(folder_of(archive) / file, known)


def require_writable(data_dir: Path) -> None:
    """Raises UsageError where the folder cannot be written to, or cannot be made."""
    existing = next(path for path in (data_dir.absolute(), *data_dir.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UsageError(f"cannot write to {shown(existing, 300)}; choose another --data-dir")


def any_reachable(urls: Iterable[str], seconds: float = CONNECT_SECONDS) -> bool:
    """Whether the host of at least one URL, or the proxy it is reached through, accepts a connection within the time."""
    addresses = {_address(url) for url in urls}
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
    # Threads, because looking up a name has no timeout; daemons, so that a hanging one does not hold up the exit.
    for address in addresses:
        threading.Thread(target=lambda a=address: answers.put(_accepts(a, seconds)), daemon=True).start()
    try:
        return any(answers.get(timeout=seconds) for _ in addresses)
    except queue.Empty:
        return False


def _accepts(address: tuple[str, int], seconds: float) -> bool:
    try:
        socket.create_connection(address, timeout=seconds).close()
    except OSError:
        return False
    return True


def _address(url: str) -> tuple[str, int]:
    """(host, port) of the first machine on the way to a URL."""
    parts = urllib.parse.urlsplit(url)
    proxy = None if urllib.request.proxy_bypass(parts.hostname or "") else urllib.request.getproxies().get(parts.scheme)
    if proxy:
        parts = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
    ports = {"https": 443, "ftp": 21}
    return parts.hostname or "", parts.port or ports.get(parts.scheme, 80)


def download(name: str, data_dir: Path, archive: Path | None) -> None:
    """Has TFDS download and prepare a set, which needs tensorflow. Raises UsageError saying what went wrong."""
    config = tfds.download.DownloadConfig(manual_dir=None if archive is None else folder_of(archive))
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        check_features(name, builder.info)
        builder.download_and_prepare(download_config=config, file_format="array_record")
    except UsageError:
        raise
    except Exception as error:  # TFDS, requests, tensorflow and the set's own code each have their errors.
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(
            f"TFDS could not prepare {name!r} in {shown(data_dir, 300)} ({shown(text, 300)}); check the network, the archive and the disk"
        ) from error


def _some(words: Iterable[str]) -> str:
    words = sorted(words)
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")


if __name__ == "__main__":
    command_line.main(Arguments, main, description=__doc__)
