"""Valid files made hostile, as hypothesis strategies, and what must hold of whatever reads them."""

import contextlib
import copy
import hashlib
import json
import os
import time
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from wdkd.errors import UsageError

SECONDS = 10.0


def cases(count):
    """So many examples, the same ones every time."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=checks)


# --- bytes --------------------------------------------------------------------------------------------------------------


@st.composite
def damaged(draw, content):
    """The bytes cut short, with flipped bits, random bytes, a part of them twice, zeros, or nothing like them at all."""
    content = bytearray(content)
    place = draw(st.integers(0, len(content)))
    kind = draw(st.sampled_from(["cut", "flip", "splice", "insert", "double", "zeros", "noise"]))
    if kind == "cut":
        return bytes(content[:place])
    if kind == "flip":
        for _ in range(draw(st.integers(1, 5))):
            content[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
    elif kind == "splice":
        content[place : place + draw(st.integers(1, 100))] = draw(st.binary(max_size=100))
    elif kind == "insert":
        content[place:place] = draw(st.binary(min_size=1, max_size=100))
    elif kind == "double":
        content[place:place] = content[: draw(st.integers(1, 1000))]
    elif kind == "zeros":
        content[place:] = bytes(len(content) - place)
    else:
        return draw(st.binary(max_size=1000))
    return bytes(content)


@st.composite
def in_place_of_a_file(draw):
    """A function that puts at a path what is no regular file, or one that has no end in sight."""
    return draw(
        st.sampled_from(
            [
                os.mkfifo,
                Path.mkdir,
                lambda path: path.symlink_to("/dev/zero"),
                lambda path: path.symlink_to(path.name),
                lambda path: path.symlink_to("nowhere"),
                lambda path: (path.touch(), os.truncate(path, 2**40)),
                lambda path: None,
            ]
        )
    )


def replace(path, make):
    """Puts something else in place of a file."""
    path.unlink()
    make(path)


# --- JSON ---------------------------------------------------------------------------------------------------------------

ESCAPES = ["../../outside/x", "/tmp/outside", "..", "a/../../x", "~/x", "$(touch x)"]
ESCAPES += ["\0", "a\nb", "\x1b[2J", "\ud800", "x" * 5000, "", " "]
NUMBERS = [0, -1, 2**31, 2**63, 10**400, -(10**4000), 0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), float("-inf")]


def deep(depth):
    """A list in a list, and so on."""
    value = []
    for _ in range(depth):
        value = [value]
    return value


def hostile():
    """JSON values that are seldom what is meant."""
    plain = st.sampled_from([None, True, False, *NUMBERS, *ESCAPES]) | st.text(max_size=20) | st.integers() | st.floats()
    return plain | st.lists(plain, max_size=3) | st.dictionaries(st.text(max_size=10), plain, max_size=3) | st.just(deep(200))


def places(value, path=()):
    """The paths of all values inside a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@st.composite
def mutated(draw, value):
    """The JSON value with one to three of the values inside it replaced, left out, or with more beside them."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(sorted(places(value), key=repr)))
        if not path:
            if draw(st.integers(0, 20)) == 0:
                value = draw(hostile())
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if kind == "replace":
            parent[path[-1]] = draw(hostile())
        elif kind == "remove":
            del parent[path[-1]]
        elif isinstance(parent, dict):
            parent[draw(st.sampled_from(ESCAPES) | st.text(max_size=10))] = draw(hostile())
        else:
            parent.append(draw(hostile()))
    return value


@st.composite
def hostile_json(draw, value):
    """The bytes of a JSON file: the value mutated, its text damaged, or nested absurdly."""
    kind = draw(st.sampled_from(["mutated"] * 6 + ["damaged"] * 3 + ["deep"]))
    if kind == "mutated":
        return json.dumps(draw(mutated(value))).encode()
    if kind == "damaged":
        return draw(damaged(json.dumps(value).encode()))
    return draw(st.sampled_from([b"[", b'{"a":', b'{"config":'])) * draw(st.sampled_from([1000, 10**5]))


# --- what must hold -----------------------------------------------------------------------------------------------------


def outcome(function, *arguments, **options):
    """What the call returns, or the text of its UsageError: one printable line. Anything else that it raises is a failure."""
    start = time.monotonic()
    try:
        return function(*arguments, **options)
    except UsageError as error:
        text = str(error)
        assert text.isprintable() and 0 < len(text) < 1000, text
        return text
    finally:
        assert time.monotonic() - start < SECONDS


def snapshot(folder):
    """{path: what is there} of everything below a folder, without following or opening what is no file."""
    found = {}
    for directory, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(directory) / name
            status = path.lstat()
            regular = path.is_file() and not path.is_symlink() and status.st_size < 2**30
            content = hashlib.sha256(path.read_bytes()).hexdigest() if regular else None
            found[str(path.relative_to(folder))] = (status.st_mode, content, os.readlink(path) if path.is_symlink() else None)
    return found


@contextlib.contextmanager
def nothing_changes(folder, *but):
    """Within, nothing below a folder changes, appears or goes, but what is below the paths `but`."""
    before = snapshot(folder)
    yield
    after = snapshot(folder)
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    owned = tuple(str(Path(path).relative_to(folder)) for path in but)
    assert not [path for path in changed if not (path in owned or path.startswith(tuple(f"{place}/" for place in owned)))], changed
