"""The restless bandit against a walk that plain numpy reflects step by step."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from trajectories import close, family_of, live, one_task, oracle, play, sample

from metarl_cli.core.types import RestlessArms


def walk(rng: np.random.Generator, volatility: float, n: int) -> list[float]:
    p = [rng.random()]
    while len(p) < n:
        after = p[-1] + volatility * rng.standard_normal()
        while not 0 <= after <= 1:
            after = -after if after < 0 else 2 - after
        p.append(after)
    return p


@pytest.mark.parametrize(("split", "volatilities"), [("train", (0.02, 0.2)), ("test", (0.02, 0.2)), ("ood", (0.0, 0.5))])
def test_the_drift_is_a_reflected_walk(split, volatilities):
    family, n = family_of("bandit_restless"), 2000
    assert family.prior == RestlessArms(100, (0.02, 0.2)) and family.horizon == 100 and family.episodes == 1
    tasks = sample(family, n, split)
    assert tasks.probability.shape == (n, 100) and tasks.probability.min() >= 0 and tasks.probability.max() <= 1
    assert close(np.isclose(tasks.volatility, volatilities[0]), 0.5)
    rng = np.random.default_rng(0)
    for volatility in volatilities:
        p = tasks.probability[np.isclose(tasks.volatility, volatility)]
        again = np.array([walk(rng, volatility, 100) for _ in range(500)])
        for t in (0, 10, 99):  # it starts uniform and, reflected, stays so
            assert stats.kstest(p[:, t], "uniform").pvalue > 1e-3
        for lag in (1, 20):  # from disjoint stretches of each walk: hardly dependent
            moved = np.abs(p[:, 50] - p[:, 50 - lag])
            expected = np.abs(again[:, 50] - again[:, 50 - lag])
            assert volatility == 0 or np.asarray(stats.ks_2samp(moved, expected))[1] > 1e-3
            assert volatility > 0 or moved.max() < 1e-6


def test_against_plain_numpy():
    family, n = family_of("bandit_restless", "env.n=20"), 4000
    p = np.linspace(0.1, 0.9, 20)
    played = play(family, one_task(family, n, probability=p), 45)
    assert not played.first.any() and not played.final.any() and not played.observation.any()
    assert not played.terminated.any() and set(np.unique(played.reward)) == {0, 1}
    for t in range(45):
        assert np.all(played.truncated[:, t] == (t in (19, 39)))
        # The clock is that of the episode: the third one starts like the first.
        for arm, pays in ((0, p[t % 20]), (1, 1 - p[t % 20])):
            reward = played.reward[played.action[:, t] == arm, t]
            assert abs(reward.mean() - pays) < 4.5 * np.sqrt(pays * (1 - pays) / reward.size)


def test_oracle_follows_the_drift():
    family = family_of("bandit_restless")
    tasks = sample(family, 2000)
    batch = live(family, tasks, oracle(family), (), sees_state=True)
    assert not batch.regret.any()
    np.testing.assert_array_equal(batch.action, tasks.probability < 0.5)
    # p stays uniform, so the better arm pays with the mean of max(p, 1 - p): 3/4.
    assert close(batch.reward.mean(1), 0.75)
