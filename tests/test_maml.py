"""MAML: the meta-gradient, the three outer optimisers, and what it learns on a task with a known optimum."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gymnax.environments import spaces as gymnax_spaces
from jax.flatten_util import ravel_pytree
from probes import assert_close, build, eval_settings, finite_differences, one_step, train, walk
from scipy import stats
from test_adapt import garbage, random_data

from metarl_cli.algos import maml
from metarl_cli.core.errors import ConfigError
from metarl_cli.core.gradient_based import State
from metarl_cli.core.returns import Normaliser, RunningStats

OUTER = ("ppo", "trpo", "vpg")
TINY: dict[str, Any] = {"hidden": [3], "meta_batch": 5, "episodes": 2, "inner_steps": 2, "inner_lr": 0.3}


@cache
def learner_on(discrete: bool, **settings: Any) -> Any:
    return build("maml", walk(discrete), **(TINY | settings))


@pytest.fixture(params=[True, False], ids=["discrete", "continuous"])
def discrete(request) -> bool:
    return request.param


@cache
def target(kind: int, episodes: int = 40) -> Any:
    """Reward -(a - g)^2 with g = 1 +- 1/2, or (kind 2) two arms of which one pays 1 and the other nothing."""
    if kind == 2:
        return one_step(gymnax_spaces.Discrete(2), lambda hidden, action: 1.0 * (action == hidden), episodes)
    box = gymnax_spaces.Box(-jnp.inf, jnp.inf, (1,))
    return one_step(box, lambda hidden, action: -((action[0] - 0.5 - hidden) ** 2), episodes)


def made_up(learner: Any) -> tuple[Any, Any]:
    """Parameters away from their initial zeros, and data `[B, N + 1, K, T]` that they could have sampled."""
    params = jax.jit(learner.inner.init)(jax.random.key(0))
    flat, unravel = ravel_pytree(params)
    params = unravel(flat + 0.3 * jax.random.normal(jax.random.key(1), flat.shape))
    tasks = [random_data(learner.policy.spec, learner.inner_steps + 1, seed) for seed in range(learner.meta_batch)]
    data = jax.tree.map(lambda *x: jnp.stack(x), *tasks)
    advantage, valid = np.array(data.advantage[:, -1]), np.asarray(data.valid[:, -1])
    for i, mask in enumerate(valid):  # as `InnerLoop.data` leaves them
        advantage[i] = (advantage[i] - advantage[i][mask].mean()) / advantage[i][mask].std()

    def log_prob(d):
        return jnp.stack([p.log_prob(a) for p, a in zip(learner.inner.policies(params, d), d.action, strict=True)])

    data = data._replace(advantage=data.advantage.at[:, -1].set(advantage), log_prob=jax.jit(jax.vmap(log_prob))(data))
    return State(params, learner.optimizer().init(params), Normaliser(None, None)), data


SEEN: Any = RunningStats(*map(np.asarray, (10.0, [0.3, 2.0], [20.0, 5.0])))  # type: ignore[arg-type]
PAID: Any = RunningStats(*map(np.asarray, (10.0, 0.0, 40.0)))  # type: ignore[arg-type]


# --- the meta-gradient


@pytest.mark.parametrize("steps", [1, 3])
def test_second_order_meta_gradient_against_finite_differences(float64, discrete, steps):
    learner = learner_on(discrete, inner_steps=steps, inner_lr=0.1, outer="vpg", meta_batch=3)
    state, tasks = made_up(learner)
    flat, unravel = ravel_pytree(state.params)
    inner = learner.inner

    def loss(x, data):
        return learner.task_loss(unravel(x), data)

    def with_constant_steps(x, data):  # what a first-order method differentiates
        last = jax.tree.map(lambda x: x[-1], data)
        step = jax.lax.stop_gradient(ravel_pytree(inner.replay(unravel(x), data)[-1])[0] - x)
        log_prob = inner.policy.apply(unravel(x + step), last.observation).log_prob(last.action)
        return -jnp.sum(jnp.where(last.valid, jnp.exp(log_prob - last.log_prob) * last.advantage, 0)) / jnp.sum(last.valid)

    expected = finite_differences(lambda x: jax.vmap(loss, in_axes=(None, 0))(x, tasks), flat).T  # [B, n]
    size = np.abs(expected).max()
    assert size > 0.1
    alone = jax.jit(jax.grad(loss))(flat, jax.tree.map(lambda x: x[0], tasks))
    together, first_order = jax.jit(
        lambda x: [jax.vmap(jax.grad(f), in_axes=(None, 0))(x, tasks) for f in (loss, with_constant_steps)]
    )(flat)
    np.testing.assert_allclose(alone, expected[0], rtol=1e-6, atol=1e-8 * size)
    np.testing.assert_allclose(together, expected, rtol=1e-6, atol=1e-8 * size)
    # The first-order gradient points elsewhere, in every task.
    assert np.all(np.abs(first_order - expected).max(1) > 0.01 * np.abs(expected).max(1))


def test_first_loss_and_gradient(float64):
    # At theta all ratios are 1 and nothing is clipped: the loss is minus the mean advantage, 0 since it is standardised,
    # and ppo and vpg have the same gradient.
    losses = {}
    for outer in ("ppo", "vpg"):
        learner = learner_on(False, outer=outer)
        state, data = made_up(learner)
        losses[outer] = gradient(learner)(state.params, data)
        np.testing.assert_allclose(losses[outer][0], 0, atol=1e-12)
    assert_close(losses["ppo"][1], losses["vpg"][1], rtol=1e-9)
    assert optax.tree.norm(losses["ppo"][1]) > 0.01


def gradient(learner: Any) -> Any:
    return jax.jit(lambda params, data: learner.gradient(learner.task_loss, params, data))


def moved(params: Any) -> Any:
    """Nearby, where ratios are not 1."""
    return jax.tree.map(lambda x: x + 0.05, params)


def test_tasks_at_once_change_nothing(float64):
    one = learner_on(False, task_batch=1)
    state, data = made_up(one)
    params = moved(state.params)
    expected = gradient(one)(params, data)
    for size in (0, 2):  # 2 does not divide 5
        assert_close(gradient(learner_on(False, task_batch=size))(params, data), expected, rtol=1e-6, atol=1e-12)
    # A step of the trust region. Conjugate gradients enlarge rounding by the condition number, which damping bounds.
    learners = [dataclasses.replace(learner_on(False, task_batch=size), damping=0.1) for size in (1, 2)]
    steps = [jax.jit(learner.trpo)(state.params, data) for learner in learners]
    assert_close(steps[1], steps[0], rtol=1e-5, atol=1e-9)
    assert steps[0][1]["accepted"] == 1


@pytest.mark.parametrize("outer", OUTER)
def test_garbage_after_an_episode_changes_nothing(float64, outer):
    learner = learner_on(False, outer=outer)
    state, data = made_up(learner)
    assert 0.3 < data.valid.mean() < 0.9
    noisy = jax.tree.map(lambda x: garbage(x, data.valid), data)._replace(valid=data.valid)
    step = jax.jit(
        (lambda d: learner.trpo(state.params, d)) if outer == "trpo" else (lambda d: learner.improve(state, None, d)[::2])
    )
    params, metrics = step(data)
    assert_close(step(noisy), (params, metrics), rtol=1e-6, atol=1e-9)
    assert metrics["grad_norm"] > 0.01 and metrics.get("accepted", 1) == 1


# --- outer optimisers


def test_ppo_adapts_anew_in_each_epoch(float64):
    learner = learner_on(False, outer="ppo", epochs=3, clip=0.05, lr=0.05)
    state, data = made_up(learner)
    params, optimizer, metrics = jax.jit(lambda s, d: learner.improve(s, None, d))(state, data)

    def loss(params):  # over all tasks, without `map_tasks`
        return jnp.mean(jax.vmap(lambda d: learner.task_loss(params, d))(data))

    expected, transform = state.params, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05))
    opt_state, value_and_grad = transform.init(expected), jax.jit(jax.value_and_grad(loss))
    value, gradient = value_and_grad(expected)
    for epoch in range(3):
        if epoch > 0:
            value, gradient = value_and_grad(expected)
        updates, opt_state = transform.update(gradient, opt_state, expected)
        expected = optax.apply_updates(expected, updates)
    assert_close(params, expected, rtol=1e-7, atol=1e-10)
    assert_close(jax.tree.leaves(optimizer), jax.tree.leaves(opt_state), rtol=1e-6, atol=1e-10)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-6)


def test_gradients_are_bounded_in_their_global_norm():
    # sgd would show it, Adam only in its first moment, which is (1 - 0.9) times the clipped gradient.
    learner = learner_on(False, outer="vpg", max_grad_norm=1e-3)
    state, data = made_up(learner)
    _, optimizer, metrics = jax.jit(lambda s, d: learner.improve(s, None, d))(state, data)
    assert metrics["grad_norm"] > 1e-2
    np.testing.assert_allclose(optax.tree.norm(optimizer[1][0].mu), 0.1 * 1e-3, rtol=1e-4)


class Captured(Exception):
    pass


def mean_kl(learner: Any, old: Any, new: Any, data: Any) -> jax.Array:
    """Mean over the tasks of the mean over valid states of KL(adapted old || adapted new)."""

    def one(task):
        before, _ = learner.inner.adapted(old, task)
        after, last = learner.inner.adapted(new, task)
        return jnp.sum(jnp.where(last.valid, before.kl(after), 0)) / jnp.sum(last.valid)

    return jnp.mean(jax.vmap(one)(data))


@pytest.mark.parametrize("fisher_tasks", [None, 2])
def test_trust_region_problem(float64, discrete, fisher_tasks, monkeypatch):
    """What `MAML.trpo` hands to the solver: gradient and Fisher matrix are the explicit ones, through the inner steps."""
    learner = learner_on(discrete, outer="trpo", meta_batch=3, fisher_tasks=fisher_tasks)
    state, data = made_up(learner)
    some = jax.tree.map(lambda x: x[:fisher_tasks], data)
    flat, unravel = ravel_pytree(state.params)
    problem: dict[str, Any] = {}

    def capture(params, loss, gradient, fisher, evaluate, **settings):
        problem.update(loss=loss, gradient=gradient, fisher=fisher, evaluate=evaluate)
        raise Captured

    monkeypatch.setattr(maml, "trust_region_step", capture)

    @jax.jit
    def actual(flat):
        with pytest.raises(Captured):
            learner.trpo(unravel(flat), data)
        matrix = jax.vmap(lambda v: ravel_pytree(problem["fisher"](unravel(v)))[0])(jnp.eye(flat.size))
        here, there = (problem["evaluate"](unravel(x)) for x in (flat, flat + 0.1))
        return problem["loss"], ravel_pytree(problem["gradient"])[0], matrix, here, there

    def loss(x):
        return jnp.mean(jax.vmap(lambda d: learner.task_loss(unravel(x), d))(data))

    def kl(x, data=data):
        return mean_kl(learner, state.params, unravel(x), data)

    @jax.jit
    def expected(flat):
        here, there = ((loss(x), kl(x)) for x in (flat, flat + 0.1))
        return *jax.value_and_grad(loss)(flat), jax.hessian(lambda x: kl(x, some))(flat), here, there

    explicit = expected(flat)
    _, _, hessian, (_, kl_here), (_, kl_there) = explicit
    assert np.linalg.matrix_rank(hessian) > flat.size // 2
    assert_close(actual(flat), explicit, rtol=1e-7, atol=1e-9 * np.abs(hessian).max())
    assert kl_here == pytest.approx(0, abs=1e-12) and kl_there > 1e-3


def test_trpo_step(float64, discrete):
    learner = learner_on(discrete, outer="trpo", meta_batch=3)
    state, data = made_up(learner)

    def loss(params):
        return jnp.mean(jax.vmap(lambda d: learner.task_loss(params, d))(data))

    @jax.jit
    def step(max_kl):
        params, metrics = dataclasses.replace(learner, max_kl=max_kl).trpo(state.params, data)
        return params, metrics, mean_kl(learner, state.params, params, data), loss(params) - loss(state.params)

    for max_kl in (0.01, 1e-4):
        params, metrics, kl, rise = step(max_kl)
        assert metrics["accepted"] == 1 and rise < 0
        np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-8)
        # Within the bound, and not far inside it: to second order, a step of the whole length just keeps it.
        assert 0.3 * max_kl * 0.64 ** float(metrics["backtracks"]) < kl <= max_kl
        assert np.any(ravel_pytree(params)[0] != ravel_pytree(state.params)[0])


def test_trpo_keeps_the_parameters_where_nothing_gets_better(float64):
    # No advantage anywhere: gradient and loss are 0 whatever is done.
    learner = learner_on(False, outer="trpo")
    state, data = made_up(learner)
    data = data._replace(advantage=data.advantage.at[:, -1].set(0))
    params, metrics = jax.jit(lambda d: learner.trpo(state.params, d))(data)
    jax.tree.map(np.testing.assert_array_equal, params, state.params)
    assert (metrics["accepted"], metrics["kl"]) == (0, 0)
    # And where the data are no numbers.
    data = data._replace(advantage=data.advantage.at[0, -1, 0, 0].set(jnp.nan))
    params, metrics = jax.jit(lambda d: learner.trpo(state.params, d))(data)
    jax.tree.map(np.testing.assert_array_equal, params, state.params)
    assert metrics["accepted"] == 0


# --- a whole meta-iteration, and a trial


def test_a_meta_iteration(float64, discrete):
    """The metrics are those of what was lived through, and what was recorded is what the adapted parameters say."""
    learner, family = learner_on(discrete, outer="vpg", normalize_observations=True, normalize_rewards=True), walk(discrete)

    @jax.jit
    def run(key):
        state = learner.init(key, family)._replace(normaliser=Normaliser(SEEN, PAID))
        batch, data = learner.sample(state, key, family)
        log_probs = []
        for point in range(learner.inner_steps + 1):
            upto = jax.tree.map(lambda x, point=point: x[:, : point + 1], data)
            policy, last = jax.vmap(lambda d: learner.inner.adapted(state.params, d))(upto)
            log_probs.append(policy.log_prob(last.action))
        return state, batch, data, jnp.stack(log_probs, axis=1), learner.update(state, key, family, jnp.zeros(()))

    state, batch, data, log_probs, (new, metrics) = run(jax.random.key(1))
    np.testing.assert_allclose(log_probs, data.log_prob, rtol=1e-9, atol=1e-12)

    reward, valid = np.asarray(batch.reward), np.asarray(batch.valid)
    assert valid.shape == (5, 3, 2, family.horizon)
    returns = np.where(valid, reward, 0).sum(-1)  # [B, N + 1, K]
    np.testing.assert_allclose(metrics["return_before"], returns[:, 0].mean(), rtol=1e-9)
    np.testing.assert_allclose(metrics["return_after"], returns[:, -1].mean(), rtol=1e-9)
    np.testing.assert_allclose(metrics["trial_return"], returns.sum((1, 2)).mean(), rtol=1e-9)
    assert metrics["steps"] == valid.sum()
    # Each task of the meta-batch is another one, and stays what it is at every point of its trial.
    lengths = valid.sum(-1)
    np.testing.assert_array_equal(lengths, np.broadcast_to(lengths[:, :1, :1], lengths.shape))
    assert len(np.unique(lengths)) > 1
    # The statistics have seen all valid steps of all points, after those they had.
    seen = np.asarray(batch.observation)[valid]
    assert new.normaliser.observation.n == SEEN.n + len(seen)
    mean = (SEEN.n * SEEN.mean + seen.sum(0)) / (SEEN.n + len(seen))
    np.testing.assert_allclose(new.normaliser.observation.mean, mean, rtol=1e-9)
    assert np.any(ravel_pytree(new.params)[0] != ravel_pytree(state.params)[0])


def test_trial_adapts_with_the_smaller_step_after_the_first():
    learner, family = learner_on(False), walk(False)
    state, task = learner.init(jax.random.key(0), family), family.sample(jax.random.key(1))
    plan = learner.plan(family, eval_settings(adapt__steps=2, adapt__episodes=3, adapt__decay=0.25))
    assert (plan.points, plan.episodes, plan.decay) == (3, 3, 0.25)
    run = jax.jit(lambda learner, plan: learner.trial(state, jax.random.key(2), family, task, plan))
    trial = run(learner, plan)
    returns = np.where(trial.batch.valid, trial.batch.reward, 0).sum(-1)
    np.testing.assert_allclose(trial.returns, returns, rtol=1e-6)
    np.testing.assert_array_equal(trial.steps, trial.batch.valid.sum(-1))
    assert trial.returns.shape == (3, 3) and trial.regret is None
    # Another decay changes nothing before the second step.
    other = run(learner, dataclasses.replace(plan, decay=1.0))
    np.testing.assert_array_equal(other.returns[:2], trial.returns[:2])
    assert np.any(other.returns[2] != trial.returns[2])


def test_plan_is_the_protocol_of_the_authors():
    # 3 steps from 40 episodes each, alpha halved after the first; 4 points, one of them before any step.
    learner = learner_on(False)
    plan = learner.plan(walk(False), eval_settings())
    assert (plan.points, plan.episodes, plan.decay) == (4, 40, 0.5)
    plan = learner.plan(walk(False), eval_settings(episodes=30, adapt__episodes=10))
    assert (plan.points, plan.episodes) == (3, 10)
    with pytest.raises(ConfigError, match=r"eval\.episodes=30: must be a multiple of the 7 episodes"):
        learner.plan(walk(False), eval_settings(episodes=30, adapt__episodes=7))


def test_one_step_families_split_the_budget_of_a_trial():
    family = target(2, episodes=12)
    learner = build("maml", family, inner_steps=2, episodes=None)
    assert learner.episodes == 4  # 12 pulls over 3 points
    plan = learner.plan(family, eval_settings())
    assert (plan.points, plan.episodes) == (3, 4)
    plan = learner.plan(family, eval_settings(adapt__steps=3))
    assert (plan.points, plan.episodes) == (4, 3)
    # 5 points do not divide 12, but 6 do; more than 12 there cannot be.
    plan = learner.plan(family, eval_settings(adapt__steps=4))
    assert (plan.points, plan.episodes) == (6, 2)
    plan = learner.plan(family, eval_settings(adapt__steps=40))
    assert (plan.points, plan.episodes) == (12, 1)
    learner = build("maml", family, inner_steps=4, episodes=None)
    assert (learner.inner_steps, learner.episodes) == (5, 2)


# --- probes: what is learned is known


@pytest.mark.slow
@pytest.mark.parametrize(
    ("outer", "settings", "iterations"),
    [("ppo", {"lr": 0.02}, 150), ("vpg", {"lr": 0.03}, 150), ("trpo", {"max_kl": 0.01}, 200)],
)
def test_learns_the_best_start_and_the_best_step(outer, settings, iterations):
    """Reward -(a - g)^2, g = 1 +- 1/2; the policy is N(m, sigma^2), m = w + b, with w and b both adapted.

    For small sigma the advantages are -2 (m - g) sigma (e - mean e) with standard normal e. A step of alpha = 1/8 moves w
    and b by alpha times 2 (g - m) S^2 each, S^2 = mean (e - mean e)^2 over the K = 20 episodes, so

        m' = m + (g - m) S^2 / 2,   E S^2 = 19/20,   Var S^2 = 2 * 19/20^2.

    Before, the return is -1/4 - (m - 1)^2 - sigma^2. After, it is best for m = 1, halfway between the goals, where it is
    -1/4 E (1 - S^2 / 2)^2 - sigma^2 = -1/4 ((1 - 19/40)^2 + 38/1600) - sigma^2 = -0.0748 - sigma^2, and sigma falls. What
    does not adapt gets -1/4 at the best.
    """
    learner = build("maml", target(1), outer=outer, hidden=[], inner_lr=0.125, episodes=20, meta_batch=40, **settings)
    states, metrics = train(learner, target(1), iterations, 3)
    head = jax.tree.map(np.asarray, states.params["head"]["params"])
    m = head["Dense_0"]["kernel"][:, 0, 0] + head["Dense_0"]["bias"][:, 0]
    sigma = np.exp(head["log_std"][:, 0])
    before, after = (np.asarray(metrics[f"return_{when}"])[:, -20:].mean(1) for when in ("before", "after"))
    assert np.all(sigma < 0.1)
    # The mean of 16,000 episodes has a standard error of about 0.002, and the parameters still move in the meantime.
    np.testing.assert_allclose(before, -0.25 - (m - 1) ** 2 - sigma**2, atol=0.015)
    # Once sigma is small, a trust region in nats is small too: its way to the middle is long.
    np.testing.assert_allclose(m, 1, atol=0.3 if outer == "trpo" else 0.1)
    np.testing.assert_allclose(after, -0.0748 - (m - 1) ** 2 / 4 - sigma**2, atol=0.01)
    assert np.all(np.asarray(metrics["return_after"])[:, 0] < -0.3)  # all that had to be learned


@pytest.mark.slow
def test_learns_a_start_from_which_one_step_finds_the_arm():
    """Two arms, of which a hidden one pays 1. The best start is uniform.

    There, with k of K = 20 pulls on the paying arm, the mean of A grad log pi is +-p (1 - p), p = k / 20, for the two
    logits. Each is a sum of two parameters and alpha = 2: their difference grows by 2 * 2 * alpha * p (1 - p).
    """
    learner = build("maml", target(2), outer="ppo", hidden=[], inner_lr=2.0, episodes=20, meta_batch=40, lr=0.02)
    states, metrics = train(learner, target(2), 100, 3)
    p = np.arange(21) / 20
    best = np.sum(stats.binom.pmf(np.arange(21), 20, 0.5) / (1 + np.exp(-8 * p * (1 - p))))
    assert best == pytest.approx(0.869, abs=1e-3)
    # 20 iterations of 800 pulls: standard errors of 0.004 and 0.003.
    np.testing.assert_allclose(np.asarray(metrics["return_before"])[:, -20:].mean(1), 0.5, atol=0.02)
    np.testing.assert_allclose(np.asarray(metrics["return_after"])[:, -20:].mean(1), best, atol=0.015)
    head = states.params["head"]["params"]["Dense_0"]
    start = jax.nn.softmax(head["kernel"][:, 0] + head["bias"])[:, 0]
    np.testing.assert_allclose(start, 0.5, atol=0.06)
