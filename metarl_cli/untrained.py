"""One evaluation of a learner that has nothing to train: `metarl eval algo=NAME env=NAME`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError
from rich.console import Console

from metarl_cli import config as configs
from metarl_cli.config import Composed, EvalConfig, TuneSettings
from metarl_cli.core.errors import ConfigError
from metarl_cli.core.interfaces import Learner, MetaLearner, TaskFamily
from metarl_cli.core.settings import AlgoSettings, EvalSettings
from metarl_cli.core.statistics import summarise
from metarl_cli.logs import table
from metarl_cli.runner import (
    SCHEMA_VERSION,
    configure_jax,
    make_directory,
    memory_errors,
    now,
    print_curve,
    provenance,
    seed_list,
    write_arrays,
    write_json,
)

if TYPE_CHECKING:
    from metarl_cli.evaluation import Evaluation


def evaluate(composed: Composed[EvalConfig]) -> Path:
    """Evaluates, prints and writes `config.yaml`, `overrides.yaml`, `result.json` and `evaluation.npz`.

    Returns the directory.

    Raises:
        MetarlError: everything that a user can mend. No directory is left behind by a mistake in the config.
    """
    console = Console()
    config = composed.config
    configure_jax(config)
    learner, family = configs.build_untrained(config)
    if isinstance(learner, MetaLearner):
        raise ConfigError(
            "algo",
            composed.algo,
            "has to be trained first",
            hint=f"metarl train algo={composed.algo} env={composed.env}, then metarl eval RUN.",
        )
    learners = candidates(config, learner, family)
    from metarl_cli import optimality

    run = make_directory(composed)
    configs.save(composed, run)
    seeds = seed_list(config)
    tuned, candidate_returns = None, {}
    with memory_errors(composed):
        if learners:
            result, tuned, every = tune(config.tune, learners, family, config.eval, seeds)
            candidate_returns = {"candidates": every}
            print_tuning(tuned, console)
        else:
            result = live(learner, family, config.eval, seeds)
    split = config.eval.split
    write_arrays(run / "evaluation.npz", result.arrays() | candidate_returns | {"seeds": seeds})
    summary = result.summary() | optimality.compare(result, family, config.eval)
    head = {
        "schema_version": SCHEMA_VERSION,
        "status": "completed",
        "algorithm": composed.algo,
        "family": composed.env,
        "seeds": seeds,
        "date": now(),
        "overrides": composed.overrides,
        "tune": tuned,
    }
    write_json(run / "result.json", {**head, **provenance(), "evaluation": {split: summary}})
    print_curve(result, summary, composed, console)
    console.print(f"Everything is in {run}", soft_wrap=True, highlight=False)
    return run


def live(learner: Learner, family: TaskFamily, settings: EvalSettings, seeds: list[int]) -> Evaluation:
    """A trial in each task and for each seed."""
    import jax
    import jax.numpy as jnp

    from metarl_cli import evaluation

    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    state = jax.lax.map(lambda key: learner.init(key, family), keys)
    evaluation.check(learner, state, family, settings, seeds)
    return evaluation.evaluate(learner, state, family, settings, seeds)


# --- tuning


def candidates(config: EvalConfig, learner: Learner, family: TaskFamily) -> list[tuple[float, Learner]]:
    """The learner with each value of the parameter that is tuned; empty where none is.

    Raises:
        ConfigError: no such parameter, or it cannot have a value.
    """
    key, values, algo = config.tune.key, config.tune.values, config.algo
    if key is None:
        if values:
            raise ConfigError("tune.key", None, "has no value", hint="Say which parameter: tune.key=algo.NAME.")
        return []
    keys = [f"algo.{name}" for name in type(algo).model_fields]
    if key not in keys:
        raise ConfigError("tune.key", key, "the learner has no such parameter", allowed=keys)
    if not values:
        raise ConfigError("tune.values", "[]", "name what to try", hint="tune.values=[0.1,0.2,0.5]")
    name = key.partition(".")[2]
    return [(value, with_value(algo, name, value).build(family)) for value in values]


def with_value(algo: AlgoSettings, name: str, value: float) -> AlgoSettings:
    field = type(algo).model_fields[name]
    try:
        return type(algo).model_validate({other: getattr(algo, other) for other in type(algo).model_fields} | {name: value})
    except ValidationError:
        allowed = configs.describe(field.annotation, field.metadata)
        raise ConfigError("tune.values", value, f"algo.{name} must be {allowed}") from None


def tune(
    settings: TuneSettings,
    learners: list[tuple[float, Learner]],
    family: TaskFamily,
    reported: EvalSettings,
    seeds: list[int],
) -> tuple[Evaluation, dict[str, Any], np.ndarray]:
    """The evaluation of the best candidate on the reported tasks, what `result.json` holds under `tune`, and the returns of
    all candidates `[V, S, N, P]` on the tasks that decided: a shorter trial may have another best.

    A parameter that is traced, as all numbers are that shape nothing, costs no other program: all run under the first one's.
    """
    chosen_on = reported if settings.tasks == "reported" else other_tasks(family, reported)
    results = [live(learner, family, chosen_on, seeds) for _, learner in learners]
    means = [float(result.trial_return.mean()) for result in results]
    best = means.index(max(means))
    result = results[best] if chosen_on is reported else live(learners[best][1], family, reported, seeds)
    rows = [{"value": value, **summarise(r.trial_return)} for (value, _), r in zip(learners, results, strict=True)]
    chosen = {"key": settings.key, "tasks": settings.tasks, "chosen": learners[best][0], "candidates": rows}
    return result, chosen, np.stack([r.returns.mean(3) for r in results]).astype(np.float32)


def other_tasks(family: TaskFamily, reported: EvalSettings) -> EvalSettings:
    """As many tasks of the same kind that are not reported; for a published set, of those for training."""
    if family.fixed(reported.split) is not None:
        return reported.model_copy(update={"split": "train"})
    return reported.model_copy(update={"seed": reported.seed + 1})


def print_tuning(tuned: dict[str, Any], console: Console) -> None:
    rows = [
        (
            f"{row['value']:g}",
            row["mean"],
            f"[{row['ci_low']:.2f}, {row['ci_high']:.2f}]",
            "chosen" if row["value"] == tuned["chosen"] else "",
        )
        for row in tuned["candidates"]
    ]
    where = "the reported tasks (this flatters)" if tuned["tasks"] == "reported" else "other tasks"
    table(f"\n{tuned['key']}, chosen on {where}", (tuned["key"], "trial return", "95%", ""), rows, console)
