"""Faults of runs of several processes, and of sweeps."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

from faults import side_by_side
from harness import NOT_COMPARED, STEPS, Ground, Tries, error_lines, finish, has_trained, identical, launch, newest_step, outcome, wait_for

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


def one_of_two_dies(ground: Ground, count: int) -> Tries:
    tries = Tries("one of two processes is killed: the other stops with one line, code 2, within 2 minutes")
    undisturbed, longest = undisturbed_pair(ground), 0.0
    for number in range(count):
        directory = ground.fresh("pair", number)
        processes = pair(ground, directory)
        wait_for(has_trained(directory, 12 + 5 * number), processes[0])
        dies, survives = processes[number % 2], processes[1 - number % 2]
        complete = newest_step(directory)
        dies.kill()
        began = time.monotonic()
        code, errors = outcome(survives)
        longest = max(longest, time.monotonic() - began)
        dies.communicate()
        tries.tries += 1
        tries.unclear += code != 2 or len(error_lines(errors)) != 1 or longest > 120
        tries.lost += newest_step(directory) < complete
        for process in pair(ground, directory):
            finish(process)
        tries.different += not identical(directory, undisturbed)
    tries.remark = f"within {longest:.1f} s"
    return tries


def one_of_two_is_asked_to_stop(ground: Ground, count: int) -> Tries:
    tries = Tries("SIGTERM to one of two processes: both save the same step and end with code 75")
    undisturbed, longest = undisturbed_pair(ground), 0.0
    for number in range(count):
        directory = ground.fresh("pair", number)
        processes = pair(ground, directory)
        wait_for(has_trained(directory, 12 + 5 * number), processes[0])
        processes[number % 2].terminate()
        began, ends = time.monotonic(), [outcome(process) for process in processes]
        longest = max(longest, time.monotonic() - began)
        tries.tries += 1
        saved = f"step {newest_step(directory)} of {STEPS} is saved"
        tries.unclear += any(code != 75 or len(error_lines(errors)) != 1 or saved not in errors for code, errors in ends)
        for process in pair(ground, directory):
            finish(process)
        tries.different += not identical(directory, undisturbed)
    tries.remark = f"within {longest:.1f} s"
    return tries


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
