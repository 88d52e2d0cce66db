"""`metarl diagnose estimators`: what is known of the estimators has to come out of it."""

import json

import jax
import numpy as np
import pytest
from running import metarl

from metarl_cli import config, diagnosis
from metarl_cli.core.errors import ConfigError, RunError

TINY = ["algo.hidden=[4]", "algo.meta_batch=4", "algo.episodes=4", "precision=float64"]


def build(*overrides):
    composed = config.compose(["algo=maml", *TINY, *overrides])
    from metarl_cli import runner

    runner.configure_jax(composed.config)
    learner, family = config.build(composed.config)
    return learner, learner.init(jax.random.key(0), family), family


def test_relative_variance_is_known_of_known_gradients():
    # g_r = m + e_r, |m|^2 = 25, variance of e 4 in each of 2 dimensions: 8 / 25, whatever the number of estimates.
    rng = np.random.default_rng(0)
    found = [diagnosis.relative_variance(list(np.array([3.0, 4.0]) + 2 * rng.standard_normal((20, 2)))) for _ in range(4000)]
    assert np.median(found) == pytest.approx(8 / 25, rel=0.05)
    assert diagnosis.relative_variance([np.ones(3), np.ones(3)]) == 0


@pytest.mark.parametrize(("agreement", "ceiling"), [(1.0, 1.0), (0.0, 0.0), (-0.2, 0.0), (1 / 3, 2**-0.5)])
def test_the_ceiling_is_that_of_a_perfect_estimate(agreement, ceiling):
    # Halves g + e_1, g + e_2 with |e|^2 = n |g|^2 agree to 1 / (1 + n); their mean and g to 1 / sqrt(1 + n / 2).
    assert diagnosis.Diagnosis([], 1.0, agreement).ceiling == pytest.approx(ceiling)


def test_on_one_step_tasks_dice_and_lvc_are_the_same_and_come_close_to_the_reference():
    """An episode of one step has no pairs of steps, which is where they differ; score lacks the outer products of one."""
    learner, state, family = build("env=bandit", "env.k=3", "env.n=8", "algo.inner_lr=2.0")
    settings = config.DiagnoseConfig(tasks=4, episodes=(8, 512), repeats=6, reference=6000, seed=1)
    found = diagnosis.estimators(learner, state, family, settings)
    by = {(e.estimator, e.episodes): e for e in found.estimates}
    assert len(by) == 2 * len(diagnosis.ESTIMATORS) and found.ceiling > 0.9
    for size in settings.episodes:
        assert by["dice", size].cosine["mean"] == pytest.approx(by["lvc", size].cosine["mean"], rel=1e-6)
        assert by["score", size].cosine["mean"] != pytest.approx(by["dice", size].cosine["mean"], rel=1e-6)
    for name in diagnosis.ESTIMATORS:
        assert by[name, 512].variance < by[name, 8].variance / 8  # 64 times the data
    assert by["dice", 512].cosine["mean"] > by["score", 512].cosine["mean"], "the reference is DiCE's"
    assert by["dice", 512].cosine["mean"] > 0.85 and by["dice", 512].cosine["mean"] > by["dice", 8].cosine["mean"]


def test_first_order_is_the_gradient_of_first_order_maml():
    learner, state, family = build("algo=fomaml", "env=point_nav", "env.horizon=5")
    tasks = jax.vmap(family.sample)(jax.random.split(jax.random.key(3), 4))
    mine = diagnosis.variant(learner, 4, **diagnosis.ESTIMATORS["first order"])
    data = diagnosis._batch(mine, state, jax.random.key(4), family, tasks)
    _, expected = learner.gradient(learner.task_loss, state.params, data)
    found = diagnosis._gradient(mine, state.params, data)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9), found, expected)


def test_a_learner_without_an_inner_step_is_refused():
    learner, state, family = build("algo=multi_task", "env=bandit")
    settings = config.DiagnoseConfig(tasks=2, episodes=(2,), repeats=2, reference=2, seed=0)
    with pytest.raises(RunError, match=r"no inner step.*inner_steps"):
        diagnosis.estimators(learner, state, family, settings)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("episodes=0", "episodes.*>= 1"),
        ("episode=[5]", "Did you mean episodes"),
        ("repeats=1", "repeats=1.*>= 2"),
        ("repeats=2,3", "takes one value"),
    ],
)
def test_mistakes_are_explained(override, message):
    with pytest.raises(ConfigError, match=message):
        config.diagnosis([override])


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    run = tmp_path / "run"
    small = ["env=point_nav", "env.horizon=4", "eval.tasks=2", "iterations=1", *TINY]
    assert metarl("train", "algo=maml", *small, f"hydra.run.dir={run}") == 0
    assert metarl("diagnose", "estimators", run, "tasks=2", "episodes=[2,4]", "repeats=2", "reference=4") == 0
    printed = capsys.readouterr().out
    (file,) = (run / "diagnoses").glob("*.json")
    content = json.loads(file.read_text())
    assert {e["estimator"] for e in content["estimates"]} == set(diagnosis.ESTIMATORS)
    for e in content["estimates"]:
        assert f"{e['cosine']['mean']:.2f}" in printed
    assert file.with_suffix(".png").exists() and file.with_suffix(".svg").exists()
