"""Interquartile mean against scipy; bootstrap intervals against theory, a slow direct version and their coverage."""

import time

import numpy as np
import pytest
import scipy.stats

from metarl_cli.core.statistics import (
    bootstrap,
    iqm,
    performance_profile,
    probability_of_improvement,
    summarise,
    summarise_curve,
    welch,
)


def crossed(rng: np.random.Generator, seeds: int, tasks: int, seed_sd: float, task_sd: float, noise: float):
    """Results of S seeds on the same N tasks, true mean 0. `[S, N]`"""
    of_seed = seed_sd * rng.normal(size=(seeds, 1))
    of_task = task_sd * rng.normal(size=(1, tasks))
    return of_seed + of_task + noise * rng.normal(size=(seeds, tasks))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 101])
def test_iqm_is_the_trimmed_mean(n: int):
    x = np.random.default_rng(n).standard_cauchy(size=(3, n, 2))
    np.testing.assert_allclose(iqm(x, axis=1), scipy.stats.trim_mean(x, 0.25, axis=1))
    np.testing.assert_allclose(iqm(x[0, :, 0]), scipy.stats.trim_mean(x[0, :, 0], 0.25))


def test_iqm_by_hand():
    # Of eight values the two lowest and the two highest go: (3 + 4 + 5 + 6) / 4.
    assert iqm(np.array([1000, 4, 3, -50, 6, 5, 7, 2])) == 4.5


def test_the_published_example():
    """google-research/rliable, tests/rliable/metrics_test.py: scores [runs, tasks], two of whose metrics are ours."""
    x, y = np.array([[1, 2], [2, 2], [1, 1], [2, 1]]), np.array([[1, 1], [2, 2], [3, 3]])
    assert (iqm(x.ravel()), iqm(y.ravel())) == (1.5, 2)
    assert probability_of_improvement(x, y)[0] == pytest.approx(1 / 3)


def test_probability_of_improvement_is_mann_whitney_per_task():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, (5, 40)), rng.integers(0, 5, (4, 40))  # ties among them
    u = [scipy.stats.mannwhitneyu(x[:, n], y[:, n]).statistic / 20 for n in range(40)]
    p, low, high = probability_of_improvement(x, y)
    assert p == pytest.approx(np.mean(u)) and low < p < high
    q, below, above = probability_of_improvement(y, x)
    assert (p + q, low + above, high + below) == pytest.approx((1, 1, 1), abs=0.01)
    # With one seed each, only the tasks are drawn: the bootstrap of a mean.
    p, low, high = probability_of_improvement(x[:1], y[:1])
    alone = bootstrap(0.5 * (1 + np.sign(x[:1] - y[:1])), n=20_000)
    assert (low, high) == pytest.approx(alone, abs=0.02)


def test_probability_of_improvement_in_parts(monkeypatch: pytest.MonkeyPatch):
    x, y = (crossed(np.random.default_rng(i), 3, 50, 1.0, 1.0, 1.0) for i in (0, 1))
    at_once = probability_of_improvement(x, y, n=4000)
    monkeypatch.setattr("metarl_cli.core.statistics._CHUNK", 700)
    assert probability_of_improvement(x, y, n=4000) == pytest.approx(at_once, abs=0.02)


def test_performance_profile():
    """The survival function; its interval is that of a mean of zeros and ones."""
    x = np.random.default_rng(0).normal(size=(1, 2000))
    thresholds = np.array([-9.0, -1.0, 0.0, 1.0, 9.0])
    share, low, high = performance_profile(x, thresholds)
    np.testing.assert_allclose(share, scipy.stats.norm.sf(thresholds), atol=0.03)
    error = np.sqrt(share * (1 - share) / x.size)
    np.testing.assert_allclose([low, high], [share - 1.96 * error, share + 1.96 * error], atol=0.004)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.5, 3.0), (-0.4, 0.2)])
def test_welch(shift: float, scale: float):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=30) + shift, scale * rng.normal(size=12)
    theirs = scipy.stats.ttest_ind(x, y, equal_var=False, alternative="greater").pvalue
    samples = [(float(v.mean()), float(v.std(ddof=1)), v.size) for v in (x, y)]
    assert welch(samples[0], samples[1]) == pytest.approx(theirs)


def test_welch_of_numbers_without_spread():
    assert (welch((2.0, 0.0, 5), (1.0, 0.0, 5)), welch((1.0, 0.0, 5), (1.0, 0.0, 5))) == (0.0, 1.0)


def test_one_seed_is_the_normal_interval_of_the_mean():
    """For many tasks the bootstrap of a mean is normal with standard error sd / sqrt(N)."""
    x = np.random.default_rng(0).exponential(size=(1, 2000))
    low, high = bootstrap(x, n=5000)
    error = x.std() / np.sqrt(x.size)
    np.testing.assert_allclose([low, high], x.mean() + error * np.array([-1.96, 1.96]), atol=0.12 * error)


