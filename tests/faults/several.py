"""Faults of runs of several processes, and of sweeps."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from faults import side_by_side
from harness import NOT_COMPARED, STEPS, Ground, Tries, finish, has_trained, identical, launch, newest_step, outcome, wait_for

CASE = "kd, 2 devices"


def free_port() -> int:
    with contextlib.closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def pair(ground: Ground, directory: Path) -> list[subprocess.Popen]:
    """The two processes of one run, with a device each."""
    address = f"127.0.0.1:{free_port()}"
    options = ("--coordinator", address, "--processes", "2")
    return [ground.start(CASE, directory, *options, "--process-id", str(number), devices=1) for number in range(2)]


def undisturbed_pair(ground: Ground) -> Path:
    directory = ground.folder / "undisturbed" / "pair"
    if not (directory / "result.json").exists():
        for process in pair(ground, directory):
            finish(process)
    return directory


def disturbed_pairs(ground: Ground, tries: Tries, count: int, disturb: Callable[[list[subprocess.Popen], int, Path], None]) -> Tries:
    """Runs pairs of processes, in which `disturb(processes, which, directory)` checks how they end, and lets them go on to their end."""
    undisturbed, longest = undisturbed_pair(ground), 0.0
    for number in range(count):
        directory = ground.fresh("pair", number)
        processes = pair(ground, directory)
        wait_for(has_trained(directory, 12 + 5 * number), processes[0])
        complete, began = newest_step(directory), time.monotonic()
        disturb(processes, number % 2, directory)
        longest = max(longest, time.monotonic() - began)
        tries.tries += 1
        said = [finish(process) for process in pair(ground, directory)]
        tries.check_start(said[0], complete)
        tries.different += not identical(directory, undisturbed)
    tries.unclear += longest > 120
    tries.remark = f"within {longest:.1f} s"
    return tries


def one_of_two_dies(ground: Ground, count: int) -> Tries:
    tries = Tries("one of two processes is killed: the other stops with one line, code 2, within 2 minutes")

    def kill(processes: list[subprocess.Popen], which: int, directory: Path) -> None:
        processes[which].kill()
        tries.check_end(outcome(processes[1 - which]), code=2)
        processes[which].communicate()

    return disturbed_pairs(ground, tries, count, kill)


def one_of_two_is_asked_to_stop(ground: Ground, count: int) -> Tries:
    tries = Tries("SIGTERM to one of two processes: both save the same step and end with code 75")

    def ask(processes: list[subprocess.Popen], which: int, directory: Path) -> None:
        processes[which].terminate()
        ends = [outcome(process) for process in processes]
        for end in ends:
            tries.check_end(end, code=75)
        saved = f"step {newest_step(directory)} of {STEPS} is saved"
        tries.unclear += any(saved not in errors for _, errors in ends)

    return disturbed_pairs(ground, tries, count, ask)


# --- sweeps -------------------------------------------------------------------------------------------------------------


def sweep(ground: Ground, folder: Path) -> subprocess.Popen:
    """Four runs, two at a time, each on a core of its own."""
    options = "--preset digits --model.width 4 --train.steps 120 --train.batch-size 20 --train.checkpoint-every 9 --train.log-every 1"
    grid = f"--methods ce kd --n-per-class 5 --seeds 0 1 --workers {min(2, os.cpu_count() or 1)}"
    return launch(
        "sweep", *options.split(), *grid.split(), "--teacher", ground.teacher, "--workdir", folder / "runs", "--results", folder / "results"
    )


def results(folder: Path) -> dict[str, dict]:
    """What a sweep published, without the times."""
    paths = sorted((folder / "results").rglob("seed*.json"))
    read = {str(path.relative_to(folder)): json.loads(path.read_text()) for path in paths}
    return {name: {key: value for key, value in result.items() if key not in NOT_COMPARED} for name, result in read.items()}


def metrics(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted((folder / "runs").rglob("metrics.jsonl"))}


def children(parent: int) -> list[int]:
    """The processes that a process has started, of those that run Python."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rsplit(")", 1)[1].split()[1]) == parent and b"spawn_main" in (path.parent / "cmdline").read_bytes():
                found.append(int(path.parent.name))
    return sorted(found)


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return False


def sweep_is_hit(ground: Ground, count: int) -> Tries:
    """In turn: a worker is killed, the sweep itself is killed, the sweep is told to stop."""
    tries = Tries("a sweep's worker or the sweep itself is killed or told to stop; the same command finishes it")
    undisturbed = ground.folder / "undisturbed" / "sweep"
    if not (undisturbed / "done").exists():
        finish(sweep(ground, undisturbed))
        (undisturbed / "done").touch()
    for number in range(count):
        folder = ground.fresh("sweep", number)
        process = sweep(ground, folder)
        trained = lambda folder=folder: any(has_trained(path.parent, 10)() for path in (folder / "runs").rglob("metrics.jsonl"))  # noqa: E731
        wait_for(trained, process)
        workers = children(process.pid)
        if number % 3 == 0:
            os.kill(workers[0], signal.SIGKILL)
        else:
            process.send_signal(signal.SIGKILL if number % 3 == 1 else signal.SIGTERM)
        code, errors = outcome(process)
        tries.tries += 1
        tries.unclear += code != (2, -signal.SIGKILL, 75)[number % 3] or "Traceback" in errors
        deadline = time.monotonic() + 15
        while any(map(alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.1)
        tries.unclear += any(map(alive, workers))
        finish(sweep(ground, folder))
        tries.different += results(folder) != results(undisturbed) or metrics(folder) != metrics(undisturbed)
    return tries


def sweeps_together(ground: Ground, count: int) -> Tries:
    tries = Tries("two equal sweeps at once share the runs", remark="no run is trained twice at the same time")
    undisturbed = ground.folder / "undisturbed" / "sweep"

    def one(number: int) -> None:
        folder = ground.fresh("sweeps", number)
        ends = [outcome(process) for process in [sweep(ground, folder), sweep(ground, folder)]]
        tries.tries += 1
        tries.unclear += any(code != 0 for code, _ in ends)
        tries.different += results(folder) != results(undisturbed) or metrics(folder) != metrics(undisturbed)

    side_by_side(one, count)
    return tries
