"""Speed of the two default runs, and of MAML-TRPO on the field's usual workload: `.venv/bin/python scripts/bench.py`.

Prints, with device and versions, for each run:

* compile seconds of `train_chunk`, cold and with the persistent cache (a fresh process and a fresh cache folder each);
* environment steps per second of whole meta-iterations, and the seconds of one split into sampling and learning;
* sampling against its floor: the bare environment under random actions plus the policy's bare matrix products;
* the meta-iteration against its floor: all its matrix products alone, of the same shapes, as often, counted in its jaxpr.

Ratios are of medians taken in turn in one process; absolute figures drift from machine to machine, so the speed of one
float32 product of 2000x64 by 64x64 stands beside them. `--cold-start` times whole processes from an empty cache instead,
`--memories` the memories of RL^2 on bandits with trials of 10, 100 and 500 pulls. Overrides (`algo=maml env=point_nav
algo.outer=trpo algo.task_batch=0`) measure that run instead of the usual ones.
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
import time
from collections import Counter
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RUNS = {
    "maml point_nav": ["algo=maml", "env=point_nav"],
    "rl2 bandit": ["algo=rl2", "env=bandit"],
    "maml-trpo point_nav": ["algo=maml", "env=point_nav", "algo.outer=trpo"],
    "maml-trpo, Fisher of 5 tasks": ["algo=maml", "env=point_nav", "algo.outer=trpo", "algo.fisher_tasks=5"],
}


def build(overrides: list[str]) -> tuple[Any, Any, Any]:
    from metarl_cli import config, runner

    composed = config.compose(overrides)
    runner.configure_jax(composed.config)
    return composed, *config.build(composed.config)


# --- compilation


def compile_seconds(overrides: list[str], cache: Path) -> float:
    """Of `train_chunk`, in a fresh process."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    command = [sys.executable, __file__, "--compile", *overrides]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def compile_here(overrides: list[str]) -> float:
    import jax
    import jax.numpy as jnp

    from metarl_cli import training

    composed, learner, family = build(overrides)
    state = training.init(learner, family, [0])
    began = time.perf_counter()
    counts = (jnp.asarray(1), jnp.asarray(composed.config.iterations), jnp.asarray(1))
    lowered = training.train_chunk.lower(state, learner, family, *counts)
    options: Any = {"xla_backend_optimization_level": 2} if jax.default_backend() == "cpu" else None  # as the runner
    lowered.compile(options)
    return time.perf_counter() - began


# --- the floor: matrix products alone


def products(jaxpr: Any, times: int = 1) -> Counter:
    """How often each `dot_general` runs: `{(lhs shape, rhs shape, dimension numbers): count}`.

    Loops count with their length; one of unknown length (the line search) counts once.
    """
    counted: Counter = Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            lhs, rhs = (x.aval.shape for x in equation.invars)
            counted[lhs, rhs, equation.params["dimension_numbers"]] += times
        length = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        branches = [products(inner, times * length) for inner in _inner(equation)]
        if equation.primitive.name == "cond":  # one of them runs: the costliest
            branches = [max(branches, key=flops)]
        for branch in branches:
            counted.update(branch)
    return counted


def _inner(equation: Any) -> list[Any]:
    found = []
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else [value]:
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                found.append(inner)
    return found


def flops(counted: Counter) -> int:
    total = 0
    for (lhs, rhs, ((contracted, _), (batched, _))), times in counted.items():
        summed = math.prod(lhs[i] for i in contracted)
        shared = math.prod(lhs[i] for i in batched)
        total += 2 * times * math.prod(lhs) * math.prod(rhs) // (summed * shared)
    return total


def bare_products(counted: Counter) -> Any:
    """A jitted function that does these products and nothing else."""
    import jax
    import jax.numpy as jnp

    operands = {
        shapes: [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes[:2])] for shapes in counted
    }

    def run(operands):
        total = jnp.zeros(())
        for shapes, times in counted.items():
            lhs, rhs = operands[shapes]

            def once(carry, _, rhs=rhs, dimensions=shapes[2]):
                # The next product depends on this one, so that none is left out; only one number is touched.
                lhs, total = carry
                out = jax.lax.dot_general(lhs, rhs, dimensions)
                first = out[(0,) * out.ndim]
                lhs = jax.lax.dynamic_update_slice(lhs, jnp.reshape(first * 1e-30, (1,) * lhs.ndim), (0,) * lhs.ndim)
                return (lhs, total + first), None

            (_, total), _ = jax.lax.scan(once, (lhs, total), None, length=times)
        return total

    return jax.jit(run).lower(operands).compile(), operands


