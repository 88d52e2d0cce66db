"""The memories of RL^2 side by side, after equally many steps and after equally long: a table and a plot.

    .venv/bin/python scripts/compare_memories.py                     all memories on all families: 5 minutes a cell
    .venv/bin/python scripts/compare_memories.py --minutes 1 --memories gru s5 --families t_maze_10 t_maze_100
    .venv/bin/python scripts/compare_memories.py --only-table        of what there is

A cell is one `metarl train` of three seeds side by side in a process of its own, stopped after its time, compilation
included. What is compared is the trial return in training, which is on tasks never seen before: the mean of the last tenth
of the meta-iterations up to the point of comparison. That point is the budget in seconds, and for equal steps the number of
steps that the slowest memory reached within it, and half of what the median memory did. Beside it stands after how many
steps each seed first got to 90 % of the best, for it may fall back. A cell that is done is a small JSON file and is not run
again; one that was interrupted goes on. `t_maze_N` is a corridor of N steps: which memory holds how long.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metarl_cli import catalogue
from metarl_cli.report import figures

T_QUANTILES = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 10: 2.262}  # 97.5 % of Student's t, by the number of seeds
COMMON = ["algo=rl2", "iterations=1000000", "algo.lr=1e-3", "algo.lr_end=null", "algo.entropy=0.01", "algo.entropy_end=null"]


class Family(NamedTuple):
    title: str
    overrides: list[str]
    best: float  # the exact optimum, or the best that is known


def t_maze(length: int) -> Family:
    """Ni et al.'s: one episode, the cue names the side, and who recalls it gets 1, who guesses 0.5 on average.

    Advantages keep their size: once the way is known all steps but one tell nothing, and standardised, they are noise. Small
    batches and a short horizon teach the way within 0.2 M steps, and the entropy keeps both arms tried until then.
    """
    overrides = ["env=t_maze", f"env.length={length}", "env.reversed=0", "algo.episodes=1", "algo.meta_batch=64"]
    overrides += ["algo.gamma=0.9", "algo.lam=0.5", "algo.entropy=0.05"]
    overrides += ["algo.standardize=false", "algo.normalize_rewards=true"]
    return Family(f"T-maze of {length} steps", overrides, 1.0)


# As cells=n100k5 of `metarl reproduce rl2_bandits`: with less entropy, or lambda = 0.3, the policies soon stop to explore.
BANDIT = ["env=bandit", "env.n=100", "env.k=5", "algo.meta_batch=256", "algo.lr=2e-3", "algo.lam=0.95", "algo.entropy=0.02"]
BANDIT += ["algo.sees_time=true", "algo.normalize_rewards=true"]

FAMILIES = {
    "bandit": Family("Bandits, n=100, k=5", BANDIT, 78.3),
    "grid_nav": Family("GridNavi", ["env=grid_nav", "algo.meta_batch=512", "algo.gamma=0.97", "algo.lam=0.95"], 37.214),
    **{f"t_maze_{length}": t_maze(length) for length in (10, 30, 100, 300)},
}


class Cell(NamedTuple):
    """A learning curve: per logged meta-iteration the steps per seed, the seconds, and the trial returns `[I, S]`."""

    minutes: float  # that it was given
    steps: np.ndarray
    seconds: np.ndarray
    returns: np.ndarray

    def until(self, seconds: float = np.inf, steps: float = np.inf) -> np.ndarray:
        """`[S]`: the mean of the last tenth of the meta-iterations up to there; NaN where there is none."""
        last = int(np.sum((self.seconds <= seconds) & (self.steps <= steps)))
        return self.returns[last - max(1, last // 10) : last].mean(0) if last else np.full(self.returns.shape[1], np.nan)

    def reached(self, level: float) -> list[str]:
        """Of each seed the million steps after which the mean of ten lines of the curve first gets to that level."""
        window = min(10, len(self.steps))
        means = [np.convolve(curve, np.full(window, 1 / window), "valid") >= level for curve in self.returns.T]
        return [f"{self.steps[window - 1 :][np.argmax(there)] / 1e6:.2f}" if np.any(there) else "never" for there in means]


def run(directory: Path, family: str, memory: str, arguments: argparse.Namespace) -> Path:
    """Trains one cell for its time and writes its JSON file."""
    result, folder = directory / f"{family}_{memory}.json", directory / "runs" / f"{family}_{memory}"
    if result.exists():
        return result
    budget = 60 * arguments.minutes
    overrides = [*COMMON, f"algo/memory={memory}", f"seeds={arguments.seeds}", *FAMILIES[family].overrides, *arguments.set]
    command = [str(Path(sys.executable).with_name("metarl"))]
    rows = read(folder)
    if rows and rows[-1]["seconds"] < budget:
        command += ["resume", str(folder)]
    elif not rows:
        command += ["train", *overrides, f"hydra.run.dir={folder}"]
    if len(command) > 1:
        print(f"{family}, {memory}: training for {budget:.0f} s", flush=True)
        with (directory / f"{family}_{memory}.log").open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)
            try:
                began = time.monotonic()
                while process.poll() is None and time.monotonic() - began < 2 * budget + 300:
                    time.sleep(0.5)
                    if (rows := read(folder)) and rows[-1]["seconds"] >= budget:
                        break
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)  # it saves
                process.wait()
    rows = [row for row in read(folder) if row["seconds"] <= budget]
    if not rows:
        problem = f"no meta-iteration ended within {budget:.0f} s; see {directory}/{family}_{memory}.log"
        raise SystemExit(f"{family}, {memory}: {problem}. Give it more --minutes.")
    curve = {
        "steps": [row["steps"] for row in rows],
        "seconds": [row["seconds"] for row in rows],
        "trial_return": [row["trial_return"] for row in rows],
    }
    keep = np.unique(np.linspace(0, len(rows) - 1, 500).astype(int)).tolist()
    thinned = {name: [values[i] for i in keep] for name, values in curve.items()}
    head = {"family": family, "memory": memory, "budget_seconds": budget, "overrides": overrides}
    temporary = result.with_suffix(".tmp")
    temporary.write_text(json.dumps(head | thinned), encoding="utf-8")
    os.replace(temporary, result)
    return result


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics of a run that hold a learning curve; the last may be half written."""
    rows = []
    if (file := folder / "metrics.jsonl").exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return [row for row in rows if "trial_return" in row]


