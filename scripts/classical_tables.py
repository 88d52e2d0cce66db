"""The classical columns of tables 1 and 2 of the RL^2 paper (Duan et al. 2016): published, ours, difference, verdict.

    .venv/bin/python scripts/classical_tables.py               the authors' protocol: each parameter chosen per cell, on
                                                               the reported tasks
    .venv/bin/python scripts/classical_tables.py --tune other  chosen on as many other tasks
    .venv/bin/python scripts/classical_tables.py --tune none   one setting each, that of the YAML files; without OTS
    .venv/bin/python scripts/classical_tables.py bandits OTS   one table, or some of its columns

All learners are anytime: cells that differ in the length of the trial share a run of the longest. A cell matches where the
difference is within 3 standard errors of it (theirs taken to be like ours: they ran as many tasks), plus half a unit of the
last published digit. Table 2 is run with TabulaRL's prior mean 0, and beside it with the family's own prior.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metarl_cli import config, runner, untrained
from metarl_cli.core.settings import EvalSettings

PUBLISHED = Path(config.__file__).parent / "tables" / "published"
TENTHS = [round(0.1 * i, 1) for i in range(11)]
SCALINGS = [float(x) for x in np.exp(np.linspace(np.log(1e-4), 0, 21))]  # the authors' own
# The authors tried 1 to 20 samples. Each costs as much as a run of the learner with one; `--all-samples` tries them all.
SAMPLES = [1, 2, 5, 10, 15, 20]
TABULA_RL = ("algo.prior_mean=0.0",)
WEIGHTLESS = (*TABULA_RL, "algo.prior_precision=1e-4", "algo.prior_count=1e-4")


class Column(NamedTuple):
    title: str  # ours
    published: str  # theirs
    algo: str
    overrides: tuple[str, ...] = ()
    parameter: str | None = None
    values: list[float] | list[int] | None = None


class Table(NamedTuple):
    file: str
    families: list[tuple[str, list[str]]]  # what a cell's name adds, and the overrides
    setup: str  # how a cell is called
    lengths: list[int]
    columns: list[Column]


def tables(samples: list[int]) -> dict[str, Table]:
    bandits = Table(
        "rl2_table1_bandits.csv",
        [(f";k={k}", ["env=bandit", f"env.k={k}", "env.n=500"]) for k in (5, 10, 50)],
        "n={n}{family}",
        [10, 100, 500],
        [
            Column("Random", "Random", "random"),
            # The paper's are the best of several approximations per cell, which are not published.
            Column("Gittins", "Gittins", "gittins", (), "discount", [0.9, 0.99, 0.999, 0.9999]),
            Column("TS", "TS", "thompson"),
            Column("OTS", "OTS", "optimistic_thompson", (), "samples", samples),
            Column("UCB1", "UCB1", "ucb1", (), "c", TENTHS),
            Column("eps-Greedy", "eps-Greedy", "epsilon_greedy", (), "epsilon", TENTHS),
            Column("Greedy", "Greedy", "greedy"),
        ],
    )
    mdps = [
        Column("PSRL", "PSRL", "psrl", TABULA_RL),
        Column("OPSRL", "OPSRL", "opsrl", TABULA_RL, "samples", samples),
        Column("UCRL2", "UCRL2", "ucrl2", (), "scaling", SCALINGS),
        Column("BEB", "BEB", "beb", TABULA_RL, "scaling", SCALINGS),
        Column("eps-Greedy", "eps-Greedy", "epsilon_greedy", WEIGHTLESS, "epsilon", TENTHS[1:]),
        Column("Greedy", "Greedy", "greedy", WEIGHTLESS),
    ]
    true = {"UCRL2": ("algo.prior_mean=1.0",)}  # its prior has no weight: only what was never tried is better known
    mdp_table = Table(
        "rl2_table2_mdp.csv",
        [("", ["env=tabular_mdp", "env.episodes=100"])],
        "n={n}{family}",
        [10, 25, 50, 75, 100],
        [Column("Random", "Random", "random"), *mdps]
        + [c._replace(title=f"{c.title}, true prior", overrides=true.get(c.title, ())) for c in mdps],
    )
    return {"bandits": bandits, "mdps": mdp_table}


class Runs(NamedTuple):
    """Total rewards `[N]` by the length of the trial, for each value of a parameter."""

    totals: dict[float | None, dict[int, np.ndarray]]

    def best(self, n: int) -> float | None:
        return max(self.totals, key=lambda value: self.totals[value][n].mean())


def run(table: Table, column: Column, family_overrides: list[str], values: list, settings: EvalSettings) -> Runs:
    composed = config.compose_eval([f"algo={column.algo}", *family_overrides, *column.overrides])
    learner, family = config.build_untrained(composed.config)
    totals = {}
    for value in values:
        if value is not None:
            assert column.parameter is not None
            learner = untrained.with_value(composed.config.algo, column.parameter, value).build(family)
        returns = untrained.live(learner, family, settings, [0]).returns[0, :, :, 0]  # [N, E]
        sums = np.cumsum(returns, axis=1)
        totals[value] = {n: sums[:, n - 1] for n in table.lengths}
    return Runs(totals)


def published(file: str) -> dict[tuple[str, str], float]:
    with (PUBLISHED / file).open(encoding="utf-8", newline="") as lines:
        return {(row["setting"], row["method"]): float(row["value"]) for row in csv.DictReader(lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="bandits, mdps, or columns of them: OTS, 'Greedy, true prior'")
    parser.add_argument("--tune", choices=["reported", "other", "none"], default="reported")
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="from which the tasks derive")
    parser.add_argument("--all-samples", action="store_true", help="OTS and OPSRL with every number of samples to 20")
    args = parser.parse_args()
    every = tables(list(range(1, 21)) if args.all_samples else SAMPLES)
    chosen = [name for name in args.what if name in every] or list(every)
    wanted = [name for name in args.what if name not in every]
    names = {column.title for table in every.values() for column in table.columns}
    if unknown := set(wanted) - names:
        parser.error(f"{', '.join(unknown)}: no such table or column; there are {', '.join([*every, *sorted(names)])}")

    base = config.compose_eval(["algo=random", "env=bandit"]).config
    runner.configure_jax(base)
    reported = base.eval.model_copy(update={"tasks": args.tasks, "seed": args.seed})
    others = reported.model_copy(update={"seed": args.seed + 1})
    for name in chosen:
        table = every[name]
        columns = [c for c in table.columns if not wanted or c.title in wanted]
        if args.tune == "none" and not wanted:
            columns = [c for c in columns if c.title != "OTS"]
        theirs = published(table.file)
        print(f"\n{table.file.removesuffix('.csv')}, {args.tasks} tasks, parameters tuned on: {args.tune}")
        print(f"{'setup':<12}{'learner':<24}{'published':>10}{'ours':>10}{'s.e.':>7}{'diff.':>8}{'in s.e.':>9}  parameter")
        total, matched, cells = 0.0, 0, 0
        for column in columns:
            began = time.monotonic()
            for family, overrides in table.families:
                values = [None] if column.values is None or args.tune == "none" else list(column.values)
                runs = run(table, column, overrides, values, others if args.tune == "other" else reported)
                best = {n: runs.best(n) for n in table.lengths}
                if args.tune == "other":
                    runs = run(table, column, overrides, list(dict.fromkeys(best.values())), reported)
                for n in table.lengths:
                    totals = runs.totals[best[n]][n]
                    setup = table.setup.format(n=n, family=family)
                    mean, error = totals.mean(), totals.std() / math.sqrt(totals.size - 1)
                    paper = theirs[setup, column.published]
                    difference = mean - paper
                    z = difference / (math.sqrt(2) * error)
                    match = abs(difference) <= 3 * math.sqrt(2) * error + 0.05
                    parameter = "" if best[n] is None else f"{column.parameter}={best[n]:.4g}"
                    verdict = "match" if match else "DIFFERS"
                    if column.title.endswith("true prior"):
                        verdict = ""  # not what they ran
                    else:
                        matched, cells = matched + match, cells + 1
                    print(
                        f"{setup:<12}{column.title:<24}{paper:>10.1f}{mean:>10.2f}{error:>7.2f}{difference:>+8.2f}{z:>+9.1f}"
                        f"  {parameter:<18}{verdict}",
                        flush=True,
                    )
            total += time.monotonic() - began
            print(f"{'':<12}{column.title}: {time.monotonic() - began:.1f} s", flush=True)
        print(f"{matched} of {cells} cells match; {total:.1f} s in all")


if __name__ == "__main__":
    main()
