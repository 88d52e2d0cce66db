"""Random MDPs against plain numpy, the random policy of Duan et al.'s Table 2 and the value-iteration ceiling."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from scipy import stats
from trajectories import close, family_of, live, oracle, play, sample

from metarl_cli.core.types import TabularMDP

SMALL = ("env.states=3", "env.actions=2", "env.horizon=4", "env.reward_mean=-1.0", "env.reward_std=2.0")


def test_splits():
    family, n = family_of("tabular_mdp"), 300
    assert family.prior == TabularMDP(10, 5, 10, 1.0, 1.0, 1.0, 1.0) and family.episodes == 10 and family.horizon == 10
    for split, alpha in (("train", 1.0), ("test", 1.0), ("ood", 0.1)):
        tasks = sample(family, n, split)
        assert tasks.transition.shape == (n, 10, 5, 10) and tasks.reward.shape == (n, 10, 5)
        np.testing.assert_allclose(tasks.transition.sum(-1), 1, rtol=1e-5)
        assert stats.kstest(tasks.reward.ravel(), stats.norm(1, 1).cdf).pvalue > 1e-3
        # One component of a symmetric Dirichlet distribution is Beta(alpha, 9 alpha).
        assert stats.kstest(tasks.transition[..., 3].ravel(), stats.beta(alpha, 9 * alpha).cdf).pvalue > 1e-3
    # Drawn anew for every MDP, and independently within one.
    rewards = sample(family, n).reward.reshape(n, -1)
    assert np.abs(np.corrcoef(rewards.T) - np.eye(50)).max() < 5 / np.sqrt(n)


def test_mdps_differ_as_a_whole_where_the_mean_does():
    tasks = sample(family_of("tabular_mdp", "env.reward_mean=2", "env.reward_mean_std=3", "env.reward_std=0.5"), 400)
    means = tasks.reward.mean((1, 2))
    assert stats.kstest(means, stats.norm(2, np.hypot(3, 0.5 / np.sqrt(50))).cdf).pvalue > 1e-3
    assert stats.kstest((tasks.reward - means[:, None, None]).ravel(), stats.norm(0, 0.5).cdf).pvalue > 1e-3


def test_against_plain_numpy():
    family, n, steps = family_of("tabular_mdp", *SMALL, "env.reward_noise=0.5"), 50, 400
    tasks = sample(family, n)
    played = play(family, tasks, steps)
    rng, places, noise = np.random.default_rng(0), [], []
    for i in range(n):
        state, time = 0, 0
        np.testing.assert_array_equal(played.first[i], [1, 0, 0])
        for t in range(steps):
            action, after = played.action[i, t], int(played.final[i, t].argmax())
            np.testing.assert_array_equal(played.final[i, t], np.eye(3)[after])
            # Where the next state falls on [0, 1], each state as wide as it is likely: uniform if it is drawn right.
            row = tasks.transition[i, state, action]
            places.append(row[:after].sum() + rng.random() * row[after])
            noise.append(played.reward[i, t] - tasks.reward[i, state, action])
            state, time = after, time + 1
            assert not played.terminated[i, t] and played.truncated[i, t] == (time == 4)
            if time == 4:
                state, time = 0, 0
            np.testing.assert_array_equal(played.observation[i, t], np.eye(3)[state])
    assert stats.kstest(places, "uniform").pvalue > 1e-3
    assert stats.kstest(noise, stats.norm(0, 0.5).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(places, noise)[0, 1]) < 4 / np.sqrt(n * steps)


def test_values_are_those_of_an_exhaustive_search():
    family = family_of("tabular_mdp", *SMALL)
    tasks = sample(family, 4)

    def search(p, r, state, left):
        if left == 0:
            return 0.0
        return max(r[state, a] + sum(p[state, a, s] * search(p, r, s, left - 1) for s in range(3)) for a in range(2))

    values = np.asarray(jax.vmap(family.values)(tasks))  # [4, T, S, A]
    for p, r, q in zip(tasks.transition, tasks.reward, values, strict=True):
        for time in range(4):
            for state in range(3):
                assert q[time, state].max() == pytest.approx(search(p, r, state, 4 - time), abs=1e-5)


def test_random_policy_of_table_2():
    family = family_of("tabular_mdp")
    total = play(family, sample(family, 4000), 100).reward.sum(1)
    assert close(total, 100.0)  # 100 steps of mean 1, exactly
    assert close(total, 100.1, total.std() / np.sqrt(1000))  # as the paper measured it, on 1000 MDPs


def test_value_iteration_ceiling():
    family = family_of("tabular_mdp")
    tasks = sample(family, 20_000)
    best = np.asarray(jax.jit(jax.vmap(lambda task: family.values(task)[0, 0].max()))(tasks))
    assert close(best, 21.85, 0.02)  # 21.85 +- 0.02 by an independent program
    # The oracle earns it.
    few = jax.tree.map(lambda x: x[:1000], tasks)
    total = live(family, few, oracle(family), (), sees_state=True).reward.sum(1)
    assert close(total - 10 * best[:1000], 0.0)
