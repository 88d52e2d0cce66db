"""Each classical learner against what defines it, and the exact optima against enumeration and against simulation."""

from __future__ import annotations

import functools
import itertools
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from metarl_cli import catalogue, config, untrained
from metarl_cli.baselines import bandits, base, exact, gittins, mdps
from metarl_cli.baselines.optimum import optimum
from metarl_cli.core.errors import ConfigError
from metarl_cli.core.interfaces import MetaLearner
from metarl_cli.core.types import Batch, BernoulliArms, CorrelatedArms, GoalGrid, InformativeArms, TabularMDP, TwoStep

ALGOS = catalogue.groups()["algo"]
CLASSICAL = sorted(ALGOS.keys() - catalogue.trained(ALGOS).keys())
ENVS = sorted(catalogue.groups()["env"])


@functools.cache
def settings_of(algo: str) -> Any:
    return config.compose_eval([f"algo={algo}"]).config.algo


def compose(*lines: str) -> tuple[Any, Any, Any]:
    composed = config.compose_eval(list(lines))
    return composed.config, *config.build_untrained(composed.config)


def simulate(*lines: str, tasks: int = 2000) -> Any:
    settings, learner, family = compose(*lines, f"eval.tasks={tasks}")
    return untrained.live(learner, family, settings.eval, [0])


def total(*lines: str, tasks: int = 2000) -> tuple[float, float]:
    """Mean trial return and its standard error."""
    returns = simulate(*lines, tasks=tasks).trial_return
    return returns.mean(), returns.std() / np.sqrt(returns.size)


def steps(observation: Any, action: Any, reward: Any) -> Batch:
    """One episode, as a learner is shown it."""
    action, no = jnp.asarray(action), jnp.zeros(len(action), bool)
    reward = jnp.asarray(reward, float)
    return Batch(jnp.asarray(observation, float), action, reward, no, no, ~no, None, None)


def decide(learner: Any, belief: Any, episode: int = 0, n: int = 1, seed: int = 0) -> np.ndarray:
    """The first actions of n episodes with this belief; for bandits."""

    def one(key):
        key_begin, key_act = jax.random.split(key)
        plan = learner.begin(belief, key_begin, jnp.asarray(episode))
        previous: Any = None
        return learner.act(plan, jnp.zeros(1), previous, key_act)[1]

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(seed), n)))


# --- all of them


def test_there_are_all_of_them():
    assert {"random", "oracle", "greedy", "epsilon_greedy", "ucb1", "thompson", "optimistic_thompson", "gittins"} < set(
        CLASSICAL
    )
    assert {"bayes_optimal", "psrl", "opsrl", "ucrl2", "beb", "q_learning", "value_iteration"} < set(CLASSICAL)


@pytest.mark.parametrize("env", ENVS)
def test_each_fits_a_family_or_says_which_it_fits(env):
    """Nothing is trained, and `random` fits all of them."""
    family = config.compose_eval([f"env={env}"]).config.env.build()
    built = []
    for algo in CLASSICAL:
        try:
            learner = settings_of(algo).build(family)
        except ConfigError as error:
            assert "fits" in str(error) or error.key.startswith("env."), error
        else:
            assert not isinstance(learner, MetaLearner)
            built.append(algo)
    assert "random" in built


FITTING = [(algo, "bandit") for algo in CLASSICAL if algo not in ("psrl", "opsrl", "ucrl2", "beb", "q_learning")]
FITTING = [pair for pair in FITTING if pair[0] != "value_iteration"]
FITTING += [("thompson", "bandit_gaussian"), ("ucb1", "bandit_gaussian"), ("greedy", "bandit_gaussian")]
MDPS = ["random", "oracle", "greedy", "psrl", "opsrl", "ucrl2", "beb", "q_learning", "value_iteration"]
FITTING += [(algo, "tabular_mdp") for algo in MDPS]


