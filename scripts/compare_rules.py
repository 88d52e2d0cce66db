"""A learned update rule against an actor-critic that was tuned on the training tasks, on tasks that neither has seen.

    .venv/bin/python scripts/compare_rules.py DIRECTORY                     all of it
    .venv/bin/python scripts/compare_rules.py DIRECTORY --rules RUN ...     rules from these runs of `algo=lpg`

Trains `algo=lpg` on small MDPs (`TRAIN`), all seeds in one run, takes of 16 settings of the actor-critic's learning rate and
entropy the one with the highest mean return over all updates on training tasks, and lets fresh agents of both learn in new
tasks of the training family and in the families `UNSEEN`, from the same number of episodes in each update. It prints the
return after some numbers of updates, and the mean over all updates with 95 % intervals over seeds and tasks, also of the
difference, and draws the curves. What is finished is kept in DIRECTORY: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metarl_cli import config, evaluation, runner
from metarl_cli.core.interfaces import TaskFamily
from metarl_cli.core.settings import EvalSettings
from metarl_cli.core.statistics import summarise, summarise_curve
from metarl_cli.report import figures

TRAIN = ["env=tabular_mdp", "env.states=5", "env.actions=3", "env.horizon=10", "env.reward_noise=0.1"]
UNSEEN = {
    "larger": ["env=tabular_mdp", "env.states=10", "env.actions=5", "env.horizon=10", "env.reward_noise=0.1"],
    "other rewards": [*TRAIN, "env.reward_mean=0.0", "env.reward_std=2.0"],
    "longer": ["env=tabular_mdp", "env.states=8", "env.actions=4", "env.horizon=20", "env.reward_noise=0.5"],
    "grid": ["env=grid_nav", "env.observation=one_hot"],
    "chain of 6": ["env=chain", "env.length=6", "env.horizon=12"],
}
RATES, ENTROPIES = (0.03, 0.1, 0.3, 1.0), (1e-4, 1e-3, 1e-2, 1e-1)
SHOWN = (0, 5, 10, 20, 50, 100)  # updates


def built(lines: list[str]) -> tuple[Any, TaskFamily, EvalSettings]:
    composed = config.compose(lines)
    return (*config.build(composed.config), composed.config.eval)


@jax.jit
def untrained(learner: Any, family: TaskFamily, keys: jax.Array) -> Any:
    """`[S, ...]`; with the learner as an argument, so that its 16 settings compile once."""
    return jax.vmap(lambda key: learner.learned(learner.init(key, family)))(keys)


def curve(learner: Any, family: TaskFamily, settings: EvalSettings, seeds: list[int]) -> np.ndarray:
    """Returns of a learner as it starts, `[S, N, P]`: mean of each point's episodes."""
    state = untrained(learner, family, jax.vmap(jax.random.key)(jnp.array(seeds)))
    return evaluation.evaluate(learner, state, family, settings, seeds).returns.mean(3)


def trained(directory: Path, family: list[str], seeds: int, overrides: list[str]) -> Path:
    """A run of lpg, finished."""
    run = directory / "lpg"
    command = [sys.executable, "-m", "metarl_cli"]
    if (run / "result.json").exists():
        return run
    if (run / "config.yaml").exists():
        subprocess.run([*command, "resume", str(run)], check=True)
    else:
        lines = [
            "algo=lpg",
            *family,
            f"seeds={seeds}",
            "log_every=10",
            "eval.tasks=100",
            *overrides,
            f"hydra.run.dir='{run}'",
        ]
        subprocess.run([*command, "train", *lines], check=True)
    return run


