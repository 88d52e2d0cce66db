"""Gaussian bandits against plain numpy."""

from __future__ import annotations

import numpy as np
from scipy import stats
from trajectories import close, family_of, live, one_task, oracle, play, sample

from metarl_cli.core.types import GaussianArms

CHANGES = ("env.k=4", "env.n=7", "env.mean=2.0", "env.std=3.0", "env.noise=0.5", "env.ood_std=1.5")


def test_splits():
    family, n = family_of("bandit_gaussian", *CHANGES), 4000
    assert family.prior == GaussianArms(k=4, mean=2.0, std=3.0, noise=0.5) and family.episodes == 7
    for split, std in (("train", 3.0), ("test", 3.0), ("ood", 1.5)):
        mean = sample(family, n, split).mean
        assert mean.shape == (n, 4) and stats.kstest(mean.ravel(), stats.norm(2.0, std).cdf).pvalue > 1e-3
        np.testing.assert_allclose(np.corrcoef(mean.T), np.eye(4), atol=4 / np.sqrt(n))


def test_against_plain_numpy():
    family = family_of("bandit_gaussian", *CHANGES)
    tasks = one_task(family, 4, mean=[-1.0, 0.0, 2.5, 10.0])
    played = play(family, tasks, 2000)
    assert not played.first.any() and not played.final.any() and not played.observation.any()
    assert played.truncated.all() and not played.terminated.any()
    rng = np.random.default_rng(0)
    for arm, mean in enumerate((-1.0, 0.0, 2.5, 10.0)):
        reward = played.reward[played.action == arm]
        again = mean + 0.5 * rng.standard_normal(2000)
        assert np.asarray(stats.ks_2samp(reward, again))[1] > 1e-3


def test_best_of_ten_standard_normal_means():
    # The largest of 10 standard normal numbers is 1.5388 on average (order statistics, e.g. Teichroew 1956).
    family = family_of("bandit_gaussian")
    assert family.prior == GaussianArms(k=10, mean=0.0, std=1.0, noise=1.0)
    tasks = sample(family, 4000)
    batch = live(family, tasks, oracle(family), ())
    assert not batch.regret.any()
    assert close(batch.reward.mean(1), 1.5388)
    np.testing.assert_array_equal(batch.action[:, 0], tasks.mean.argmax(1))
