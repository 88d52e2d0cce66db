"""Dark Key-to-Door against plain numpy and known values."""

from __future__ import annotations

import numpy as np
import pytest
from navigation import follow, one_hot, oracle_episodes
from scipy import stats
from trajectories import family_of, one_task, sample


class KeyDoorReference:
    def __init__(self, task, ends, coordinates=False):
        self.key, self.door, self.moves = tuple(task.key), tuple(task.door), task.moves
        self.ends, self.coordinates = ends, coordinates

    def reset(self, state):
        self.cell, self.found = tuple(state.cell), []
        assert all(0 <= x <= 8 for x in self.cell)
        return self.seen()

    def seen(self):
        return self.cell if self.coordinates else one_hot(self.cell, 9)

    def step(self, action):
        x, y = (int(a + b) for a, b in zip(self.cell, self.moves[action], strict=True))
        self.cell = (min(max(x, 0), 8), min(max(y, 0), 8))
        reward = 0
        if self.cell == self.key and "key" not in self.found:
            self.found.append("key")
            reward += 1
        if self.cell == self.door and self.found == ["key"]:
            self.found.append("door")
            reward += 1
        return self.seen(), reward, self.ends and "door" in self.found


@pytest.mark.parametrize("split", ["train", "ood"])
@pytest.mark.parametrize("ends", [True, False])
def test_against_plain_numpy(split, ends):
    how = "one_hot" if ends else "coordinates"
    family = family_of("key_door", f"env.ends={str(ends).lower()}", f"env.observation={how}")
    rewards = follow(family, lambda task: KeyDoorReference(task, ends, not ends), sample(family, 8, split))
    assert np.any(rewards == 1)


def test_key_and_door_in_one_cell_pay_at_once():
    family = family_of("key_door")
    tasks = one_task(family, 4, key=np.array([2, 7]), door=np.array([2, 7]))
    rewards = follow(family, lambda task: KeyDoorReference(task, True), tasks)
    assert set(np.unique(rewards)) == {0, 2}


def test_oracle():
    family = family_of("key_door")
    tasks = sample(family, 60)
    returns, lengths, batch = oracle_episodes(family, tasks)
    np.testing.assert_array_equal(returns, 2)
    start = np.array(np.divmod(batch.observation[:, 0].argmax(-1), 9)).T[:, ::-1]
    distance = np.abs(start - tasks.key).sum(1)
    # A key under the feet takes one step, and so does a door that is there already after that.
    same = np.all(tasks.key == tasks.door, axis=1)
    steps = np.maximum(distance, 1) + np.where(same, 0, np.abs(tasks.key - tasks.door).sum(1))
    np.testing.assert_array_equal(lengths[:, 0], steps)


def test_splits_and_starts():
    family, n = family_of("key_door"), 8000
    for split in family.splits:
        tasks = sample(family, n, split)
        for cells in (tasks.key, tasks.door):
            counts = np.bincount(cells[:, 0] * 9 + cells[:, 1], minlength=81)
            assert stats.chisquare(counts).pvalue > 1e-3
        assert abs(np.mean(np.all(tasks.key == tasks.door, axis=1)) - 1 / 81) < 4 * np.sqrt(1 / 81 / n)
        assert len(np.unique(tasks.moves.reshape(n, 10), axis=0)) == (120 if split == "ood" else 1)
    tasks = one_task(family, 1)
    starts = oracle_episodes(family_of("key_door", "env.episodes=200"), tasks)[2]
    assert len(np.unique(starts.observation[0].argmax(-1))) > 40
