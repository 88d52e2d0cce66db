"""The command line: every mistake gets a message, help is instant, completion knows the keys."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import metarl_cli
from metarl_cli import config
from metarl_cli.cli import main
from metarl_cli.core.errors import MetarlError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in an empty directory."""
    directory = tmp_path / "work"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[config.Composed]:
    """What the runner is asked to train, in place of training."""
    seen: list[config.Composed] = []

    def train(composed: config.Composed) -> None:
        seen.append(composed)
        if composed.config.seed == 13:
            raise MetarlError("the quantity is NaN")
        if composed.config.seed == 99:
            error = MetarlError("interrupted")
            error.exit_code = 130  # type: ignore[attr-defined]
            raise error

    runner: Any = ModuleType("metarl_cli.runner")
    runner.train = train
    monkeypatch.setitem(sys.modules, "metarl_cli.runner", runner)
    monkeypatch.setattr(metarl_cli, "runner", runner, raising=False)
    return seen


MISTAKES = [
    # Commands and options.
    ("trian", ["trian: there is no such command", "train, eval", "Did you mean train?"]),
    ("algo=maml seed=3", ["Did you mean `metarl train algo=maml`?"]),
    ("--verison", ["--verison", "Did you mean --version?"]),
    ("train --multi-run seed=1,2", ["--multi-run", "Did you mean --multirun?"]),
    ("train --seed=3", ["--seed=3", "seed=3"]),
    ("train --seed 3", ["--seed: ", "seed=VALUE"]),
    ("train --config-dir", ["--config-dir: this option takes a value"]),
    ("train --multirun=3", ["this option takes no value"]),
    ("train --config-dir nowhere", ["--config-dir=nowhere: is not a directory"]),
    ("list algo", ["algo: there is no such list", "algos, envs, memories", "Did you mean algos?"]),
    ("completion fish", ["fish", "bash or zsh"]),
    ("eval", ["which run?", "metarl eval RUN"]),
    ("resume iterations=3", ["which run?", "metarl resume RUN"]),
    ("eval nowhere", ["nowhere: there is no such run directory"]),
    ("resume .", [".: is no run directory", "config.yaml"]),
    # Choices.
    ("train algo=mamll", ["algo=mamll: no such algorithm", "rl2", "Did you mean maml?"]),
    ("train env=pointnav", ["env=pointnav: no such task family", "bandit", "Did you mean point_nav?"]),
    ("train algo=rl2 algo/memory=grru", ["algo/memory=grru: no such memory model", "Did you mean gru?"]),
    ("train algo/memory=gru", ["algo/memory=gru: the chosen algorithm takes none"]),
    ("train experiment=rl2_papr", ["experiment=rl2_papr: no such experiment", "Did you mean rl2_paper?"]),
    ("train algo=[maml,rl2]", ["algo=[maml,rl2]: no such algorithm"]),
    ("train algo=3", ["algo=3: no such algorithm", "rl2"]),
    ("train maml", ["maml: ", "key=value", "Did you mean algo=maml?"]),
    # Keys.
    ("train algo.inner_lrr=0.1", ["algo.inner_lrr=0.1: no such key", "Did you mean algo.inner_lr?", "Keys of algo: "]),
    ("train +algo.inner_lrr=0.1", ["algo.inner_lrr=0.1: no such key", "Did you mean algo.inner_lr?"]),
    ("train ++algo.inner_lrr=0.1", ["algo.inner_lrr=0.1: no such key", "Did you mean algo.inner_lr?"]),
    ("train inner_lr=0.1", ["inner_lr=0.1: no such key", "Did you mean algo.inner_lr?"]),
    ("train alg.lr=1", ["alg.lr=1: no such key", "Did you mean algo.lr?"]),
    ("train eval.adapt.step=2", ["eval.adapt.step=2: no such key", "Did you mean eval.adapt.steps?"]),
    ("train env.k=3", ["env.k=3: no such key", "env=bandit", "env=point_nav does not"]),
    ("train +algo.lr=3", ["algo.lr=3: the key exists already", "Leave out the `+`"]),
    ("train ~algo.lr", ["algo.lr: a key cannot be deleted"]),
    ("train iteratoins=3", ["iteratoins=3: no such key", "Did you mean iterations?"]),
    # Values.
    ("train algo.inner_lr=-1", ["algo.inner_lr=-1: must be a number > 0"]),
    ("train env=bandit env.k=0", ["env.k=0: must be an integer >= "]),
    ("train env=bandit env.k=???", ["env.k=???: has no value", "env.k=VALUE"]),
    ("train seeds=0", ["seeds=0: must be an integer >= 1"]),
    ("train seed=three", ["seed=three: must be an integer >= 0"]),
    ("train seed='\"3\"'", ["seed='3': must be an integer >= 0"]),
    ("train seed=true", ["seed=true: must be an integer >= 0"]),
    ("train iterations=1e3", ["iterations=1000.0: must be an integer >= 0", "Write 1000"]),
    ("train device=gpuu", ["device=gpuu: no such choice", "auto, cpu, gpu", "Did you mean gpu?"]),
    ("train algo.hidden=64", ["algo.hidden=64: must be a list, each an integer >= 1. Write algo.hidden=[64]."]),
    ("train algo=rl2 algo.memory=lstm", ["algo.memory=lstm: must be a section", "write algo/memory=NAME; there are gru"]),
    ("train algo=rl2 memory=lstm", ["memory=lstm: no such key. To choose a file of algo/memory, write algo/memory=NAME."]),
    ("train algo.hidden=[64,0]", ["algo.hidden=[64,0]: must be a list, each an integer >= 1"]),
    ("diagnose estimators RUN episodes=[]", ["episodes=[]: must be a list, each an integer >= 1, and not empty"]),
    ("train algo.lr=inf", ["algo.lr=inf: must be a finite number"]),
    ("train algo.lr=", ["algo.lr='': must be a number > 0"]),
    ("train eval=5", ["eval=5: must be a section"]),
    ("train algo.lr.x=5", ["algo.lr={x:5}: must be a number > 0"]),
    ("train algo.lr=${algo.lrr}", ["algo.lr=${algo.lrr}: refers to a key", "Did you mean ${algo.lr}?"]),
    ("train algo.lr=${oc.env:HOME}", ["algo.lr=${oc.env:HOME}: a config may not read the environment"]),
    ("train seed=${eval.seed} eval.seed=${seed}", ["seed=${eval.seed}: cannot be resolved: Recursive"]),
    # Syntax.
    ("train seed=4294967296", ["seed=4294967296: must be an integer >= 0 and <= 2147483647"]),
    ("train seed=2147483647 seeds=2", ["seeds=2: the last seed"]),
    ("train plugins=[no_such_package]", ["plugins=no_such_package: there is no such package", "PYTHONPATH"]),
    ("train algo=mamll", ["algo=mamll: no such algorithm", "Did you mean maml?"]),
    ("train sweep=rl2", ["sweep=rl2: is a space to search: metarl train -m sweep=rl2"]),
    ("train seed=0,1", ["seed=0,1: takes one value", "Add -m", "metarl train -m seed=0,1"]),
    ("train seed=range(0,3)", ["seed=range(0,3): takes one value", "Add -m"]),
    ("train algo.lr = 3", ["algo.lr: ", "without spaces around `=`"]),
    ("train algo.hidden=[64", ["algo.hidden=[64: cannot be read", "closed"]),
    ("train hydra.run.dir=~/x", ["hydra.run.dir=~/x: cannot be read", "$HOME"]),
    ("train =3", ["=3: this is no key"]),
    # Hydra's own settings, and classes.
    ("train hydra.searchpath=[x]", ["hydra.searchpath=[x]: cannot be set", "hydra.run.dir", "Use --config-dir"]),
    ("train hydra.run.dirr=x", ["hydra.run.dirr=x: no such key"]),
    ("train -m seed=0,1 hydra.run.dir=x", ["hydra.run.dir=x", "Set hydra.sweep.dir"]),
    ("train algo._target_=metarl_cli.x.os.system", ["algo._target_=metarl_cli.x.os.system: there is no module"]),
    ("train +eval._target_=os.system", ["eval._target_=os.system: no class may be named here"]),
]


