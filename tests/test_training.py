"""`train_chunk`: one program, whatever the chunks; seeds side by side are seeds one by one; a broken seed stands still."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import plugin_learner
import pytest
from probes import assert_close
from running import GROUPS, OTHER_PAIRS, PAIRS, TRAINED, assert_identical, build, hasty_compiler, run_chunks, small

from metarl_cli import catalogue, config, evaluation, training

MEMORIES = [
    (algo, memory)
    for algo in TRAINED
    for memory in GROUPS["algo/memory"]
    if any(key.startswith("algo.memory.") for key in catalogue.defaults({"algo": algo}))
]
ONE_PAIR_EACH = [("maml", "point_nav"), ("rl2", "bandit")]


@pytest.fixture(scope="module", autouse=True)
def hasty() -> Iterator[None]:
    with hasty_compiler():
        yield


def walker(breaks: str = "nothing", luckier_than: float = -1.0) -> tuple[Any, Any]:
    family = config.compose(["env=bandit", "env.n=4"]).config.env.build()
    settings = plugin_learner.WalkerSettings(lr=1.0, breaks=breaks, breaks_at=3, luckier_than=luckier_than)  # type: ignore[arg-type]
    return settings.build(family), family


# --- every YAML file


def trains_two_iterations(lines: list[str]) -> None:
    _, learner, family = build(lines)
    state = training.init(learner, family, [0, 1])
    before = jax.tree.map(np.asarray, state.learner)
    state, rows = run_chunks(state, learner, family, [2], total=2)
    assert int(state.iteration) == 2
    assert state.failed_at.tolist() == [-1, -1]
    assert {"return_before", "return_after", "trial_return", "steps"} <= rows.keys()
    for name, values in rows.items():
        assert values.shape == (2, 2) and np.isfinite(values).all(), name
    assert (rows["steps"] > 0).all()
    changed = jax.tree.map(lambda new, old: np.any(np.asarray(new) != old), state.learner, before)
    # Where no reward was seen, there is nothing to learn from.
    assert any(jax.tree.leaves(changed)) or np.ptp(rows["trial_return"]) == 0
    # The two seeds have nothing in common. (Not their returns: of so short episodes those are all equal in some families.)
    assert any(np.any(x[0] != x[1]) for x in map(np.asarray, jax.tree.leaves(state.learner)))


@pytest.mark.parametrize(("algo", "env"), [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHER_PAIRS)])
def test_every_algorithm_and_every_family_train(algo: str, env: str) -> None:
    trains_two_iterations(small(algo, env))


@pytest.mark.parametrize(("algo", "memory"), MEMORIES)
def test_every_memory_trains(algo: str, memory: str) -> None:
    trains_two_iterations(small(algo, "bandit", f"algo/memory={memory}"))


# --- chunks


@pytest.mark.parametrize(("algo", "env"), ONE_PAIR_EACH)
def test_the_length_of_chunks_changes_nothing(algo: str, env: str) -> None:
    _, learner, family = build(small(algo, env))
    for log_every in (1, 4):
        outcomes = [
            run_chunks(training.init(learner, family, [0, 1]), learner, family, chunks, total=6, log_every=log_every)
            for chunks in ([6], [1, 5], [2, 4], [3, 2, 1])
        ]
        # 6 iterations in windows of 4: one full, and a shorter one at the end.
        assert all(len(x) == (6 if log_every == 1 else 2) for x in outcomes[0][1].values())
        assert int(outcomes[0][0].windowed) == 0
        for outcome in outcomes[1:]:
            assert_identical(outcome, outcomes[0])


def test_a_window_holds_means_and_the_sum_of_steps() -> None:
    learner, family = walker()
    each, windows = (
        run_chunks(training.init(learner, family, [0, 1]), learner, family, [6], total=6, log_every=n)[1] for n in (1, 4)
    )
    np.testing.assert_array_equal(windows["steps"], [each["steps"][:4].sum(0), each["steps"][4:].sum(0)])
    np.testing.assert_array_equal(each["steps"][:, 0], 3 + np.arange(6))
    for name in ("loss", "return_before", "progress"):
        expected = [each[name][:4].mean(0), each[name][4:].mean(0)]
        np.testing.assert_allclose(windows[name], expected, rtol=1e-6)
    # Progress runs from 0 towards 1 over the whole run.
    np.testing.assert_allclose(each["progress"][:, 0], np.arange(6) / 6, rtol=1e-6)


def test_one_trace_whatever_the_chunks() -> None:
    learner, family = walker()
    state = training.init(learner, family, [0, 1, 2, 3])  # as no other test
    before, compiled = plugin_learner.calls["update"], training.train_chunk._cache_size()  # type: ignore[attr-defined]
    state, _ = run_chunks(state, learner, family, [3], total=7)
    traced = plugin_learner.calls["update"]
    assert traced - before <= 1
    run_chunks(state, learner, family, [3, 1], total=7)
    assert plugin_learner.calls["update"] == traced
    assert training.train_chunk._cache_size() - compiled == 1  # type: ignore[attr-defined]


def test_other_hyper_parameters_are_no_other_program() -> None:
    learner, family = walker()
    run_chunks(training.init(learner, family, [0, 1]), learner, family, [1], total=2)
    before = plugin_learner.calls["update"]
    settings = plugin_learner.WalkerSettings(lr=0.25, breaks="nothing", breaks_at=5, luckier_than=0.5)
    state = training.init(learner, family, [0, 1])
    traced = plugin_learner.calls["update"]
    run_chunks(state, settings.build(family), family, [2], total=5, log_every=3)
    assert plugin_learner.calls["update"] == traced, "a float shaped the program"
    assert traced - before <= 1  # the shapes of the metrics


# --- seeds


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("algo", "env"), ONE_PAIR_EACH)
def test_seeds_side_by_side_are_seeds_one_by_one(algo: str, env: str) -> None:
    """The same tasks, actions and updates. In float64, where the order of a sum does not decide an action."""
    settings, learner, family = build(small(algo, env))

    def outcome(seeds: list[int]) -> tuple[Any, Any, dict[str, np.ndarray]]:
        state, rows = run_chunks(training.init(learner, family, seeds), learner, family, [2], total=2)
        arrays = evaluation.evaluate(learner, state.learner, family, settings.eval, seeds).arrays()
        return state.learner, rows, arrays

    together = outcome([3, 4])
    assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(together[0]) if jnp.issubdtype(x.dtype, jnp.floating))
    for i, seed in enumerate([3, 4]):
        learner_state, rows, arrays = outcome([seed])
        assert_close(jax.tree.map(lambda x, i=i: x[i : i + 1], together[0]), learner_state)
        assert_close({name: x[:, i : i + 1] for name, x in together[1].items()}, rows)
        assert_close({name: x[i : i + 1] for name, x in together[2].items()}, arrays)
    # And the comparison would notice: the two seeds differ.
    assert np.any(together[2]["returns"][0] != together[2]["returns"][1])


# --- seeds that break


@pytest.mark.parametrize("breaks", ["loss", "logits"])
def test_a_broken_seed_stands_still_and_the_others_go_on(breaks: str) -> None:
    seeds = [0, 1, 2]
    healthy, family = walker()
    luck = np.asarray(training.init(healthy, family, seeds).learner.luck)
    unlucky, breaking = np.sort(luck)[1], int(np.argmax(luck))  # only the luckiest one breaks, in meta-iteration 3
    others = [i for i in range(3) if i != breaking]

    good, good_rows = run_chunks(training.init(healthy, family, seeds), healthy, family, [6], total=6)
    at_break, _ = run_chunks(training.init(healthy, family, seeds), healthy, family, [3], total=6)
    learner, _ = walker(breaks, luckier_than=float(unlucky))
    state, rows = run_chunks(training.init(learner, family, seeds), learner, family, [2, 4], total=6)

    assert state.failed_at.tolist() == [3 if i == breaking else -1 for i in range(3)]
    names = training.quantities(state)
    assert names[int(state.failed_by[breaking])] == ("loss" if breaks == "loss" else "parameters")
    pick = lambda state, i: jax.tree.map(lambda x: x[i], state.learner)  # noqa: E731
    assert_identical(pick(state, breaking), pick(at_break, breaking))  # the last good state
    for i in others:
        assert_identical(pick(state, i), pick(good, i))
    for name in rows:
        np.testing.assert_array_equal(rows[name][:, others], good_rows[name][:, others])
        if name != "steps":
            np.testing.assert_array_equal(np.isnan(rows[name][:, breaking]), [False] * 3 + [True] * 3)


def test_a_broken_seed_shows_in_the_window_it_breaks_in() -> None:
    learner, family = walker("loss")
    state, rows = run_chunks(training.init(learner, family, [0]), learner, family, [8], total=8, log_every=4)
    assert state.failed_at.tolist() == [3]
    assert np.isnan(rows["loss"]).all() and np.isnan(rows["return_before"]).all()
    assert np.isfinite(np.asarray(state.learner.logits)).all()