@pytest.mark.slow
@pytest.mark.parametrize(("algo", "env"), FITTING)
def test_learns_within_the_trial_and_stays_between_chance_and_the_oracle(algo, env):
    sizes = ["env.episodes=20", "env.states=4"] if env == "tabular_mdp" else ["env.k=3", "env.n=10"]
    result = simulate(f"algo={algo}", f"env={env}", *sizes, tasks=500)
    returns = result.returns[0, :, :, 0]  # [N, E]
    first, last = returns[:, :3].mean(1), returns[:, -3:].mean(1)
    gain = last - first
    error = gain.std() / np.sqrt(gain.size)
    if algo in ("random", "oracle", "value_iteration"):
        assert abs(gain.mean()) < 4 * error
    else:
        assert gain.mean() > 3 * error
        best = simulate("algo=oracle", f"env={env}", *sizes, tasks=500).trial_return - result.trial_return
        assert best.mean() > 3 * best.std() / np.sqrt(500)


def test_continuous_actions_of_chance_and_the_oracle():
    chance, _ = total("algo=random", "env=point_nav", "eval.tasks=40", tasks=40)
    knows, _ = total("algo=oracle", "env=point_nav", tasks=40)
    assert knows > chance / 4  # both negative: the oracle loses far less


# --- sampling


@pytest.mark.parametrize("shape", [0.3, 1.0, 2.0, 7.5, 300.0])
def test_gamma_variates(shape):
    x = np.asarray(jax.jit(base.sample_gamma)(jax.random.key(1), jnp.full(20_000, shape)))
    assert stats.kstest(x, stats.gamma(shape).cdf).pvalue > 1e-3


def test_beta_and_dirichlet_variates():
    x = np.asarray(base.sample_beta(jax.random.key(2), jnp.full(20_000, 3.0), jnp.full(20_000, 2.0)))
    assert stats.kstest(x, stats.beta(3, 2).cdf).pvalue > 1e-3
    alpha = jnp.array([1.0, 2.0, 5.0])
    p = np.asarray(base.sample_dirichlet(jax.random.key(3), jnp.broadcast_to(alpha, (20_000, 3))))
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)
    for i, a in enumerate(alpha.tolist()):  # each component is Beta(a, sum - a)
        assert stats.kstest(p[:, i], stats.beta(a, 8 - a).cdf).pvalue > 1e-3


def test_equal_values_are_chosen_equally_often():
    values = jnp.array([1.0, 3.0, 3.0 - 1e-7, 2.999])
    chosen = np.asarray(jax.vmap(lambda key: base.choose(key, values))(jax.random.split(jax.random.key(0), 4000)))
    share = np.bincount(chosen, minlength=4) / 4000
    np.testing.assert_allclose(share, [0, 0.5, 0.5, 0], atol=4 * np.sqrt(0.25 / 4000))


# --- bandits


def arms(algo: str, *changes: str, k: int = 3, n: int = 10) -> Any:
    return compose(f"algo={algo}", "env=bandit", f"env.k={k}", f"env.n={n}", *changes)[1]


def after(learner: Any, pulls: list[tuple[int, int]]) -> Any:
    belief = learner.start()
    for arm, reward in pulls:
        belief = learner.learn(belief, jnp.asarray(arm), steps(np.zeros((1, 1)), [arm], [reward]))
    return belief


def test_the_posterior_of_bernoulli_arms():
    belief = after(arms("thompson"), [(0, 1), (0, 1), (0, 0), (2, 0)])
    np.testing.assert_array_equal(belief.successes, [3, 1, 1])
    np.testing.assert_array_equal(belief.failures, [2, 1, 2])
    np.testing.assert_allclose(belief.mean(), [3 / 5, 1 / 2, 1 / 3], rtol=1e-6)


def test_the_posterior_of_gaussian_arms():
    learner = compose("algo=thompson", "env=bandit_gaussian", "env.k=2", "env.mean=1", "env.std=2", "env.noise=0.5")[1]
    belief = after(learner, [(1, 3), (1, 2)])
    # Precisions 1/4 and 2 x 4: the mean is (1 x 1/4 + 5 x 4) / (1/4 + 8).
    np.testing.assert_allclose(belief.precision, [0.25, 8.25], rtol=1e-6)
    np.testing.assert_allclose(belief.mean(), [1, 20.25 / 8.25], rtol=1e-6)
    np.testing.assert_allclose(belief.weight(), [2, 4], rtol=1e-6)


def test_greedy_takes_the_first_of_the_best():
    learner = arms("greedy")
    assert decide(learner, learner.start()) == 0
    assert decide(learner, after(learner, [(0, 0)])) == 1
    assert decide(learner, after(learner, [(0, 0), (1, 1), (2, 1)])) == 1


