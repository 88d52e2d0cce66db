"""Means, interquartile means, bootstrap intervals and comparisons over seeds and tasks. Numpy only, but for one p-value.

All learners of a comparison, hence all seeds, meet the same tasks: a table of results `[S, N]` is crossed, not nested.
The bootstrap therefore draws seeds and tasks with replacement, and a drawn task brings all of its seeds (Owen 2007's
"pigeonhole" bootstrap). Drawing tasks afresh within each drawn seed would treat the S results on one task as
independent; with hard and easy tasks such intervals are too narrow by up to a factor sqrt(S).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray
_CHUNK = 2_000_000  # elements of a temporary array: stays in the tens of megabytes


def iqm(x: Array, axis: int = -1) -> Array:
    """Interquartile mean: the mean of what is left without the lowest and the highest quarter (each rounded down).

    Args:
        x: values, any shape.
        axis: reduced.
    """
    x = np.asarray(x, np.float64)
    n = x.shape[axis]
    cut = n // 4
    if cut:
        x = np.partition(x, (cut, n - cut - 1), axis=axis)
    return np.take(x, np.arange(cut, n - cut), axis=axis).mean(axis=axis)


def bootstrap(
    values: Array,
    statistic: Callable[..., Array] = np.mean,
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[Array, Array]:
    """Percentile bootstrap over seeds and tasks; over tasks only where there is one seed.

    Trailing axes (the points of a curve) share the draws, which costs little more than a single point.

    Args:
        values: `[S, N, ...]`.
        statistic: reduces an axis of length S * N: `statistic(x, axis=1)`. `numpy.mean` takes a much faster way.
        n: resamples.
        seed: of the draws; the same seed gives the same interval.
        level: coverage.

    Returns:
        `(low, high)`, each `[...]`.
    """
    values = np.asarray(values, np.float64)
    seeds, tasks = values.shape[:2]
    rng = np.random.default_rng(seed)
    drawn_seeds = rng.integers(seeds, size=(n, seeds)) if seeds > 1 else np.zeros((n, 1), np.int64)
    chunk = max(1, _CHUNK // tasks)
    results = []
    for start in range(0, n, chunk):
        of_seeds = drawn_seeds[start : start + chunk]
        of_tasks = rng.integers(tasks, size=(len(of_seeds), tasks))
        if statistic is np.mean:
            results.append(_means(values, of_seeds, of_tasks))
        else:
            results.append(_general(values, of_seeds, of_tasks, statistic))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(results), (tail, 1 - tail), axis=0)
    return low, high


def summarise(values: Array) -> dict[str, Any]:
    """What is reported of one number per seed and task.

    Args:
        values: `[S, N]`.

    Returns:
        `mean`, `iqm`, `ci_low`, `ci_high` (95 % bootstrap interval of the mean), `n_tasks`, `n_seeds` and
        `interval_over`: `seeds, tasks`, or `tasks` where there is one seed.
    """
    return summarise_curve(np.asarray(values)[:, :, None])[0]


def summarise_curve(values: Array) -> list[dict[str, Any]]:
    """`summarise` for each of P points; much faster than one by one, and the points share the draws.

    Args:
        values: `[S, N, P]`.
    """
    values = np.asarray(values, np.float64)
    seeds, tasks, points = values.shape
    low, high = bootstrap(values)
    means, iqms = values.mean(axis=(0, 1)), iqm(values.reshape(seeds * tasks, points), axis=0)
    return [
        {
            "mean": float(means[p]),
            "iqm": float(iqms[p]),
            "ci_low": float(low[p]),
            "ci_high": float(high[p]),
            "n_tasks": tasks,
            "n_seeds": seeds,
            "interval_over": "seeds, tasks" if seeds > 1 else "tasks",
        }
        for p in range(points)
    ]


def probability_of_improvement(
    x: Array, y: Array, n: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """How often a seed of X beats a seed of Y on the same task, ties counted half, averaged over the tasks.

    Agarwal et al. 2021, section 4.3; the bootstrap draws seeds of X, seeds of Y and tasks, as everywhere in this module.

    Args:
        x, y: `[S, N]`, `[S', N]`; higher is better.

    Returns:
        The probability and its interval `(p, low, high)`.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    (seeds, tasks), others = x.shape, len(y)
    wins = 0.5 * (1 + np.sign(x[:, None] - y[None])).reshape(-1, tasks)  # [S * S', N]
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // tasks)
    results = []
    for start in range(0, n, chunk):
        size = min(chunk, n - start)
        of_x, of_y, of_tasks = (_counts(rng.integers(k, size=(size, k)), k) / k for k in (seeds, others, tasks))
        drawn = (of_tasks @ wins.T).reshape(size, seeds, others)
        results.append(np.einsum("rx,ry,rxy->r", of_x, of_y, drawn))
    low, high = np.quantile(np.concatenate(results), ((1 - level) / 2, (1 + level) / 2))
    return float(wins.mean()), float(low), float(high)


def performance_profile(values: Array, thresholds: Array) -> tuple[Array, Array, Array]:
    """The share of all seeds and tasks that end above each threshold (Agarwal et al. 2021, section 4.3).

    Args:
        values: `[S, N]`.
        thresholds: `[M]`.

    Returns:
        The share and its 95 % interval, each `[M]`.
    """
    above = np.asarray(values)[:, :, None] > np.asarray(thresholds)
    return above.mean((0, 1)), *bootstrap(above)


def welch(better: tuple[float, float, int], worse: tuple[float, float, int]) -> float:
    """One-sided p-value of Welch's t-test: how likely so large a difference is where the first mean is not the larger.

    Args:
        better, worse: mean, standard deviation (of a sample: divided by n - 1) and size of each.
    """
    from scipy.special import stdtr

    (mean, std, n), (other_mean, other_std, m) = better, worse
    a, b = std**2 / n, other_std**2 / m
    if a + b == 0:
        return 0.0 if mean > other_mean else 1.0
    freedom = (a + b) ** 2 / (a**2 / max(1, n - 1) + b**2 / max(1, m - 1))
    return float(stdtr(freedom, -(mean - other_mean) / np.sqrt(a + b)))


def _means(values: Array, of_seeds: Array, of_tasks: Array) -> Array:
    """The mean is linear: two small matrix products with how often each seed and task was drawn. `[R, ...]`"""
    seeds, tasks, *rest = values.shape
    by_task = values.swapaxes(0, 1).reshape(tasks, -1)
    task_means = (_counts(of_tasks, tasks) @ by_task / tasks).reshape(len(of_tasks), seeds, -1)
    means = np.einsum("rs,rsp->rp", _counts(of_seeds, seeds) / seeds, task_means)
    return means.reshape(len(of_tasks), *rest)


def _counts(drawn: Array, size: int) -> Array:
    """`[R, size]`: how often each index was drawn."""
    rows = len(drawn)
    flat = (drawn + size * np.arange(rows)[:, None]).ravel()
    return np.bincount(flat, minlength=rows * size).reshape(rows, size).astype(np.float64)


def _general(values: Array, of_seeds: Array, of_tasks: Array, statistic: Callable[..., Array]) -> Array:
    seeds, tasks, *rest = values.shape
    chunk = max(1, _CHUNK // values.size)
    results = []
    for start in range(0, len(of_tasks), chunk):
        rows, columns = of_seeds[start : start + chunk, :, None], of_tasks[start : start + chunk, None, :]
        results.append(statistic(values[rows, columns].reshape(-1, seeds * tasks, *rest), axis=1))
    return np.concatenate(results)
