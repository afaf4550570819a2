"""Real processes of launch/distill.py on the embedded digits, stopped in every way, and whether the end is that of an undisturbed one."""

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from wdkd.checkpoint import saved_steps, unfinished_saves

LAUNCH = Path(__file__).parents[2] / "launch"
STEPS = 120
TINY = (
    f"--preset digits --data.n-per-class 5 --model.width 4 --train.steps {STEPS} --train.batch-size 20 --train.log-every 1 "
    "--train.checkpoint-every 9 --train.checkpoint-seconds 0.7"
)
CASES = {
    "ce": "--method.name ce",
    "kd, EMA, mixup": "--method.name kd --augment.name matching --optimizer.ema-decay 0.9",
    "fitnet": "--method.name fitnet",
    "ab then wdkd": "--method.name ab --method.epsilon 0.05",
    "wdkd, recorded": "--method.name wdkd --augment.name flip_crop --augment.views 2",
    "sobolev": "--method.name sobolev",
    "kd, 2 devices": "--method.name kd --model.norm batch --augment.name flip_crop",
}
"""What is run, by name; fitnet and ab change from their first to their second stage after 36 steps."""
NOT_COMPARED = ("wall_seconds", "examples_per_second", "revision")
"""What a result has measured of time, and the commit of the code, which may be another one when `make faults` goes on."""
LIMIT = 300
"""Seconds that a process may take on a busy machine before it counts as hanging."""


@dataclasses.dataclass
class Tries:
    """What came of trying one kind of fault."""

    fault: str
    tries: int = 0
    lost: int = 0
    """Tries after which a run did not go on from the newest checkpoint that was complete and intact."""
    different: int = 0
    """Tries whose run did not end with the parameters, metrics and result of an undisturbed one."""
    unclear: int = 0
    """Tries that ended with another exit code, or with other than one line, than they should have."""
    remark: str = ""
    evidence: list[str] = dataclasses.field(default_factory=list)
    """What was said where it was not what it should have been."""

    def check_start(self, errors: str, least: int) -> None:
        """Counts something as lost if a call that came to a step did not go on from step `least` or a later one."""
        if went_on_from(errors) < least and any(line.startswith("digits ") for line in errors.splitlines()):
            self.lost += 1
            self.evidence.append(f"not from step {least}: {errors[-2000:]}")

    def check_end(self, ended: tuple[int, str], code: int) -> None:
        """Counts an end as unclear that has another exit code, or says something else than one line, or more."""
        if ended[0] != code or len(error_lines(ended[1])) != 1:
            self.unclear += 1
            self.evidence.append(f"code {ended[0]}: {ended[1][-2000:]}")


class Ground:
    """A folder with a teacher, and an undisturbed run of each case, made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.teacher = folder / "teacher"
        if not self.teacher.exists():
            command = ["--preset", "digits", "--model.width", "4", "--train.steps", "40", "--workdir", self.teacher]
            finish(launch("train_teacher", *command))
        self._undisturbed: dict[str, Path] = {}

    def start(self, case: str, workdir: Path, *more: str, devices: int | None = None, prefix: tuple[str, ...] = ()) -> subprocess.Popen:
        """The process of a case's run."""
        devices = devices or (2 if "2 devices" in case else 1)
        arguments = (*TINY.split(), *CASES[case].split(), "--teacher", self.teacher, "--workdir", workdir, *more)
        return launch("distill", *arguments, environment={"JAX_NUM_CPU_DEVICES": str(devices)}, prefix=prefix)

    def undisturbed(self, case: str) -> Path:
        """The directory of a run that nothing happened to."""
        if case not in self._undisturbed:
            directory = self.folder / "undisturbed" / slug(case)
            if not (directory / "result.json").exists():
                finish(self.start(case, directory))
            self._undisturbed[case] = directory
        return self._undisturbed[case]

    def fresh(self, case: str, number: int) -> Path:
        """A new directory's name."""
        directory = self.folder / "disturbed" / f"{slug(case)}-{number}"
        shutil.rmtree(directory, ignore_errors=True)
        return directory


