"""Learners of an update rule: the plain learners that they contain, their meta-gradients, lives that end, and the chain."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import running
from gymnax.environments import spaces as gymnax_spaces
from jax.flatten_util import ravel_pytree
from probes import assert_close, build, eval_settings, finite_differences, one_step, update, walk
from test_returns import loop_gae

from metarl_cli import config, runner, training
from metarl_cli.algos.lpg import LPG
from metarl_cli.core.adapt import InnerLoop, policy_data
from metarl_cli.core.returns import Normaliser
from metarl_cli.core.types import pytree

TINY: dict[str, Any] = {"hidden": [3], "meta_batch": 3, "episodes": 2, "inner_steps": 2, "lifetime": 6, "task_batch": 0}
RULE: dict[str, Any] = {"units": 3, "embedding": 2, "predictions": 3}
RAW = Normaliser(None, None)


def learner_of(algo: str, discrete: bool = True, **settings: Any) -> Any:
    return build(algo, walk(discrete), **(TINY | (RULE if algo == "lpg" else {}) | settings))


def lived(learner: Any, discrete: bool = True, seed: int = 0) -> tuple[Any, Any, Any]:
    """A state, and what its agents live through: agents afterwards and `[B, N + 1, K, T]`."""
    family = walk(discrete)
    state = jax.jit(lambda key: learner.init(key, family))(jax.random.key(seed))
    if isinstance(learner, LPG):  # large enough to matter
        state = state._replace(params=jax.tree.map(lambda x: 1.5 * x + 0.1, state.params))

    def live(life, key):
        return learner.live(state.params, life.agent, key, family, life.task, learner.inner_steps, learner.episodes)

    agents, batch = jax.jit(jax.vmap(live))(state.lives, jax.random.split(jax.random.key(seed + 1), learner.meta_batch))
    return state, agents, batch


def first(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)


# --- the plain learners inside


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_with_frozen_meta_parameters_it_is_the_plain_actor_critic(float64, optimizer):
    """Step for step, over two meta-iterations of two updates, against one written here."""
    settings = {"gamma": 0.8, "lam": 0.6, "entropy": 0.05, "inner_lr": 0.1, "inner_optimizer": optimizer, "lifetime": 1000}
    learner = replace(learner_of("meta_gradient", **settings), lr=0.0)
    family, network = walk(True), learner.network
    start = state = jax.jit(lambda key: learner.init(key, family))(jax.random.key(0))
    transform = optax.adam(0.1, eps_root=1e-8) if optimizer == "adam" else optax.sgd(0.1)

    @jax.jit
    def live(state, key):
        life = first(state.lives)
        return learner.live(state.params, life.agent, key, family, life.task, 2, 2)[1]

    @jax.jit
    def step(params, moments, one, advantage, target):
        def loss(p):
            policy, v = network.apply(p, one.observation)
            m, n = one.valid, one.valid.sum()
            actor = -jnp.sum(jnp.where(m, policy.log_prob(one.action) * advantage, 0)) / n
            critic = jnp.sum(jnp.where(m, (v[..., 0] - target) ** 2, 0)) / n / 2
            return actor + learner.value * critic - 0.05 * jnp.sum(jnp.where(m, policy.entropy(), 0)) / n

        updates, moments = transform.update(jax.grad(loss)(params), moments, params)
        return optax.apply_updates(params, updates), moments

    params = first(start.lives.agent.params)
    moments = transform.init(params)
    for i in range(2):
        key = jax.random.key(i)
        batch = live(state, jax.random.split(jax.random.split(key, 3)[1], 3)[0])  # of the first agent
        for n in range(2):
            one = jax.tree.map(lambda x, n=n: np.asarray(x[n]), batch)
            value = np.where(one.valid, network.apply(params, one.observation)[1][..., 0], 0)
            after = np.concatenate([value[:, 1:], np.zeros((2, 1))], axis=1)
            done = one.terminated | one.truncated
            raw = np.stack([loop_gae(*x, 0.8, 0.6) for x in zip(one.reward, value, after, done, done, strict=True)])
            raw = np.where(one.valid, raw, 0)
            advantage = (raw - raw[one.valid].mean()) / raw[one.valid].std()
            params, moments = step(params, moments, one, advantage, value + raw)
        state, _ = update(learner, state, key, family)
        assert_close(state.params, start.params, rtol=0, atol=0)
        assert_close(first(state.lives.agent.params), params, rtol=1e-6, atol=1e-9)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, params, first(start.lives.agent.params))) > 0.1


@pytree
class Told(LPG):
    """Whose policy target is the advantage."""

    def targets(self, eta: Any, params: Any, batch: Any) -> Any:
        data = policy_data(batch.observation, batch, RAW, 0.9, 0.7)
        return data.advantage, jnp.zeros((*batch.valid.shape, self.network.outputs))


@pytest.mark.parametrize("discrete", [True, False], ids=["discrete", "continuous"])
def test_lpg_told_the_advantage_is_reinforce(float64, discrete):
    learner = learner_of("lpg", discrete, inner_optimizer="sgd", inner_lr=0.3)
    told = Told(**{name: getattr(learner, name) for name in learner.__dataclass_fields__})
    state, _, batch = lived(told, discrete)
    agent, one = first(state.lives.agent), first(first(batch))
    new, _ = jax.jit(told.update_agent)(state.params, agent, one)
    inner = InnerLoop(lr=0.3, gamma=0.9, lam=0.7, policy=told.network.policy)
    policy = agent.params["policy"]
    expected = inner.step(inner.start(policy), inner.data(one.observation, one, RAW)).params
    assert_close(new.params["policy"], expected, rtol=1e-9, atol=1e-12)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, expected, policy)) > 0.01


def average(x: Any, valid: Any) -> float:
    return float(np.sum(np.where(valid, x, 0)) / np.sum(valid))


def entropy(logits: Any) -> np.ndarray:
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return -(p * np.log(p)).sum(-1)


def test_what_a_rule_is_learned_for(float64):
    """Term by term: what theta_N earns, its entropy, and the regularisers of both targets, a mean over the updates."""
    weights = {"policy_l2": 0.3, "prediction_l2": 0.2, "prediction_entropy": 0.4}
    learner = learner_of("lpg", outer_entropy=0.7, outer_gamma=0.6, inner_optimizer="sgd", inner_lr=0.3, **weights)
    state, _, batch = lived(learner)
    eta, agent, episodes = state.params, first(state.lives.agent), first(batch)
    actual = jax.jit(learner.loss)(eta, (agent, episodes))
    costs = []
    for n in range(2):
        one = jax.tree.map(lambda x, n=n: x[n], episodes)
        pi_hat, y_hat = jax.jit(learner.targets)(eta, agent.params, one)
        _, y = learner.network.apply(agent.params, one.observation)
        regularisers = 0.3 * pi_hat**2 + 0.2 * (y_hat**2).mean(-1) - 0.4 * entropy(y)
        costs.append(average(regularisers, one.valid))
        agent = jax.jit(learner.update_agent)(eta, agent, one)[0]
    last = jax.tree.map(lambda x: x[2], episodes)
    logits = np.asarray(learner.network.apply(agent.params, last.observation)[0].logits)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    taken = np.take_along_axis(log_p, np.asarray(last.action)[..., None], -1)[..., 0]
    earned = average(taken * policy_data(last.observation, last, RAW, 0.6, 1.0).advantage, last.valid)
    expected = np.mean(costs) - earned - 0.7 * average(entropy(logits), last.valid)
    np.testing.assert_allclose(actual, expected, rtol=1e-9)
    assert min(abs(earned), *map(abs, costs)) > 1e-3


@pytree
class Aimed(LPG):
    """Whose targets are given: none for the policy, always the same for the prediction."""

    def targets(self, eta: Any, params: Any, batch: Any) -> Any:
        return jnp.zeros(batch.valid.shape), jnp.broadcast_to(jnp.array([1.0, -2.0, 0.5]), (*batch.valid.shape, 3))


def test_predictions_move_towards_their_target(float64):
    """theta' = theta - lr alpha_y grad KL(y || y_hat), the prediction first, written out."""
    learner = learner_of("lpg", inner_optimizer="sgd", inner_lr=0.3, prediction=0.7)
    aimed = Aimed(**{name: getattr(learner, name) for name in learner.__dataclass_fields__})
    state, _, batch = lived(aimed)
    agent, one = first(state.lives.agent), first(first(batch))
    aim = jnp.broadcast_to(jax.nn.log_softmax(jnp.array([1.0, -2.0, 0.5])), (*one.valid.shape, 3))

    def divergence(params):
        y = jax.nn.log_softmax(learner.network.apply(params, one.observation)[1])
        return jnp.sum(jnp.where(one.valid, jnp.sum(jnp.exp(y) * (y - aim), -1), 0)) / one.valid.sum()

    new = jax.jit(aimed.update_agent)(state.params, agent, one)[0].params
    step = jax.grad(divergence)(agent.params)
    assert_close(new, jax.tree.map(lambda p, g: p - 0.3 * 0.7 * g, agent.params, step), rtol=1e-9, atol=1e-12)
    assert optax.tree.norm(step) > 0.01


