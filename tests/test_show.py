"""`metarl show`: what chance and the oracle do in the tasks that an evaluation would meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from scipy import stats

from metarl_cli import config
from metarl_cli.cli import main
from metarl_cli.core.rollout import Spaces, spaces
from metarl_cli.evaluation import choose_tasks
from metarl_cli.report import figures, show


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of each figure."""
    seen: list[Any] = []
    for name in ("trajectories", "parameters"):
        figure = getattr(figures, name)
        monkeypatch.setattr(figures, name, lambda *args, figure=figure: (seen.append(args), figure(*args))[1])
    return seen


def test_tasks_of_the_evaluation_with_chance_and_oracle(drawn: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "env=point_nav", "eval.tasks=3", "env.episodes=2"]) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert files == [Path("runs/show/point_nav/tasks.svg"), Path("runs/show/point_nav/tasks.png")]
    assert files[0].read_text().startswith("<?xml") and files[1].read_bytes().startswith(b"\x89PNG")
    ((family, tasks, batches, titles),) = drawn  # a goal is no single number: no second figure
    assert titles == ["random policy", "oracle"]
    settings = config.compose(["env=point_nav", "eval.tasks=3"]).config.eval
    np.testing.assert_array_equal([task.goal for task in tasks], choose_tasks(family, settings).goal)
    for task, (chance, oracle) in zip(tasks, batches, strict=True):
        assert chance.valid.shape == oracle.valid.shape == (2, family.horizon)
        # The shortest way, in both episodes.
        np.testing.assert_array_equal(oracle.valid.sum(1), np.ceil((np.abs(task.goal).max() - 0.01) / 0.1))
        assert oracle.terminated.sum() == 2 and chance.valid.sum() > oracle.valid.sum()
        assert np.abs(chance.action).max() <= 1 and np.ptp(chance.action) > 1.5


def test_a_gymnax_family_also_shows_its_numbers(drawn: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    line = [
        "show",
        "env=cartpole",
        "env.horizon=30",
        "eval.tasks=2",
        "eval.split=ood",
        "eval.episodes=3",
        "-o",
        "here/there",
    ]
    assert main(line) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [file.name for file in files] == ["tasks.svg", "tasks.png", "parameters.svg", "parameters.png"]
    assert all(file.parent == Path("here/there") and file.stat().st_size > 1000 for file in files)
    (_, tasks, batches, titles), (values,) = drawn
    assert titles == ["random policy"]  # nobody knows what is best there
    assert all(1 <= task.force_mag <= 5 or 15 <= task.force_mag <= 20 for task in tasks)
    assert [[batch.valid.shape for batch in row] for row in batches] == [[(3, 30)]] * 2
    assert set(values) == {"force_mag", "length", "masspole", "total_mass", "polemass_length"}
    assert set(values["length"]) == {"train", "ood"}
    assert stats.kstest(values["length"]["train"].astype(float), stats.uniform(0.25, 0.5).cdf).pvalue > 1e-3


def test_bandits(drawn: list[Any]) -> None:
    assert main(["show", "env=bandit", "env.n=40", "-o", "b"]) == 0
    ((_, tasks, batches, _),) = drawn
    assert len(tasks) == show.TASKS
    for task, (chance, oracle) in zip(tasks, batches, strict=True):
        assert oracle.action.shape == (40, 1) and np.all(oracle.action == task.probability.argmax())
        assert len(np.unique(chance.action)) > 2


def test_fewer_tasks_than_a_published_set_has_are_its_first() -> None:
    settings = config.compose(["env=point_nav"]).config
    family = config.build_family(settings)
    assert not show.numbers(family) and show.has_oracle(family)
    assert main(["show", "env=point_nav", "eval.tasks=41"]) == 2  # the published set has 40


def test_random_actions() -> None:
    keys = jax.random.split(jax.random.key(0), 4000)
    discrete = np.asarray(jax.vmap(lambda key: show.random_action(key, Spaces(1, 3, True)))(keys))
    assert stats.chisquare(np.bincount(discrete)).pvalue > 1e-3 and discrete.max() == 2
    box = np.asarray(jax.vmap(lambda key: show.random_action(key, Spaces(1, 2, False)))(keys))
    assert box.shape == (4000, 2) and stats.kstest(box.ravel(), stats.uniform(-1, 2).cdf).pvalue > 1e-3


def test_projected_observations_are_drawn_too(drawn: list[Any]) -> None:
    assert main(["show", "env=cartpole_projected", "env.horizon=20", "env.episodes=2", "-o", "p"]) == 0
    (family, *_), (values,) = drawn
    assert spaces(family).observation == 4
    assert set(values) == {"force_mag", "length", "masspole", "total_mass", "polemass_length"}
    assert np.ptp(values["length"]["train"]) == 0 < np.ptp(values["length"]["ood"])


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("show", "which family? metarl show env=NAME"),
        ("show eval.split=ood", "which family?"),
        ("show env=cartpol", "Did you mean cartpole?"),
        ("show env=bandit eval.split=odd", "the family has no such split"),
        ("show env=bandit --output", "this option takes a value"),
        ("show env=bandit --outptu=x", "Did you mean --output?"),
        ("show env=cartpole env.id=CartPol", "Did you mean CartPole-v1?"),
    ],
)
def test_a_mistake_gets_a_message(line: str, fragment: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    assert fragment in capsys.readouterr().err
    assert not list(Path.cwd().iterdir())


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "--help"]) == 0
    assert "metarl show env=cartpole" in capsys.readouterr().out