def slug(words: str) -> str:
    return re.sub(r"\W+", "-", words)


def launch(script: str, *arguments: object, environment: dict[str, str] | None = None, prefix: tuple[str, ...] = ()) -> subprocess.Popen:
    """One of the launch scripts as a process of its own."""
    variables = os.environ | {"JAX_PLATFORMS": "cpu"} | (environment or {})
    command = [*prefix, sys.executable, str(LAUNCH / f"{script}.py"), *map(str, arguments)]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outcome(process: subprocess.Popen) -> tuple[int, str]:
    """(exit code, what it said on stderr) when it has ended; a process that hangs is an error."""
    try:
        _, errors = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise AssertionError(f"no end within {LIMIT} s: {process.args}") from None
    return process.returncode, errors


def finish(process: subprocess.Popen) -> str:
    """What a process that must succeed said."""
    code, errors = outcome(process)
    assert code == 0, errors[-3000:]
    return errors


def error_lines(errors: str) -> list[str]:
    """What is neither progress nor a note; one line where a run stops."""
    progress = ("note: ", "teacher cache", "digits ", "goes on from step ")
    return [line for line in errors.splitlines() if line.strip() and not line.startswith(progress)]


def identical(directory: Path, undisturbed: Path) -> bool:
    """Whether two runs ended with the same parameters, training state, metrics, subset and result, bit for bit, but for the times."""
    for name in ("metrics.jsonl", "subset.json"):
        if (directory / name).read_bytes() != (undisturbed / name).read_bytes():
            return False
    digests, results = [], []
    for path in (directory, undisturbed):
        digest = json.loads((path / "checkpoints" / str(STEPS) / "digest" / "metadata").read_text())
        digests.append((digest["network"], digest["state"]))
        result = json.loads((path / "result.json").read_text())
        results.append({name: value for name, value in result.items() if name not in NOT_COMPARED})
    return digests[0] == digests[1] and results[0] == results[1]


def went_on_from(errors: str) -> int:
    """The step that a call says it goes on from; 0 where it began."""
    found = re.search(r"^goes on from step (\d+) ", errors, re.MULTILINE)
    return int(found[1]) if found else 0


def newest_step(directory: Path) -> int:
    """The newest complete checkpoint."""
    return max(saved_steps(directory / "checkpoints"), default=0)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = LIMIT) -> bool:
    """Whether the condition came true while the process lived."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.002)
    return False


def has_trained(directory: Path, steps: int = 1) -> Callable[[], bool]:
    """Whether a run has written the metrics of so many steps."""

    def check() -> bool:
        with contextlib.suppress(OSError):
            return (directory / "metrics.jsonl").read_bytes().count(b"\n") >= steps
        return False

    return check


def is_saving(directory: Path) -> Callable[[], bool]:
    """Whether a checkpoint is just being written."""
    return lambda: bool(unfinished_saves(directory / "checkpoints"))


Moment = Callable[[subprocess.Popen, Path, random.Random], None]
"""Waits for the moment at which something happens to a process."""


def any_time(process: subprocess.Popen, directory: Path, draw: random.Random) -> None:
    """Anywhere from the start of the process to beyond its end."""
    wait_for(lambda: False, process, draw.uniform(0.2, 12))


def in_training(process: subprocess.Popen, directory: Path, draw: random.Random) -> None:
    """Some time after this call came to its first step."""
    began, metrics = time.time(), directory / "metrics.jsonl"
    if wait_for(lambda: metrics.exists() and metrics.stat().st_mtime > began, process):
        wait_for(lambda: False, process, draw.uniform(0, 3))


def in_a_save(process: subprocess.Popen, directory: Path, draw: random.Random) -> None:
    """While a checkpoint is being written, the second one or a later one of this call."""
    for _ in range(draw.randint(1, 4)):
        if not wait_for(is_saving(directory), process):
            return
        wait_for(lambda: not is_saving(directory)(), process)
    wait_for(is_saving(directory), process)
    wait_for(lambda: False, process, draw.uniform(0, 0.03))


def send(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)


KILL, TERM, INTERRUPT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