def tune(directory: Path, family: list[str], settings: list[str]) -> dict[str, float]:
    """The best of 16, by the mean return over all updates on training tasks."""
    path = directory / "tuned.json"
    if not path.exists():
        scores = {}
        learner, tasks, where = built(
            ["algo=actor_critic", *family, "algo.hidden=[]", *settings, "eval.split=train", "eval.seed=1"]
        )
        for lr, entropy in itertools.product(RATES, ENTROPIES):
            changed = dataclasses.replace(learner, inner_lr=lr, entropy=entropy)
            scores[f"{lr},{entropy}"] = float(curve(changed, tasks, where, [0]).mean())
            print(f"actor-critic, lr {lr:g}, entropy {entropy:g}: {scores[f'{lr},{entropy}']:.3f}", flush=True)
        lr, entropy = map(float, max(scores, key=scores.__getitem__).split(","))
        path.write_text(json.dumps({"scores": scores, "inner_lr": lr, "entropy": entropy}))
    best = json.loads(path.read_text())
    return {"inner_lr": best["inner_lr"], "entropy": best["entropy"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rules", type=Path, nargs="*", help="runs of algo=lpg")
    parser.add_argument("--train", action="append", default=[], help="changes TRAIN, e.g. env.reward_mean=0.0")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("overrides", nargs="*", help="of the training of lpg, e.g. iterations=2000")
    given = parser.parse_intermixed_args()
    given.directory.mkdir(parents=True, exist_ok=True)
    family = [*TRAIN, *given.train]
    runs = given.rules or [trained(given.directory, family, given.seeds, given.overrides)]
    settings = [f"eval.tasks={given.tasks}", f"eval.adapt.steps={given.updates}"]
    best = tune(given.directory, family, settings)
    print(f"actor-critic: the best has lr {best['inner_lr']:g}, entropy {best['entropy']:g}")
    shown = [n for n in SHOWN if n <= given.updates]
    print(f"\n| family | | {' | '.join(f'after {n}' for n in shown)} | mean over all | difference |")
    print(f"|---|---|{'---|' * (len(shown) + 2)}")
    for name, lines in {"the training family": family, **UNSEEN}.items():
        file = given.directory / f"{name.replace(' ', '_')}.npz"
        if not file.exists():
            rule = np.concatenate([rule_curve(Path(run), [*lines, *settings]) for run in runs])
            learner, tasks, where = built(["algo=actor_critic", *lines, "algo.hidden=[]", *settings])
            tuned = curve(dataclasses.replace(learner, **best), tasks, where, list(range(len(rule))))
            np.savez(file, lpg=rule, actor_critic=tuned)
        with np.load(file) as arrays:
            both = dict(arrays)
        draw(file, both)
        gain = summarise((both["lpg"] - both["actor_critic"]).mean(2))
        for learner, returns in both.items():
            area = summarise(returns.mean(2))
            cells = [f"{returns[:, :, n].mean():.2f}" for n in shown]
            cells.append(f"{area['mean']:.2f} [{area['ci_low']:.2f}, {area['ci_high']:.2f}]")
            cells.append(f"{gain['mean']:+.2f} [{gain['ci_low']:.2f}, {gain['ci_high']:.2f}]" if learner == "lpg" else "")
            print(f"| {name if learner == 'lpg' else ''} | `{learner}` | {' | '.join(cells)} |", flush=True)


def draw(file: Path, both: dict[str, np.ndarray]) -> None:
    """Both learners' returns `[S, N, P]` against the updates, beside the numbers."""
    lines = []
    for label, returns in both.items():
        points = summarise_curve(returns)
        mean, low, high = (np.array([point[key] for point in points]) for key in ("mean", "ci_low", "ci_high"))
        lines.append(figures.Curve(label, np.arange(len(points)), mean, low, high))
    figures.save(
        figures.curves(lines, "updates of a fresh agent in a new task", "return of an episode"), file.with_suffix("")
    )


def rule_curve(run: Path, lines: list[str]) -> np.ndarray:
    """Of trained rules, `[S, N, P]`, on the family that `lines` name."""
    composed = config.from_run(run, lines, ("eval", "env"))
    learner, family = config.build(composed.config)
    state = runner.restore_learner(run, composed, learner, family)
    return evaluation.evaluate(learner, state, family, composed.config.eval, runner.seed_list(composed.config)).returns.mean(
        3
    )


if __name__ == "__main__":
    main()