def test_epsilon_greedy_takes_any_arm_with_probability_epsilon():
    learner = arms("epsilon_greedy", "algo.epsilon=0.6")
    chosen = decide(learner, after(learner, [(1, 1)]), n=4000)
    np.testing.assert_allclose(np.bincount(chosen) / 4000, [0.2, 0.6, 0.2], atol=4 * np.sqrt(0.24 / 4000))


def test_ucb1_is_its_index():
    learner = arms("ucb1", "algo.c=0.7")
    pulls = [(0, 1), (0, 1), (1, 0), (2, 1), (0, 0), (2, 0)]
    # The authors': each arm starts with a success and a failure; c sqrt(2 log t / n), t from 0.
    k, m = np.ones(3), np.full(3, 2.0)
    for t, (arm, reward) in enumerate(pulls):
        index = k / m + 0.7 * np.sqrt(2 * np.log(t) / m) if t else np.zeros(3)
        assert decide(learner, after(learner, pulls[:t]), episode=t) == np.argmax(index)
        k[arm] += reward
        m[arm] += 1


def test_thompson_takes_an_arm_as_often_as_it_is_the_best():
    learner = arms("thompson", k=2)
    belief = after(learner, [(0, 1), (0, 1), (1, 0)])  # Beta(3, 1) and Beta(1, 2)
    x = (np.arange(100_000) + 0.5) / 100_000
    expected = np.mean(stats.beta(3, 1).pdf(x) * stats.beta(1, 2).cdf(x))
    assert abs(np.mean(decide(learner, belief, n=20_000) == 0) - expected) < 4 * np.sqrt(expected * (1 - expected) / 20_000)


def test_optimistic_thompson_takes_the_best_arm_of_the_likeliest_sample():
    """With many samples that is near the mode of the joint density."""
    learner = arms("optimistic_thompson", "algo.samples=300", k=2)
    belief = after(learner, [(0, 1), (0, 1), (0, 0), (1, 1), (1, 0), (1, 0)])  # modes 2/3 and 1/3
    assert np.mean(decide(learner, belief, n=500) == 0) > 0.98
    one = arms("thompson", k=2)
    assert np.mean(decide(one, belief, n=2000) == 0) < 0.9
    # The density is that of the Beta distributions, up to a constant.
    means = np.array([[0.2, 0.7], [0.6, 0.3]])
    expected = stats.beta(3, 2).logpdf(means[:, 0]) + stats.beta(2, 3).logpdf(means[:, 1])
    actual = np.asarray(jax.vmap(belief.log_density)(jnp.asarray(means)))
    np.testing.assert_allclose(actual[0] - actual[1], expected[0] - expected[1], rtol=1e-5)


def test_gittins_published_indices():
    # Gittins, Glazebrook and Weber 2011, tables of the Bernoulli reward process.
    table = gittins.gittins_indices(3, 0.9)
    np.testing.assert_allclose([table[0, 0], table[0, 1], table[1, 0]], [0.7029, 0.5001, 0.8001], atol=1e-4)
    table = gittins.gittins_indices(3, 0.99)
    np.testing.assert_allclose([table[0, 0], table[1, 0]], [0.8699, 0.9102], atol=1e-4)


def test_gittins_indices_make_an_arm_worth_as_much_as_a_certain_one():
    """By an independent recursion: with lambda below the index it pays to pull, above it does not."""
    discount, depth = 0.6, 40
    table = gittins.gittins_indices(4, discount)

    def gain(s: int, f: int, certain: float) -> float:
        @functools.cache
        def value(s: int, f: int, left: int) -> float:
            p = (s + 1) / (s + f + 2)
            if left == 0:
                return max(certain, p) / (1 - discount)
            return max(certain / (1 - discount), pull(s, f, left))

        def pull(s: int, f: int, left: int) -> float:
            p = (s + 1) / (s + f + 2)
            return p + discount * (p * value(s + 1, f, left - 1) + (1 - p) * value(s, f + 1, left - 1))

        return pull(s, f, depth) - certain / (1 - discount)

    for s, f in itertools.product(range(3), range(3)):
        if s + f <= 4:
            assert gain(s, f, table[s, f] - 1e-3) > 0 > gain(s, f, table[s, f] + 1e-3)


