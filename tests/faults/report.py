"""Tries every fault, and writes what came of it: results/reliability.md. Killed, it goes on with the faults that are left."""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import faults
import hostile
import overhead
import several
from harness import CASES, STEPS, Ground, Tries

from wdkd import parallel
from wdkd.files import write_file, write_json

FAULTS: dict[Callable[[Ground, int], Tries], int] = {
    faults.kill_any_time: 21,
    faults.kill_in_training: 28,
    faults.kill_in_a_save: 14,
    faults.stop_by_signal: 14,
    faults.damaged: 14,
    faults.full_disk: 10,
    faults.no_permission: 4,
    faults.deleted: 4,
    faults.two_writers: 4,
    faults.divergence: 7,
    several.one_of_two_dies: 4,
    several.one_of_two_is_asked_to_stop: 3,
    several.sweep_is_hit: 6,
    several.sweeps_together: 2,
    faults.repeated: 7,
    hostile.damaged_directories: 100,
    hostile.generated: 1,
}
"""How often each is tried."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/faults"), help="where the runs are, and what was seen so far")
    parser.add_argument("--out", type=Path, default=Path("results/reliability.md"), help="the report")
    options = parser.parse_args()
    began = time.monotonic()
    folder = options.folder.absolute()
    ground = Ground(folder)
    seen = [tried(ground, fault, count) for fault, count in FAULTS.items()]
    cost = remembered(folder / "seen" / "overhead.json", lambda: overhead.measure(ground.teacher))
    write_file(options.out, report(seen, cost, describe_machine()).encode())
    print(options.out.read_text())
    print(f"wrote {options.out} after {time.monotonic() - began:.0f} s")
    if any(tries.lost or tries.different or tries.unclear for tries in seen):
        sys.exit(1)


def remembered(path: Path, make: Callable[[], dict]) -> dict:
    """What an earlier call wrote there, or what `make` gives, written there."""
    if not path.exists():
        write_json(path, make())
    return json.loads(path.read_text())


def tried(ground: Ground, fault: Callable[[Ground, int], Tries], count: int) -> Tries:
    """What came of one fault, now or in an earlier call."""

    def make() -> dict:
        began = time.monotonic()
        tries = fault(ground, count)
        print(f"{tries.fault}: {tries.tries} tries in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        return dataclasses.asdict(tries)

    return Tries(**remembered(ground.folder / "seen" / f"{fault.__name__}.json", make))


def report(seen: list[Tries], cost: dict[str, float], machine: str) -> str:
    """The whole of reliability.md."""
    rows = [row(tries) for tries in seen]
    kills = sum(tries.tries for tries in seen if tries.fault.startswith("kill -9"))
    return f"""# Reliability

Written by `make faults` from what it saw; nothing is typed by hand. Real processes of `launch/distill.py` train a student of the
embedded digits for {STEPS} steps, with a checkpoint every 9 steps and every 0.7 seconds, in turn as: {"; ".join(CASES)}.
Something happens to them, the same command is given again, and the end is compared with that of a run to which nothing happened.

{machine}. {kills} kills at random points.

| fault | tries | lost nothing | ended bit-identical | said so clearly | remark |
|---|---:|---:|---:|---:|---|
{chr(10).join(rows)}

- *Lost nothing*: the run went on from the newest checkpoint that was complete and intact.
- *Ended bit-identical*: parameters, optimiser state, metrics.jsonl, subset.json and result.json (but for its two measured times and
  the commit of the code) are those of the undisturbed run.
- *Said so clearly*: the expected exit code, and one line on stderr beside progress and notes; no traceback.

## What saving costs

The demo's student (`wdkd`, digits preset), {overhead.ROUNDS} rounds of {overhead.STEPS} steps in turn without and with a save every
{cost["every"]:g} seconds ({cost["saves"]:g} saves): {cost["without"] * 1000:.2f} ms and {cost["with"] * 1000:.2f} ms per step, median ratio
of a round {cost["ratio"]:.3f}. At the default of one every 60 seconds that is a ratio of {cost["at_default"]:.4f}; the limit is 1.05.
{evidence(seen)}"""


def row(tries: Tries) -> str:
    """A fault's line of the table."""
    if tries.tries == 0:
        return f"| {tries.fault} | 0 | | | | {tries.remark} |"
    good = [f"{max(tries.tries - bad, 0)} of {tries.tries}" for bad in (tries.lost, tries.different, tries.unclear)]
    return f"| {tries.fault} | {tries.tries} | {' | '.join(good)} | {tries.remark} |"


def evidence(seen: list[Tries]) -> str:
    """What was said where it was not what it should have been."""
    said = [f"- {tries.fault}: `{' '.join(text.split())[:500]}`" for tries in seen for text in tries.evidence[:3]]
    return "\n## What still hurts\n\n" + "\n".join(said) + "\n" if said else ""


def describe_machine() -> str:
    return f"{os.cpu_count()} CPU cores, JAX on {parallel.device_kind()}, Python {sys.version.split()[0]}"


if __name__ == "__main__":
    parallel.enable_compilation_cache()
    main()
