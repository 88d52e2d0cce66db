"""What every meta-learner of `configs/algo/` has to keep, on discrete and on continuous actions."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import build, eval_settings, update, walk

from metarl_cli import catalogue, config
from metarl_cli.core.interfaces import MetaLearner
from metarl_cli.core.settings import Settings

# Classical learners, in baselines/, have nothing to train.
TRAINED = sorted(catalogue.trained(catalogue.groups()["algo"]))
# Values that make it quick, for whatever algorithm has the key.
SMALL = {
    "meta_batch": 4,
    "minibatches": 2,
    "episodes": 2,
    "hidden": [3],
    "epochs": 2,
    "memory.features": 4,
    "lifetime": 6,
    "units": 3,
}
SWITCHES = [(name, {}) for name in TRAINED] + [("maml", {"outer": "trpo"}), ("maml", {"outer": "vpg"})]
SWITCHES += [
    ("rl2", {"outer": "a2c", "critic": "separate", "sees_time": "true"}),
    ("rl2", {"outer": "reinforce", "critic": "none"}),
    ("rl2", {"policy_sees_state": "true", "hypernetwork": 2}),
]


@cache
def _learner(name: str, discrete: bool, switches: tuple) -> Any:
    known = catalogue.defaults({"algo": name})
    small = {key.replace(".", "__"): value for key, value in SMALL.items() if f"algo.{key}" in known}
    return build(name, walk(discrete), **(small | dict(switches)))


@pytest.fixture(params=SWITCHES, ids=lambda p: "-".join([p[0], *map(str, p[1].values())]))
def algo(request) -> tuple[str, tuple]:
    return request.param[0], tuple(request.param[1].items())


@pytest.mark.parametrize("discrete", [True, False], ids=["discrete", "continuous"])
def test_every_parameter_is_trained(algo, discrete):
    """Two meta-iterations change each number of each parameter: its gradient was not 0 at least once."""
    learner, family = _learner(algo[0], discrete, algo[1]), walk(discrete)
    assert isinstance(learner, MetaLearner)
    state = start = jax.jit(lambda key: learner.init(key, family))(jax.random.key(0))
    for i in range(2):
        state, metrics = update(learner, state, jax.random.key(i), family)
        assert {"return_before", "return_after", "trial_return", "steps"} <= metrics.keys()
        assert all(np.shape(x) == () and np.isfinite(x) for x in metrics.values())
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, start)
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, start)
    for (path, before), after in zip(jax.tree.leaves_with_path(start.params), jax.tree.leaves(state.params), strict=True):
        assert np.all(before != after), jax.tree_util.keystr(path)
        assert np.all(np.isfinite(after)), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", TRAINED)
def test_one_key_one_result(name):
    learner, family = _learner(name, True, ()), walk(True)
    init = jax.jit(lambda key: learner.init(key, family))
    first, again, other = (update(learner, init(jax.random.key(0)), jax.random.key(k), family) for k in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert any(np.any(x != y) for x, y in zip(jax.tree.leaves(first[0]), jax.tree.leaves(other[0]), strict=True))
    starts = (jax.tree.leaves(init(jax.random.key(k))) for k in (0, 9))
    assert any(np.any(x != y) for x, y in zip(*starts, strict=True))


@pytest.mark.parametrize("name", TRAINED)
def test_a_trial_lives_in_the_task_it_is_given(name):
    """Shapes, padding, and that a trial is a function of its key and its task."""
    learner, family = _learner(name, True, ()), walk(True)
    plan = learner.plan(family, eval_settings(adapt__episodes=2, adapt__steps=1))
    state = jax.jit(lambda key: learner.init(key, family))(jax.random.key(0))
    tasks = jax.vmap(family.sample)(jax.random.split(jax.random.key(1), 5))
    live = jax.jit(jax.vmap(lambda key, task: learner.trial(state, key, family, task, plan)))
    trial = live(jax.random.split(jax.random.key(2), 5), tasks)
    shape = (5, plan.points, plan.episodes)
    assert trial.returns.shape == trial.steps.shape == shape
    assert trial.batch.reward.shape == (*shape, family.horizon)
    length = np.minimum(tasks.length, family.horizon)
    np.testing.assert_array_equal(trial.steps, np.broadcast_to(length[:, None, None], shape))
    valid = np.arange(family.horizon) < np.asarray(length)[:, None, None, None]
    np.testing.assert_array_equal(trial.batch.valid, np.broadcast_to(valid, trial.batch.valid.shape))
    position = trial.batch.observation[..., 0] + 0.5 * (trial.batch.action - 1)
    reward = -np.abs(position - np.asarray(tasks.goal)[:, None, None, None])
    np.testing.assert_allclose(trial.returns, np.where(trial.batch.valid, reward, 0).sum(-1), rtol=1e-5, atol=1e-5)


def floats(section: Settings) -> list[float]:
    found = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Settings):
            found += floats(value)
        elif isinstance(value, float):
            found.append(value)
    return found


@pytest.mark.parametrize("name", TRAINED)
def test_every_float_is_a_traced_leaf(name):
    """Many settings can run under one `vmap`: the floats of the config are the leaves of the learner, all else is static."""
    learner = build(name, walk(True))
    settings = floats(config.compose([f"algo={name}", f"env={untuned(name)}"]).config.algo)
    leaves = jax.tree.leaves(learner)
    assert sorted(leaves) == sorted(settings) and all(isinstance(x, float) for x in leaves)
    hash(jax.tree.structure(learner))


def untuned(name: str) -> str:
    groups = catalogue.groups()
    return next(env for env in groups["env"] if f"{name}_{env}" not in groups["tuned"])


@pytest.mark.parametrize("name", TRAINED)
def test_settings_side_by_side(float64, name):
    """Two values of a hyper-parameter under one `vmap` give what each gives alone."""
    learner, family = _learner(name, True, ()), walk(True)
    both = dataclasses.replace(learner, lr=jnp.array([1e-3, 1e-2]))
    axes = dataclasses.replace(jax.tree.map(lambda _: None, learner), lr=0)
    state = jax.jit(lambda key: learner.init(key, family))(jax.random.key(0))

    def params(learner):
        return learner.update(state, jax.random.key(1), family, jnp.zeros(()))[0].params

    together = jax.jit(jax.vmap(params, in_axes=(axes,)))(both)
    for i, lr in enumerate((1e-3, 1e-2)):
        alone = jax.jit(params)(dataclasses.replace(learner, lr=lr))
        for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(x[i], y, rtol=1e-6, atol=1e-10)