# --- steady state


def measure(overrides: list[str], rounds: int) -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    from metarl_cli.core.rollout import rollout, spaces
    from metarl_cli.core.types import Batch

    _, learner, family = build(overrides)
    key = jax.random.key(0)
    state = jax.jit(lambda k, f: learner.init(k, f))(key, family)

    def update(state, key, learner, family):
        return learner.update(state, key, family, jnp.zeros(()))

    def sample(state, key, learner, family):
        return learner.sample(state, key, family)

    spec = spaces(family)
    sampled = jax.eval_shape(sample, state, key, learner, family)
    shape = (sampled if isinstance(sampled, Batch) else sampled[0]).reward.shape
    lanes, horizon = math.prod(shape[:-1]), shape[-1]

    def environment(key, family):
        """As many steps as `sample` makes, random actions."""

        def act(carry, observation, previous, key):
            action = jax.random.randint(key, (), 0, spec.action) if spec.discrete else jax.random.normal(key, (spec.action,))
            return carry, action, ()

        def lane(key):
            task = family.sample(key)
            _, batch = rollout(key, family, task, act, (), spec, horizon // family.horizon)
            return jnp.sum(batch.reward)

        return jax.vmap(lane)(jax.random.split(key, lanes))

    of_update = products(jax.make_jaxpr(update)(state, key, learner, family).jaxpr)
    of_sample = products(jax.make_jaxpr(sample)(state, key, learner, family).jaxpr)
    floor_update, operands_update = bare_products(of_update)
    floor_sample, operands_sample = bare_products(of_sample)
    compiled = {
        "update": (jax.jit(update).lower(state, key, learner, family).compile(), (state, key, learner, family)),
        "sample": (jax.jit(sample).lower(state, key, learner, family).compile(), (state, key, learner, family)),
        "environment": (jax.jit(environment).lower(key, family).compile(), (key, family)),
        "products of update": (floor_update, (operands_update,)),
        "products of sample": (floor_sample, (operands_sample,)),
    }
    times: dict[str, list[float]] = {name: [] for name in compiled}
    for turn in range(rounds + 1):
        for name, (function, arguments) in compiled.items():
            began = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            if turn:  # the first one warms up
                times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return medians | {"steps": lanes * horizon, "gflop": flops(of_update) / 1e9}


def product_speed() -> float:
    """GFLOP/s of one float32 product of 2000x64 by 64x64."""
    import jax

    x, w = jax.random.normal(jax.random.key(0), (2000, 64)), jax.random.normal(jax.random.key(1), (64, 64))

    def many(x, w):
        return jax.lax.fori_loop(0, 2000, lambda _, x: x @ w * 0.125, x)

    run = jax.jit(many).lower(x, w).compile()
    times = []
    for _ in range(6):
        began = time.perf_counter()
        run(x, w).block_until_ready()
        times.append(time.perf_counter() - began)
    return 2000 * 2 * 2000 * 64 * 64 / statistics.median(times[1:]) / 1e9


# --- memories


def compare_memories(lengths: list[int], rounds: int) -> None:
    """Steps per second of sampling and of whole meta-iterations of 12,800 steps or so, one minibatch, one epoch."""
    import jax
    import jax.numpy as jnp

    from metarl_cli import catalogue

    print("| memory | parameters |" + "".join(f" n={n}: sampling | meta-iteration | compile |" for n in lengths))
    print("|---" * (2 + 3 * len(lengths)) + "|")
    for memory in sorted(catalogue.groups()["algo/memory"]):
        row, size = [], 0
        for n in lengths:
            batch = f"algo.meta_batch={max(16, 12_800 // n)}"
            once = ["algo.epochs=1", "algo.minibatches=1"]
            _, learner, family = build(["algo=rl2", "env=bandit", f"env.n={n}", f"algo/memory={memory}", batch, *once])
            key = jax.random.key(0)
            state = jax.jit(lambda k, f, learner=learner: learner.init(k, f))(key, family)
            began = time.perf_counter()
            functions = [
                jax.jit(lambda s, k, learner, f: learner.sample(s, k, f)),
                jax.jit(lambda s, k, learner, f: learner.update(s, k, f, jnp.zeros(()))),
            ]
            compiled = [function.lower(state, key, learner, family).compile() for function in functions]
            seconds = time.perf_counter() - began
            for function in compiled:
                times = []
                for _ in range(rounds + 1):
                    start = time.perf_counter()
                    jax.block_until_ready(function(state, key, learner, family))
                    times.append(time.perf_counter() - start)
                row.append(f"{learner.meta_batch * n / statistics.median(times[1:]):,.0f}")
            row.append(f"{seconds:.1f} s")
            size = sum(x.size for x in jax.tree.leaves(state.params))
            jax.clear_caches()
        print(f"| {memory} | {size:,} |" + "".join(f" {cell} |" for cell in row), flush=True)


# --- whole processes


def cold_start(overrides: list[str]) -> None:
    """From an empty cache to the figures, and when training first reached -18 after adaptation."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        command = [str(Path(sys.executable).with_name("metarl")), "train", *overrides, f"hydra.run.dir={run}"]
        began = time.time()
        subprocess.run(command, env=environment, capture_output=True, check=True)
        wall = time.time() - began
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        result = json.loads((run / "result.json").read_text())
        before_training = wall - result["train"]["wall_seconds"]  # imports, and the figures at the end
        reached = [row["seconds"] for row in rows if row["return_after"][0] >= -18]
        print(f"{' '.join(overrides)}: {wall:.1f} s from a cold start to the figures")
        if reached:
            print(f"  -18 after adaptation in training: {reached[0] + before_training:.1f} s at the latest")
        curve = result["evaluation"]["test"]["curve"]
        print("  held-out return:", ", ".join(f"{point['mean']:.2f}" for point in curve))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; medians are printed")
    parser.add_argument("--only", choices=RUNS, help="one of the runs")
    parser.add_argument("--cold-start", action="store_true", help="time whole processes from an empty cache")
    parser.add_argument("--memories", type=int, nargs="*", metavar="N", help="the memories on bandits of N pulls instead")
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    if arguments.compile:
        print(compile_here(overrides))
        return
    if arguments.cold_start:
        cold_start(overrides or RUNS["maml point_nav"])
        return

    import jax

    from metarl_cli import runner

    build(RUNS["maml point_nav"])
    about = runner.provenance()
    print("device:", about["device"], "on", len(os.sched_getaffinity(0)), "cores")
    print("versions:", {name: about["versions"][name] for name in ("python", "metarl", "jax", "jaxlib", "gymnax")})
    print("revision:", about["git_revision"])
    print(f"one float32 product of 2000x64 by 64x64: {product_speed():.0f} GFLOP/s")
    if arguments.memories is not None:
        compare_memories(arguments.memories or [10, 100, 500], arguments.rounds)
        return
    runs = {" ".join(overrides): overrides} if overrides else RUNS
    for name, overrides in runs.items():
        if arguments.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = (compile_seconds(overrides, Path(cache)) for _ in range(2))
        m = measure(overrides, arguments.rounds)
        jax.clear_caches()
        learning = m["update"] - m["sample"]
        print(f"\n{name}: {m['steps']:,.0f} environment steps and {m['gflop']:.2f} GFLOP of products a meta-iteration")
        print(f"  compile             {cold:6.2f} s cold, {warm:.2f} s with the persistent cache")
        print(f"  meta-iteration      {m['update']:6.3f} s, {m['steps'] / m['update']:,.0f} steps/s")
        print(f"    sampling          {m['sample']:6.3f} s, {m['steps'] / m['sample']:,.0f} steps/s")
        print(f"    learning          {learning:6.3f} s")
        floor = m["environment"] + m["products of sample"]
        print(f"  sampling / (bare environment + bare products)   {m['sample'] / floor:.2f}")
        print(f"    bare environment  {m['environment']:6.3f} s, {m['steps'] / m['environment']:,.0f} steps/s")
        print(f"  meta-iteration / its bare products              {m['update'] / m['products of update']:.2f}")
        print(f"    bare products     {m['products of update']:6.3f} s, {m['gflop'] / m['products of update']:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
