"""Every learner meets the same tasks, whatever the size of the calls; a curve says what was spent before each point."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import eval_settings
from running import build, hasty_compiler, own_configs, small, walker

from metarl_cli import config, evaluation, training
from metarl_cli.core.errors import ConfigError
from metarl_cli.core.interfaces import Learner, TaskFamily
from metarl_cli.core.settings import EvalSettings
from metarl_cli.core.types import Batch, Key, Plan, Trial, pytree
from metarl_cli.evaluation import Evaluation, choose_tasks, evaluate


@pytest.fixture(scope="module", autouse=True)
def hasty() -> Iterator[None]:
    with hasty_compiler():
        yield


def family(env: str, *more: str) -> TaskFamily:
    return config.compose([f"env={env}", *more]).config.env.build()


@pytree
class Telltale(Learner):
    """Its returns are the task, its steps are its random numbers: what an evaluation gave it can be read off the result."""

    def init(self, key: Key, family: TaskFamily) -> jax.Array:
        return jnp.zeros(())

    def plan(self, family: TaskFamily, settings: EvalSettings) -> Plan:
        return Plan(points=2, episodes=2)

    def trial(self, state: Any, key: Key, family: TaskFamily, task: Any, plan: Plan) -> Trial:
        leaf = next(x for x in jax.tree.leaves(task) if x.ndim)  # goal [2] or probability [k]
        told = jnp.stack([leaf[0], leaf[1], state, leaf.sum()]).reshape(plan.points, plan.episodes)
        drawn = jax.random.uniform(key, (plan.points, plan.episodes))
        empty = jnp.zeros((plan.points, plan.episodes, 1))
        return Trial(told, drawn, None, Batch(*[empty] * 6, regret=None, extra=None))


def meet(settings: EvalSettings, seeds: tuple[int, ...] = (0, 1), env: str = "point_nav", state: float = 0.0) -> Evaluation:
    return evaluate(Telltale(), jnp.full(len(seeds), state), family(env), settings, list(seeds))


# --- which tasks


def test_tasks_derive_from_the_seed_of_the_evaluation_alone() -> None:
    settings = eval_settings(split="train", tasks=20)
    one, other = meet(settings), meet(settings, seeds=(5, 6, 7), state=1.0)
    assert one.returns.shape == (2, 20, 2, 2) and other.returns.shape == (3, 20, 2, 2)
    goals = one.returns[:, :, 0]  # [S, N, 2]
    np.testing.assert_array_equal(goals[0], goals[1])
    np.testing.assert_array_equal(goals[0], other.returns[2, :, 0])
    np.testing.assert_array_equal(goals[0], choose_tasks(family("point_nav"), settings).goal)
    np.testing.assert_array_equal(goals[0, : evaluation.SHOWN], one.shown_tasks.goal)
    assert len(np.unique(goals[0, :, 0])) == 20

    for changed in (eval_settings(split="train", tasks=20, seed=1), eval_settings(split="ood", tasks=20)):
        assert not np.isin(meet(changed).returns[0, :, 0], goals[0]).any()


def test_another_learner_meets_the_same_tasks(tmp_path: Path) -> None:
    settings, learner, bandits = build(walker("eval.tasks=20"), own_configs(tmp_path))
    state = jax.vmap(lambda key: learner.init(key, bandits))(jax.random.split(jax.random.key(7), 1))
    shown = evaluate(learner, state, bandits, settings.eval, [7]).shown_tasks
    np.testing.assert_array_equal(shown.probability, meet(settings.eval, env="bandit").shown_tasks.probability)


def test_a_trial_has_randomness_of_its_own() -> None:
    """It derives from `eval.seed`, the learner's seed and the task's place, and from nothing else."""
    settings = eval_settings(split="train", tasks=20)
    drawn = meet(settings).steps
    assert len(np.unique(drawn)) == drawn.size
    np.testing.assert_array_equal(meet(settings, seeds=(1,)).steps[0], drawn[1])
    assert not np.isin(meet(eval_settings(split="train", tasks=20, seed=1)).steps, drawn).any()
    # Neither is it that of the tasks.
    assert not np.isin(meet(settings).returns + 0.5, drawn).any()


def test_the_published_goals_are_the_default() -> None:
    goals = np.random.RandomState(1).uniform(-0.5, 0.5, (40, 2))  # as in the authors' code
    everything = meet(eval_settings())
    np.testing.assert_allclose(everything.returns[0, :, 0], goals, rtol=1e-6)
    assert everything.summary()["curve"][0]["n_tasks"] == 40
    np.testing.assert_allclose(meet(eval_settings(tasks=7)).returns[1, :, 0], goals[:7], rtol=1e-6)
    np.testing.assert_allclose(meet(eval_settings(seed=5)).returns[0, :, 0], goals, rtol=1e-6)


def test_more_tasks_than_were_published_are_refused() -> None:
    with pytest.raises(ConfigError) as error:
        choose_tasks(family("point_nav"), eval_settings(tasks=41))
    assert str(error.value) == (
        "eval.tasks=41: the test split of this family is a published set of 40 tasks. "
        "Ask for at most 40, or take eval.split=train for fresh tasks."
    )
    assert choose_tasks(family("point_nav"), eval_settings(tasks=41, split="ood")).goal.shape == (41, 2)


def test_how_many_tasks_there_are_where_none_are_published() -> None:
    assert len(choose_tasks(family("point_nav"), eval_settings(split="ood")).goal) == 1_000
    assert len(choose_tasks(family("bandit"), eval_settings()).probability) == 10_000


# --- calls


@pytest.mark.parametrize("per_call", [1, 3 * 8, 7 * 8])
def test_the_size_of_the_calls_changes_nothing(per_call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = eval_settings(split="train", tasks=10)
    whole = meet(settings, env="bandit")
    # A trial is counted as 2 points x 2 episodes x 1 step x 2 seeds = 8 steps: 10 calls of one task, 4 calls of 3, 2 calls
    # of 5. The last of the 4 has one task and is filled up.
    monkeypatch.setattr(evaluation, "STEPS_PER_CALL", per_call)
    pauses: list[int] = []
    traced = evaluation._trials._cache_size()  # type: ignore[attr-defined]
    parts = evaluate(
        Telltale(), jnp.zeros(2), family("bandit"), settings, [0, 1], between=lambda: pauses.append(len(pauses))
    )
    assert len(pauses) == {1: 10, 24: 4, 56: 2}[per_call]
    assert evaluation._trials._cache_size() - traced <= 1  # type: ignore[attr-defined]
    for name, x in whole.arrays().items():
        np.testing.assert_array_equal(parts.arrays()[name], x)
    np.testing.assert_array_equal(parts.shown_tasks.probability, whole.shown_tasks.probability)


def test_the_size_of_the_calls_changes_nothing_for_a_real_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, learner, bandits = build(small("rl2", "bandit"))
    state = training.init(learner, bandits, [0, 1]).learner
    whole = evaluate(learner, state, bandits, settings.eval, [0, 1])
    monkeypatch.setattr(evaluation, "STEPS_PER_CALL", 4 * 4 * 2)  # 2 calls of 3 tasks
    parts = evaluate(learner, state, bandits, settings.eval, [0, 1])
    np.testing.assert_array_equal(parts.returns, whole.returns)
    np.testing.assert_allclose(parts.arrays()["regret"], whole.arrays()["regret"], rtol=1e-6)
    assert 0 < whole.returns.mean() < 1


# --- what comes of it


def by_hand(regret: np.ndarray | None = None) -> Evaluation:
    """Two seeds, two tasks, three points of two episodes."""
    returns = np.arange(24.0).reshape(2, 2, 3, 2)
    steps = np.array([[[10, 10], [4, 6], [1, 1]], [[10, 10], [10, 2], [3, 1]]])  # of each task, the same for both seeds
    nothing = jnp.zeros(0)
    shown = Batch(*[nothing] * 6, regret=None, extra=None)
    return Evaluation("ood", returns, np.stack([steps, steps]), regret, None, shown)


def test_a_curve_by_hand() -> None:
    curve = by_hand().curve()
    assert [point["episodes"] for point in curve] == [0, 2, 4]
    # Before point 1: 10 + 10 steps. Before point 2: also 4 + 6 in one task and 10 + 2 in the other, 11 on average.
    assert [point["steps"] for point in curve] == [0.0, 20.0, 31.0]
    # Point 0 holds 0, 1 | 6, 7 | 12, 13 | 18, 19; each later point two more.
    assert [point["mean"] for point in curve] == [9.5, 11.5, 13.5]
    # Means over episodes at point 0: 0.5, 6.5, 12.5, 18.5, of which the middle two count.
    assert curve[0]["iqm"] == 9.5
    assert {(point["n_tasks"], point["n_seeds"], point["interval_over"]) for point in curve} == {(2, 2, "seeds, tasks")}
    assert all(point["ci_low"] < point["mean"] < point["ci_high"] for point in curve)


def test_trial_returns_by_hand() -> None:
    evaluation = by_hand()
    # Sums of 0..5, 6..11, 12..17, 18..23.
    np.testing.assert_array_equal(evaluation.trial_return, [[15, 51], [87, 123]])
    summary = evaluation.summary()
    assert summary["trial_return"]["mean"] == 69.0
    assert "trial_regret" not in summary
    assert evaluation.arrays().keys() == {"returns", "steps"}


def test_regret_by_hand() -> None:
    evaluation = by_hand(regret=np.full((2, 2, 3, 2), 0.5))
    assert evaluation.summary()["trial_regret"]["mean"] == 3.0
    assert evaluation.arrays().keys() == {"returns", "steps", "regret"}
