"""The faults: each function tries one kind, so many times, and says what came of it. `harness` has what they share."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness import (
    CASES,
    STEPS,
    Ground,
    Moment,
    Tries,
    any_time,
    error_lines,
    finish,
    has_trained,
    identical,
    in_a_save,
    in_training,
    launch,
    newest_step,
    outcome,
    send,
    wait_for,
    went_on_from,
)

SEED = 20261125
WORKERS = 2


def side_by_side(work: Callable[[int], None], count: int) -> None:
    """Calls `work` with 0 to count - 1, two at a time."""
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(work, range(count)))


def case_of(number: int) -> str:
    """The cases in turn."""
    return list(CASES)[number % len(CASES)]


def prepare(ground: Ground, count: int) -> None:
    """Makes the undisturbed runs that so many tries are compared with."""
    cases = list(dict.fromkeys(case_of(number) for number in range(count)))
    side_by_side(lambda index: ground.undisturbed(cases[index]), len(cases))


# --- one process --------------------------------------------------------------------------------------------------------


def stopped(ground: Ground, tries: Tries, number: int, moments: list[Moment], signals: list[int], code: int) -> None:
    """One run that is stopped at each of the moments, and then let go on to its end."""
    case, draw = case_of(number), random.Random(SEED + number)
    directory, least = ground.fresh(case, number), 0
    for moment in moments:
        process = ground.start(case, directory)
        moment(process, directory, draw)
        if process.poll() is None:
            tries.tries += 1
        complete = newest_step(directory)
        began = time.monotonic()
        send(process, draw.choice(signals))
        ended, errors = outcome(process)
        if signals != [signal.SIGKILL] and ended not in (0, -signal.SIGTERM, -signal.SIGINT):
            tries.check_end((ended, errors), code=code)
            if time.monotonic() - began > 10:
                tries.unclear += 1
                tries.evidence.append(f"{case}: it took {time.monotonic() - began:.1f} s")
        tries.check_start(errors, least)
        least = max(least, complete, saved_at(errors))
    finished = was_finished(directory, least)
    tries.check_start(finish(ground.start(case, directory)), 0 if finished else least)
    tries.different += not identical(directory, ground.undisturbed(case))


def saved_at(errors: str) -> int:
    """The step that a stopped run says it has saved."""
    words = errors.split("stopped by a signal; step ")
    return int(words[1].split()[0]) if len(words) > 1 else 0


def was_finished(directory: Path, least: int) -> bool:
    """Whether the last checkpoint was there already, so that a call had nothing to go on with."""
    return least == STEPS and newest_step(directory) == STEPS


def kill_any_time(ground: Ground, count: int) -> Tries:
    tries = Tries("kill -9 at a random time of a process's life")
    side_by_side(lambda number: stopped(ground, tries, number, [any_time] * 3, [signal.SIGKILL], -9), -(-count // 3))
    return tries


def kill_in_training(ground: Ground, count: int) -> Tries:
    tries = Tries("kill -9 at a random time of training")
    side_by_side(lambda number: stopped(ground, tries, number, [in_training] * 2, [signal.SIGKILL], -9), -(-count // 2))
    return tries


def kill_in_a_save(ground: Ground, count: int) -> Tries:
    tries = Tries("kill -9 while a checkpoint is being written")
    side_by_side(lambda number: stopped(ground, tries, number, [in_a_save] * 2, [signal.SIGKILL], -9), -(-count // 2))
    return tries


def stop_by_signal(ground: Ground, count: int) -> Tries:
    tries = Tries("SIGTERM or Ctrl-C in training: code 75, one line, within 10 s", remark="nothing of what was computed is computed again")
    both = [signal.SIGTERM, signal.SIGINT]
    side_by_side(lambda number: stopped(ground, tries, number, [in_training] * 2, both, 75), -(-count // 2))
    return tries


def damaged(ground: Ground, count: int) -> Tries:
    """The newest checkpoint of a killed run loses bytes, has some changed, or loses a file."""
    tries = Tries("the newest checkpoint is damaged: a bit, half a file, a file", remark="goes on from the one before")

    def one(number: int) -> None:
        case, draw = case_of(number), random.Random(SEED + number)
        directory = ground.fresh(case, number)
        process = ground.start(case, directory)
        wait_for(lambda: newest_step(directory) >= 18, process)
        send(process, signal.SIGKILL)
        outcome(process)
        newest = newest_step(directory)
        before = max((int(p.name) for p in (directory / "checkpoints").iterdir() if p.name.isdigit() and int(p.name) < newest), default=0)
        damage(directory / "checkpoints" / str(newest), draw)
        errors = finish(ground.start(case, directory))
        tries.tries += 1
        # What was damaged may be a byte that nothing reads.
        tries.lost += went_on_from(errors) not in (before, newest)
        tries.unclear += went_on_from(errors) != newest and f"checkpoints/{newest} is passed over: " not in errors
        tries.different += not identical(directory, ground.undisturbed(case))

    side_by_side(one, count)
    return tries


def damage(step: Path, draw: random.Random) -> None:
    """Flips a bit, cuts or deletes one of a checkpoint's larger files."""
    candidates = sorted((p for p in step.rglob("*") if p.is_file() and p.stat().st_size > 50), key=lambda p: -p.stat().st_size)
    path = draw.choice(candidates[:6])
    content = bytearray(path.read_bytes())
    kind = draw.randrange(3)
    if kind == 0:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    elif kind == 1:
        path.write_bytes(content[: draw.randrange(len(content))])
    else:
        path.unlink()


