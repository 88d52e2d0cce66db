"""`metarl eval algo=NAME env=NAME`: a learner that has nothing to train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from metarl_cli import catalogue
from metarl_cli.baselines import exact
from metarl_cli.cli import main

SMALL = ["env=bandit", "env.k=3", "env.n=6", "eval.tasks=40"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def test_what_is_printed_and_written(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "algo=thompson", *SMALL]) == 0
    (run,) = (elsewhere / "runs" / "thompson_bandit").iterdir()
    out = capsys.readouterr().out
    assert "thompson on bandit, 40 test tasks, 1 seed" in out and "trial return (sum over 6 episodes)" in out
    table = exact.solve_counts(3, 6)
    optimal = f"optimal: {table.value:.3f} (dynamic program over {len(table.best)} count states)"
    assert f"{optimal}, its regret {4.5 - table.value:.3f}" in out
    assert "the share of the gap that is closed" in out and run.name in out
    assert {path.name for path in run.iterdir()} == {"config.yaml", "overrides.yaml", "result.json", "evaluation.npz"}

    content = result(run)
    assert (content["schema_version"], content["status"], content["tune"]) == (1, "completed", None)
    assert (content["algorithm"], content["family"], content["seeds"]) == ("thompson", "bandit", [0])
    (evaluation,) = content["evaluation"].values()
    with np.load(run / "evaluation.npz") as arrays:
        assert arrays["returns"].shape == arrays["regret"].shape == (1, 40, 6, 1)
        assert arrays["returns"].sum((2, 3)).mean() == pytest.approx(evaluation["trial_return"]["mean"])
    best = evaluation["optimum"]
    assert best["value"] + best["regret"] == pytest.approx(6 * 3 / 4)  # the best of three uniform numbers
    # Chance brings 1/2 a pull: 3, with a standard error of 0.015 over 10,000 tasks. The share is that of what was gained
    # over chance on the same tasks.
    assert best["random"] == pytest.approx(3, abs=0.06)
    assert main(["eval", "algo=random", *SMALL, "hydra.run.dir=chance"]) == 0
    chance = result(Path("chance"))["evaluation"]["test"]
    gained = evaluation["trial_return"]["mean"] - chance["trial_return"]["mean"]
    assert best["share"] == pytest.approx(gained / (best["value"] - best["random"]))
    assert best["share_ci_low"] < best["share"] < best["share_ci_high"]
    assert chance["optimum"]["share"] == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["choices"] == {"algo": "thompson", "env": "bandit"}

    # The same again, bit by bit, elsewhere; several seeds meet the same tasks.
    assert main(["eval", "algo=thompson", *SMALL, "seeds=2", "hydra.run.dir=there"]) == 0
    assert result(Path("there"))["evaluation"]["test"]["trial_return"]["n_seeds"] == 2
    with np.load(run / "evaluation.npz") as one, np.load("there/evaluation.npz") as two:
        np.testing.assert_array_equal(one["returns"][0], two["returns"][0])
        assert np.any(two["returns"][0] != two["returns"][1])


def test_where_no_optimum_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "algo=random", "env=bandit_restless", "env.n=5", "eval.tasks=4", "hydra.run.dir=one"]) == 0
    assert "optimal" not in capsys.readouterr().out
    assert "optimum" not in result(Path("one"))["evaluation"]["test"]
    assert main(["eval", "algo=random", "env=bandit", "env.k=5", "env.n=60", "eval.tasks=4", "hydra.run.dir=two"]) == 0
    assert "GB" in capsys.readouterr().out
    found = result(Path("two"))["evaluation"]["test"]["optimum"]
    assert found["value"] is None and "count states for 5 arms and 60 pulls" in found["method"]


@pytest.mark.parametrize("where", ["reported", "other"])
def test_tuning(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    tune = ["tune.key=algo.epsilon", "tune.values=[0,0.2,1]", f"tune.tasks={where}"]
    lines = ["env=bandit", "env.k=3", "env.n=6", "eval.tasks=400"]
    assert main(["eval", "algo=epsilon_greedy", *lines, *tune, "hydra.run.dir=tuned"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert {"reported": "chosen on the reported tasks (this flatters)", "other": "chosen on other tasks"}[where] in out
    tuned = result(Path("tuned"))["tune"]
    assert (tuned["key"], tuned["tasks"], [row["value"] for row in tuned["candidates"]]) == (
        "algo.epsilon",
        where,
        [0, 0.2, 1],
    )
    means = [row["mean"] for row in tuned["candidates"]]
    assert tuned["chosen"] == [0, 0.2, 1][means.index(max(means))] != 1
    # What is reported is the chosen value on the reported tasks, whatever it was chosen on.
    assert main(["eval", "algo=epsilon_greedy", *lines, f"algo.epsilon={tuned['chosen']}", "hydra.run.dir=alone"]) == 0
    reported = result(Path("tuned"))["evaluation"]["test"]["trial_return"]
    assert reported == result(Path("alone"))["evaluation"]["test"]["trial_return"]
    assert (reported["mean"] == max(means)) == (where == "reported")
    with np.load("tuned/evaluation.npz") as arrays:  # a shorter trial may have another best: all of them are kept
        assert arrays["candidates"].shape == (3, 1, 400, 6)
        np.testing.assert_allclose(arrays["candidates"].sum(3).mean((1, 2)), means)


def test_all_candidates_run_under_one_program() -> None:
    from metarl_cli import evaluation

    before = evaluation._trials._cache_size()
    tune = ["tune.key=algo.c", "tune.values=[0.1,0.25,1]"]
    assert main(["eval", "algo=ucb1", "env=bandit", "env.k=4", "env.n=5", "eval.tasks=11", *tune]) == 0
    assert evaluation._trials._cache_size() == before + 3  # theirs, that of chance, and of chance on more tasks


@pytest.mark.parametrize("word", ["experiment=wang_bandits", "+experiment=rl2_paper", "sweep=rl2"])
def test_what_an_evaluation_takes(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "algo=thompson", "env=bandit", word]) == 2
    message = capsys.readouterr().err
    assert f"{word.lstrip('+')}: metarl eval takes no" in message and "It takes algo=NAME, env=NAME" in message


def test_an_evaluation_that_cannot_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "algo=thompson", "env=bandit", "eval.tasks=20000000000", "hydra.run.dir=there"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("metarl: The evaluation needs") and "eval.tasks" in message and len(message.splitlines()) == 1


def test_an_optimum_is_no_reason_to_lose_an_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    # The target pays less than the informative arm tells of: nobody has computed that optimum.
    assert (
        main(["eval", "algo=random", "env=bandit_informative", "env.target=0.5", "eval.tasks=5", "hydra.run.dir=one"]) == 0
    )
    assert "optimal: not computed" in capsys.readouterr().out
    assert result(Path("one"))["evaluation"]["test"]["optimum"]["value"] is None
    # Two arms that both pay with probability 1/2: chance is as good as it gets.
    lines = ["env=bandit_easy", "env.values=[0.5]", "env.n=2", "eval.tasks=7", "hydra.run.dir=two"]
    assert main(["eval", "algo=random", *lines]) == 0
    assert "there is no gap to close" in capsys.readouterr().out
    assert result(Path("two"))["evaluation"]["test"]["optimum"]["share"] is None


MISTAKES = [
    ("train algo=thompson env=bandit", ["algo=thompson: has nothing to train", "metarl eval algo=thompson env=bandit"]),
    ("eval algo=maml env=bandit", ["algo=maml: has to be trained first", "metarl train algo=maml env=bandit"]),
    ("eval algo=psrl env=bandit", ["algo=psrl: does not fit this family", "tabular MDPs", "algo=random fits every family"]),
    ("eval algo=thompson env=point_nav", ["does not fit this family", "env=bandit"]),
    ("eval algo=bayes_optimal env=bandit env.k=9 env.n=90", ["count states for 9 arms", "GB"]),
    ("eval algo=bayes_optimal env=bandit eval.episodes=5", ["eval.episodes=5", "trials of 10 episodes", "env.n"]),
    ("eval algo=thomson env=bandit", ["algo=thomson", "Did you mean thompson"]),
    ("eval algo=ucb1 env=bandit algo.epsilon=1", ["algo.epsilon=1: no such key", "greedy"]),
    ("eval algo=ucb1 env=bandit tune.key=algo.x tune.values=[1]", ["tune.key=algo.x", "Allowed: algo.c"]),
    ("eval algo=ucb1 env=bandit tune.key=algo.c", ["tune.values=[]", "tune.values=[0.1,0.2,0.5]"]),
    ("eval algo=ucb1 env=bandit tune.values=[1]", ["tune.key: has no value"]),
    ("eval algo=ucb1 env=bandit tune.key=algo.c tune.values=[0.1,-1]", ["tune.values=-1", "algo.c must be a number >= 0"]),
    ("eval algo=thompson env=bandit tune.key=algo.samples tune.values=[1.5]", ["algo.samples must be an integer"]),
    ("eval algo=thompson env=bandit iterations=3", ["iterations=3: no such key"]),
]


@pytest.mark.parametrize(("line", "fragments"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_gets_a_message_and_leaves_nothing_behind(
    line: str, fragments: list[str], capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    assert main(line.split()) == 2
    message = capsys.readouterr().err
    for fragment in fragments:
        assert fragment in message
    assert not list(elsewhere.iterdir())


def test_it_is_no_run_to_go_on_with(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "algo=random", *SMALL, "hydra.run.dir=it"]) == 0
    for command in ("resume", "eval"):
        assert main([command, "it"]) == 2
        assert "metarl eval algo=random env=bandit" in capsys.readouterr().err
    assert main(["eval", "algo=random", *SMALL, "hydra.run.dir=it"]) == 2
    assert "already in use" in capsys.readouterr().err


def test_help_and_completion(capsys: pytest.CaptureFixture[str]) -> None:
    def complete(line: str) -> list[str]:
        assert main(["_complete", *line.split(" ")]) == 0
        return capsys.readouterr().out.splitlines()

    assert {"algo=thompson ", "algo=psrl "} <= set(complete("eval algo="))
    assert "algo=maml " not in complete("eval algo=") and "algo=thompson " not in complete("train algo=")
    assert complete("eval al") == ["algo="]
    assert complete("eval algo=ucb1 algo.") == ["algo.c="]
    assert complete("eval algo=ucb1 tune.") == ["tune.key=", "tune.tasks=", "tune.values="]
    assert main(["eval", "algo=psrl", "env=tabular_mdp", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(key in text for key in ("algo.samples", "algo.prior_mean", "tune.key", "env.dirichlet"))
    assert main(["eval", "--help"]) == 0
    assert "algo=thompson" in capsys.readouterr().out
    algos = catalogue.groups()["algo"]
    assert set(catalogue.trained(algos)) >= {"maml", "rl2"} and "psrl" not in catalogue.trained(algos)