def load(path: Path) -> Cell:
    content = json.loads(path.read_text(encoding="utf-8"))
    returns = [[np.nan if x is None else x for x in row] for row in content["trial_return"]]
    numbers = (np.array(content["steps"]), np.array(content["seconds"]), np.array(returns, float))
    return Cell(content["budget_seconds"] / 60, *numbers)


def interval(values: np.ndarray) -> str:
    """Mean over seeds and half the width of its 95 % interval."""
    n = len(values)
    half = T_QUANTILES.get(n, 1.96) * values.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
    return f"{values.mean():.2f} ± {half:.2f}"


def table(cells: dict[tuple[str, str], Cell]) -> str:
    lines = []
    for family in dict.fromkeys(name for name, _ in cells):
        here = {memory: cell for (name, memory), cell in cells.items() if name == family}
        reached = [int(cell.steps[-1]) for cell in here.values()]
        points = sorted({min(reached), max(min(reached), int(np.median(reached)) // 2)})
        columns = "".join(f" after {steps / 1e6:.2f} M steps |" for steps in points)
        minutes = " or ".join(f"{minutes:g}" for minutes in sorted({cell.minutes for cell in here.values()}))
        lines += [
            f"**{FAMILIES[family].title}** (best {FAMILIES[family].best:g})",
            "",
            f"| memory | after {minutes} min | 90 % after M steps |{columns} steps in the time | steps/s |",
            "|---" * (5 + len(points)) + "|",
        ]
        for memory, cell in sorted(here.items(), key=lambda item: -np.nan_to_num(item[1].until()).mean()):
            speed = (cell.steps[-1] - cell.steps[0]) / max(cell.seconds[-1] - cell.seconds[0], 1e-9) * cell.returns.shape[1]
            at = [interval(cell.until(steps=steps)) if steps <= cell.steps[-1] else "" for steps in points]
            numbers = " | ".join([interval(cell.until()), ", ".join(cell.reached(0.9 * FAMILIES[family].best)), *at])
            lines.append(f"| {memory} | {numbers} | {cell.steps[-1] / 1e6:.2f} M | {speed:,.0f} |")
        lines.append("")
    return "\n".join(lines)


def plot(cells: dict[tuple[str, str], Cell], path: Path) -> None:
    """Trial return over steps (above) and over seconds (below): means over seeds, and from the lowest to the highest."""
    from matplotlib.figure import Figure

    families = list(dict.fromkeys(name for name, _ in cells))
    memories = sorted({memory for _, memory in cells})
    figure = Figure(figsize=(4 * len(families), 6), layout="constrained")
    axes = figure.subplots(2, len(families), squeeze=False)
    for column, family in enumerate(families):
        for (name, memory), cell in cells.items():
            if name != family:
                continue
            for row, x in enumerate((cell.steps / 1e6, cell.seconds / 60)):
                window = max(1, len(x) // 50)
                smooth = np.array([cell.returns[max(0, i - window) : i + 1].mean(0) for i in range(len(x))])
                color = figures.CYCLE[memories.index(memory) % len(figures.CYCLE)]
                axes[row, column].plot(x, smooth.mean(1), color=color, label=memory)
                axes[row, column].fill_between(x, smooth.min(1), smooth.max(1), color=color, alpha=0.15, linewidth=0)
        for row, label in enumerate(("million steps per seed", "minutes")):
            axes[row, column].axhline(FAMILIES[family].best, color="0.5", linestyle=":")
            axes[row, column].set(xlabel=label, ylabel="trial return" if column == 0 else None)
        axes[0, column].set_xscale("log")  # some memories are twenty times faster than others
        axes[0, column].set_title(FAMILIES[family].title)
    axes[0, 0].legend(fontsize="small")
    print(f"Written to {' and '.join(map(str, figures.save(figure, path)))}")


def main() -> None:
    names = sorted(catalogue.groups()["algo/memory"])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("runs/compare_memories"))
    parser.add_argument("--memories", nargs="+", choices=names, default=names, metavar="MEMORY", help=", ".join(names))
    parser.add_argument(
        "--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY", help=", ".join(FAMILIES)
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="wall clock of a cell, compilation included")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="more overrides of every cell")
    parser.add_argument("--only-table", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    cells = {}
    for family in arguments.families:
        for memory in arguments.memories:
            if arguments.only_table:
                path = arguments.directory / f"{family}_{memory}.json"
                if not path.exists():
                    continue
            else:
                path = run(arguments.directory, family, memory, arguments)
            cells[family, memory] = load(path)
    if not cells:
        raise SystemExit(f"{arguments.directory}: holds no cells yet.")
    text = table(cells)
    print(text)
    (arguments.directory / "table.md").write_text(text, encoding="utf-8")
    plot(cells, arguments.directory / "curves")


if __name__ == "__main__":
    main()
