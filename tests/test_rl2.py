"""RL^2: one memory through all episodes of a trial, advantages across them, and tasks with a known optimum."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gymnax.environments import spaces as gymnax_spaces
from probes import assert_close, build, eval_settings, one_step, train, walk
from test_adapt import garbage
from test_returns import loop_gae

from metarl_cli.core.errors import ConfigError
from metarl_cli.core.memory import Memory
from metarl_cli.core.networks import RecurrentActorCritic
from metarl_cli.core.returns import Normaliser, RunningStats

TINY: dict[str, Any] = {"memory__features": 4, "meta_batch": 6, "minibatches": 2, "epochs": 2, "gamma": 0.9, "lam": 0.7}
SEEN: Any = RunningStats(*map(np.asarray, (10.0, [0.3, 2.0], [20.0, 5.0])))  # type: ignore[arg-type]
PAID: Any = RunningStats(*map(np.asarray, (10.0, 0.0, 40.0)))  # type: ignore[arg-type]
REWARD_SCALE = 2.0  # sqrt(40 / 10), of PAID


@cache
def learner_on(discrete: bool, **settings: Any) -> Any:
    return build("rl2", walk(discrete), **(TINY | settings))


@cache
def lived(discrete: bool) -> tuple[Any, Any, Any, Any, Any]:
    """In float64: a learner with running normalisation, a state, a meta-batch `[B, E * T]`, its data, and an update."""
    learner = learner_on(discrete, normalize_observations=True, normalize_rewards=True)
    family = walk(discrete)

    @jax.jit
    def run(key):
        state = learner.init(key, family)
        leaves, structure = jax.tree.flatten(state.params)
        keys = jax.random.split(key, len(leaves))
        params = [x + 0.3 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
        state = state._replace(params=jax.tree.unflatten(structure, params), normaliser=Normaliser(SEEN, PAID))
        batch = learner.sample(state, key, family)
        return state, batch, learner.data(state, batch), learner.update(state, key, family, jnp.zeros(()))

    with jax.enable_x64(True):
        return learner, *run(jax.random.key(3))


@pytest.fixture(params=[True, False], ids=["discrete", "continuous"])
def trials(request, float64) -> Any:
    return lived(request.param)


# --- one memory per trial


@dataclass(frozen=True)
class Clock(Memory):
    """Counts the steps since `init_carry`, and gives the count out."""

    features: int = 1

    def init(self, key, inputs):
        return {}

    def init_carry(self):
        return jnp.zeros(())

    def step(self, params, carry, x):
        return carry + 1, jnp.array([carry + 1])

    def sequence(self, params, carry, x, reset):
        raise NotImplementedError


def test_memory_is_carried_across_episodes_and_reset_between_trials():
    family, learner = walk(True), learner_on(True)
    learner = dataclasses.replace(learner, network=RecurrentActorCritic(learner.network.spec, Clock()))
    state = learner.init(jax.random.key(0), family)
    value = {"params": {"Dense_0": {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}}}
    state = state._replace(params=state.params | {"value": value})
    batch = jax.jit(lambda key: learner.sample(state, key, family))(jax.random.key(1))
    steps = family.episodes * family.horizon
    assert np.all((batch.terminated | batch.truncated).sum(1) >= family.episodes)
    # The value tells the time: it runs on through the ends of episodes, and is 1 at the start of each trial.
    np.testing.assert_array_equal(batch.extra[1], np.tile(np.arange(1, steps + 1), (6, 1)))


def test_training_sees_what_acting_saw(trials):
    """At the parameters that acted, `sequence` on the training inputs gives the recorded policies and values."""
    learner, state, batch, data, _ = trials
    policy, value = jax.jit(jax.vmap(lambda x: learner.network.sequence(state.params, x)))(data.x)
    np.testing.assert_allclose(policy.log_prob(data.action), data.log_prob, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(value, batch.extra[1], rtol=1e-9, atol=1e-12)
    # The memory matters: without a past, the same steps would have other policies.
    alone, _ = jax.jit(jax.vmap(jax.vmap(lambda x: learner.network.sequence(state.params, x[None]))))(data.x)
    difference = np.abs(alone.log_prob(data.action[:, :, None])[..., 0] - data.log_prob)
    assert np.all(difference[:, 0] < 1e-9) and np.median(difference[:, 1:]) > 1e-3


def test_inputs(trials):
    """`[s_t, a_{t-1}, r_{t-1}, done_{t-1}]`: zeros and done = 1 at the start of a trial, rewards as they were."""
    learner, _, batch, data, _ = trials
    spec, mean, std = learner.network.spec, SEEN.mean, np.sqrt(SEEN.m2 / SEEN.n)
    for i in range(learner.meta_batch):
        action, reward, done = np.zeros(spec.action), 0.0, 1.0
        for t in range(batch.reward.shape[1]):
            seen = np.clip((batch.observation[i, t] - mean) / std, -10, 10)
            np.testing.assert_allclose(data.x[i, t], [*seen, *action, reward, done], rtol=1e-6, atol=1e-9)
            action = np.eye(spec.action)[batch.action[i, t]] if spec.discrete else np.clip(batch.action[i, t], -1, 1)
            reward, done = batch.reward[i, t], float(batch.terminated[i, t] | batch.truncated[i, t])


def test_advantages_reach_across_the_episodes_of_a_trial(trials):
    _, _, batch, data, _ = trials
    valid, done = np.asarray(batch.valid), np.asarray(batch.terminated | batch.truncated)
    shape, never = valid.shape, np.zeros(valid.shape[1], bool)
    advantage, cut = np.zeros(shape), np.zeros(shape)
    for i in range(shape[0]):
        reward = np.where(valid[i], batch.reward[i], 0) / REWARD_SCALE
        value = np.where(valid[i], batch.extra[1][i], 0)
        next_value = np.append(value[1:], 0)  # after the trial there is nothing
        advantage[i] = loop_gae(reward, value, next_value, never, never, 0.9, 0.7)
        cut[i] = loop_gae(reward, value, next_value, done[i], done[i], 0.9, 0.7)
    standard = lambda x: (x - x[valid].mean()) / x[valid].std()  # noqa: E731
    np.testing.assert_allclose(data.advantage[valid], standard(advantage)[valid], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(data.advantage[~valid], 0)
    np.testing.assert_allclose(data.target[valid], (advantage + batch.extra[1])[valid], rtol=1e-6, atol=1e-9)
    # Cut at the ends of episodes they would be others, and not only there.
    assert np.mean(np.abs(standard(cut) - standard(advantage))[valid & ~done] > 0.01) > 0.5


def test_garbage_after_a_trial_changes_nothing(float64):
    learner, state, batch, _, _ = lived(False)
    assert 0.2 < batch.valid.mean() < 0.9
    noisy = jax.tree.map(lambda x: garbage(x, batch.valid), batch)._replace(valid=batch.valid)

    @jax.jit
    def learn(batch):
        return learner.ppo(state, learner.data(state, batch)), state.normaliser.update(batch, learner.gamma)

    assert_close(learn(noisy), learn(batch), rtol=1e-7, atol=1e-9)


# --- the update


def test_first_loss(trials):
    # Ratios are 1: the surrogate is minus the mean standardised advantage, 0; the rest is the definition.
    learner, state, batch, data, _ = trials
    learner = dataclasses.replace(learner, entropy=0.1, value=0.3)
    loss, metrics = jax.jit(learner.loss)(state.params, data)
    valid = np.asarray(data.valid)
    value_loss = 0.5 * np.mean((batch.extra[1] - data.target)[valid] ** 2)
    np.testing.assert_allclose(metrics["policy_loss"], 0, atol=1e-9)
    np.testing.assert_allclose(metrics["value_loss"], value_loss, rtol=1e-9)
    np.testing.assert_allclose(metrics["kl"], 0, atol=1e-9)
    np.testing.assert_allclose(loss, 0.3 * value_loss - 0.1 * metrics["entropy"], rtol=1e-6)
    assert metrics["entropy"] > 0.1


def test_update_is_ppo_over_minibatches_of_whole_trials(float64):
    learner, state, _, data, _ = lived(True)
    learner = dataclasses.replace(learner, max_grad_norm=0.1)
    params, _, metrics = jax.jit(learner.ppo)(state, data)
    transform = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(learner.lr, eps=1e-5))
    expected, optimizer = state.params, transform.init(state.params)
    gradient = jax.jit(jax.grad(lambda p, d: learner.loss(p, d)[0]))
    norms = []
    for _ in range(learner.epochs):
        for half in (slice(0, 3), slice(3, 6)):
            slope = gradient(expected, jax.tree.map(lambda x, half=half: x[half], data))
            norms.append(optax.tree.norm(slope))
            updates, optimizer = transform.update(slope, optimizer, expected)
            expected = optax.apply_updates(expected, updates)
    assert_close(params, expected, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(metrics["grad_norm"], np.mean(norms[-2:]), rtol=1e-6)
    assert norms[0] > 0.1  # so that the clip has been at work


def test_metrics_are_those_of_what_was_lived_through(trials):
    _, _, batch, _, (new, metrics) = trials
    reward, valid = np.asarray(batch.reward), np.asarray(batch.valid)
    done = np.asarray(batch.terminated | batch.truncated)
    episode = np.cumsum(done, axis=1) - done
    returns = [np.where(episode == e, reward, 0).sum(1).mean() for e in range(3)]
    np.testing.assert_allclose(metrics["return_before"], returns[0], rtol=1e-9)
    np.testing.assert_allclose(metrics["return_after"], returns[2], rtol=1e-9)
    np.testing.assert_allclose(metrics["trial_return"], sum(returns), rtol=1e-9)
    assert metrics["steps"] == valid.sum()
    seen = np.asarray(batch.observation)[valid]
    mean = (SEEN.n * SEEN.mean + seen.sum(0)) / (SEEN.n + len(seen))
    np.testing.assert_allclose(new.normaliser.observation.mean, mean, rtol=1e-9)


def test_trial_is_a_point_per_episode():
    learner, family = learner_on(False), walk(False)
    plan = learner.plan(family, eval_settings())
    assert (plan.points, plan.episodes) == (3, 1)
    plan = learner.plan(family, eval_settings(episodes=5))
    assert (plan.points, plan.episodes) == (5, 1)
    state, task = learner.init(jax.random.key(0), family), family.sample(jax.random.key(1))
    trial = jax.jit(lambda key: learner.trial(state, key, family, task, plan))(jax.random.key(2))
    batch = jax.jit(lambda key: learner.live(state, key, family, task, 5))(jax.random.key(2))
    assert trial.returns.shape == trial.steps.shape == (5, 1) and trial.regret is None
    length = min(int(task.length), family.horizon)
    np.testing.assert_array_equal(trial.steps, length)
    # The same trial as `live` says, cut into episodes.
    expected = np.asarray(batch.reward)[: 5 * length].reshape(5, length).sum(1)
    np.testing.assert_allclose(trial.returns[:, 0], expected, rtol=1e-5)


def test_minibatches_have_to_divide_the_trials():
    with pytest.raises(ConfigError, match=r"algo\.minibatches=4: must divide algo\.meta_batch=6\. Allowed: 1, 2, 3, 6"):
        build("rl2", walk(True), meta_batch=6, minibatches=4)


# --- probes: what is learned is known


@pytest.mark.slow
def test_learns_the_value_of_the_rest_of_the_trial():
    # Each of two one-step episodes pays 1 and gamma is 1/2: the values are 1 + 1/2 and 1. Cut at the end of an episode, the
    # first would be 1; with anything after the trial, the second would not.
    family = one_step(gymnax_spaces.Discrete(2), lambda hidden, action: jnp.ones(()), episodes=2)
    learner = build("rl2", family, meta_batch=32, minibatches=2, memory__features=8, lr=0.01, gamma=0.5, lam=0.5)
    states, metrics = train(learner, family, 100, 3)
    values = jax.jit(jax.vmap(lambda state: learner.sample(state, jax.random.key(5), family).extra[1]))(states)
    # Advantages are standardised, and where all are 0 that makes noise of rounding: so it is not learned to the last digit.
    np.testing.assert_allclose(values.mean(1), [[1.5, 1.0]] * 3, atol=0.2)
    assert np.all(np.asarray(metrics["return_before"]) == 1)


@cache
def hidden_bit() -> Any:
    """Two one-step episodes; a guess of the hidden bit pays 1 or -1, the third action pays 0.1 and tells nothing."""

    def reward(hidden, action):
        return jnp.where(action == 2, 0.1, jnp.where(action == hidden, 1.0, -1.0))

    return one_step(gymnax_spaces.Discrete(3), reward, episodes=2)


@pytest.mark.slow
@pytest.mark.parametrize(("gamma", "before", "after"), [(1.0, 0.0, 1.0), (0.0, 0.1, 0.1)])
def test_explores_in_the_first_episode_for_the_second(gamma, before, after):
    """Best: guess first, which pays 0 on average, then act on what came of it, which pays 1.

    Only credit across the end of an episode teaches to guess: with gamma = 0, which is the same as cutting there as an
    episode is one step, the sure 0.1 is better, and nothing is known in the second episode either.
    """
    learner = build(
        "rl2", hidden_bit(), meta_batch=128, minibatches=4, memory__features=16, lr=0.01, gamma=gamma, lam=0.95, entropy=0.01
    )
    states, metrics = train(learner, hidden_bit(), 150, 3)
    # The last 10 iterations: 1280 first guesses of +-1 have a standard error of 0.028.
    first, second = (np.asarray(metrics[f"return_{when}"])[:, -10:].mean(1) for when in ("before", "after"))
    np.testing.assert_allclose(first, before, atol=0.1)
    np.testing.assert_allclose(second, after, atol=0.1)
    if gamma == 1:  # what is still to come: 0 + 1 at first, 1 then
        values = jax.jit(jax.vmap(lambda state: learner.sample(state, jax.random.key(5), hidden_bit()).extra[1]))(states)
        np.testing.assert_allclose(values.mean(1), np.ones((3, 2)), atol=0.2)


@pytest.mark.slow
def test_learns_a_continuous_action():
    # Reward -(a - 1/2)^2 on [-1, 1]: the mean goes to 1/2, the standard deviation falls, the return goes to 0.
    box = gymnax_spaces.Box(-1.0, 1.0, (1,))
    family = one_step(box, lambda hidden, action: -((action[0] - 0.5) ** 2), episodes=2)
    learner = build("rl2", family, meta_batch=64, minibatches=2, memory__features=8, lr=0.02, lam=0.5)
    states, metrics = train(learner, family, 100, 3)
    sample = jax.jit(jax.vmap(lambda state: learner.sample(state, jax.random.key(5), family).action))(states)
    np.testing.assert_allclose(np.mean(sample, axis=(1, 3)), 0.5, atol=0.1)
    first = np.asarray(metrics["return_after"])
    # N(0, 1), clipped to [-1, 1], loses 1/4 + 0.516 (the second moment of a clipped standard normal) at the start.
    np.testing.assert_allclose(first[:, 0], -0.766, atol=0.2)
    assert np.all(first[:, -10:].mean(1) > -0.03)