def words(line: str) -> list[str]:
    import shlex

    return shlex.split(line)


@pytest.mark.parametrize(("line", "fragments"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_gets_a_message(
    line: str, fragments: list[str], elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(line)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("metarl: ") and err.count("\n") == 1  # one paragraph
    assert "Traceback" not in err
    for fragment in fragments:
        assert fragment in err
    assert list(elsewhere.iterdir()) == []


def test_several_mistakes_are_several_paragraphs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "seed=-1", "seeds=0"]) == 2
    err = capsys.readouterr().err
    assert [line[:14] for line in err.splitlines()] == ["metarl: seed=-", "metarl: seeds="]


def test_messages_are_wrapped_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "50")
    assert main(["train", "algo.inner_lrr=3"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 3 and max(map(len, lines)) <= 50


def test_a_bug_shows_its_trace(
    trained: list[config.Composed], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metarl_cli.config.compose", lambda *_: 1 // 0)
    assert main(["train"]) == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err and "this is a bug in metarl. Please report it" in err


# Training


def test_train_passes_the_config_on(trained: list[config.Composed]) -> None:
    assert main(["train", "algo=rl2", "env=bandit", "seed=3", "hydra.run.dir=here"]) == 0
    (composed,) = trained
    assert (composed.algo, composed.env, composed.config.seed) == ("rl2", "bandit", 3)
    assert composed.run_dir == Path("here") and composed.run_dir_given


def test_the_exit_code_of_an_error_is_kept(trained: list[config.Composed], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "seed=99"]) == 130
    assert capsys.readouterr().err == "metarl: interrupted\n"


def test_a_sweep_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    sweep: Any = ModuleType("metarl_cli.sweep")
    sweep.run = lambda *args: seen.append(args) or 3
    monkeypatch.setitem(sys.modules, "metarl_cli.sweep", sweep)
    monkeypatch.setattr(metarl_cli, "sweep", sweep, raising=False)
    assert main(["train", "-m", "seed=1,2", "--config-dir", "mine", "hydra/launcher=vmap"]) == 3
    assert seen == [(["seed=1,2", "hydra/launcher=vmap"], Path("mine"))]


# Help, lists, completion


@pytest.mark.parametrize(
    "line",
    [
        "--help",
        "",
        "--version",
        "train --help",
        "eval --help",
        "resume -h",
        "list",
        "list envs",
        "completion bash",
        "_complete train algo=rl2 algo.memory.",
        "_complete eval .",
        "tarin",
        "runs .",
        "compare",
    ],
)
def test_what_has_to_be_instant_imports_nothing_heavy(line: str) -> None:
    code = (
        "import sys; from metarl_cli.cli import main; main(sys.argv[1:]);"
        "heavy = {'jax', 'hydra', 'omegaconf', 'pydantic', 'rich', 'numpy', 'gymnax'} & set(sys.modules);"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code, *words(line)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_train_help_names_keys_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    for word in ("-m, --multirun", "--config-dir", "maml", "rl2", "point_nav", "seeds=", "algo.inner_lr="):
        assert word in out


def test_every_key_in_the_short_help_exists(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--help"])
    listed = capsys.readouterr().out.partition("Keys that are often set:")[2]
    keys = {word.partition("=")[0] for word in listed.partition("metarl train")[0].split() if "=" in word}
    known = {"hydra.run.dir", "hydra.sweep.dir", "hydra/launcher", "hydra/sweeper", "sweep"}
    for env in ("point_nav", "bandit"):
        known |= {row.key for row in config.rows(config.compose(["algo=maml", f"env={env}"]))}
    assert len(keys) > 15 and keys <= known


def test_help_with_a_choice_lists_every_key(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["train", "algo=rl2", "env=bandit", "algo.clip=0.25", "--help"]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    keys = {row.key for row in config.rows(config.compose(["algo=rl2", "env=bandit"]))}
    assert keys <= set(lines)
    assert lines["algo.clip"][1:5] == ["0.25", "number", ">", "0"]
    assert lines["algo.memory.features"][2:6] == ["integer", ">=", "1", "(units)"]
    assert lines["device"][1:] == ["auto", "one", "of", "auto,", "cpu,", "gpu", *lines["device"][7:]]


def test_help_reports_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "algo=mamll", "--help"]) == 2
    assert "Did you mean maml?" in capsys.readouterr().err


def test_list_has_a_line_for_each_also_of_ones_own(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    (elsewhere / "own" / "algo").mkdir(parents=True)
    (elsewhere / "own" / "algo" / "mine.yaml").write_text("# @package _global_\n# My own learner\niterations: 3\n")
    assert main(["list", "algos", "--config-dir", "own"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"maml", "rl2"} < {line.split()[0] for line in lines}
    assert lines[-1].split(maxsplit=1) == ["mine", "My own learner"]
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "envs (env=NAME)" in out and "  point_nav " in out and "  gru " in out and "mine" not in out


def test_a_closed_pipe_is_no_error() -> None:
    command = [sys.executable, "-c", "import sys; from metarl_cli.cli import main; sys.exit(main())", "train", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def complete(line: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["_complete", *line.split(" ")]) == 0
    return capsys.readouterr().out.splitlines()


def test_completion_of_commands_choices_and_keys(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    assert complete("", capsys) == sorted(f"{name} " for name in MAIN_WORDS)
    assert complete("tr", capsys) == ["train "]
    assert {"algo=maml ", "algo=rl2 "} <= set(complete("train algo=", capsys))
    assert complete("train env=pen", capsys) == ["env=pendulum "]
    assert complete("show env=pen", capsys) == ["env=pendulum "]
    assert complete("show e", capsys) == ["env.", "env=", "eval."]
    assert complete("show algo", capsys) == []
    assert complete("show -", capsys) == ["--config-dir ", "--help ", "--output "]
    assert complete("list f", capsys) == ["fields "]
    assert complete("train e", capsys) == ["env.", "env=", "eval.", "experiment="]
    assert complete("train env=bandit env.", capsys) == ["env.k=", "env.n="]
    assert complete("train algo=rl2 algo.memory.f", capsys) == ["algo.memory.features="]
    assert complete("train algo=rl2 algo/memory=s5 algo.memory.", capsys) == [
        "algo.memory.features=",
        "algo.memory.layers=",
        "algo.memory.state=",
    ]
    assert complete("train experiment=wang", capsys) == ["experiment=wang_bandits "]
    assert complete("train experiment=wang_bandits algo.inner", capsys) == []  # its algorithm is not the default one
    assert complete("train experiment=wang_bandits algo.memory.a", capsys) == []  # nor its memory that of the algorithm
    assert complete("train experiment=rl2_paper algo.memory.a", capsys) == ["algo.memory.activation="]
    assert complete("train experiment=rl2_paper env=grid_nav env.si", capsys) == ["env.size="]
    assert complete("train algo.inner", capsys) == ["algo.inner_lr=", "algo.inner_optimizer=", "algo.inner_steps="]
    assert complete("train algo=from_scratch algo.inner_l", capsys) == ["algo.inner_lr="]  # of the file that it starts from
    assert complete("train algo=rl2 algo.inner", capsys) == []
    assert complete("list e", capsys) == ["envs ", "experiments "]
    assert complete("completion ", capsys) == ["bash ", "zsh "]
    assert complete("nonsense ", capsys) == []


COMMANDS = (
    "train",
    "eval",
    "resume",
    "diagnose",
    "runs",
    "compare",
    "show",
    "table",
    "reproduce",
    "report",
    "list",
    "completion",
)
MAIN_WORDS = (*COMMANDS, "--help", "--version")


def test_completion_of_runs(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    run = elsewhere / "runs" / "maml_bandit" / "1"
    run.mkdir(parents=True)
    config.save(config.compose(["env=bandit"]), run)
    assert complete("eval ", capsys) == ["runs/maml_bandit/"]
    assert complete("resume runs/maml_bandit/", capsys) == ["runs/maml_bandit/1 "]
    assert complete("eval runs/maml_bandit/1 env.", capsys) == ["env.k=", "env.n="]
    assert complete("resume runs/maml_bandit/1 it", capsys) == ["iterations="]
    assert complete("eval nowhere e", capsys) == []


def test_completion_knows_ones_own_directory(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    (elsewhere / "own" / "env").mkdir(parents=True)
    (elsewhere / "own" / "env" / "maze.yaml").write_text("# Mazes\n_target_: x.Maze\nwidth: 3\n")
    assert complete("train --config-dir o", capsys) == ["own/"]
    assert complete("train --config-dir own env=maz", capsys) == ["env=maze "]
    assert complete("train --config-dir own env=maze env.", capsys) == ["env.width="]


def test_the_bash_script_completes(elsewhere: Path) -> None:
    script = f"""
        metarl() {{ {sys.executable} -c 'import sys; from metarl_cli.cli import main; sys.exit(main())' "$@"; }}
        eval "$(metarl completion bash)"
        for COMP_LINE in 'metarl tr' 'metarl train env=pen' 'metarl train algo=rl2 algo.memory.f'; do
            COMP_POINT=${{#COMP_LINE}}
            _metarl metarl
            printf '<%s>' "${{COMPREPLY[@]}}"
        done
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    # Bash itself has already typed what stands before the `=`.
    assert done.stdout == "<train ><pendulum ><algo.memory.features=>", done.stderr