def test_what_a_rule_is_told(float64):
    """(r, d, gamma, pi(a|s), phi(y_t), phi(y_{t+1})), by a plain loop; nothing of the next state over an end."""
    learner = learner_of("lpg", gamma=0.77)
    state, _, batch = lived(learner)
    agent, one = first(state.lives.agent), first(first(batch))
    one = one._replace(terminated=jnp.array([[0, 1, 0, 0], [0, 0, 0, 0]], bool), valid=jnp.ones((2, 4), bool))
    one = one._replace(truncated=jnp.zeros((2, 4), bool).at[:, 3].set(True))
    rule, eta = learner.rule, state.params
    policy, y = learner.network.apply(agent.params, one.observation)
    y, p = np.asarray(jax.nn.softmax(y)), np.asarray(jax.nn.softmax(policy.logits))
    actual = jax.jit(learner.targets)(eta, agent.params, one)

    def phi(y):
        return float(rule.embed.apply(eta["embed"], y)[0])

    for k in range(2):
        carry = jnp.zeros(rule.units)
        for t in reversed(range(4)):
            end = bool(one.terminated[k, t] | one.truncated[k, t])
            carry = jnp.zeros(rule.units) if end else carry
            after = 0.0 if end else phi(y[k, t + 1])
            x = [one.reward[k, t], float(end), 0.77, p[k, t, one.action[k, t]], phi(y[k, t]), after]
            carry, out = rule.backward.apply(eta["backward"], carry, jnp.array(x))
            np.testing.assert_allclose(actual[0][k, t], out[0], rtol=1e-9)
            np.testing.assert_allclose(actual[1][k, t], out[1:], rtol=1e-9)


