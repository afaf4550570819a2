"""Grids declared in a TOML file: [[sweep]] tables, whose keys are options of launch/sweep.py, and [default] for what they share."""

import os
import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from wdkd.errors import UsageError, suggestion
from wdkd.files import read_file
from wdkd.wording import shown

MAX_BYTES, MAX_LINE, MAX_TABLES = 64 * 2**10, 2000, 200
"""Of the largest file, longest line and most tables that are read: tomllib takes minutes for what is much larger."""


def read_grid(path: str | os.PathLike, options: Collection[str], excluded: Collection[str]) -> list[tuple[str, list[str]]]:
    """(where it stands, the words of the command line that it says) for each [[sweep]] table, in the order of the file.

    Args:
      options: names that a key may be, as `train.steps`; - and _ are the same, and [sweep.train] may hold `steps`.
      excluded: names of options that only the command line has.

    Raises:
      UsageError: if the file is missing, no regular file, too large or no TOML, or a key or a value cannot be an option's; names it.
    """
    name = shown(path, 300)
    tables = _read(Path(path), name)
    for key in tables:
        if key not in ("default", "sweep"):
            raise UsageError(
                f"{name}: there is no {shown(key)!r}{suggestion(key, ('default', 'sweep')) or ';'} put options below [[sweep]]"
            )
    default, sweeps = tables.get("default", {}), tables.get("sweep", [])
    if not isinstance(default, dict) or not isinstance(sweeps, list) or not all(isinstance(table, dict) for table in sweeps):
        raise UsageError(f"{name}: 'sweep' must be tables, each below a line [[sweep]], and 'default' one below [default]")
    if not 1 <= len(sweeps) <= MAX_TABLES:
        raise UsageError(f"{name} has {len(sweeps)} [[sweep]] tables; it must have between 1 and {MAX_TABLES}")
    shared = _options(default, f"{name} [default]", options, excluded)
    found = []
    for number, table in enumerate(sweeps, start=1):
        where = f"{name} [[sweep]] {number}"
        given = shared | _options(table, where, options, excluded)
        found.append((where, [word for option, words in given.items() for word in (f"--{option}", *words)]))
    return found


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        text = read_file(path, MAX_BYTES).decode()
    except FileNotFoundError:
        raise UsageError(f"{name} does not exist; give a TOML file with [[sweep]] tables") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not TOML: it is no UTF-8 text ({error.reason})") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if len(line) > MAX_LINE:
            raise UsageError(f"{name} line {number} has {len(line):,} characters; at most {MAX_LINE:,} are read: break it")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else shown(error, 300)
        raise UsageError(f"{name} is not TOML: {why}") from None


def _options(table: dict[str, Any], where: str, options: Collection[str], excluded: Collection[str]) -> dict[str, list[str]]:
    """{option: its words}, the options spelled in one way."""
    found: dict[str, list[str]] = {}
    for key, value in _flat(table, where):
        option = key.replace("-", "_")
        if option in excluded:
            raise UsageError(f"{where}: {option} is given on the command line only")
        if option not in options:
            raise UsageError(f"{where}: there is no option {shown(key)!r}{suggestion(option, options) or ';'} --help lists all of them")
        if option in found:
            raise UsageError(f"{where}: {option} is there twice; keep one")
        found[option] = [_word(item, f"{where}: {option}") for item in (value if isinstance(value, list) else [value])]
    return found


def _flat(table: dict[str, Any], where: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values; `train.steps = 1` without quotes is a table in a table."""
    for key, value in table.items():
        if not isinstance(value, dict):
            yield prefix + key, value
        elif prefix:
            raise UsageError(f"{where}: there is no option {shown(f'{prefix}{key}')!r}; options are of the form 'train.steps'")
        else:
            yield from _flat(value, where, f"{key}.")


def _word(value: Any, where: str) -> str:
    if isinstance(value, bool | int | float | str):
        if isinstance(value, str) and value.startswith("-"):  # It would be taken for an option.
            raise UsageError(f"{where} is {shown(value)!r}; it must not begin with '-'")
        if not isinstance(value, int) or abs(value) < 2**63:
            return str(value)
    raise UsageError(f"{where} is {shown(type(value).__name__)}; it must be text, a number of 64 bits, true, false, or a list of these")