def test_gittins_indices_grow_with_what_may_still_come():
    near, far = gittins.gittins_indices(6, 0.5), gittins.gittins_indices(6, 0.99)
    s, f = np.nonzero(np.add.outer(np.arange(7), np.arange(7)) <= 6)
    mean = (s + 1) / (s + f + 2)
    assert np.all(mean < near[s, f]) and np.all(near[s, f] < far[s, f])
    np.testing.assert_allclose(gittins.gittins_indices(6, 0.0)[s, f], mean, atol=1e-5)
    belief = after(arms("gittins"), [(0, 0), (1, 1)])
    assert decide(arms("gittins"), belief) == 1


# --- optima of bandits


def best_of_bernoulli(k: int, n: int) -> Fraction:
    """Over all counts, neither sorted nor indexed."""

    @functools.cache
    def value(counts: tuple[tuple[int, int], ...], left: int) -> Fraction:
        if left == 0:
            return Fraction(0)
        found = []
        for i, (s, f) in enumerate(counts):
            p = Fraction(s + 1, s + f + 2)
            won = value((*counts[:i], (s + 1, f), *counts[i + 1 :]), left - 1)
            lost = value((*counts[:i], (s, f + 1), *counts[i + 1 :]), left - 1)
            found.append(p * (1 + won) + (1 - p) * lost)
        return max(found)

    return value(((0, 0),) * k, n)


@pytest.mark.parametrize(("k", "n"), [(1, 3), (2, 1), (2, 5), (3, 4), (5, 3)])
def test_dynamic_program_against_enumeration(k, n):
    assert exact.solve_counts(k, n).value == pytest.approx(float(best_of_bernoulli(k, n)), rel=1e-12)


def test_number_of_count_states():
    for k, n in ((1, 4), (2, 4), (3, 3), (5, 3)):
        single = [(s, m - s) for m in range(n) for s in range(m + 1)]
        every = itertools.combinations_with_replacement(single, k)
        expected = sum(sum(map(sum, counts)) < n for counts in every)
        assert exact.count_states(k, n) == expected == len(exact.solve_counts(k, n).best)


def test_rows_that_do_not_fit_in_an_integer():
    rows = np.array([[3, 1], [2, 2], [3, 1], [0, 0]], np.int32)
    for codes in (4, 2**40):
        distinct, where = exact._unique_rows(rows, codes)
        np.testing.assert_array_equal(distinct[where], rows)
        assert len(distinct) == 3


def test_published_optima():
    # PAPERS: the Bayes-optimal returns of the RL^2 bandits with 10 pulls, and the regrets of Wang et al.'s with 100.
    assert exact.solve_counts(5, 10).value == pytest.approx(6.660, abs=5e-4)
    assert exact.solve_counts(10, 10).value == pytest.approx(6.714, abs=5e-4)
    assert exact.solve_counts(50, 10).value == exact.solve_counts(10, 10).value
    for values, regret in ((None, 1.221), ((0.1, 0.9), 0.625), ((0.25, 0.75), 1.000)):
        value, best = exact.correlated_value(values, 100)
        assert 100 * best - value == pytest.approx(regret, abs=5e-4)


@pytest.mark.slow
def test_published_optimum_of_two_independent_arms():
    assert 200 / 3 - exact.solve_counts(2, 100).value == pytest.approx(1.748, abs=5e-4)


def test_what_does_not_fit_says_how_large_it_is():
    with pytest.raises(ConfigError, match=r"3.63e\+11 count states for 5 arms and 100 pulls would take 2.43e\+04 GB"):
        compose("algo=bayes_optimal", "env=bandit", "env.k=5", "env.n=100")
    family = compose("algo=random", "env=bandit", "env.k=5", "env.n=100")[2]
    found = optimum(family, None, "test", 100)
    assert found is not None and found.value is None and "GB" in found.method
    assert optimum(family, None, "ood", 100) is None


