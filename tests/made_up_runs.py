"""Run directories with results that a test knows, without training anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from metarl_cli.core.statistics import summarise, summarise_curve

VERSIONS = {"python": "3.12.0", "metarl": "0.1.0", "jax": "0.10.2"}


def finished_run(
    path: Path,
    returns: np.ndarray,
    *,
    algo: str = "rl2",
    env: str = "bandit",
    seeds: list[int] | None = None,
    regret: np.ndarray | None = None,
    candidates: dict[float, np.ndarray] | None = None,
    optimum: dict[str, Any] | None = None,
    training: np.ndarray | None = None,
    overrides: list[str] | None = None,
    **settings: Any,
) -> Path:
    """Writes what `metarl train` or, with `candidates` or without `training`, `metarl eval` leaves behind.

    Args:
        returns, regret: `[S, N, P, K]`.
        candidates: value of algo.c -> `[S, N, P]`.
        training: `[iterations, S]`, the trial return of each.
        settings: of the learner.
    """
    path.mkdir(parents=True)
    seeds = seeds if seeds is not None else list(range(len(returns)))
    config: dict[str, Any] = {
        "choices": {"algo": algo, "env": env},
        "seed": seeds[0],
        "seeds": len(seeds),
        "eval": {"split": "test", "tasks": returns.shape[1], "seed": 0},
        "algo": settings,
        "env": {"n": returns.shape[2]},
    }
    if training is None:
        config["tune"] = {"key": None}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "overrides.yaml").write_text(yaml.safe_dump(overrides or [f"algo={algo}", f"env={env}"]))
    evaluation: dict[str, Any] = {
        "curve": [{"episodes": p, "steps": p, **x} for p, x in enumerate(summarise_curve(returns.mean(3)))],
        "trial_return": summarise(returns.sum((2, 3))),
    }
    if optimum is not None:
        evaluation["optimum"] = optimum
    result: dict[str, Any] = {
        "status": "completed",
        "algorithm": algo,
        "family": env,
        "seeds": seeds,
        "failed_seeds": [],
        "date": "2031-05-01T12:00:00+00:00",
        "memory": {"peak_bytes": 5e8, "peak_device_bytes": None},
        "device": {"platform": "cpu", "kind": "cpu", "cores": 2},
        "versions": VERSIONS,
        "git_revision": None,
        "evaluation": {"test": evaluation},
    }
    arrays = {"returns": returns, "steps": np.ones_like(returns), "seeds": np.array(seeds)}
    if regret is not None:
        arrays["regret"] = regret
    if candidates is not None:
        rows = [{"value": value} for value in candidates]
        result["tune"] = {"key": "algo.c", "tasks": "reported", "chosen": rows[0]["value"], "candidates": rows}
        arrays["candidates"] = np.stack(list(candidates.values()))
    if training is not None:
        result["train"] = {"iterations": len(training), "steps": 10 * len(training), "wall_seconds": 30.0}
        result["train"] |= {"compile_seconds": 3.0, "steps_per_second": 100.0}
        lines = [
            {"iteration": i + 1, "steps": 10 * (i + 1), "trial_return": list(row), "return_after": list(row)}
            for i, row in enumerate(training.tolist())
        ]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    np.savez_compressed(path / "evaluation.npz", **arrays)  # type: ignore[arg-type]
    (path / "result.json").write_text(json.dumps(result))
    return path
