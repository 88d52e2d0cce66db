"""Paper tables: every file in configs/table/ holds together, verdicts are right, and what is missing is run once."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from made_up_runs import finished_run
from running import ROOT, environment

from metarl_cli import catalogue, config
from metarl_cli.cli import main
from metarl_cli.completion import candidates
from metarl_cli.core.errors import MetarlError, RunError
from metarl_cli.tables import pages, records, reproduce, view
from metarl_cli.tables.table import BUDGETS, PUBLISHED, Cell, Published, Rule, Source, Table, load, select

NAMES = list(catalogue.tables())
TABLES = {name: load(name) for name in NAMES}

OWN = {
    "title": "Two learners",
    "paper": "none",
    "protocol": "short",
    "quantity": "total reward",
    "of_episodes": "sum",
    "digits": 2,
    "optimum": ["best"],
    "rule": {"better": "higher", "tasks": 10, "relative": 0.0, "absolute": 0.0, "welch": 0.05, "best_seed": 2},
    "smoke": ["eval.tasks=4"],
    "rows": {
        "short": {"label": "n=2", "overrides": ["env=bandit", "env.k=2", "env.n=2"], "episodes": [0, 2], "published": {}},
        "long": {"label": "n=4", "overrides": ["env=bandit", "env.k=2", "env.n=4"], "episodes": [0, 4], "published": {}},
    },
    "columns": {
        "chance": {
            "label": "chance",
            "rows": ["*"],
            "overrides": ["algo=random", "env.n=4"],
            "reads": "return",
            "against": "optimum",
            "budgets": None,
        },
        "misfit": {
            "label": "for MDPs only",
            "rows": ["short"],
            "overrides": ["algo=psrl"],
            "reads": "return",
            "against": None,
            "budgets": None,
        },
        "rl2": {
            "label": "RL^2",
            "rows": ["long"],
            "overrides": ["algo=rl2", "algo.memory.features=8", "algo.meta_batch=4", "algo.minibatches=2"],
            "reads": "return",
            "against": None,
            "budgets": {
                "smoke": {"*": ["iterations=20000"]},
                "cpu": {"*": ["iterations=3"]},
                "full": {"*": ["iterations=9"]},
            },
        },
        "best": {
            "label": "optimum",
            "rows": ["*"],
            "overrides": ["algo=random"],
            "reads": "best_return",
            "against": None,
            "budgets": None,
        },
    },
    "notes": {"*.rl2": "hardly trained"},
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "table").mkdir(parents=True)
    (tmp_path / "mine" / "table" / "own.yaml").write_text(yaml.safe_dump(OWN, sort_keys=False))
    return tmp_path


@pytest.fixture
def own(elsewhere: Path) -> Table:
    return load("own", elsewhere / "mine")


# --- the files


@pytest.mark.parametrize("name", NAMES)
def test_every_command_composes(name: str) -> None:
    table = TABLES[name]
    commands = {table.command(cell, budget, 2) for cell in table.cells() for budget in BUDGETS} - {None}
    assert commands
    for command in commands:
        assert command is not None
        verb, *lines = command
        composed = (config.compose_eval if verb == "eval" else config.compose)(lines)
        assert composed.config.seeds == (2 if verb == "train" else 1)
        if isinstance(composed.config, config.EvalConfig):
            assert composed.config.tune.tasks == "reported"  # `records.measure` chooses among candidates on these


@pytest.mark.parametrize("name", NAMES)
def test_published_numbers_are_those_of_the_files(name: str) -> None:
    """Read here in another way; each with its source, none of which is from memory."""
    table, found = TABLES[name], 0
    for cell in table.cells():
        against, published = table.columns[cell.column].against, table.published(cell)
        if not isinstance(against, Source):
            assert published is None
            continue
        settings = table.rows[cell.row].published.get(against.file, ())
        with (PUBLISHED / f"{against.file}.csv").open(newline="") as file:
            rows = [r for r in csv.reader(file) if r[1] in settings and r[2] == against.method and r[3]]
        if published is None:
            assert not rows, cell
            continue
        (row,) = rows
        assert (published.text.split(" ± ")[0], published.source, row[6]) == (row[3], row[5], "false")
        assert published.value == float(row[3]) and (published.ci or "") == (row[4] and float(row[4]))
        found += 1
    assert found


@pytest.mark.parametrize(
    ("name", "file", "left_out"),
    [
        ("rl2_bandits", "rl2_table1_bandits", set()),
        ("rl2_mdps", "rl2_table2_mdp", set()),
        ("metasgd_point_nav", "metasgd_table4_nav2d", set()),
        (
            "rl2_bandits",
            "snail_table3_bandits",
            {"Gittins", "Random", "LSTM", "N=1000;K=50"},
        ),  # copies of RL^2's, and its own
        ("maml_point_nav", "maml_figure4_nav2d", {"grad_steps=4"}),
    ],
)
def test_no_published_number_is_left_out(name: str, file: str, left_out: set[str]) -> None:
    table = TABLES[name]
    shown = {
        (setting, column.against.method)
        for cell in table.cells()
        for column in [table.columns[cell.column]]
        if isinstance(column.against, Source) and column.against.file == file
        for setting in table.rows[cell.row].published[file]
    }
    with (PUBLISHED / f"{file}.csv").open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if not {row["setting"], row["method"]} & left_out]
    assert rows and not [row for row in rows if (row["setting"], row["method"]) not in shown]


def test_some_published_numbers() -> None:
    """By hand, from the papers."""
    for name, cell, value, ci in (
        ("rl2_bandits", "n10k50.rl2", 6.8, None),
        ("rl2_bandits", "n500k50.gittins", 463.7, None),
        ("rl2_bandits", "n100k5.snail", 79.1, 1.0),
        ("rl2_mdps", "n100.opsrl", 1973.9, None),
        ("maml_point_nav", "step1.maml", -11.68, 2.16),
        ("maml_point_nav", "step0.oracle", -2.29, 0.14),
        ("metasgd_point_nav", "varying.meta_sgd", -10.15, 0.62),
    ):
        published = TABLES[name].published(Cell(*cell.split(".")))
        assert published is not None and (published.value, published.ci) == (value, ci)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_recorded_with_metarl_fits_its_table(name: str) -> None:
    table = TABLES[name]
    for cell, record in records.read(records.RECORDED, name).items():
        assert cell in table.cells() and (record["table"], record["cell"]) == (name, str(cell))
        assert record["budget"] != "smoke" and not record["git_revision"].endswith("-dirty")
        assert record["command"].startswith(("metarl train ", "metarl eval "))
        assert not re.search(r"[ =~.]/|runs/", record["command"]), "a path"


def test_rows_share_a_run_where_learners_are_anytime() -> None:
    jobs = reproduce.jobs("rl2_bandits", TABLES["rl2_bandits"], TABLES["rl2_bandits"].cells(), "cpu", 5, Path("none"))
    by_first = {str(job.cells[0]): job for job in jobs}
    assert list(map(str, by_first["n10k5.ucb1"].cells)) == ["n10k5.ucb1", "n100k5.ucb1", "n500k5.ucb1"]
    assert "env.n=500" in by_first["n10k5.ucb1"].command and "env.n=10" not in by_first["n10k5.ucb1"].command
    assert list(map(str, by_first["n100k5.rl2"].cells)) == ["n100k5.rl2"]


def test_a_seeds_number_belongs_to_what_is_trained(own: Table) -> None:
    assert own.command(Cell("long", "rl2"), "cpu", 7) == (
        "train",
        "algo=rl2",
        "env=bandit",
        "env.k=2",
        "env.n=4",
        "algo.memory.features=8",
        "algo.meta_batch=4",
        "algo.minibatches=2",
        "iterations=3",
        "seeds=7",
    )
    assert own.command(Cell("short", "chance"), "cpu", 7) == ("eval", "algo=random", "env=bandit", "env.k=2", "env.n=4")
    assert own.command(Cell("long", "rl2"), "gpu", None) is None


def test_cells_by_row_column_and_name(own: Table) -> None:
    assert list(map(str, select(own, ["short"]))) == ["short.chance", "short.misfit", "short.best"]
    assert list(map(str, select(own, ["rl2", "short.best"]))) == ["short.best", "long.rl2"]
    assert select(own, []) == own.cells()


# --- verdicts


RULE = {"better": "higher", "tasks": 100, "relative": 0.0, "absolute": 0.0, "welch": 0.05, "best_seed": None}


def rule(**changes: Any) -> Rule:
    return Rule.model_validate(RULE | changes)


def ours(mean: float, half: float, std: float = 1.0) -> dict[str, Any]:
    return {"mean": mean, "ci_low": mean - half, "ci_high": mean + half, "std": std}


@pytest.mark.parametrize(
    ("mean", "target", "changes", "verdict"),
    [
        # Ours +-0.1; theirs 5.0: 1.96 / sqrt(100) = 0.196 for as many tasks, 0.05 for the digit: up to 5.346 they meet.
        (5.34, Published(5.0, 0.05, None, "", "5.0"), {}, "matches"),
        (5.36, Published(5.0, 0.05, None, "", "5.0"), {}, "better"),
        (4.64, Published(5.0, 0.05, None, "", "5.0"), {}, "worse"),
        (5.36, Published(5.0, 0.05, None, "", "5.0"), {"better": "lower"}, "worse"),
        # A published interval of +-0.4 takes the place of the sampling error: 0.4 + 0.05 + 0.1.
        (5.54, Published(5.0, 0.05, 0.4, "", "5.0"), {}, "matches"),
        (5.56, Published(5.0, 0.05, 0.4, "", "5.0"), {}, "better"),
        # An exact number has neither.
        (5.16, Published(5.0, 0.05, None, "", "5.0"), {"tasks": None}, "better"),
        # The optimum 2.0: the larger of 15 % (0.3) and 0.25, and ours +-0.1.
        (2.39, 2.0, {"relative": 0.15, "absolute": 0.25, "better": "lower"}, "matches"),
        (2.41, 2.0, {"relative": 0.15, "absolute": 0.25, "better": "lower"}, "worse"),
        (2.51, 2.0, {"relative": 0.05, "absolute": 0.4, "better": "lower"}, "worse"),
        (2.49, 2.0, {"relative": 0.05, "absolute": 0.4, "better": "lower"}, "matches"),
        (1.0, None, {}, ""),
    ],
)
def test_verdict(mean: float, target: Published | float | None, changes: dict[str, Any], verdict: str) -> None:
    assert view.judge(ours(mean, 0.1), target, rule(**changes)) == verdict


def test_bold_is_what_is_not_significantly_worse(own: Table) -> None:
    """Standard error of the difference 0.1 * sqrt(2): one-sided, 0.234 is significant at 5 %."""
    base = {"std": 1.0, "n_seeds": 5, "n_tasks": 100}  # seeds share their tasks: they are no more samples
    known = {
        Cell("short", "chance"): base | {"mean": 5.0},
        Cell("short", "misfit"): base | {"mean": 5.0 - 0.23},
        Cell("short", "best"): base | {"mean": 6.0},  # no contender
    }
    assert view.is_bold(Cell("short", "chance"), known, own) and view.is_bold(Cell("short", "misfit"), known, own)
    known[Cell("short", "misfit")]["mean"] = 5.0 - 0.24
    assert not view.is_bold(Cell("short", "misfit"), known, own)


# --- what a run says


def test_a_cell_of_a_trained_learner(own: Table, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    returns = rng.normal(size=(3, 20, 4, 1))
    training = np.array([[9.0, 0, 0], [0, 1, 0], [0, 1, 3]])  # the last two decide: seeds 5, 6, 7 have 0, 1, 1.5
    run = finished_run(tmp_path / "run", returns, seeds=[5, 6, 7], training=training)
    record = records.measure(run, own, Cell("long", "rl2"))
    totals = returns.sum((2, 3))
    assert record["mean"] == pytest.approx(totals.mean()) and record["std"] == pytest.approx(totals.std(ddof=1))
    assert record["ci_low"] < record["mean"] < record["ci_high"]
    assert record["by_seed"] == pytest.approx(totals.mean(1)) and (record["n_seeds"], record["n_tasks"]) == (3, 20)
    assert record["best_seed"]["seed"] == 7 and record["best_seed"]["mean"] == pytest.approx(totals[2].mean())
    assert (record["steps"], record["chosen"]) == (30, None)


def test_a_shorter_trial_may_have_another_best(own: Table, tmp_path: Path) -> None:
    """Parameter 0.1 wins after two episodes, 0.2 after four; the run itself was chosen for four."""
    early, late = np.zeros((1, 5, 4)), np.zeros((1, 5, 4))
    early[..., :2], late[..., 3] = 1, 5
    run = finished_run(tmp_path / "run", late[..., None], candidates={0.1: early, 0.2: late})
    found = {row: records.measure(run, own, Cell(row, "chance")) for row in ("short", "long")}
    assert [(x["mean"], x["chosen"]) for x in found.values()] == [(2.0, {"algo.c": 0.1}), (5.0, {"algo.c": 0.2})]


def test_episodes_of_a_point_are_averaged_where_the_table_says_so(tmp_path: Path) -> None:
    """MAML: 4 points of 40 episodes; a row is one point."""
    returns = np.arange(4.0)[None, None, :, None] * np.ones((1, 3, 4, 40))
    run = finished_run(tmp_path / "run", returns, algo="maml", env="point_nav", training=np.zeros((1, 1)))
    means = [records.measure(run, TABLES["maml_point_nav"], Cell(f"step{i}", "maml"))["mean"] for i in range(4)]
    assert means == [0, 1, 2, 3]


def test_optima(own: Table, tmp_path: Path) -> None:
    returns = np.zeros((1, 3, 4, 1))
    run = finished_run(tmp_path / "a", returns, optimum={"value": 2.5, "method": "by hand", "regret": 0.25})
    assert records.measure(run, own, Cell("long", "best"))["mean"] == 2.5
    wang = TABLES["wang_bandits"]
    assert records.measure(run, wang, Cell("easy", "optimum"))["mean"] == 0.25
    grid = TABLES["grid_nav"]
    run = finished_run(tmp_path / "b", returns, optimum={"value": 9.0, "method": "by hand", "episodes": [1, 2, 3, 3]})
    found = [records.measure(run, grid, Cell(row, "optimum"))["mean"] for row in ("episode1", "episode2", "total")]
    assert found == [1, 2, 9]
    run = finished_run(tmp_path / "c", returns, optimum={"value": None, "method": "does not fit"})
    record = records.measure(run, own, Cell("long", "best"))
    assert (record["mean"], record["method"]) == (None, "does not fit")


def test_a_trial_that_is_too_short(own: Table, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", np.zeros((1, 3, 3, 1)))
    with pytest.raises(RunError, match=r"a trial has 3 episodes, and long\.chance is about episodes 0 to 3"):
        records.measure(run, own, Cell("long", "chance"))


# --- reproduce


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is run, in place of running it: of algo=psrl nothing comes."""
    seen: list[str] = []

    def run(job: reproduce.Job, config_dir: Path | None, watch: reproduce.Watch, received: list[int]) -> str | None:
        seen.append(reproduce.printed(job.command))
        if "algo=psrl" in job.command:
            return "algo=psrl: does not fit this family"
        shutil.rmtree(job.run, ignore_errors=True)
        training = np.ones((3, 2)) if job.command[0] == "train" else None
        seeds = 1 if training is None else 2
        optimum = {"value": 3.0, "method": "by hand"}
        finished_run(job.run, np.full((seeds, 6, 4, 1), 0.5), optimum=optimum, training=training)
        return None

    monkeypatch.setattr(reproduce, "_run", run)
    return seen


