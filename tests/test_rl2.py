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
from jax.flatten_util import ravel_pytree
from probes import assert_close, build, eval_settings, one_step, random_like, train, walk
from test_adapt import garbage
from test_returns import loop_gae

from metarl_cli.algos.rl2 import Bound, RL2State
from metarl_cli.core.errors import ConfigError
from metarl_cli.core.memory import Memory
from metarl_cli.core.networks import RecurrentActorCritic
from metarl_cli.core.returns import Normaliser, RunningStats
from metarl_cli.core.rollout import first_input
from metarl_cli.core.types import Batch

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
        return learner.learn(state, learner.data(state, batch), 0.0), state.normaliser.update(batch, learner.gamma)

    assert_close(learn(noisy), learn(batch), rtol=1e-7, atol=1e-9)


# --- the update


def test_first_loss(trials):
    # Ratios are 1: the surrogate is minus the mean standardised advantage, 0; the rest is the definition.
    learner, state, batch, data, _ = trials
    learner = dataclasses.replace(learner, entropy=0.1, value=0.3)
    loss, metrics = jax.jit(learner.loss)(state.params, data, 0.0)
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
    params, _, metrics = jax.jit(learner.learn)(state, data, 0.0)
    transform = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(learner.lr, eps=1e-5))
    expected, optimizer = state.params, transform.init(state.params)
    gradient = jax.jit(jax.grad(lambda p, d: learner.loss(p, d, 0.0)[0]))
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


def test_update_samples_learns_and_remembers_what_it_saw(float64):
    """Annealed half-way through; the rewards' scale is that of the learner's own returns."""
    family = walk(True)
    learner = learner_on(True, entropy=0.4, entropy_end=0.0, lr_end=0.0, normalize_rewards="true")
    key = jax.random.key(3)
    state = learner.init(key, family)

    @jax.jit
    def by_hand(state):
        batch = learner.sample(state, key, family)
        params, optimizer, _ = learner.learn(state, learner.data(state, batch), 0.5)
        return RL2State(params, optimizer, state.normaliser.update(batch, learner.gamma))

    new, _ = jax.jit(learner.update)(state, key, family, jnp.array(0.5))
    assert_close(new, by_hand(state), rtol=1e-7, atol=1e-9)
    other, _ = jax.jit(learner.update)(state, key, family, jnp.array(0.0))
    assert np.abs(ravel_pytree(other.params)[0] - ravel_pytree(new.params)[0]).max() > 1e-4


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
    greedy = learner.plan(family, eval_settings(greedy="true"))
    alike = jax.jit(lambda key: learner.trial(state, key, family, task, greedy))(jax.random.key(2)).batch
    assert np.any(alike.action != trial.batch.action[:3])
    first = learner.network.inputs(alike.observation[0, 0, 0], first_input(learner.network.spec), jnp.zeros((), int))
    mode = learner.network.step(state.params, learner.network.init_carry(), first)[1].mode()
    np.testing.assert_allclose(alike.action[0, 0, 0], mode, rtol=1e-5)
    # The same trial as `live` says, cut into episodes.
    expected = np.asarray(batch.reward)[: 5 * length].reshape(5, length).sum(1)
    np.testing.assert_allclose(trial.returns[:, 0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"minibatches": 4}, r"algo\.minibatches=4: must divide algo\.meta_batch=6\. Allowed: 1, 2, 3, 6"),
        ({"accumulate": 2}, r"algo\.accumulate=2: must divide the 3 trials of a minibatch\. Allowed: 1, 3"),
        ({"unroll": 5}, r"algo\.unroll=5: must divide the 12 steps of a trial\. Allowed: 1, 2, 3, 4, 6, 12"),
        ({"hypernetwork": 25}, r"algo\.hypernetwork=25: .* Set algo\.policy_sees_state=true"),
        ({"max_kl": 0.01, "outer": "a2c"}, r"algo\.max_kl=0\.01: algo\.outer=a2c makes a single step\. Allowed: null"),
    ],
)
def test_what_does_not_fit(settings, message):
    with pytest.raises(ConfigError, match=message):
        build("rl2", walk(True), **({"meta_batch": 6, "minibatches": 2} | settings))


