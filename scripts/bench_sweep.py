"""A sweep in four ways: `.venv/bin/python scripts/bench_sweep.py [--rates 8] [--seeds 8] [KEY=VALUE ...]`.

RL^2 on a bandit, learning rates times seeds, each in whole processes from start to end:

* `vmap`: one program for all, from an empty compilation cache and once more with what that one has left there;
* `serial`: one after another in one process, warm;
* `joblib`: in two processes side by side, warm;
* `fresh`: each in a process of its own, one after another, warm.

Prints, with device and versions, wall clock, the compile seconds of `train_chunk` over all processes, the peak of the memory
of all processes together, and how many times as fast `vmap` is. Checks that all ways report the same metrics, as far as
whole float32 runs can be the same: the mean over all points and its standard error.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

SMALL = [
    "algo=rl2",
    "env=bandit",
    "algo.meta_batch=64",
    "algo.memory.features=32",
    "iterations=50",
    "eval.tasks=1000",
    "figures=false",
]
METARL = [sys.executable, "-m", "metarl_cli", "train"]


class Timing(NamedTuple):
    wall: float
    compiling: float
    peak: int  # bytes
    metrics: list[float]


def resident(root: int) -> int:
    """Bytes that a process and all below it hold, what they share counted once (Linux)."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    family, grown = {root}, True
    while grown:
        below = {pid for pid, parent in parents.items() if parent in family}
        grown = not below <= family
        family |= below
    total = 0
    for pid in family:
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += 1024 * sum(int(line.split()[1]) for line in rollup if line.startswith("Pss:"))
        except OSError:
            continue
    return total


def measure(commands: list[list[str]], directory: Path, cache: Path) -> Timing:
    """Runs commands one after another, which leave their runs below the directory."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    peak, over = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.2):
            peak = max(peak, resident(os.getpid()) - resident_here)

    resident_here = resident(os.getpid())
    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    try:
        for command in commands:
            subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    finally:
        wall = time.monotonic() - began
        over.set()
        watcher.join()
    results = [json.loads(file.read_text()) for file in sorted(directory.glob("*/result.json"))]
    compiling = sum(result["train"]["compile_seconds"] / result["train"]["runs"] for result in results)
    metrics = [result["evaluation"]["test"]["trial_return"]["mean"] for result in results]
    return Timing(wall, compiling, peak, metrics)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=int, default=8, help="learning rates, from 3e-4 to 1e-2")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--ways", default="vmap,serial,joblib,fresh", help="some of vmap, serial, joblib, fresh")
    parser.add_argument("overrides", nargs="*", help="of the small settings")
    arguments = parser.parse_args()
    rates = [3e-4 * (1e-2 / 3e-4) ** (i / max(1, arguments.rates - 1)) for i in range(arguments.rates)]
    points = [(f"algo.lr={rate:.3g}", f"seed={seed}") for rate in rates for seed in range(arguments.seeds)]
    settings = [*SMALL, *arguments.overrides]
    swept = [f"algo.lr={','.join(f'{rate:.3g}' for rate in rates)}", f"seed=range({arguments.seeds})"]
    found: dict[str, Timing] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def sweep(way: str, cache: str, *more: str) -> Timing:
            command = [*METARL, "-m", *settings, *swept, *more, f"hydra.sweep.dir={folder / way}"]
            return measure([command], folder / way, folder / cache)

        ways = arguments.ways.split(",")
        if "vmap" in ways:
            found["vmap, nothing compiled"] = sweep("vmap-cold", "vmap", "hydra/launcher=vmap")
            found["vmap"] = sweep("vmap", "vmap", "hydra/launcher=vmap")
        measure(
            [[*METARL, *settings, *points[0], f"hydra.run.dir={folder / 'warm' / '0'}"]], folder / "warm", folder / "alone"
        )
        if "serial" in ways:
            found["serial"] = sweep("serial", "alone")
        if "joblib" in ways:
            found["joblib"] = sweep("joblib", "alone", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
        if "fresh" in ways:
            runs = [
                [*METARL, *settings, *point, f"hydra.run.dir={folder / 'fresh' / str(i)}"] for i, point in enumerate(points)
            ]
            found["fresh"] = measure(runs, folder / "fresh", folder / "alone")
    print_all(found, len(points), settings)


def print_all(found: dict[str, Timing], points: int, settings: list[str]) -> None:
    from metarl_cli import runner

    about: Any = runner.provenance()
    print(f"device: {about['device']['kind']}, {about['device']['cores']} cores")
    print(f"versions: { ({name: about['versions'][name] for name in ('python', 'metarl', 'jax', 'jaxlib')}) }")
    print(f"{points} points: {' '.join(settings)}\n")
    print(f"{'':<24}{'wall':>9}{'a point':>9}{'compiling':>11}{'peak memory':>13}{'vmap is':>18}   mean trial return")
    for way, (wall, compiling, peak, metrics) in found.items():
        ratio = f"{wall / found['vmap'].wall:.1f} x as fast" if "vmap" in found and way != "vmap" else ""
        mean, error = statistics.mean(metrics), statistics.stdev(metrics) / math.sqrt(len(metrics))
        print(
            f"{way:<24}{wall:>7.1f} s{wall / points:>7.2f} s{compiling:>9.1f} s{peak / 1e9:>10.2f} GB{ratio:>18}"
            f"   {mean:.3f} +- {error:.3f}"
        )


if __name__ == "__main__":
    main()