def test_reproduce_records_and_never_runs_twice(ran: list[str], elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["reproduce", "own", "--config-dir", "mine"]
    assert main([*line, "budget=cpu", "seeds=2"]) == 1  # one of them failed, the others went on
    assert len(ran) == 4
    captured = capsys.readouterr()
    assert "4 of 4 commands to run, for 6 cells" in captured.out and "left" in captured.out
    assert "FAILED: algo=psrl: does not fit this family" in captured.out
    assert "1 of 4 commands failed: short.misfit" in captured.err
    known = records.read(records.OWN, "own")
    assert set(map(str, known)) == {"short.chance", "long.chance", "long.rl2", "short.best", "long.best"}
    assert known[Cell("short", "chance")]["mean"] == 1.0 and known[Cell("long", "chance")]["mean"] == 2.0
    assert known[Cell("long", "rl2")] | {"budget": "cpu", "seconds": 30.0} == known[Cell("long", "rl2")]

    ran.clear()
    assert main([*line, "budget=cpu", "seeds=2"]) == 1
    assert ran == ["metarl eval algo=psrl env=bandit env.k=2 env.n=2"]  # only what failed is tried again
    ran.clear()
    assert main([*line, "budget=cpu", "seeds=2", "cells=rl2"]) == 0
    assert ran == [] and "Everything is recorded" in capsys.readouterr().out
    # Fewer seeds do not take the place of more.
    assert main([*line, "budget=cpu", "seeds=1", "cells=rl2"]) == 0 and ran == []
    assert main([*line, "budget=cpu", "seeds=3", "cells=rl2"]) == 0
    assert [command.split()[-1] for command in ran] == ["seeds=3"]
    ran.clear()
    # Another budget is another command; a lesser one does not take its place.
    assert main([*line, "budget=full", "cells=rl2"]) == 0
    assert [command.split()[-2:] for command in ran] == [["iterations=9", "seeds=5"]]
    ran.clear()
    assert main([*line, "budget=cpu", "cells=rl2"]) == 0
    assert ran == []
    # Smoke runs are kept apart.
    assert main([*line, "budget=smoke", "cells=chance"]) == 0
    assert Path("runs/tables_smoke/own/short.chance.json").exists()
    # A report shows what its numbers were made from: one run of chance and the best, and RL^2 under its last budget.
    shown = view.view("own", load("own", elsewhere / "mine"), [Cell("long", "rl2"), Cell("long", "chance")], None)
    behind = [run.path.name for run in pages._behind(shown)]
    assert len(behind) == 2 and sum(name.startswith("long.rl2-") for name in behind) == 1
    assert len(list(Path("runs/tables/own/runs").glob("long.rl2-*"))) == 3


def test_a_table_of_ones_own(ran: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["reproduce", "own", "--config-dir", "mine", "seeds=2"])
    capsys.readouterr()

    def printed(form: str, *more: str) -> str:
        assert main(["table", "own", "--config-dir", "mine", "--format", form, *more]) == 0
        return capsys.readouterr().out

    text = printed("text")
    lines = {tuple(line.split()[:2]): line for line in text.splitlines() if line.startswith("n=")}
    assert lines["n=2", "chance"].split() == ["n=2", "chance", "1.00*", "[1.00,", "1.00]", "3.00", "-2.00", "worse"]
    assert "Optimum: optimum (short, long)." in text
    assert "hardly trained" in text and "metarl train algo=rl2" in text and "30 s on 2 CPU cores, 2031-05-01" in text
    rows = json.loads(printed("json"))
    assert [row["cell"] for row in rows] == ["short.chance", "short.misfit", "long.chance", "long.rl2"]
    assert [row["verdict"] for row in rows] == ["worse", "not run", "worse", ""]
    (found,) = csv.DictReader(io.StringIO(printed("csv", "cells=rl2")))
    assert found["command"].startswith("metarl train algo=rl2") and float(found["mean"]) == 2.0
    markdown = [line for line in printed("markdown").splitlines() if line.startswith("|")]
    assert len(markdown) == 6 and len({line.count("|") for line in markdown}) == 1 and "**1.00**" in markdown[2]
    latex = printed("latex")
    assert "RL$^2$" in latex and "95 \\%" in latex and "\\textbf{1.00}" in latex
    body = [line for line in latex.splitlines() if line.endswith("\\\\")]
    assert len(body) == 5 and len({line.count("&") for line in body}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_table_is_printed_in_every_format(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [cell for cell in TABLES[name].cells() if not TABLES[name].columns[cell.column].reads.startswith("best_")]
    for form in view.FORMATS:
        assert main(["table", name, "--format", form]) == 0
        out = capsys.readouterr().out
        assert "nan" not in out.lower()
        if form == "json":
            assert [row["cell"] for row in json.loads(out)] == list(map(str, cells))  # no cell is hidden
    assert main(["table"]) == 0
    assert name in capsys.readouterr().out


def test_the_best_known_optimum_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """The exact one comes before the Gittins index, and says which it is and what made it."""
    assert main(["table", "rl2_bandits", "--format", "json", "--records", str(records.RECORDED)]) == 0
    source = {row["cell"]: row["optimum_from"] for row in json.loads(capsys.readouterr().out)}
    assert source["n10k5.ucb1"] == "optimum" and source["n100k5.ucb1"] == "gittins"
    assert main(["table", "rl2_bandits", "cells=n10k5.ucb1", "--records", str(records.RECORDED)]) == 0
    assert "n10k5.optimum: metarl eval algo=random" in capsys.readouterr().out


@pytest.mark.slow
def test_stopped_and_continued(own: Table, elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In processes of their own: a training that is interrupted in the middle goes on where it was."""
    command = [sys.executable, "-m", "metarl_cli", "reproduce", "own", "--config-dir", "mine", "budget=smoke"]
    (run,) = {job.run for job in reproduce.jobs("own", own, [Cell("long", "rl2")], "smoke", None, Path("runs/tables_smoke"))}
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = elsewhere / run / "metrics.jsonl"
    for _ in range(3000):
        if process.poll() is not None or (metrics.exists() and metrics.stat().st_size > 2000):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, out
    assert "FAILED: " in out and "does not fit" in out  # the misfit stopped nothing
    assert "Go on with the same command" in out
    known = records.read(Path("runs/tables_smoke"), "own")
    assert Cell("short", "chance") in known and Cell("long", "rl2") not in known
    assert known[Cell("short", "best")]["mean"] == pytest.approx(13 / 12)  # two pulls of two arms: 1/2, then 2/3 or 1/2
    done = json.loads(metrics.read_text().splitlines()[-1])["iteration"]
    assert 0 < done < 20000

    # The rest would take a minute: the run is told that it is finished sooner.
    text = (elsewhere / run / "config.yaml").read_text()
    (elsewhere / run / "config.yaml").write_text(text.replace("iterations: 20000", f"iterations: {done + 50}"))
    before = os.stat(records.RECORDED).st_mtime
    process = subprocess.run([*command, "cells=chance,rl2,best"], env=environment(), capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "1 of 3 commands to run, for 1 cells" in process.stdout
    record = records.read(Path("runs/tables_smoke"), "own")[Cell("long", "rl2")]
    assert record["n_seeds"] == 2 and 0 <= record["mean"] <= 4
    assert len(list((elsewhere / run).parent.glob("*.log"))) == 4  # of each command its own
    iterations = [json.loads(line)["iteration"] for line in metrics.read_text().splitlines()]
    assert iterations == list(range(1, done + 51))  # resumed, not started anew
    assert os.stat(records.RECORDED).st_mtime == before and ROOT not in elsewhere.parents


# --- mistakes


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ("table rl2_bandit", ["table=rl2_bandit: there is no such table", "Did you mean rl2_bandits?"]),
        ("table rl2_bandits --format html", ["--format=html: there is no such format: text, markdown", "csv, json"]),
        ("table rl2_bandits cells=n10k6", ["cells=n10k6: is no row, column or cell", "Did you mean n10k5?"]),
        ("table rl2_bandits cells=n10k5.ucb2", ["Did you mean n10k5.ucb1?"]),
        ("table rl2_bandits budget=cpu", ["budget=cpu: there is no such key. Those of metarl table: cells"]),
        ("table rl2_bandits cells=", ["cells=: needs a value"]),
        ("table rl2_bandits cells=optimum", ["cells=n10k5.optimum", "stands beside the other columns", "gittins"]),
        ("reproduce rl2_bandits budget=cpu cells=n100k50.rl2", ["budget=cpu: has none of these cells", "gpu, full"]),
        ("reproduce", ["name one table"]),
        ("reproduce own budget=large --config-dir mine", ["budget=large: there is no such budget", "smoke, cpu, gpu, full"]),
        ("reproduce own seeds=0 --config-dir mine", ["seeds=0: must be an integer >= 1"]),
        ("reproduce own seed=1 --config-dir mine", ["seed=1: there is no such key", "Did you mean seeds?"]),
    ],
)
def test_mistakes(line: str, fragments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    for fragment in fragments:
        assert fragment in error


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"digits": "two"}, "table/own.yaml, digits: Input should be a valid integer"),
        ({"notes": {"*.rl3": "x"}}, "notes: *.rl3 is nothing in this table"),
        ({"optimum": ["bset"]}, "optimum: bset is nothing in this table"),
        ({"extra": 1}, "table/own.yaml, extra: Extra inputs are not permitted"),
    ],
)
def test_mistakes_in_a_table(change: dict[str, Any], fragment: str, elsewhere: Path) -> None:
    (elsewhere / "mine" / "table" / "own.yaml").write_text(yaml.safe_dump(OWN | change, sort_keys=False))
    with pytest.raises(MetarlError) as caught:
        load("own", elsewhere / "mine")
    assert fragment in str(caught.value)


def test_a_damaged_record(own: Table) -> None:
    folder = records.OWN / "own"
    folder.mkdir(parents=True)
    (folder / "long.rl2.json").write_text('{"cell": ')
    with pytest.raises(RunError, match=r"long\.rl2\.json: is no record of a cell"):
        records.read(records.OWN, "own")


def test_completion() -> None:
    def completed(*words: str) -> list[str]:
        return candidates(list(words), ("table", "reproduce"))

    assert completed("table", "rl2_b") == ["rl2_bandits "]
    assert completed("reproduce", "rl2_bandits", "") == ["budget=", "cells=", "seeds="]
    assert completed("reproduce", "rl2_bandits", "budget=") == [f"budget={name} " for name in sorted(BUDGETS)]
    assert completed("table", "rl2_bandits", "--format", "") == sorted(f"{form} " for form in view.FORMATS)
    assert "grid_nav " in completed("report", "grid")


def test_how_far_a_running_command_is(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert reproduce._iteration(metrics) is None
    metrics.write_text("".join(json.dumps({"iteration": i, "x": "." * 500}) + "\n" for i in range(99)) + '{"iterat')
    assert reproduce._iteration(metrics) == 98
