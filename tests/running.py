"""Whole runs for the tests: small ones of any algorithm on any family, and what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import plugin_learner
import pytest

from metarl_cli import catalogue, checkpoint, cli, config, runner, sweep, training
from metarl_cli.core.interfaces import MetaLearner, TaskFamily

ROOT = Path(__file__).parents[1]
GROUPS = catalogue.groups()
CORE = ("bandit", "point_nav")  # the two families that differ most: every algorithm trains on them, all others take turns
TRAINED = list(catalogue.trained(GROUPS["algo"]))
PAIRS = [(algo, env) for env in CORE for algo in TRAINED]
OTHER_PAIRS = [(TRAINED[i % len(TRAINED)], env) for i, env in enumerate(GROUPS["env"]) if env not in CORE]
TIMING = ("seconds", "steps_per_second")  # all that may differ between two runs of the same seed

# Values that make a run small, for whatever algorithm or family has the key: so that a new YAML file is tested, and
# quickly, without a test of its own.
SMALL = {
    "devices": "one",
    "algo.meta_batch": "4",
    "algo.minibatches": "2",
    "algo.episodes": "2",
    "algo.epochs": "2",
    "algo.hidden": "[8]",
    "algo.memory.features": "8",
    "algo.lifetime": "5",
    "algo.units": "4",
    "env.horizon": "6",
    "env.episodes": "2",
    "env.n": "4",
    "eval.tasks": "6",
    "eval.adapt.episodes": "2",
}


def small(algo: str, env: str, *more: str) -> list[str]:
    """Overrides for a run of two seeds and two iterations, unless `more` says otherwise."""
    known = catalogue.defaults({"algo": algo, "env": env})
    chosen = [f"algo={algo}", f"env={env}", "seeds=2", "iterations=2"]
    chosen += [f"{key}={value}" for key, value in SMALL.items() if key in known]
    given = {line.partition("=")[0] for line in more}
    return [line for line in chosen if line.partition("=")[0] not in given] + list(more)


def own_configs(directory: Path) -> Path:
    """A user's config directory with the algorithm `walker` of `plugin_learner`."""
    file = directory / "own" / "algo" / "walker.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(plugin_learner.YAML)
    return file.parents[1]


def walker(*more: str) -> list[str]:
    """`small` for it, on bandits."""
    given = {line.partition("=")[0] for line in more}
    chosen = ["algo=walker", "env=bandit", "plugins=[plugin_learner]", "seeds=3", "iterations=4", "env.n=4", "eval.tasks=6"]
    return [line for line in chosen if line.partition("=")[0] not in given] + list(more)


@contextmanager
def hasty_compiler() -> Iterator[None]:
    """Compiles in a third of the time, the same computation. What it compiles is as deterministic as ever."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def no_figures(patch: pytest.MonkeyPatch) -> None:
    """Runs draw none, a second each, and are finished without."""
    patch.setattr(runner.Point, "draw", lambda *_: None)
    for module in (runner, sweep):
        patch.setattr(module, "drawn", lambda *_: True)


def metarl(*words: str | Path) -> int:
    """One command line in this process."""
    return cli.main([str(word) for word in words])


def train(run: Path, lines: list[str]) -> Path:
    """A run that has to succeed. Its directory also holds the user's own configs, in a sibling of `run`."""
    options = [f"--config-dir={own_configs(run.parent)}"] if "algo=walker" in lines else []
    assert metarl("train", *options, *lines, f"hydra.run.dir='{run}'") == 0
    return run


def environment() -> dict[str, str]:
    """For a process of its own, which finds the plug-in and compiles as this one does."""
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    hasty = str(jax.config.values["jax_disable_most_optimizations"])
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "120", "JAX_DISABLE_MOST_OPTIMIZATIONS": hasty}


def build(lines: list[str], config_dir: Path | None = None) -> tuple[config.TrainConfig, MetaLearner, TaskFamily]:
    composed = config.compose(lines, config_dir)
    return (composed.config, *config.build(composed.config))


def run_chunks(
    state: training.TrainState,
    learner: Any,
    family: Any,
    chunks: list[int],
    total: int,
    log_every: int = 1,
    swept: training.Swept | None = None,
) -> tuple[training.TrainState, dict[str, np.ndarray]]:
    """The state afterwards and all closed windows of metrics, `[R, S]`."""
    parts, done = [], int(state.iteration)
    for n in chunks:
        counts = (jnp.asarray(n), jnp.asarray(total), jnp.asarray(log_every))
        state, rows = training.train_chunk(state, learner, family, *counts, swept)
        closed = (done + n) // log_every - done // log_every
        done += n
        closed += done == total and done % log_every > 0
        parts.append({name: np.asarray(x[:closed]) for name, x in rows.items()})
    return state, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def assert_identical(actual: Any, expected: Any) -> None:
    """Bit by bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, x), y in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        name = jax.tree_util.keystr(path)
        assert x.dtype == y.dtype, name
        assert x.shape == y.shape, name
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), name


# --- run directories


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def rows(run: Path, timing: bool = False) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, all of them complete."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert all(line.endswith("\n") for line in lines)
    return [{k: v for k, v in json.loads(line).items() if timing or k not in TIMING} for line in lines]


def checkpoint_arrays(run: Path, name: checkpoint.Name = "last") -> dict[str, Any]:
    """Every array of a checkpoint, read without knowing what it is of."""
    folder = run / "checkpoints" / name / str(checkpoint.latest(run, name))
    leaves = json.loads((folder / "manifest.json").read_text())["leaves"]
    with checkpoint._quiet_orbax() as ocp, contextlib.closing(ocp.PyTreeCheckpointHandler(use_zarr3=True)) as handler:
        how = {leaf: ocp.RestoreArgs(restore_type=np.ndarray) for leaf in leaves}
        return handler.restore((folder / "arrays").absolute(), args=ocp.args.PyTreeRestore(restore_args=how))


def assert_same_run(actual: Path, expected: Path) -> None:
    """Equal bit by bit in all that a run computes: states, metrics, evaluation."""
    names: list[checkpoint.Name] = ["last", "best"]
    for name in names:
        assert checkpoint.latest(actual, name) == checkpoint.latest(expected, name)
        if checkpoint.latest(expected, name) is not None:
            assert_identical(checkpoint_arrays(actual, name), checkpoint_arrays(expected, name))
    assert rows(actual) == rows(expected)
    with np.load(actual / "evaluation.npz") as a, np.load(expected / "evaluation.npz") as b:
        assert_identical(dict(a), dict(b))
    for key in ("status", "seeds", "failed_seeds", "best", "evaluation"):
        assert result(actual)[key] == result(expected)[key], key
    for key in ("iterations", "steps"):
        assert result(actual)["train"][key] == result(expected)["train"][key], key


def tree(directory: Path) -> list[str]:
    """Every path below a directory."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def driver(patch: str, *words: str | Path) -> list[str]:
    """A command that runs `metarl WORDS` in a process of its own, after the Python code of `patch`."""
    code = f"import sys\nfrom metarl_cli import cli, logs, runner\n{patch}\nsys.exit(cli.main(sys.argv[1:]))"
    return [sys.executable, "-c", code, *map(str, words)]