@pytest.mark.parametrize("values", [None, (0.1, 0.9), (0.3, 0.4, 0.8)])
def test_correlated_arms_against_all_policies(values):
    """The best action after every history of pulls and rewards, by plain expectation over p."""
    p = np.array(values) if values else np.polynomial.legendre.leggauss(20)[0] / 2 + 0.5
    prior = np.full(len(p), 1 / len(p)) if values else np.polynomial.legendre.leggauss(20)[1] / 2

    def value(weight: np.ndarray, left: int) -> float:
        if left == 0:
            return 0.0
        found = []
        for arm in (0, 1):
            win = p if arm == 0 else 1 - p
            found.append((weight * win).sum() + value(weight * win, left - 1) + value(weight * (1 - win), left - 1))
        return max(found)

    assert exact.correlated_value(values, 5)[0] == pytest.approx(value(prior, 5), rel=1e-9)


@pytest.mark.parametrize(
    ("prior", "n"),
    [(InformativeArms(4, 5.0, 1.0), 4), (InformativeArms(5, 1.0, 0.9), 5), (InformativeArms(4, 1.2, 0.0), 4)],
)
def test_informative_arm_against_all_policies(prior, n):
    """Over the sets of arms that may still be the target, in any order."""

    @functools.cache
    def value(possible: frozenset[int], left: int) -> float:
        if left == 0:
            return 0.0
        if len(possible) == 1:
            (arm,) = possible
            return left * max(prior.target, prior.other, (arm + 1) / prior.arms)
        found = [sum((i + 1) / prior.arms + value(frozenset({i}), left - 1) for i in possible) / len(possible)]
        for arm in range(prior.arms):
            share = (arm in possible) / len(possible)
            rest = possible - {arm}
            miss = (1 - share) * (prior.other + value(rest, left - 1))
            found.append(share * (prior.target + value(frozenset({arm}), left - 1)) + miss)
        return max(found)

    assert exact.solve_informative(prior, n).value == pytest.approx(value(frozenset(range(prior.arms)), n), rel=1e-12)


def test_wang_informative_arm():
    # Ask first, for 0.55 on average, then four times 5.
    plan = exact.solve_informative(InformativeArms(10, 5.0, 1.0), 5)
    assert plan.value == pytest.approx(20.55) and plan.asks[0, 0]


@pytest.mark.parametrize("prior", [TwoStep(1, 0.8, 0.9, 0.0), TwoStep(4, 0.8, 0.9, 0.1), TwoStep(4, 0.3, 0.7, 0.3)])
def test_two_step_against_all_policies(prior):
    def value(belief: float, left: int) -> float:
        if left == 0:
            return 0.0
        found = []
        for action in (0, 1):
            worth = 0.0
            for second in (0, 1):
                reach = prior.common if second == action else 1 - prior.common
                for reward in (0, 1):
                    if_first = prior.reward if (second == 0) == (reward == 1) else 1 - prior.reward
                    joint, other = belief * if_first, (1 - belief) * (1 - if_first)
                    posterior = joint / (joint + other)
                    posterior = posterior * (1 - prior.switch) + (1 - posterior) * prior.switch
                    worth += reach * (joint + other) * (reward + value(posterior, left - 1))
            found.append(worth)
        return max(found)

    assert exact.two_step_value(prior, 4) == pytest.approx(value(0.5, 4), abs=1e-6)


SIMULATED = [
    ("bandit", "env.k=3", "env.n=12"),
    ("bandit", "env.k=12", "env.n=6"),
    ("bandit_uniform", "env.n=20"),
    ("bandit_easy", "env.n=20"),
    ("bandit_informative", "env.n=3"),
    ("two_step", "env.episodes=15"),
    ("two_step_switching", "env.rounds=15"),
    ("grid_nav", "env.episodes=2"),
    ("tabular_mdp", "env.episodes=2"),
]


@pytest.mark.slow
@pytest.mark.parametrize("lines", SIMULATED, ids=" ".join)
def test_simulation_agrees_with_the_dynamic_program(lines):
    """In 4000 tasks, within 4 standard errors."""
    env, *changes = lines
    algo = "value_iteration" if env == "tabular_mdp" else "bayes_optimal"
    settings, learner, family = compose(f"algo={algo}", f"env={env}", *changes, "eval.tasks=4000")
    result = untrained.live(learner, family, settings.eval, [0])
    from metarl_cli.evaluation import choose_tasks

    found = optimum(family, choose_tasks(family, settings.eval), "test", family.episodes)
    assert found is not None and found.value is not None
    returns = result.trial_return
    assert abs(returns.mean() - found.value) < 4 * returns.std() / np.sqrt(returns.size)
    if found.regret is not None:
        regret = result.regret.sum((2, 3))
        assert abs(regret.mean() - found.regret) < 4 * regret.std() / np.sqrt(regret.size) + 1e-6


