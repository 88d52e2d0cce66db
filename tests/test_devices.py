"""Tasks spread over several devices, and over several processes: the same results as on one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from running import ROOT, assert_identical, checkpoint_arrays, driver, environment, result, rows, small

BARE = """
from metarl_cli import optimality
runner.Point.draw = lambda *_: None
optimality.compare = lambda *_: {}
"""

SPREAD = """
import sys
import jax, jax.numpy as jnp, numpy as np
from running import build, run_chunks, small
from metarl_cli import evaluation, runner, training
from metarl_cli.core import devices
from metarl_cli.core.adapt import map_tasks
from metarl_cli.core.errors import ConfigError

jax.config.update("jax_enable_x64", True)
algo, env, *more = sys.argv[1:]
config, learner, family = build(small(algo, env, *more))
assert jax.device_count() == 2 and devices.count() == 1
meta_batch = learner.meta_batch

def run():
    state = devices.place(training.init(learner, family, [0, 1]))
    state, rows = run_chunks(state, learner, family, [1, 1], 2)
    return state, rows, evaluation.evaluate(learner, state.learner, family, config.eval, [0, 1])

one = run()
devices.start("auto", meta_batch)
assert devices.count() == 2
two = run()
assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(two[0]))
close = lambda a, b: np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=1e-6, atol=1e-9)
data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
for a, b in zip(jax.tree.leaves(one[:2]), jax.tree.leaves(two[:2]), strict=True):
    close(data(a), data(b))
close(one[2].returns, two[2].returns)
counts = (jnp.asarray(1), jnp.asarray(2), jnp.asarray(1))
text = training.train_chunk.lower(two[0], learner, family, *counts).compile().as_text()
assert "all-reduce" in text or "all-gather" in text, "nothing is spread"

double = jax.jit(lambda x: map_tasks(lambda y: 2 * y, x, 1))
for n in (3, 4):  # 3 cannot be shared out
    np.testing.assert_array_equal(double(jnp.arange(n)), 2 * np.arange(n))
devices.start("auto", 5)
assert devices.count() == 1
try:
    devices.start("all", 5)
    raise AssertionError("5 tasks over 2 devices")
except ConfigError as error:
    assert "algo.meta_batch=5: cannot be shared out evenly over 2 devices" in str(error), error
devices.start("one", meta_batch)
assert devices.count() == 1
"""


@pytest.mark.parametrize(
    ("algo", "env", "more"),
    [("maml", "point_nav", ["algo.task_batch=1"]), ("rl2", "bandit", [])],
    ids=["maml", "rl2"],
)
def test_two_devices_give_what_one_gives(algo: str, env: str, more: list[str]) -> None:
    two = {**environment(), "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", SPREAD, algo, env, *more]
    done = subprocess.run(command, env=two, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    """Only the first writes. One that is stopped stops both, and they go on together."""
    lines = small("rl2", "bandit", "precision=float64", "iterations=4", "algo.meta_batch=8", "eval.every=2")
    plain = subprocess.run(driver(BARE, "train", *lines, f"hydra.run.dir={tmp_path / 'one'}"), env=environment())
    assert plain.returncode == 0

    def together(*words: str | Path, patch: str = "", code: int = 0) -> None:
        from engines import free_ports

        where = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_ports(1)[0]}", "JAX_NUM_PROCESSES": "2"}
        processes = [
            subprocess.Popen(
                driver(BARE + (patch if i == 1 else ""), *words),
                env={**environment(), **where, "JAX_PROCESS_ID": str(i)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=tmp_path,
            )
            for i in range(2)
        ]
        said = [process.communicate(timeout=300)[0] for process in processes]
        assert [process.returncode for process in processes] == [code, code], "\n".join(said)
        assert "compiling" in said[0] and "compiling" not in said[1]

    sys.path.append(str(ROOT / "scripts"))
    run = tmp_path / "two"
    stop = f"""
import os
report = runner.Session.report_failures
runner.CHUNK_SECONDS = 0
runner.Session.report_failures = lambda *x: (report(*x), x[0].done == 1 and os.kill(os.getpid(), {int(signal.SIGTERM)}))
"""
    together("train", *lines, "devices=all", f"hydra.run.dir={run}", patch=stop, code=143)
    together("resume", run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    one, two = checkpoint_arrays(tmp_path / "one"), checkpoint_arrays(run)
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(np.asarray(two[name], float), np.asarray(one[name], float), rtol=1e-6, atol=1e-9)
    assert [row["iteration"] for row in rows(run)] == [row["iteration"] for row in rows(tmp_path / "one")]
    assert result(run)["train"]["iterations"] == 4
    assert_identical({"keys": one["train.key"]}, {"keys": two["train.key"]})