# --- the meta-gradient


@pytest.mark.parametrize("discrete", [True, False], ids=["discrete", "continuous"])
@pytest.mark.parametrize("algo", ["meta_gradient", "lpg"])
def test_meta_gradient_against_finite_differences(float64, algo, discrete):
    """Through two updates, of Adam and of plain gradient descent; every meta-parameter has a gradient, and `remat` changes
    nothing."""
    learner = learner_of(algo, discrete, inner_optimizer="adam" if discrete else "sgd", inner_lr=0.1)
    state, _, batch = lived(learner, discrete)
    flat, unravel = ravel_pytree(state.params)

    def loss(x):
        return jnp.mean(jax.vmap(lambda life: learner.loss(unravel(x), life))((state.lives.agent, batch)))

    gradient = jax.jit(learner.gradient)(state.params, state.lives, batch)
    again = jax.jit(replace(learner, remat=True).gradient)(state.params, state.lives, batch)
    assert_close(again, gradient, rtol=1e-8, atol=1e-12)
    expected = finite_differences(loss, flat)
    np.testing.assert_allclose(ravel_pytree(gradient)[0], expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert np.any(leaf != 0), jax.tree_util.keystr(path)


def test_truncation_changes_only_what_it_must(float64):
    """A window of the last updates has the same value, and the gradient of the rule where it is used within the window."""
    learner = learner_of("lpg", inner_steps=4, policy_l2=0.0, prediction_l2=0.0, prediction_entropy=0.0)
    state, _, batch = lived(learner)
    agent, episodes = first(state.lives.agent), first(batch)
    early, late = (jax.tree.map(lambda x, part=part: x[part], episodes) for part in (slice(2), slice(2, None)))
    eta = state.params

    def apart(before, within):
        return learner.loss(within, (learner.replay(before, agent, early)[0], late))

    @jax.jit
    def compute(eta):
        middle = learner.replay(eta, agent, early)[0]
        whole = jax.value_and_grad(learner.loss)(eta, (agent, episodes))
        return whole, jax.value_and_grad(apart, argnums=(0, 1))(eta, eta), jax.grad(learner.loss)(eta, (middle, late))

    (whole, full), (value, (before, within)), truncated = compute(eta)
    np.testing.assert_allclose(value, whole, rtol=1e-10)
    assert_close(truncated, within, rtol=1e-9, atol=1e-14)
    assert_close(jax.tree.map(jnp.add, before, within), full, rtol=1e-8, atol=1e-13)
    assert optax.tree.norm(before) > 1e-3 * optax.tree.norm(within)


def test_a_rule_sees_the_future_of_an_episode_and_nothing_else(float64):
    learner = learner_of("lpg")
    state, _, batch = lived(learner)
    agent, one = first(state.lives.agent), first(first(batch))
    one = one._replace(
        terminated=jnp.array([[0, 1, 0, 0], [0, 0, 0, 0]], bool),
        truncated=jnp.array([[0, 0, 0, 0], [0, 0, 0, 1]], bool),
        valid=jnp.array([[1, 1, 0, 0], [1, 1, 1, 1]], bool),
    )

    targets = jax.jit(learner.targets)

    def changed(k, t):
        other = one._replace(reward=one.reward.at[k, t].add(1.0))
        pair = [targets(state.params, agent.params, x) for x in (one, other)]
        return np.abs(pair[0][0] - pair[1][0]) > 1e-9

    np.testing.assert_array_equal(changed(1, 2), [[0, 0, 0, 0], [1, 1, 1, 0]])
    np.testing.assert_array_equal(changed(0, 1), [[1, 1, 0, 0], [0, 0, 0, 0]])
    assert not changed(0, 2)[0, :2].any() and not changed(0, 2)[1].any()  # after the end


def test_evolution_strategies_agree_with_the_gradient(float64):
    """Where the fitness is smooth and known: J = -|eta - goal|^2, in place of what agents earn."""
    learner = replace(learner_of("meta_gradient", meta_batch=4000, episodes=1, outer="es"), sigma=0.05)
    goal = jnp.array([0.5, -1.0, 0.3, 0.8])
    eta = {"entropy": jnp.zeros(()), "gamma": jnp.zeros(()), "lam": jnp.zeros(()), "lr": jnp.zeros(())}

    @pytree
    class Known(type(learner)):
        def live(self, eta, agent, key, family, task, updates, episodes):
            reward = -jnp.sum((ravel_pytree(eta)[0] - goal) ** 2)
            one = jnp.ones((updates + 1, 1, 1))
            return agent, Episodes(reward * one, one > 0)

    known = Known(**{name: getattr(learner, name) for name in learner.__dataclass_fields__})
    lives = Lives(agent=jnp.zeros(4000), task=jnp.zeros(4000))
    estimate = ravel_pytree(jax.jit(lambda key: known.evolve(eta, lives, key, walk(True)))(jax.random.key(0)))[0]
    truth = ravel_pytree(jax.grad(lambda eta: jnp.sum((ravel_pytree(eta)[0] - goal) ** 2))(eta))[0]
    cosine = estimate @ truth / jnp.linalg.norm(estimate) / jnp.linalg.norm(truth)
    assert cosine > 0.99


@pytest.mark.parametrize("outer", ["gradient", "es"])
def test_a_rule_gets_better(outer):
    """Of two actions one pays 1: who learns faster earns more, so the agents' learning rate has to grow."""
    family = one_step(gymnax_spaces.Discrete(2), lambda hidden, action: 1.0 * action, episodes=1)
    settings = {"hidden": [], "inner_steps": 2, "episodes": 8, "meta_batch": 400, "outer_entropy": 0.0, "lr": 0.05}
    learner = build("meta_gradient", family, **settings, outer=outer, inner_lr=0.3, inner_optimizer="sgd", lifetime=2)
    state = jax.jit(lambda key: learner.init(key, family))(jax.random.key(0))
    new, metrics = update(learner, state, jax.random.key(1), family)
    assert metrics["return_after"] > metrics["return_before"]
    np.testing.assert_allclose(new.params["lr"] - state.params["lr"], 0.05, rtol=1e-3)  # Adam's first step


class Episodes(NamedTuple):
    reward: Any
    valid: Any


class Lives(NamedTuple):
    agent: Any
    task: Any


# --- lives


def test_lives_end_one_by_one_and_are_replaced():
    learner = learner_of("meta_gradient", meta_batch=40, lifetime=5, inner_steps=2)
    family = walk(True)
    state = jax.jit(lambda key: learner.init(key, family))(jax.random.key(0))
    assert set(np.unique(state.lives.left)) == {1, 2, 3, 4, 5}
    for i in range(3):
        new, _ = update(learner, state, jax.random.key(i), family)
        ends = np.asarray(state.lives.left) <= 2
        assert 0 < ends.sum() < 40
        same_task = np.asarray(new.lives.task.goal == state.lives.task.goal)
        np.testing.assert_array_equal(same_task, ~ends)
        np.testing.assert_array_equal(new.lives.left[~ends], state.lives.left[~ends] - 2)
        assert np.all(new.lives.left >= 1)
        state = new


@pytest.mark.parametrize("algo", ["meta_gradient", "lpg"])
def test_a_trial_needs_what_was_learned_alone_and_any_family_will_do(algo):
    learner = learner_of(algo)
    state, _, _ = lived(learner)
    eta = learner.learned(state)
    assert len(jax.tree.leaves(eta)) == len(jax.tree.leaves(state.params))
    settings = eval_settings(adapt__steps=3, adapt__episodes=2)
    for discrete in (True, False):
        other, family = learner_of(algo, discrete, hidden=[4, 2]), walk(discrete)
        shapes = jax.eval_shape(lambda key, x=other, f=family: x.init(key, f), jax.random.key(0))
        assert jax.tree.map(jnp.shape, other.learned(shapes)) == jax.tree.map(jnp.shape, eta)
        plan, task = other.plan(family, settings), family.sample(jax.random.key(3))
        trial = jax.jit(lambda key, x=other, f=family, t=task, p=plan: x.trial(eta, key, f, t, p))(jax.random.key(2))
        assert trial.returns.shape == (4, 2) and np.all(np.isfinite(trial.returns))


@pytest.mark.slow
def test_metarl_eval_takes_a_rule_to_another_family_and_network(tmp_path: Path) -> None:
    run = running.train(tmp_path / "run", running.small("lpg", "bandit"))
    words = ["env=two_step", "env.reward=0.8", "algo.hidden=[4]", "eval.tasks=3", "eval.adapt.steps=2"]
    assert running.metarl("eval", run, *words) == 0
    (file,) = (run / "evaluations").glob("*.json")
    curve = json.loads(file.read_text())["evaluation"]["test"]["curve"]
    assert [point["episodes"] for point in curve] == [0, 2, 4]
    assert running.metarl("eval", run, "algo.units=5") == 2  # of the rule itself


@pytest.mark.slow
def test_metarl_eval_takes_a_learned_inner_step_to_another_network(tmp_path: Path, capsys: Any) -> None:
    """The rule is the one that was learned, and theta starts as it does before training."""
    run = running.train(tmp_path / "run", running.small("meta_lstm", "bandit"))
    assert running.metarl("eval", run, "env=two_step", "algo.hidden=[4]", "eval.tasks=3") == 0
    assert "Its learned rule is used" in capsys.readouterr().out
    composed = config.from_run(run, ["algo.hidden=[4]"], ("algo",))
    learner, family = config.build(composed.config)
    state = runner.restore_rule(run, composed, learner, family)
    trained, fresh = runner.load(run).state, training.init(learner, family, [0, 1]).learner
    assert_close(state.params["rule"], trained.params["rule"], rtol=0, atol=0)
    assert np.any(ravel_pytree(fresh.params["rule"])[0] != ravel_pytree(trained.params["rule"])[0])
    assert_close(
        {"theta": [state.params[g] for g in ("body", "head")]}, {"theta": [fresh.params[g] for g in ("body", "head")]}
    )
    assert running.metarl("eval", run, "algo.rule_units=3") == 2  # of the rule itself