@pytest.mark.slow
def test_no_learner_beats_the_optimum():
    for algo in ("gittins", "ucb1", "thompson", "greedy"):
        mean, error = total(f"algo={algo}", "env=bandit", "env.k=5", "env.n=10", tasks=4000)
        assert mean < 6.660 + 3 * error


# --- a goal on a grid


def test_the_sweep_of_grid_nav():
    family = compose("algo=bayes_optimal", "env=grid_nav")[2]
    sweep = exact.solve_sweep(family.prior, family.horizon)
    assert sweep is not None
    np.testing.assert_allclose(sweep.episodes, [4.0, 11.071], atol=5e-4)
    for path in (sweep.first, sweep.second):
        walk = np.array([family.prior.start, *path])
        assert len(path) == 15 and np.all(np.abs(np.diff(walk, axis=0)).sum(1) <= 1)
        assert walk.min() >= 0 and walk.max() <= 4
    assert set(family.prior.goals) <= {*sweep.first, *sweep.second}
    for cell in set(family.prior.goals) - set(sweep.first):  # what is left costs nothing in the second episode
        assert sweep.second.index(cell) + 1 == sum(cell)


def test_the_sweep_in_every_task():
    """The mean over the 21 goals, without luck: 4.000 and 3 x 11.071."""
    _, learner, family = compose("algo=bayes_optimal", "env=grid_nav")
    from metarl_cli.core.types import Plan

    task = family.sample(jax.random.key(0))
    tasks = jax.vmap(lambda goal: type(task)(**{**vars(task), "goal": goal}))(jnp.array(family.prior.goals))
    live = jax.vmap(lambda t: learner.trial((), jax.random.key(1), family, t, Plan(points=4, episodes=1)).returns)
    np.testing.assert_allclose(np.asarray(live(tasks)).mean((0, 2)), [4.0, *[11.0714286] * 3], rtol=1e-5)


def test_other_grids():
    def solve(size: int, horizon: int, clearance: int) -> Any:
        cells = itertools.product(range(size), repeat=2)
        goals = tuple(cell for cell in cells if max(cell) >= clearance)
        return exact.solve_sweep(GoalGrid(size, (0, 0), goals, 1.0, 0.0, False), horizon)

    # 2 x 2, the goal anywhere but at the start: three steps try three cells, found after 1, 2 or 3 of 3.
    assert solve(2, 3, 1).episodes == pytest.approx(((3 + 2 + 1) / 3, (3 + 3 + 2) / 3))
    everywhere = GoalGrid(2, (0, 0), ((0, 1), (1, 0), (1, 1)), 1.0, 0.0, True)
    assert exact.solve_sweep(everywhere, 3) is None  # who is paid once does better not to stay
    with pytest.raises(ConfigError, match="fits"):
        compose("algo=bayes_optimal", "env=dark_room")


# --- tabular MDPs

S, A, T = 4, 3, 5
RNG = np.random.default_rng(0)


def mdp() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.normal(1, 1, (S, A)), rng.dirichlet(np.ones(S), (S, A))


def test_backward_induction_against_all_policies():
    reward, transition = mdp()
    values = np.asarray(mdps.backward_induction(jnp.asarray(reward), jnp.asarray(transition), T))

    def value(s: int, left: int) -> float:
        return 0.0 if left == 0 else max(action_value(s, a, left) for a in range(A))

    @functools.cache
    def action_value(s: int, a: int, left: int) -> float:
        return reward[s, a] + sum(transition[s, a, n] * value(n, left - 1) for n in range(S))

    expected = [[[action_value(s, a, T - t) for a in range(A)] for s in range(S)] for t in range(T)]
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def tabular(algo: str, *changes: str) -> Any:
    sizes = [f"env.states={S}", f"env.actions={A}", f"env.horizon={T}"]
    return compose(f"algo={algo}", "env=tabular_mdp", *sizes, *changes)[1]


