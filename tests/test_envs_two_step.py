"""The two-step task against plain numpy, with and without switches."""

from __future__ import annotations

import numpy as np
import pytest
from trajectories import close, family_of, live, oracle, play, sample

from metarl_cli.core.errors import ConfigError
from metarl_cli.core.types import TwoStep


def test_presets_and_splits():
    n = 4000
    for name, prior, episodes in (
        ("two_step", TwoStep(rounds=1, common=0.75, reward=0.9, switch=0.0), 100),
        ("two_step_switching", TwoStep(rounds=100, common=0.8, reward=0.9, switch=0.025), 1),
    ):
        family = family_of(name)
        assert family.prior == prior and family.episodes == episodes and family.horizon == 2 * prior.rounds
        for split, reward in (("train", 0.9), ("test", 0.9), ("ood", 0.7)):
            tasks = sample(family, n, split)
            assert tasks.best.shape == (n, prior.rounds) and set(np.unique(tasks.best)) == {0, 1}
            assert close(tasks.best[:, 0], 0.5)
            np.testing.assert_allclose(tasks.reward, reward, rtol=1e-6)
            np.testing.assert_allclose(tasks.common, prior.common, rtol=1e-6)
            if prior.rounds > 1:
                assert close(tasks.best[:, 1:] != tasks.best[:, :-1], 0.025)


def test_a_switch_needs_rounds():
    with pytest.raises(ConfigError, match=r"env\.switch.*env\.rounds"):
        family_of("two_step", "env.switch=0.1")


@pytest.mark.parametrize("changes", [("env=two_step",), ("env=two_step_switching", "env.rounds=7", "env.switch=0.3")])
def test_against_plain_numpy(changes):
    family = family_of(changes[0].removeprefix("env="), *changes[1:])
    n, rounds, steps = 400, family.prior.rounds, 56
    tasks = sample(family, n)
    played = play(family, tasks, steps)
    common, paid = [], {True: [], False: []}
    for i in range(n):
        state, time = 0, 0
        np.testing.assert_array_equal(played.first[i], [1, 0, 0])
        for t in range(steps):
            after = int(played.final[i, t].argmax())
            if state == 0:
                assert played.reward[i, t] == 0 and after in (1, 2)
                common.append(after == 1 + played.action[i, t])
            else:
                assert played.reward[i, t] in (0, 1) and after == 0
                paid[bool(state - 1 == tasks.best[i, time // 2])].append(played.reward[i, t])
            time += 1
            assert not played.terminated[i, t] and played.truncated[i, t] == (time == 2 * rounds)
            state, time = (0, 0) if time == 2 * rounds else (after, time)
            np.testing.assert_array_equal(played.observation[i, t], np.eye(3)[state])
    assert close(common, family.prior.common)
    assert close(paid[True], 0.9) and close(paid[False], 0.1)


# A common transition leads to 0.9, a rare one to 0.1: 0.75 * 0.9 + 0.25 * 0.1 and 0.8 * 0.9 + 0.2 * 0.1; chance is 0.5.
@pytest.mark.parametrize(("name", "best"), [("two_step", 0.7), ("two_step_switching", 0.74)])
def test_what_the_oracle_and_chance_earn_per_round(name, best):
    family = family_of(name)
    tasks = sample(family, 500)
    assert close(live(family, tasks, oracle(family), (), sees_state=True).reward.sum(1) / 100, best)
    assert close(play(family, tasks, 200).reward.sum(1) / 100, 0.5)
