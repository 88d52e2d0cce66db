"""The report: one page that needs nothing else, in which nothing of a config is ever code."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from made_up_runs import finished_run

from metarl_cli.cli import main
from metarl_cli.report import runs
from metarl_cli.report.figures import plain_text
from metarl_cli.report.runs import Run

HOSTILE = "</td><script>alert(1)</script><img src=x onerror=\"alert('2')\">$\\frac{_^&%\u202e\n\x07"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Page(HTMLParser):
    """Tags and text of a page, and the SVG of every image. Whatever is not closed in order is a mistake."""

    VOID = ("meta", "img", "br")

    def __init__(self, path: Path):
        super().__init__()
        self.content = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.open: list[str] = []
        self.images: list[str] = []
        self.text = ""
        self.feed(self.content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href"):
                kind, _, data = (value or "").partition("base64,")
                assert value == "#" or kind == "data:image/svg+xml;", value
                if data:
                    svg = base64.b64decode(data).decode()
                    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
                    self.images.append(svg)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open and self.open[-1] not in ("style", "script") else ""


def bandit_runs(folder: Path) -> None:
    """RL^2 in two runs of two seeds, one more with another learning rate, Thompson, and one that is not finished."""
    rng = np.random.default_rng(0)

    def lived(seeds: int, mean: float) -> dict[str, np.ndarray]:
        returns = rng.binomial(1, mean, size=(seeds, 30, 8, 1)).astype(float)
        return {"returns": returns, "regret": np.full_like(returns, 1 - mean)}

    optimum = {"value": 6.0, "method": "by hand", "regret": 1.0, "random": 4.0, "share": 0.5}
    training = np.linspace(0, 1, 12)[:, None] * np.ones(2)
    for name, seeds, lr in (("0", [0, 1], 1e-3), ("1", [2, 3], 1e-3), ("2", [0, 1], 1e-2)):
        finished_run(folder / name, **lived(2, 0.6), seeds=seeds, training=training, optimum=optimum, lr=lr)
    finished_run(folder / "10", **lived(1, 0.5), algo="thompson", optimum=optimum)
    waiting = finished_run(folder / "11", **lived(2, 0.5), training=training, lr=5.0)
    (waiting / "result.json").unlink()


def test_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bandit_runs(tmp_path / "sweep")
    assert main(["report", "sweep", "-o", "new/page.html"]) == 0
    assert capsys.readouterr().out.strip() == "new/page.html"
    page = Page(tmp_path / "new" / "page.html")
    assert len(page.content) < 400_000
    for words in ("rl2 lr=0.001", "rl2 lr=0.01", "thompson", "0-3", "not finished", "50.0 %", "12", "500 MB", "Save as SVG"):
        assert words in page.text, words
    # Adaptation, regret, learning curves, who is better, profiles; no trajectories were drawn.
    assert len(page.images) == 5
    assert page.tags.count("script") == 1 and "http" not in re.sub(r"base64,[\w+/=]+", "", page.content)


def test_runs_that_differ_in_seeds_are_one_learner(tmp_path: Path) -> None:
    bandit_runs(tmp_path / "sweep")
    found = runs.find(tmp_path / "sweep")
    assert [run.path.name for run in found] == ["0", "1", "2", "10", "11"]
    (group,) = runs.groups(found)
    assert [(learner.label, learner.seeds) for learner in group.learners] == [
        ("rl2 lr=0.001", [0, 1, 2, 3]),
        ("rl2 lr=0.01", [0, 1]),
        ("thompson", [0]),
        ("rl2 lr=5.0", []),
    ]
    returns = group.learners[0].array("returns")
    assert returns is not None and returns.shape == (4, 30, 8, 1)
    what, scores = runs.scores(group)
    assert what == "trial return (sum over 8 episodes)" and set(scores) == {"rl2 lr=0.001", "rl2 lr=0.01", "thompson"}
    np.testing.assert_allclose(scores["rl2 lr=0.001"], returns.sum((2, 3)))
    curve = runs.adaptation(group.learners[0])
    assert curve is not None
    np.testing.assert_allclose(curve.mean, returns.mean((0, 1, 3)))
    np.testing.assert_array_equal(curve.x, range(8))  # what was spent before
    regret = runs.regret(group.learners[2])
    assert regret is not None
    np.testing.assert_allclose(regret.mean, 0.5 * np.arange(1, 9))


def test_families_are_told_apart(tmp_path: Path) -> None:
    for n in (3, 4):
        finished_run(tmp_path / str(n), np.zeros((1, 5, n, 1)))
    finished_run(tmp_path / "grid", np.zeros((1, 5, 2, 1)), env="grid_nav")
    assert [group.env for group in runs.groups(runs.find(tmp_path))] == ["grid_nav", "bandit, n=3", "bandit, n=4"]


def test_the_same_seeds_twice_are_not_pooled(tmp_path: Path) -> None:
    for name in ("a", "b"):
        finished_run(tmp_path / name, np.zeros((2, 5, 3, 1)))
    (group,) = runs.groups([Run(tmp_path / "a"), Run(tmp_path / "b")])
    assert [learner.label for learner in group.learners] == ["rl2 (a)", "rl2 (b)"]


def test_learners_that_live_differently_are_compared_at_the_end(tmp_path: Path) -> None:
    """MAML: 2 points of 5 episodes; RL^2: 4 episodes. On one axis of steps."""
    maml = np.concatenate([np.zeros((1, 6, 1, 5)), np.ones((1, 6, 1, 5))], axis=2)
    finished_run(tmp_path / "maml", maml, algo="maml", env="point_nav")
    finished_run(tmp_path / "rl2", np.full((1, 6, 4, 1), 0.5), env="point_nav")
    for name in ("maml", "rl2"):  # the family of both
        config = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config | {"env": {"horizon": 1}}))
    (group,) = runs.groups(runs.find(tmp_path))
    what, scores = runs.scores(group)
    assert what == "return of an episode at the end of a trial"
    assert (scores["maml"].mean(), scores["rl2"].mean()) == (1.0, 0.5)
    curve = runs.adaptation(group.learners[0])
    assert curve is not None and curve.x.tolist() == [0, 5]


def test_hostile_names_and_values(tmp_path: Path) -> None:
    """In a label, a command, a setting, a key, a method, a device and a directory."""
    folder = tmp_path / "<b>&amp;$x_"
    for i, value in enumerate((HOSTILE, f"{HOSTILE}2")):
        run = finished_run(
            folder / str(i),
            np.random.default_rng(i).normal(size=(2, 5, 3, 1)),
            algo=HOSTILE,
            env=f"_{HOSTILE}",
            optimum={"value": 1.0, "method": HOSTILE, "random": 0.0, "share": 0.1},
            overrides=[f"algo.x='{HOSTILE}'"],
            **{HOSTILE: value},
        )
        result = json.loads((run / "result.json").read_text())
        result["device"]["kind"], result["status"] = HOSTILE, HOSTILE
        (run / "result.json").write_text(json.dumps(result))
    assert main(["report", str(folder), "-o", "page.html"]) == 0
    page = Page(tmp_path / "page.html")
    assert page.tags.count("script") == 1 and page.tags.count("img") == len(page.images) == 3
    assert page.text.count("<script>alert(1)</script>") >= 10  # as text, where it belongs
    assert not any("<script" in image or "onerror" in image for image in page.images)


def test_labels_of_figures() -> None:
    assert plain_text("_a$b\n") == " _a\\$b "
    assert plain_text("x" * 50, 10) == "x" * 9 + "…"


def test_a_table_and_its_runs(tmp_path: Path) -> None:
    assert main(["report", "rl2_bandits", "-o", "page.html"]) == 0
    page = Page(tmp_path / "page.html")
    assert "Bernoulli bandits: total reward over n pulls" in page.text and "n=500, k=50" in page.text
    assert "as recorded with metarl" in page.text and "What was run" not in page.text  # only the numbers are kept
    assert len(page.images) == 9  # a figure for each row
    assert 'class="not-run"' in page.content


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("report", "report: of what?"),
        ("report nowhere", "nowhere: there is no such run, directory of runs or table."),
        ("report rl2_bandit", "Did you mean rl2_bandits?"),
        ("report empty", "empty: no run is here"),
        ("report broken", "cannot be read as a run"),
        ("report run -o empty", "empty cannot be written"),
        ("report run --format pdf", "metarl report has no such option"),
    ],
)
def test_mistakes(line: str, fragment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("choices: [")
    finished_run(tmp_path / "run", np.zeros((1, 3, 2, 1)))
    assert main(line.split()) == 2
    assert fragment in capsys.readouterr().err
