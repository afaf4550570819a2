"""What a prepared set says of itself in its JSON files, checked before TFDS believes it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_info import read_from_json

from wdkd.checks import require
from wdkd.files import parse_json, read_file

MAX_JSON = 4 * 2**20
"""Bytes of the largest file that describes a set."""
MAX_SHARDS = 10_000

_NAME = re.compile(r"[\w.\-]+", re.ASCII)
_VERSION = re.compile(r"[0-9]+\.[0-9]+\.[0-9]+")
_TEMPLATE = re.compile(r"([\w.\-]|\{[A-Z_]+\})*", re.ASCII)


def check_declaration(directory: Path) -> None:
    """Sees to it that TFDS, given the directory, imports nothing, reads nothing elsewhere and waits for nothing.

    Raises:
      ValueError, OSError, or what protobuf raises: a file is no regular file, is too large or damaged, or says what none should.
    """
    for path in directory.iterdir():
        if path.suffix in (".json", ".txt"):
            read_file(path, MAX_JSON)
    _check_features(parse_json(read_file(directory / "features.json", MAX_JSON)))
    _check_features(parse_json(read_file(directory / "dataset_info.json", MAX_JSON)).get("features"))
    info = read_from_json(directory / "dataset_info.json")
    require(bool(_NAME.fullmatch(info.name)), "name", repr(info.name), "a name")
    require(bool(_VERSION.fullmatch(info.version)), "version", repr(info.version), "three numbers")
    for split in info.splits:
        require(bool(_NAME.fullmatch(split.name)), "a split's name", repr(split.name), "a name")
        template = split.filepath_template
        require(bool(_TEMPLATE.fullmatch(template)), "filepath_template", repr(template), "the name of a file, without formats")
        require(len(split.shard_lengths) <= MAX_SHARDS, "number of shards", len(split.shard_lengths), f"at most {MAX_SHARDS}")
        require(min(split.shard_lengths, default=0) >= 0, "shard_lengths", min(split.shard_lengths, default=0), "at least 0")


def _check_features(described: Any) -> None:
    """TFDS imports the module of a class that it does not know, which runs it, and reads names of labels from any file named."""
    known = set(_known_classes())
    for key, value in _entries(described):
        if key in ("type", "pythonClassName", "python_class_name") and isinstance(value, str):
            require(value in known, "a feature's class", repr(value), "one of TFDS's own")
        require(key != "names_file" or value is None, "names_file", repr(value), "absent")


def _known_classes() -> Iterator[str]:
    classes: list[type] = [tfds.features.FeatureConnector]
    while classes:
        found = classes.pop()
        yield f"{found.__module__}.{found.__name__}"
        yield from found.__dict__.get("ALIASES", ())
        classes += found.__subclasses__()


def _entries(described: Any) -> Iterator[tuple[str, Any]]:
    """(key, value) of every object, at any depth, in JSON that is within strings too."""
    rest = [described]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            yield from value.items()
            rest += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            rest += value
        elif isinstance(value, str) and value.lstrip()[:1] in ("{", "[", '"'):
            try:
                rest.append(parse_json(value))
            except ValueError:
                continue
