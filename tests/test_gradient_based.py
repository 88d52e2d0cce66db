"""The family of MAML: what its members change of the inner loop and of the outer loss, and the estimators."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from probes import assert_close, build, eval_settings, finite_differences, update, walk
from test_maml import made_up

from metarl_cli.core.adapt import Data, Estimator, InnerLoop, task_code
from metarl_cli.core.distributions import Categorical
from metarl_cli.core.errors import ConfigError
from metarl_cli.core.rollout import Spaces

TINY: dict[str, Any] = {"hidden": [3], "meta_batch": 3, "episodes": 2, "inner_steps": 2, "inner_lr": 0.3}


def learner_of(algo: str, discrete: bool = True, **settings: Any) -> Any:
    return build(algo, walk(discrete), **(TINY | settings))


# --- the inner step of each member


MEMBERS: list[tuple[str, dict[str, Any]]] = [
    ("maml", {}),
    ("maml", {"estimator": "ratio"}),
    ("maml", {"inner_optimizer": "adam", "inner_lr": 0.02}),
    ("anil", {}),
    ("meta_sgd", {}),
    ("cavia", {"inner_lr": 0.2}),
    ("emaml", {}),
    ("promp", {"clip": 5.0, "kl_penalty": 2.0}),  # no ratio at the clip, where the loss has a kink
]


@pytest.mark.parametrize("discrete", [True, False], ids=["discrete", "continuous"])
@pytest.mark.parametrize(
    ("algo", "settings"), MEMBERS, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values()))
)
def test_meta_gradient_against_finite_differences(float64, algo, settings, discrete):
    learner = learner_of(algo, discrete, **({"inner_lr": 0.05} | settings))
    state, data = made_up(learner)
    flat, unravel = ravel_pytree(state.params)
    tasks = (data, jnp.array([1.0, -0.5, -0.5])) if algo == "emaml" else data
    if algo == "promp":  # other parameters sampled, where the gradient of the KL divergence is not 0
        sampled = jax.tree.map(lambda x: x + 0.1, state.params)
        tasks = (data, jax.vmap(lambda d: learner.inner.policies(sampled, d)[:-1])(data))

    def loss(x):
        return jnp.mean(jax.vmap(lambda task: learner.task_loss(unravel(x), task))(tasks))

    gradient = jax.jit(lambda params, tasks: learner.gradient(learner.task_loss, params, tasks))(state.params, tasks)[1]
    expected = finite_differences(loss, flat)
    np.testing.assert_allclose(ravel_pytree(gradient)[0], expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    # Every group of theta has a gradient, the learned steps of Meta-SGD among them.
    assert all(optax.tree.norm(group) > 1e-3 for group in gradient.values())
    assert ("lr" in gradient) == (algo == "meta_sgd")


@pytest.mark.parametrize(
    ("algo", "moves", "stays"),
    [("maml", ["body", "head"], []), ("anil", ["head"], ["body"]), ("cavia", ["context"], ["body", "head"])],
)
def test_what_an_inner_step_changes(algo, moves, stays):
    learner = learner_of(algo)
    state, data = made_up(learner)
    first, *_, last = learner.inner.replay(state.params, jax.tree.map(lambda x: x[0], data))
    for group in moves:
        assert all(np.all(x != y) for x, y in zip(jax.tree.leaves(first[group]), jax.tree.leaves(last[group]), strict=True))
    for group in stays:
        jax.tree.map(np.testing.assert_array_equal, first[group], last[group])
    assert set(moves + stays) == set(last)


def test_cavia_starts_every_task_from_an_empty_context():
    learner = learner_of("cavia", context=4)
    state, _ = made_up(learner)
    assert set(state.params) == {"body", "head"}
    np.testing.assert_array_equal(learner.inner.start(state.params).params["context"], np.zeros(4))


def test_learned_steps_are_those_that_are_taken(float64):
    """Meta-SGD with all steps equal is MAML; a step of 0 keeps its parameter."""
    maml, meta_sgd = learner_of("maml"), learner_of("meta_sgd")
    state, data = made_up(maml)
    task = jax.tree.map(lambda x: x[0], data)
    steps = jax.tree.map(lambda x: jnp.full_like(x, 0.3), state.params)
    expected = maml.inner.replay(state.params, task)[-1]
    actual = meta_sgd.inner.replay(state.params | {"lr": steps}, task)[-1]
    assert_close({group: actual[group] for group in expected}, expected, rtol=1e-12)
    steps["head"] = jax.tree.map(jnp.zeros_like, steps["head"])
    actual = meta_sgd.inner.replay(state.params | {"lr": steps}, task)[-1]
    jax.tree.map(np.testing.assert_array_equal, actual["head"], state.params["head"])


def test_three_steps_are_one_step_three_times(float64):
    learner = learner_of("maml", inner_steps=3)
    state, data = made_up(learner)
    task, params = jax.tree.map(lambda x: x[0], data), state.params
    for i in range(3):
        gradient = jax.grad(learner.inner.loss)(params, jax.tree.map(lambda x, i=i: x[i], task))
        params = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)
    assert_close(learner.inner.replay(state.params, task)[-1], params, rtol=1e-12)


def test_adam_inside(float64):
    """Against optax on its own, and with a finite meta-gradient where a parameter has no gradient at all."""
    learner = learner_of("maml", inner_optimizer="adam", inner_lr=0.1)
    state, data = made_up(learner)
    task, params = jax.tree.map(lambda x: x[0], data), state.params
    adam = optax.adam(0.1, eps_root=1e-8)
    moments = adam.init(params)
    for i in range(2):
        gradient = jax.grad(learner.inner.loss)(params, jax.tree.map(lambda x, i=i: x[i], task))
        updates, moments = adam.update(gradient, moments, params)
        params = optax.apply_updates(params, updates)
    assert_close(learner.inner.replay(state.params, task)[-1], params, rtol=1e-10)
    blind = data._replace(observation=jnp.zeros_like(data.observation))  # no gradient into the first kernel
    gradient = jax.jit(lambda d: learner.gradient(learner.task_loss, state.params, d))(blind)[1]
    assert np.all(np.isfinite(ravel_pytree(gradient)[0]))


def test_computing_steps_again_changes_nothing(float64):
    learner = learner_of("maml", inner_steps=3, inner_lr=0.05)
    again = replace(learner, inner=replace(learner.inner, remat=True))
    state, data = made_up(learner)
    one, two = (jax.jit(lambda d, x=x: x.gradient(x.task_loss, state.params, d))(data) for x in (learner, again))
    assert_close(two, one, rtol=1e-9, atol=1e-13)


def test_first_order_has_the_step_but_not_its_derivative(float64):
    second, first = learner_of("maml"), learner_of("fomaml")
    state, data = made_up(second)
    task = jax.tree.map(lambda x: x[0], data)
    assert_close(first.inner.replay(state.params, task), second.inner.replay(state.params, task), rtol=0, atol=0)
    adapted = second.inner.replay(state.params, task)[-1]
    last = jax.tree.map(lambda x: x[-1], task)

    def after(params):  # the outer loss at theta' as if theta' were theta
        log_prob = second.policy.apply(params, last.observation).log_prob(last.action)
        return -jnp.sum(jnp.where(last.valid, jnp.exp(log_prob - last.log_prob) * last.advantage, 0)) / jnp.sum(last.valid)

    unclipped = replace(first, clip=1e9)
    assert_close(jax.grad(unclipped.task_loss)(state.params, task), jax.grad(after)(adapted), rtol=1e-10, atol=1e-14)


# --- the estimators, where the expectation over trajectories can be enumerated


@dataclass(frozen=True)
class Tabular:
    """Logits linear in a one-hot state."""

    spec: Spaces

    def apply(self, params: Any, observation: jax.Array) -> Categorical:
        return Categorical(observation @ params["head"])


POLICY = Tabular(Spaces(3, 2, True))
# From state 0, action a leads to state 1 + a, where the episode ends with the second step: four trajectories. The parameters
# are shared between the states, so that scores of different steps are not orthogonal.
STATES = np.array([[1.0, 0.3, -0.5], [0.4, 1.0, 0.2], [-0.3, 0.6, 1.0]])
REWARDS = np.array([[0.5, -1.0], [2.0, 0.3], [-0.7, 1.5]])
THETA = np.array([[0.3, -0.2], [0.5, 0.1], [-0.4, 0.6]])
TRAJECTORIES = list(itertools.product(range(2), range(2)))


def trajectory(first: int, second: int, gamma: float, baseline: float) -> Data:
    """One episode `[K = 1, T = 2]`, raw returns."""
    states, actions = np.array([0, 1 + first]), np.array([first, second])
    reward = REWARDS[states, actions]
    value = baseline * np.array([1.0, -0.5]) * (states + 1)  # any function of the state
    advantage = np.array([reward[0] + gamma * reward[1], reward[1]]) - value
    arrays = (STATES[states], actions, advantage, reward, value, np.zeros(2), np.ones(2, bool))
    return Data(*(jnp.array(x)[None] for x in arrays))


def probability(theta: jax.Array, data: Data) -> jax.Array:
    return jnp.exp(jnp.sum(log_prob_of(theta, data)))


def log_prob_of(theta: jax.Array, data: Data) -> jax.Array:
    return POLICY.apply({"head": theta}, data.observation).log_prob(data.action)


def objective(theta: jax.Array, gamma: float) -> jax.Array:
    """The expected discounted return, exactly."""
    total = jnp.zeros(())
    for actions in TRAJECTORIES:
        data = trajectory(*actions, gamma, 0.0)
        total += probability(theta, data) * (data.reward[0, 0] + gamma * data.reward[0, 1])
    return total


def expected(function: Any, gamma: float, baseline: float) -> np.ndarray:
    """Over trajectories sampled with THETA, which is not differentiated."""
    every = [trajectory(*actions, gamma, baseline) for actions in TRAJECTORIES]
    return np.asarray(sum(probability(THETA, data) * function(data) for data in every))


def inner_on_tabular(estimator: Estimator, gamma: float = 1.0, lr: float = 0.5) -> InnerLoop:
    return InnerLoop(lr=lr, gamma=gamma, lam=1.0, policy=POLICY, estimator=estimator)  # type: ignore[arg-type]


def inner_loss(estimator: Estimator, gamma: float, data: Data) -> Any:
    acting = data._replace(log_prob=log_prob_of(THETA, data))
    return lambda theta: inner_on_tabular(estimator, gamma).loss({"head": theta}, acting)


@pytest.mark.parametrize("baseline", [0.0, 1.0])
@pytest.mark.parametrize("estimator", ["score", "dice", "lvc", "ratio"])
def test_every_estimator_has_the_gradient_of_the_return(float64, estimator, baseline):
    # The loss is minus the mean over two steps: half of minus the gradient.
    gradient = expected(lambda data: jax.grad(inner_loss(estimator, 1.0, data))(THETA), 1.0, baseline)
    np.testing.assert_allclose(gradient, -jax.grad(objective)(THETA, 1.0) / 2, rtol=1e-10)


@pytest.mark.parametrize("baseline", [0.0, 1.0])
def test_with_a_discount_only_dice_has_the_gradient_of_the_discounted_return(float64, baseline):
    """The others leave out the factor gamma^t of step t, as is usual."""
    gamma = 0.5

    def apart(first, second):  # the objective, with parameters of its own for each of the two steps
        every = [trajectory(*actions, gamma, 0.0) for actions in TRAJECTORIES]
        return sum(
            jnp.exp(log_prob_of(first, data)[0, 0] + log_prob_of(second, data)[0, 1])
            * (data.reward[0, 0] + gamma * data.reward[0, 1])
            for data in every
        )

    first, second = jax.grad(apart, argnums=(0, 1))(THETA, THETA)
    for estimator in ("score", "dice", "lvc", "ratio"):
        gradient = expected(lambda data, e=estimator: jax.grad(inner_loss(e, gamma, data))(THETA), gamma, baseline)
        usual = first + second / gamma
        np.testing.assert_allclose(gradient, -(first + second if estimator == "dice" else usual) / 2, rtol=1e-10)


def hessian(estimator: Estimator, gamma: float, baseline: float) -> np.ndarray:
    return -2 * expected(lambda data: jax.hessian(inner_loss(estimator, gamma, data))(THETA), gamma, baseline)


@pytest.mark.parametrize("baseline", [0.0, 1.0])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_the_hessian_of_dice_is_unbiased(float64, gamma, baseline):
    np.testing.assert_allclose(hessian("dice", gamma, baseline), jax.hessian(objective)(THETA, gamma), rtol=1e-9, atol=1e-12)


def q_value(theta: jax.Array, state: int, action: int) -> jax.Array:
    if state > 0:
        return jnp.asarray(REWARDS[state, action])
    after = 1 + action
    return REWARDS[0, action] + jax.nn.softmax(STATES[after] @ theta) @ REWARDS[after]


def test_the_hessian_of_lvc_lacks_the_cross_terms_only(float64):
    """`H - H12 - H12^T`, with `H12 = E sum_t grad log pi_t grad Q(s_t, a_t)^T` (Rothfuss et al. 2018, equations 5 to 8)."""

    def cross(data):
        total = 0
        for t, state in enumerate((0, 1 + int(data.action[0, 0]))):
            score = jax.grad(lambda theta, t=t: log_prob_of(theta, data)[0, t])(THETA)
            of_q = jax.grad(lambda theta, s=state, a=int(data.action[0, t]): q_value(theta, s, a))(THETA)
            total += jnp.einsum("ij,kl->ijkl", score, of_q)
        return total

    h12 = expected(cross, 1.0, 0.0)
    exact = np.asarray(jax.hessian(objective)(THETA, 1.0))
    assert np.abs(h12).max() > 0.01
    np.testing.assert_allclose(hessian("lvc", 1.0, 0.0), exact - h12 - h12.transpose(2, 3, 0, 1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(hessian("ratio", 1.0, 0.0), hessian("lvc", 1.0, 0.0), rtol=1e-9, atol=1e-12)


def test_the_hessian_of_score_lacks_the_outer_products(float64):
    """`E sum_t r_t G_t G_t^T` with `G_t` the sum of the scores up to t."""

    def outer(data):
        total = 0
        for t in range(2):
            score = jax.grad(lambda theta, t=t: jnp.sum(log_prob_of(theta, data)[0, : t + 1]))(THETA)
            total += data.reward[0, t] * jnp.einsum("ij,kl->ijkl", score, score)
        return total

    missing = expected(outer, 1.0, 0.0)
    exact = np.asarray(jax.hessian(objective)(THETA, 1.0))
    assert np.abs(missing).max() > 0.1
    np.testing.assert_allclose(hessian("score", 1.0, 0.0), exact - missing, rtol=1e-9, atol=1e-12)


def test_gradient_of_the_return_after_an_update_from_finite_data(float64):
    """`grad E_D J(theta'(D))`: score plus `sum_t log pi_theta J(theta'(D))` is exact; neither score nor dice alone is."""

    def after(estimator, theta, data):
        inner = inner_on_tabular(estimator)
        params = {"body": {}, "head": theta}
        return objective(inner.step(inner.start(params), data).params["head"], 1.0)

    def exact(theta):
        every = [trajectory(*actions, 1.0, 0.0) for actions in TRAJECTORIES]
        return sum(probability(theta, data) * after("score", theta, data) for data in every)

    truth = np.asarray(finite_differences(lambda x: exact(x.reshape(3, 2)), THETA.ravel())).reshape(3, 2)

    def with_credit(data):
        outcome = after("score", THETA, data)
        return jax.grad(lambda theta: after("score", theta, data) + outcome * jnp.sum(log_prob_of(theta, data)))(THETA)

    np.testing.assert_allclose(expected(with_credit, 1.0, 0.0), truth, rtol=1e-6, atol=1e-9)
    for estimator in ("score", "dice"):
        alone = expected(lambda data, e=estimator: jax.grad(lambda theta: after(e, theta, data))(THETA), 1.0, 0.0)
        assert np.abs(alone - truth).max() > 0.01 * np.abs(truth).max()


# --- the outer losses


def test_the_exploration_term(float64):
    """Of E-MAML: MAML's loss and, for each task, minus c times the mean log-probability before the last point times R'."""
    learner = learner_of("emaml", credit=0.7)
    plain = replace(learner, credit=0.0)
    state, data = made_up(learner)
    outcome = jnp.array([1.3, -0.4, -0.9])
    for i in range(3):
        task = jax.tree.map(lambda x, i=i: x[i], data)
        before = np.asarray(task.valid)[:-1]
        mean = float(np.asarray(task.log_prob)[:-1][before].mean())
        both, alone = (jax.jit(x.task_loss)(state.params, (task, outcome[i])) for x in (learner, plain))
        np.testing.assert_allclose(both - alone, -0.7 * mean * outcome[i], rtol=1e-9)
    maml = learner_of("maml")
    maml = replace(maml, clip=learner.clip)
    task = jax.tree.map(lambda x: x[0], data)
    assert_close(
        jax.grad(plain.task_loss)(state.params, (task, 1.0)), jax.grad(maml.task_loss)(state.params, task), rtol=1e-9
    )


def test_the_outcome_of_exploration_is_the_standardised_return_after_it(float64):
    learner = learner_of("emaml", credit=0.7)
    state, data = made_up(learner)
    reward = np.random.default_rng(0).normal(size=data.valid.shape)
    batch: Any = SimpleNamespace(reward=jnp.asarray(reward), valid=data.valid)
    after = np.where(data.valid, reward, 0)[:, -1].sum(-1).mean(-1)  # of the last point, mean over its episodes
    outcome = jnp.asarray((after - after.mean()) / after.std())
    expected = learner.descend(learner.task_loss, state, (data, outcome), learner.epochs)[0]
    assert_close(learner.improve(state, batch, data)[0], expected, rtol=1e-8, atol=1e-12)


def test_promp(float64):
    """Where it starts the KL divergence and its gradient are 0; elsewhere it is the mean over tasks and points before."""
    learner = learner_of("promp", kl_penalty=0.9, inner_lr=0.2)
    state, data = made_up(learner)
    task = jax.tree.map(lambda x: x[0], data)
    old = learner.inner.policies(state.params, task)
    plain = replace(learner, kl_penalty=0.0)
    at_start = [jax.value_and_grad(x.task_loss)(state.params, (task, old[:-1])) for x in (learner, plain)]
    assert_close(at_start[0], at_start[1], rtol=1e-9, atol=1e-12)
    moved = jax.tree.map(lambda x: x + 0.05, state.params)
    new = learner.inner.policies(moved, task)
    kl = [np.asarray(p.kl(q))[np.asarray(v)].mean() for p, q, v in zip(old[:-1], new[:-1], task.valid[:-1], strict=True)]
    both, alone = (x.task_loss(moved, (task, old[:-1])) for x in (learner, plain))
    assert min(kl) > 1e-5
    np.testing.assert_allclose(both - alone, 0.9 * np.mean(kl), rtol=1e-9)


def test_promp_steps_towards_the_policy_that_sampled(float64):
    """A penalty so large that it is all there is: later epochs pull back what the first one moved."""
    free, held = (learner_of("promp", kl_penalty=eta, epochs=20, lr=0.02) for eta in (0.0, 1e4))
    state, data = made_up(free)
    old = jax.vmap(lambda d: free.inner.policies(state.params, d)[:-1])(data)

    def distance(learner):
        params = jax.jit(lambda d: learner.improve(state, None, d)[0])(data)
        new = jax.vmap(lambda d: learner.inner.policies(params, d)[:-1])(data)
        return float(jnp.mean(jnp.stack([p.kl(q).mean() for p, q in zip(old, new, strict=True)])))

    assert distance(held) < 0.1 * distance(free)


def test_reptile(float64):
    learner = learner_of("reptile", lr=0.25)
    state, data = made_up(learner)
    params, _, metrics = jax.jit(lambda d: learner.improve(state, None, d))(data)
    ends = [learner.inner.replay(state.params, jax.tree.map(lambda x, i=i: x[i], data))[-1] for i in range(3)]
    expected = jax.tree.map(lambda p, *end: p + 0.25 * (sum(end) / 3 - p), state.params, *ends)
    assert_close(params, expected, rtol=1e-10, atol=1e-14)
    assert metrics["grad_norm"] > 1e-3


@pytest.mark.parametrize("settings", [{"adapts": "context"}, {"learned_lr": True}])
def test_reptile_refuses_what_would_never_move(settings):
    with pytest.raises(ConfigError, match=f"algo.{next(iter(settings))}="):
        learner_of("reptile", **settings)


# --- one policy for all tasks, and one that is told the task


def test_without_inner_steps_it_is_plain_policy_optimisation():
    learner = learner_of("multi_task", inner_steps=0)
    state, data = made_up(learner)
    task = jax.tree.map(lambda x: x[0], data)
    assert data.valid.shape[1] == 1
    policy, last = learner.inner.adapted(state.params, task)
    np.testing.assert_array_equal(policy.logits, learner.policy.apply(state.params, last.observation).logits)
    assert learner.plan(walk(True), eval_settings()).points == 4  # but it is fine-tuned on a new task


def test_the_task_is_told_in_numbers_that_vary():
    family = walk(True)
    codes = jax.vmap(lambda key: task_code(family, family.sample(key)))(jax.random.split(jax.random.key(5), 500))
    # The limit of the episode, which comes first, does not vary; goal and length do.
    assert codes.shape == (500, 3)
    np.testing.assert_array_equal(codes[:, 0], 0)
    np.testing.assert_allclose(codes[:, 1:].mean(0), 0, atol=0.2)
    np.testing.assert_allclose(codes[:, 1:].std(0), 1, atol=0.15)
    learner = learner_of("told_task", inner_steps=0)
    assert learner.inner.told == (1, 2) and learner.policy.spec.observation == 2 + 2
    state = learner.init(jax.random.key(0), family)
    _, data = learner.sample(state, jax.random.key(1), family)
    told = np.asarray(data.observation)[..., 2:]
    assert np.all(told == told[:, :1, :1, :1]) and len(np.unique(told[:, 0, 0, 0, 0])) == 3


def test_each_member_trains_on_one_step_families():
    """Where a trial of ten pulls is split over the points."""
    from metarl_cli import config

    family = config.compose(["env=bandit"]).config.env.build()
    for algo in ("fomaml", "cavia", "emaml", "promp", "multi_task"):
        learner = build(algo, family, hidden=[3], meta_batch=4, episodes=None)
        assert learner.episodes * (learner.inner_steps + 1) == 10
        _, metrics = update(learner, learner.init(jax.random.key(0), family), jax.random.key(1), family)
        assert np.isfinite(metrics["return_after"])