def deleted(ground: Ground, count: int) -> Tries:
    tries = Tries("the directory is deleted under a running job", remark="what was in it is gone; the same command begins again")

    def one(number: int) -> None:
        case = case_of(number)
        directory = ground.fresh(case, number)
        process = ground.start(case, directory)
        wait_for(has_trained(directory, 20), process)
        while directory.exists():
            shutil.rmtree(directory, ignore_errors=True)
        told(tries, process)
        shutil.rmtree(directory, ignore_errors=True)
        ended_well(ground, tries, case, directory)

    side_by_side(one, count)
    return tries


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[bool]:
    """A disk of that size at `folder`; False where this user may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)


def full_disk(ground: Ground, count: int) -> Tries:
    """Sizes from one that does not take the config to one that takes most of the run."""
    tries = Tries("the disk fills up; later there is room again")

    def one(number: int) -> None:
        case, disk = case_of(number), ground.fresh(case_of(number), number)
        with small_disk(disk, f"{8 + (number * 37) % 360}k") as mounted:
            if not mounted:
                tries.remark = "not tried: needs the right to mount a disk"
                return
            told(tries, ground.start(case, disk / "run"))
            subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
            ended_well(ground, tries, case, disk / "run")

    side_by_side(one, count)
    return tries


def told(tries: Tries, process: subprocess.Popen) -> None:
    """Counts a try, whose process must end with one line and code 2."""
    tries.check_end(outcome(process), code=2)
    tries.tries += 1


def ended_well(ground: Ground, tries: Tries, case: str, directory: Path) -> None:
    """The same command, now that the cause is gone."""
    complete = newest_step(directory)
    tries.lost += went_on_from(finish(ground.start(case, directory))) < complete < STEPS
    tries.different += not identical(directory, ground.undisturbed(case))


def no_permission(ground: Ground, count: int) -> Tries:
    tries = Tries("the directory may no longer be written; later it may")
    # Root may write anywhere, unless it gives that up.
    prefix = () if os.geteuid() else ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    if prefix and shutil.which(prefix[0]) is None:
        tries.remark = "not tried: as root, it needs setpriv"
        return tries

    def one(number: int) -> None:
        case = case_of(number)
        directory = ground.fresh(case, number)
        process = ground.start(case, directory, prefix=prefix)
        wait_for(has_trained(directory, 20), process)
        closed = [directory, directory / "checkpoints"]
        for path in closed:
            path.chmod(0o500)
        told(tries, process)
        for path in closed:
            path.chmod(0o755)
        ended_well(ground, tries, case, directory)

    side_by_side(one, count)
    return tries


def two_writers(ground: Ground, count: int) -> Tries:
    tries = Tries("a second process starts on the same directory", remark="it is refused, and told the first one's number and host")

    def one(number: int) -> None:
        case = case_of(number)
        directory = ground.fresh(case, number)
        first = ground.start(case, directory)
        wait_for(has_trained(directory), first)
        second = ground.start(case, directory)
        # It may come too late on a busy machine: then it is given the result.
        code, errors = outcome(second)
        overlapped = first.poll() is None
        finish(first)
        refused = f"is being written by process {first.pid} on {socket.gethostname()}" in errors and code == 2
        tries.tries += refused
        tries.unclear += overlapped and not (refused and len(error_lines(errors)) == 1)
        tries.different += not identical(directory, ground.undisturbed(case))

    side_by_side(one, count)
    return tries


def divergence(ground: Ground, count: int) -> Tries:
    tries = Tries("the loss becomes infinite: status diverged, the checkpoints before it stay", remark="there is no undisturbed end")

    def one(number: int) -> None:
        directory = ground.fresh("diverging", number)
        options = ("--optimizer.name", "sgd", "--optimizer.clip-norm", "None", "--optimizer.warmup-fraction", "0.9")
        rate = ("--optimizer.learning-rate", "1e12", "--seed", str(number), "--train.checkpoint-every", "2")
        for _ in range(2):
            code, errors = outcome(ground.start(case_of(number), directory, *options, *rate))
            tries.unclear += code != 2 or len(error_lines(errors)) != 1 or "at step" not in errors
        result = json.loads((directory / "result.json").read_text())
        verified = launch("evaluate", "--run", directory, "--verify")
        tries.tries += 1
        tries.unclear += result["status"] != "diverged" or result["evaluation"] is not None
        tries.lost += outcome(verified)[0] != 0 or newest_step(directory) < result["steps"] - 3

    side_by_side(one, count)
    return tries


def repeated(ground: Ground, count: int) -> Tries:
    tries = Tries("nothing happens: the same command twice")

    def one(number: int) -> None:
        directory = ground.fresh(case_of(number), number)
        finish(ground.start(case_of(number), directory))
        tries.tries += 1
        tries.different += not identical(directory, ground.undisturbed(case_of(number)))

    side_by_side(one, count)
    return tries