def test_one_seed_agrees_with_scipy():
    x = np.random.default_rng(1).gamma(0.5, size=40)
    low, high = bootstrap(x[None], n=20_000)
    theirs = scipy.stats.bootstrap((x,), np.mean, n_resamples=20_000, method="percentile", rng=2).confidence_interval
    np.testing.assert_allclose([low, high], theirs, rtol=0.02)


def test_two_seeds_by_hand():
    """Seed means 0 and 1 on every task: half of the draws mix them, a quarter take either one twice."""
    low, high = bootstrap(np.array([[0.0] * 3, [1.0] * 3]))
    assert (low, high) == (0, 1)
    low, high = bootstrap(np.array([[0.0] * 3, [1.0] * 3]), level=0.4)  # the middle 40 % lie inside the mixed half
    assert (low, high) == (0.5, 0.5)


def test_the_fast_mean_is_the_bootstrap_of_a_mean():
    """The same draws, resampled one by one."""
    x = crossed(np.random.default_rng(0), 4, 30, 1.0, 1.0, 1.0)[:, :, None] * np.array([1.0, -3.0])
    fast = bootstrap(x, n=300)
    np.testing.assert_allclose(fast, bootstrap(x, lambda v, axis: np.mean(v, axis=axis), n=300))
    rng = np.random.default_rng(0)
    seeds, tasks = rng.integers(4, size=(300, 4)), rng.integers(30, size=(300, 30))
    slow = [np.mean([x[s, t] for s in seeds[r] for t in tasks[r]], axis=0) for r in range(300)]
    np.testing.assert_allclose(fast, np.quantile(slow, (0.025, 0.975), axis=0))


def test_many_tasks_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch):
    """What does not fit into memory at once gives the same interval."""
    x = crossed(np.random.default_rng(0), 3, 50, 1.0, 1.0, 1.0)
    at_once = bootstrap(x, n=100), bootstrap(x, iqm, n=100)
    monkeypatch.setattr("metarl_cli.core.statistics._CHUNK", 700)
    np.testing.assert_allclose((bootstrap(x, n=100), bootstrap(x, iqm, n=100)), at_once)


def test_the_same_seed_gives_the_same_interval():
    x = np.random.default_rng(0).normal(size=(3, 50))
    assert bootstrap(x) == bootstrap(x)
    assert bootstrap(x) != bootstrap(x, seed=1)


def test_seeds_that_differ_widen_the_interval():
    """The pooled interval forgets that tasks of one seed share that seed's luck."""
    x = crossed(np.random.default_rng(0), 5, 200, 1.0, 0.0, 0.5)
    low, high = bootstrap(x)
    pooled_low, pooled_high = bootstrap(x.reshape(1, -1))
    assert high - low > 5 * (pooled_high - pooled_low)
    # Nearly all is the luck of the seeds: a bootstrap over the five seed means alone.
    seeds_low, seeds_high = bootstrap(x.mean(axis=1)[None])
    np.testing.assert_allclose(high - low, seeds_high - seeds_low, rtol=0.1)


@pytest.mark.parametrize(("seeds", "seed_sd", "task_sd"), [(1, 0.0, 1.0), (5, 0.0, 1.0), (5, 0.2, 1.0), (20, 1.0, 0.3)])
def test_covers_the_truth(seeds: int, seed_sd: float, task_sd: float):
    """95 % intervals over 40 shared tasks hold the true mean in about 95 of 100 experiments.

    Drawing tasks afresh within each seed would cover in about 60 of 100 in the second case: sd / sqrt(5 * 40) for an
    error of sd / sqrt(40). 300 experiments of 0.95 have a standard error of 0.013.
    """
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        low, high = bootstrap(crossed(rng, seeds, 40, seed_sd, task_sd, 0.2), n=400)
        hits += low <= 0 <= high
    assert 0.90 <= hits / 300 <= 0.985


def test_summary():
    x = np.random.default_rng(0).normal(size=(3, 40))
    summary = summarise(x)
    low, high = bootstrap(x)
    assert summary == {
        "mean": pytest.approx(x.mean()),
        "iqm": pytest.approx(scipy.stats.trim_mean(x.ravel(), 0.25)),
        "ci_low": pytest.approx(float(low)),
        "ci_high": pytest.approx(float(high)),
        "n_tasks": 40,
        "n_seeds": 3,
        "interval_over": "seeds, tasks",
    }
    assert all(type(value) in (float, int, str) for value in summary.values())  # as JSON wants them
    assert summarise(x[:1])["interval_over"] == "tasks"


def test_a_curve_is_its_points():
    x = np.random.default_rng(0).normal(size=(3, 40, 4)).astype(np.float32)
    for p, point in enumerate(summarise_curve(x)):
        alone = summarise(x[:, :, p])
        assert point.keys() == alone.keys()
        for key in ("mean", "iqm", "ci_low", "ci_high"):
            assert point[key] == pytest.approx(alone[key])


def test_one_task_of_one_seed():
    assert summarise(np.array([[2.5]]))["ci_low"] == 2.5


def test_fast_enough():
    x = np.random.default_rng(0).normal(size=(5, 10_000))
    start = time.perf_counter()
    bootstrap(x)
    assert time.perf_counter() - start < 2  # 0.3 s on an idle machine