# --- switches


def lived_with(**settings: Any) -> tuple[Any, Any, Any]:
    """In float64: a learner, a state, the data of a meta-batch."""
    learner, family = learner_on(True, **settings), walk(True)

    @jax.jit
    def run(key):
        state = learner.init(key, family)
        state = state._replace(params=jax.tree.map(lambda x, y: x + y, state.params, random_like(state.params, 0.3)))
        return state, learner.data(state, learner.sample(state, key, family))

    return learner, *run(jax.random.key(3))


def test_training_sees_what_acting_saw_with_all_options(float64):
    learner, state, data = lived_with(
        critic="separate", hidden="[3]", sees_time="true", policy_sees_state="true", hypernetwork=2, unroll=4
    )
    policy, _ = jax.jit(learner.sequence)(state.params, data.x)
    np.testing.assert_allclose(policy.log_prob(data.action), data.log_prob, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(data.x[..., -1], np.broadcast_to(np.arange(12) / 12, (6, 12)))


@pytest.mark.parametrize("part", [1, 3])
def test_accumulated_gradients_are_those_of_the_minibatch(float64, part):
    """In parts with different numbers of valid steps."""
    _, state, _, data, _ = lived(True)
    assert len(set(np.asarray(data.valid).sum(1).tolist())) > 1
    whole, parts = (learner_on(True, entropy=0.1, accumulate=n) for n in (1, part))
    params, _, metrics = jax.jit(whole.learn)(state, data, 0.0)
    again, _, same = jax.jit(parts.learn)(state, data, 0.0)
    assert_close((again, same), (params, metrics), rtol=1e-6, atol=1e-9)


def test_annealing(float64):
    _, state, _, data, _ = lived(True)
    learner = learner_on(True, entropy=0.4, entropy_end=0.0, lr=0.1, lr_end=0.02)
    gradient = jax.jit(jax.grad(lambda p, learner, progress: learner.loss(p, data, progress)[0]))
    constant = learner_on(True, entropy=0.1)
    assert_close(gradient(state.params, learner, 0.75), gradient(state.params, constant, 0.0), rtol=1e-9, atol=1e-12)
    updates = []
    for progress in (0.0, 0.5):
        transform = learner.optimizer(progress)
        update, _ = transform.update(jax.tree.map(jnp.ones_like, state.params), transform.init(state.params))
        updates.append(jax.tree.leaves(update)[0])
    np.testing.assert_allclose(updates[1], 0.6 * updates[0])  # 0.06 / 0.1


def test_first_step_of_a2c_is_that_of_ppo(float64):
    """At the parameters that acted, the surrogate and the log-likelihood have one gradient."""
    _, state, _, data, _ = lived(True)
    ppo, a2c = (learner_on(True, entropy=0.1, minibatches=1, epochs=n, outer=o) for n, o in ((1, "ppo"), (7, "a2c")))
    params, _, metrics = jax.jit(ppo.learn)(state, data, 0.0)
    same, _, others = jax.jit(a2c.learn)(state, data, 0.0)  # a single step, whatever is said of epochs
    assert_close(same, params, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(others["grad_norm"], metrics["grad_norm"], rtol=1e-9)
    assert others["policy_loss"] != pytest.approx(metrics["policy_loss"])


def test_reinforce_is_the_gradient_of_the_return(float64):
    """Exactly: the expectation of its loss' gradient over all trials, against the derivative of the expected return.

    Two guesses of a hidden bit in a row, three actions each: 2 x 9 trials.
    """
    family = hidden_bit()
    learner = build("rl2", family, outer="reinforce", critic="none", gamma=1.0, memory__features=3, meta_batch=18)
    state = learner.init(jax.random.key(0), family)
    state = state._replace(params=random_like(state.params))
    hidden, first, second = (x.ravel() for x in np.meshgrid(*map(np.arange, (2, 3, 3)), indexing="ij"))
    action = jnp.stack([first, second], axis=1)
    reward = jnp.where(action == 2, 0.1, jnp.where(action == hidden[:, None], 1.0, -1.0))
    yes, zero = jnp.ones((18, 2), bool), jnp.zeros((18, 2))
    batch = Batch(jnp.ones((18, 2, 1)), action, reward, ~yes, yes, yes, None, (zero, zero))
    data = learner.data(state, batch)
    np.testing.assert_allclose(data.advantage, np.stack([reward.sum(1), reward[:, 1]], 1))

    def probability(params):
        policy, _ = learner.sequence(params, data.x)
        return 0.5 * jnp.exp(jnp.sum(policy.log_prob(action), axis=1))

    exact = jax.grad(lambda params: probability(params) @ reward.sum(1))(state.params)
    one = lambda data: jax.grad(lambda p: learner.loss(p, jax.tree.map(lambda x: x[None], data), 0.0)[0])(state.params)  # noqa: E731
    weights = probability(state.params)
    np.testing.assert_allclose(weights.sum(), 1)
    expected = jax.tree.map(lambda g: -2 * jnp.tensordot(weights, g, 1), jax.vmap(one)(data))  # a mean over 2 steps
    assert_close(expected, exact, rtol=1e-8, atol=1e-12)
    assert optax.tree.norm(exact) > 0.05


def test_reinforce_with_a_critic(float64):
    """Advantages are the rest of the trial's return over the value, whatever lambda is; the critic learns that return."""
    learner = build("rl2", hidden_bit(), outer="reinforce", critic="separate", gamma=1.0, lam=0.3, memory__features=3)
    state = learner.init(jax.random.key(0), hidden_bit())
    state = state._replace(params=random_like(state.params))
    reward, value, zero = jnp.array([[1.0, -1.0], [0.1, 1.0]]), jnp.array([[0.3, -0.2], [0.5, 0.4]]), jnp.zeros((2, 2))
    yes, action = jnp.ones((2, 2), bool), jnp.array([[0, 1], [2, 1]])
    data = learner.data(state, Batch(jnp.ones((2, 2, 1)), action, reward, ~yes, yes, yes, None, (zero, value)))
    left = np.array([[0.0, -1.0], [1.1, 1.0]])
    np.testing.assert_allclose(data.advantage, left - value, atol=1e-12)
    np.testing.assert_allclose(data.target, left, atol=1e-12)
    policy, predicted = learner.sequence(state.params, data.x)
    loss, _ = learner.loss(state.params, data, 0.0)
    expected = -np.mean(policy.log_prob(action) * (left - value)) + learner.value * np.mean((predicted - left) ** 2) / 2
    np.testing.assert_allclose(loss, expected, rtol=1e-10)


def test_clip_of_each_number(float64):
    learner, state, _, data, _ = lived(True)
    learner = dataclasses.replace(learner, max_grad_norm=None, max_grad=1e-3, epochs=1, minibatches=1)
    new = jax.jit(learner.learn)(state._replace(optimizer=learner.optimizer().init(state.params)), data, 0.0)[0]
    gradient = jax.grad(lambda p: learner.loss(p, data, 0.0)[0])(state.params)
    clipped = jax.tree.map(lambda g: jnp.clip(g, -1e-3, 1e-3), gradient)
    assert np.mean(ravel_pytree(jax.tree.map(lambda g, c: g != c, gradient, clipped))[0]) > 0.3
    # Adam's first step: lr g / (|g| + eps)
    expected = jax.tree.map(lambda x, g: x - learner.lr * g / (jnp.abs(g) + 1e-5), state.params, clipped)
    assert_close(new, expected, rtol=1e-8)


@cache
def bounded(lr: float, max_kl: float | None, epochs: int = 4, critic: str = "separate") -> tuple[Any, Any, Any, Any]:
    """In float64: a learner with the bound, the state before, the data, the parameters after."""
    learner = learner_on(True, lr=lr, max_kl=max_kl, epochs=epochs, critic=critic)
    with jax.enable_x64(True):
        _, state, data = lived_with(critic=critic)
        state = state._replace(optimizer=learner.optimizer().init(state.params))
        return learner, state, data, jax.jit(learner.learn)(state, data, 0.0)[0]


def kl_and_loss(learner: Any, before: Any, after: Any, data: Any) -> tuple[float, float]:
    """Over the whole meta-batch."""
    old, new = (learner.sequence(params, data.x)[0] for params in (before, after))
    ratio = np.exp(new.log_prob(data.action) - data.log_prob)
    gain = np.minimum(ratio * data.advantage, np.clip(ratio, 1 - learner.clip, 1 + learner.clip) * data.advantage)
    valid = np.asarray(data.valid)
    return float(np.mean(np.asarray(old.kl(new))[valid])), -float(np.mean(np.asarray(gain)[valid]))


def test_the_bound_measures_the_divergence_of_the_new_policy_from_the_old_over_the_whole_meta_batch(float64):
    learner, state, data, params = bounded(0.3, None)
    parts = jax.tree.map(lambda x: x.reshape(2, 1, -1, *x.shape[1:]), data)
    found = jax.jit(lambda params: Bound(learner, state.params, parts, 0.01).measure(params))(params)
    np.testing.assert_allclose(found, kl_and_loss(learner, state.params, params, data), rtol=1e-9)


def test_a_step_that_goes_too_far_is_halved_until_it_is_within_the_bound(float64):
    learner, state, data, params = bounded(0.3, 0.01)
    *_, free = bounded(0.3, None)
    assert kl_and_loss(learner, state.params, free, data)[0] > 0.05
    kl, _ = kl_and_loss(learner, state.params, params, data)
    assert 0 < kl <= 0.01
    # It is the last epoch's step, halved a whole number of times, once less would not have done; the critic's is not.
    ours = lambda p: ravel_pytree({name: p[name] for name in ("memory", "policy")})[0]  # noqa: E731
    share = (ours(params) - ours(state.params)) / (ours(free) - ours(state.params))
    np.testing.assert_allclose(share, share[0], rtol=1e-6)
    halvings = -np.log2(share[0])
    assert halvings >= 1 and halvings == pytest.approx(round(halvings), abs=1e-6)
    twice = jax.tree.map(lambda old, new: old + 2 * (new - old), state.params, params)
    assert kl_and_loss(learner, state.params, twice, data)[0] > 0.01
    assert_close((params["critic"], params["value"]), (free["critic"], free["value"]), rtol=1e-12)


def test_the_best_epoch_within_the_bound_is_kept(float64):
    # The first epoch is within the bound, and the later ones go further and further.
    candidates = [bounded(0.02, None, epochs)[3] for epochs in (1, 2, 3, 4)]
    learner, state, data, _ = bounded(0.02, None)
    measured = [kl_and_loss(learner, state.params, params, data) for params in candidates]
    losses = [loss for _, loss in measured]
    assert losses[3] < losses[0] and measured[3][0] > measured[0][0]
    bound = (measured[0][0] + measured[3][0]) / 2
    inside = [i for i, (kl, _) in enumerate(measured) if kl <= bound]
    best = min(inside, key=lambda i: losses[i])
    assert 0 < len(inside) < 4
    *_, params = bounded(0.02, float(bound))
    for name in ("memory", "policy"):
        assert_close(params[name], candidates[best][name], rtol=1e-9)
    for name in ("critic", "value"):  # the critic is that of the last epoch
        assert_close(params[name], candidates[3][name], rtol=1e-9)


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
