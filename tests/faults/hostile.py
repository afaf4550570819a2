"""Run directories in which a file is cut, changed or replaced, by accident or by somebody who knows the formats."""

import contextlib
import dataclasses
import gc
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults import SEED
from harness import Ground, Tries

from wdkd.config import STUDENTS, Config, MethodConfig
from wdkd.errors import UsageError
from wdkd.evaluate import evaluate_checkpoint
from wdkd.result import read_result
from wdkd.train import run
from wdkd.verify import verify

SECONDS = 10
"""That reading a damaged directory may take, beside what an undamaged one takes."""
ABSURD: tuple[Any, ...] = (
    None, True, -1, 0, 10**30, 1e308, float("nan"), float("inf"), "", "../../x", "/etc/passwd", "a\0b", "a\nb", "\ud800", [], {}, [[[]]],
    ["../x"], {"": 1}, "x" * 10_000, [10**9, 10**9, 3], "resnet9998", "$(touch /tmp/x)",
)  # fmt: skip
"""Values that stand in for those of a JSON file."""
GENERATED = Path(__file__).parents[1] / "test_hostile_files.py"
PICKLE = b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x04exit\x94\x85\x94R\x94."


def damaged_directories(ground: Ground, count: int) -> Tries:
    """Verifies, evaluates and goes on with directories that were damaged in `count` ways."""
    tries = Tries("a file of a run is cut, changed or replaced, at random or by design")
    intact, config = intact_run(ground)
    expected = read_result(intact / "result.json").parameter_hash
    folder = ground.folder / "hostile"
    kinds: dict[str, int] = {}
    for number in range(count):
        draw = random.Random(SEED + number)
        shutil.rmtree(folder, ignore_errors=True)
        directory = Path(shutil.copytree(intact, folder / "run"))
        (folder / "sentinel").write_text("as it was")
        if draw.random() < 0.7:
            (directory / "result.json").unlink()
        what = harm(directory, draw)
        kinds[what.split()[0]] = kinds.get(what.split()[0], 0) + 1
        tries.tries += 1
        for action in (verify, evaluate_checkpoint, lambda path: run(config, path, show_progress=False, cache=folder / "cache")):
            problem, result = outcome_of(action, directory)
            tries.unclear += problem is not None
            if problem is not None:
                tries.evidence.append(f"{what}: {problem}")
        # What goes on to the end must end as ever; what is refused has said why.
        tries.different += result is not None and result.parameter_hash != expected
        outside = {path.name for path in folder.iterdir()} - {"run", "sentinel", "cache"}
        tries.lost += bool(outside) or (folder / "sentinel").read_text() != "as it was"
    tries.remark = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
    return tries


def generated(ground: Ground, count: int) -> Tries:
    """What hypothesis makes of command lines, configs and files, in tests/test_hostile_files.py, as often as that says."""
    tries = Tries("generated bad options, configs, results, subsets, caches and prepared sets")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--hypothesis-show-statistics", str(GENERATED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    tries.tries = sum(map(int, re.findall(r"- (\d+) passing,", done.stdout)))
    tries.unclear = len(re.findall(r"^(?:FAILED|ERROR) ", done.stdout, re.MULTILINE)) or int(done.returncode != 0)
    tries.remark = f"{done.stdout.strip().splitlines()[-1].strip('= ')}; no traceback, none over 10 s, no file harmed"
    return tries


def intact_run(ground: Ground) -> tuple[Path, Config]:
    """A finished run of few steps, and its config."""
    base = STUDENTS["digits"]
    config = dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, n_per_class=5),
        model=dataclasses.replace(base.model, width=4),
        method=MethodConfig(name="kd"),
        train=dataclasses.replace(base.train, steps=12, batch_size=20, log_every=1, checkpoint_every=4),
        teacher=str(ground.teacher),
    )
    directory = ground.folder / "undisturbed" / "hostile"
    run(config, directory, show_progress=False, cache=ground.folder / "cache")
    return directory, config


def outcome_of(action: Callable[[Path], Any], directory: Path) -> tuple[str | None, Any]:
    """(what is wrong with how it ended, or None; its result, if it has one)."""
    began, said = time.monotonic(), io.StringIO()
    try:
        with time_limit(6 * SECONDS), contextlib.redirect_stderr(said):
            result = action(directory)
    except UsageError as error:
        text = str(error)
        return (None if len(text) < 1000 and "\n" not in text else f"{len(text)} characters: {text}"), None
    except BaseException as error:  # Anything else is what must not happen.
        return f"{type(error).__name__}: {str(error)[:300]}", None
    finally:
        with contextlib.redirect_stderr(said):
            gc.collect()  # What asyncio has to say, it says now.
    loud = [line for line in said.getvalue().splitlines() if not line.startswith("note: ")]
    if loud:
        return f"it printed {len(loud)} lines, first {loud[0][:200]}", result
    late = time.monotonic() - began > SECONDS
    return (f"it took {time.monotonic() - began:.0f} s" if late else None), result


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in what hangs."""

    def expired(*_: Any) -> None:
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- what is done to a file ---------------------------------------------------------------------------------------------


def harm(directory: Path, draw: random.Random) -> str:
    """Damages one file of a directory; says how, the kind in the first word."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != ".lock" and "events" not in path.parts]
    path = draw.choice(paths)
    # Two of three of a checkpoint's files are larger than a line; those that are read in whole come as often.
    if draw.random() < 0.4:
        path = draw.choice([p for p in paths if p.parent == directory])
    kind = draw.choice([cut, flip, splice, replace, crafted if path.suffix == ".json" or path.name == "metadata" else flip])
    return f"{kind(path, draw)} {path.relative_to(directory)}"


def cut(path: Path, draw: random.Random) -> str:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))] if content else b"")
    return "truncated"


def flip(path: Path, draw: random.Random) -> str:
    content = bytearray(path.read_bytes() or b"\0")
    for _ in range(draw.choice((1, 1, 1, 20))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return "flipped"


def splice(path: Path, draw: random.Random) -> str:
    content = path.read_bytes()
    place = draw.randrange(len(content) + 1)
    path.write_bytes(content[:place] + draw.randbytes(draw.choice((1, 50, 5000))) + content[place + draw.choice((0, 50)) :])
    return "spliced"


def replace(path: Path, draw: random.Random) -> str:
    """By something of another kind: random bytes, a pickle, nothing, a directory, a link, a pipe, a file with a hole."""
    kind = draw.choice(("random", "pickle", "empty", "missing", "directory", "link", "pipe", "huge", "deep"))
    path.unlink()
    if kind in ("random", "pickle", "empty", "deep"):
        path.write_bytes({"random": draw.randbytes(3000), "pickle": PICKLE, "empty": b"", "deep": b"[" * 200_000}[kind])
    elif kind == "directory":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(path.parents[len(path.parts) - 2] / "etc" / "passwd")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(2**42)
    return kind


def crafted(path: Path, draw: random.Random) -> str:
    """One value somewhere in a JSON file is another one."""
    value = json.loads(path.read_text())
    places = list(inner(value))
    if not places:
        return "crafted"
    container, key = draw.choice(places)
    container[key] = draw.choice(ABSURD)
    path.write_text(json.dumps(value))
    return "crafted"


def inner(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value inside of a value."""
    keys = value.keys() if isinstance(value, dict) else range(min(len(value), 5)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from inner(value[key])
