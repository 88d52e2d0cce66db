"""Kills a short run with `kill -9` many times, each time resumes it, and compares it bit by bit with an uninterrupted run.

    .venv/bin/python scripts/kill_test.py --kills 50

Half of the moments are random, between the first sign of the run and its result; the other half lie inside the writing of
a checkpoint: of a random one, a random time of up to 20 ms after its unfinished directory appears. A checkpoint follows each
meta-iteration here, where other runs write one every 20 seconds. What has to be equal: every array of the last and the best
checkpoint, `evaluation.npz`, the numbers of `result.json`, and all lines of `metrics.jsonl` but for their times.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests")]

from running import assert_same_run, driver, small  # noqa: E402 - the tests' way to run and compare

# A chunk is one meta-iteration, and a checkpoint follows each. No figures: they come after the result.
HASTY = "runner.CHUNK_SECONDS, runner.SAVE_SECONDS = 0, -1\nrunner.Point.draw = lambda *_: None"
RUN = small("rl2", "bandit", "iterations=15", "log_every=2", "eval.every=6")


def start(*words: str | Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return subprocess.Popen(
        driver(HASTY, *words), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    """Raises `RuntimeError` with what was printed if it fails."""
    output = process.communicate()[0].decode(errors="replace")
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}:\n{output}")


def wait_for(condition: Callable[[], object], process: subprocess.Popen[bytes]) -> bool:
    """Whether it came true while the process was alive. Looks a thousand times a second."""
    while not condition():
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    return process.poll() is None


def unfinished(run: Path) -> list[Path]:
    return [*run.glob("checkpoints/*/.unfinished-*"), *run.glob("checkpoints/*/.replaced-*")]


def saves(run: Path, process: subprocess.Popen[bytes], number: int) -> bool:
    """Waits for the beginning of a checkpoint, the `number`-th that this process writes."""
    for _ in range(number):
        if not wait_for(lambda: unfinished(run), process) or not wait_for(lambda: not unfinished(run), process):
            return False
    return wait_for(lambda: unfinished(run), process)


def kill(run: Path, seconds: float, within: str, moments: random.Random) -> str | None:
    """Starts a run and kills it. What it was doing; `None` where the moment came too late.

    Args:
        seconds: that the uninterrupted run took from its first sign to its result.
        within: `run` or `checkpoint`.
    """
    process = start("train", *RUN, f"hydra.run.dir={run}")
    try:
        if not wait_for(run.exists, process):
            finish(process)
        if within == "checkpoint":
            if not saves(run, process, moments.randrange(17)):
                return None
            time.sleep(moments.uniform(0, 0.02))
        else:
            time.sleep(moments.uniform(0, seconds))
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    if process.returncode != -signal.SIGKILL or (run / "result.json").exists():
        return None
    if not (run / "config.yaml").exists():
        return "before its config was written"
    if unfinished(run):
        return "in the middle of a checkpoint"
    return "between checkpoints" if (run / "checkpoints" / "last").exists() else "before the first checkpoint"


def killed_runs(kills: int, seed: int, folder: Path) -> Generator[str, None, None]:
    """What each kill fell into; raises `AssertionError` or `RuntimeError` at the first run that ends otherwise."""
    moments = random.Random(seed)
    finish(start("train", *RUN, f"hydra.run.dir={folder / 'warm'}"))  # compiles what the others find in the cache
    whole = folder / "whole"
    process = start("train", *RUN, f"hydra.run.dir={whole}")
    wait_for(whole.exists, process)
    began = time.monotonic()
    wait_for((whole / "result.json").exists, process)
    seconds = time.monotonic() - began
    finish(process)
    done = 0
    while done < kills:
        run = folder / f"killed-{done}"
        found = kill(run, seconds, ("run", "checkpoint")[done % 2], moments)
        if found is not None:
            again = ("resume", run) if (run / "config.yaml").exists() else ("train", *RUN, f"hydra.run.dir={run}")
            finish(start(*again))
            assert_same_run(run, whole)
            done += 1
            yield found
        shutil.rmtree(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(killed_runs(arguments.kills, arguments.seed, Path(folder))) as runs,
    ):
        for found in runs:
            counts[found] += 1
            print(f"{counts.total()}: killed {found}, resumed, identical", flush=True)
    what = ", ".join(f"{n} {found}" for found, n in counts.items())
    print(f"{counts.total()} of {arguments.kills} end bit-identical: {what}")


if __name__ == "__main__":
    main()