def an_episode() -> Batch:
    state, action = [0, 2, 2, 1, 2], [1, 0, 0, 2, 0]
    return steps(np.eye(S)[state], action, [1.0, 2.0, 4.0, -1.0, 3.0])


def test_the_posterior_of_an_mdp_step_by_step():
    """As TabulaRL updates it, without the transition of the last step."""
    learner = tabular(
        "psrl", "algo.prior_mean=0.5", "algo.prior_precision=2", "algo.prior_count=0.7", "env.reward_noise=0.5"
    )
    belief = learner.learn(learner.start(), None, an_episode())
    mean, precision, counts = np.full((S, A), 0.5), np.full((S, A), 2.0), np.full((S, A, S), 0.7)
    batch = an_episode()
    state = batch.observation.argmax(1)
    for t in range(T):
        s, a, r = int(state[t]), int(batch.action[t]), float(batch.reward[t])
        mean[s, a] = (mean[s, a] * precision[s, a] + r * 4) / (precision[s, a] + 4)
        precision[s, a] += 4
        if t < T - 1:
            counts[s, a, int(state[t + 1])] += 1
    np.testing.assert_allclose(belief.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(belief.precision, precision, rtol=1e-6)
    np.testing.assert_allclose(belief.counts, counts, rtol=1e-6)


def test_the_prior_is_the_family_s_own_unless_it_is_given():
    belief = tabular("psrl", "env.reward_mean=2", "env.reward_std=0.5", "env.dirichlet=3").start()
    assert (belief.mean[0, 0], belief.precision[0, 0], belief.counts[0, 0, 0]) == (2, 4, 3)
    assert tabular("psrl", "algo.prior_mean=0").start().mean[0, 0] == 0
    assert tabular("ucrl2").start().mean[0, 0] == 0  # as TabulaRL


def extended_in_place(reward, transition, reward_slack, transition_slack):
    """Optimistic planning state by state, on one array of probabilities that is changed as it goes."""
    p, value, q = transition.copy(), np.zeros(S), np.zeros((T, S, A))
    for t in reversed(range(T)):
        order = np.argsort(value, kind="stable")
        for s, a in itertools.product(range(S), range(A)):
            row, best = p[s, a], order[-1]
            if row[best] + transition_slack[s, a] / 2 > 1:
                row = np.eye(S)[best]
            else:
                row[best] += transition_slack[s, a] / 2
                for worst in order:
                    if row.sum() <= 1:
                        break
                    row[worst] = max(0.0, 1 - row.sum() + row[worst])
            q[t, s, a] = reward[s, a] + reward_slack[s, a] + row @ value
        value = q[t].max(1)
    return q


@pytest.mark.parametrize("slack", [0.0, 0.1, 0.5, 1.5])
def test_extended_value_iteration_against_its_definition(slack, float64):
    reward, transition = mdp()
    reward_slack, transition_slack = RNG.uniform(0, 1, (S, A)), slack * RNG.uniform(0.5, 1, (S, A))
    expected = extended_in_place(reward, transition, reward_slack, transition_slack)
    args = map(jnp.asarray, (reward, transition, reward_slack, transition_slack))
    np.testing.assert_allclose(mdps.extended_value_iteration(*args, T), expected, rtol=1e-9)


def test_ucrl2_is_optimistic_and_beb_adds_its_bonus():
    belief = tabular("ucrl2").learn(tabular("ucrl2").start(), None, an_episode())
    plan = lambda *changes: tabular("ucrl2", *changes).begin(belief, jax.random.key(0), jnp.asarray(3)).values  # noqa: E731
    greedy = mdps.backward_induction(*mdps.expected_mdp(belief), T)
    assert np.all(np.asarray(plan("algo.scaling=0.01")) > np.asarray(greedy) - 1e-5)
    assert np.all(np.asarray(plan("algo.scaling=0.2")) > np.asarray(plan("algo.scaling=0.01")))
    # At the last step there is the slack of the reward alone; (2, 0) was seen three times. Episodes count from 1, plus 1.
    log = np.log(2 * S * A * 5 / 0.05)
    expected = float(belief.mean[2, 0]) + 0.2 * np.sqrt(4 * log / 3)
    assert plan("algo.scaling=0.2")[-1, 2, 0] == pytest.approx(expected, rel=1e-4)

    beb = tabular("beb", "algo.scaling=0.01")
    belief = beb.learn(beb.start(), None, an_episode())
    values = np.asarray(beb.begin(belief, jax.random.key(0), jnp.asarray(0)).values)
    assert values[-1, 2, 0] == pytest.approx(float(belief.mean[2, 0]) + 1 / (1 + float(belief.precision[2, 0])), rel=1e-5)
    p = np.asarray(belief.counts[2, 0]) / float(belief.counts[2, 0].sum())
    bonus = 2 * T**3 * 0.01 / (1 + float(belief.counts[2, 0].sum()))
    assert values[-2, 2, 0] == pytest.approx(values[-1, 2, 0] + p @ values[-1].max(1) + bonus, rel=1e-5)


def test_psrl_acts_in_a_sample_of_the_posterior():
    """At the last step its values are posterior samples of the mean reward; those of several samples are their maximum."""
    learner, more = tabular("psrl"), tabular("opsrl", "algo.samples=5")
    belief = learner.learn(learner.start(), None, an_episode())
    keys = jax.random.split(jax.random.key(0), 4000)
    last = lambda one: np.asarray(jax.jit(jax.vmap(lambda k: one.begin(belief, k, 0).values[-1, 2, 0]))(keys))  # noqa: E731
    posterior = stats.norm(float(belief.mean[2, 0]), float(belief.precision[2, 0]) ** -0.5)
    assert stats.kstest(last(learner), posterior.cdf).pvalue > 1e-3
    assert stats.kstest(last(more), lambda x: posterior.cdf(x) ** 5).pvalue > 1e-3


def test_a_planner_that_knows_the_mdp_is_value_iteration():
    reward, transition = map(jnp.asarray, mdp())
    known = mdps.MDPBelief(reward.astype(float), jnp.full((S, A), 1e8), 1e8 * transition.astype(float))
    expected = np.asarray(mdps.backward_induction(reward, transition, T))
    for algo in ("greedy", "psrl", "opsrl", "ucrl2", "beb"):
        values = jax.jit(tabular(algo).begin)(known, jax.random.key(0), jnp.asarray(0)).values
        np.testing.assert_allclose(values, expected, atol=0.02)


def test_q_learning_by_hand():
    learner = tabular("q_learning", "algo.lr=0.5", "algo.gamma=0.8", "algo.initial=0")
    q = np.asarray(learner.learn(learner.start(), None, an_episode()))
    expected = np.zeros((S, A))
    expected[0, 1] = 0.5 * 1  # all values of state 2 are 0
    expected[2, 0] = 0.5 * 2
    expected[2, 0] += 0.5 * (4 + 0.8 * 0 - 1)  # on to state 1
    expected[1, 2] = 0.5 * (-1 + 0.8 * 2.5)
    # the last step leads to a state that is not seen
    np.testing.assert_allclose(q, expected, rtol=1e-6)


def test_the_ceiling_is_that_of_the_evaluated_tasks():
    settings, _, family = compose("algo=random", "env=tabular_mdp", "env.episodes=3", "eval.tasks=50")
    from metarl_cli.evaluation import choose_tasks

    tasks = choose_tasks(family, settings.eval)
    found = optimum(family, tasks, "ood", 3)
    assert found is not None
    value = np.zeros((50, 10))
    for _ in range(10):
        value = (np.asarray(tasks.reward) + np.einsum("bsan,bn->bsa", tasks.transition, value)).max(2)
    assert found.value == pytest.approx(3 * value[:, 0].mean(), rel=1e-5)


def test_priors_are_what_the_families_say():
    known = (BernoulliArms, CorrelatedArms, InformativeArms, TwoStep, TabularMDP, GoalGrid)
    for env, prior in zip(
        ("bandit", "bandit_easy", "bandit_informative", "two_step", "tabular_mdp", "grid_nav"), known, strict=True
    ):
        assert isinstance(compose("algo=random", f"env={env}")[2].prior, prior)
    assert isinstance(bandits.first_belief(BernoulliArms(4)), bandits.BetaArms)
