"""The chain, written once more in plain Python, and from which discount on it pays to go on."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from test_envs import family_of, sample


class Reference:
    def __init__(self, task, length, horizon):
        self.task, self.length, self.horizon = task, length, horizon

    def reset(self):
        self.position = self.time = 0
        return np.eye(self.length + 1)[0]

    def step(self, action):
        on = action == self.task.forward[self.position]
        self.position += int(on)
        self.time += 1
        end = self.position == self.length
        reward = float(self.task.reward) * end - float(self.task.cost)
        return np.eye(self.length + 1)[self.position], reward, end, self.time >= self.horizon


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_against_plain_python(share):
    """From chance to always going on; episodes of a chain of 4 that end both ways."""
    family = family_of("chain", "env.length=4", "env.horizon=7")
    rng = np.random.default_rng(0)
    step = jax.jit(family.env.step)
    ends = set()
    for i in range(4):
        task = jax.tree.map(lambda x, i=i: x[i], sample(family))
        reference = Reference(jax.tree.map(np.asarray, task), 4, 7)
        seen, state = family.env.reset(jax.random.key(0), task)
        np.testing.assert_array_equal(seen, reference.reset())
        for t in range(30):
            on = int(family.oracle(task, state))
            action = on if rng.random() < share else int(rng.integers(2))
            seen, state, reward, terminated, truncated, info = step(jax.random.key(t), state, action, task)
            expected = reference.step(action)
            np.testing.assert_allclose(info["final_observation"], expected[0])
            assert (float(reward), bool(terminated), bool(truncated)) == (pytest.approx(expected[1]), *expected[2:])
            if terminated or truncated:  # at the limit both may be true
                ends.add(bool(terminated))
                np.testing.assert_array_equal(seen, reference.reset())
    assert True in ends and (share == 1 or False in ends)


@pytest.mark.parametrize("gamma", [0.5, 0.9, 1.0])
def test_what_staying_once_loses(gamma):
    """The formula of the module, and that the best return is 1 - 20 * 0.02 = 0.6."""
    task = jax.tree.map(lambda x: float(x[0]) if x.ndim == 1 else x[0], sample(family_of("chain")))
    value = [0.0]
    for _ in range(20):
        value.append(-task.cost + (gamma * value[-1] if len(value) > 1 else task.reward))
    for k in range(1, 21):
        loss = value[k] - (gamma * value[k] - task.cost)
        assert loss == pytest.approx(gamma ** (k - 1) * ((1 - gamma) * task.reward + gamma * task.cost))
    assert gamma < 1 or value[20] == pytest.approx(0.6)
