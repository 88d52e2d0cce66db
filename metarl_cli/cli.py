"""argv to command. Imports nothing heavy: `metarl --help`, `metarl list` and completion answer at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from metarl_cli.core.errors import MetarlError

if TYPE_CHECKING:
    from metarl_cli.config import Composed

_HELP = """\
metarl: trains, evaluates and shows meta-reinforcement learners

usage: metarl COMMAND ...

  train [OVERRIDES]        train a learner on a task family, then evaluate it on held-out tasks
  eval RUN [OVERRIDES]     evaluate a finished run again: other splits, budgets or family settings
  eval algo=NAME ...       evaluate a learner that has nothing to train: Thompson sampling, PSRL, an oracle
  resume RUN [OVERRIDES]   continue an interrupted run, or extend a finished one
  diagnose estimators RUN  how well each estimator of the inner gradient does at a run's parameters
  runs [DIR]               list runs and sweeps: status, result, age, size
  compare RUN RUN ...      where settings differ, beside what was reached
  show env=NAME            draw a few tasks of a family, and what can be reached there
  table [NAME]             a paper's table: published, ours, the optimum, a verdict
  reproduce NAME           run what is missing of a paper's table
  report RUN ... -o FILE   one HTML page about runs, a sweep or a table
  list [KIND]              what there is: algos, envs, memories
  completion bash|zsh      print the completion script for the shell

  metarl COMMAND --help    more about a command
  metarl --version

example: metarl train algo=maml env=point_nav seed=3
"""

_TRAIN = """\
usage: metarl train [-m] [--config-dir DIR] [KEY=VALUE ...]

Trains a learner on a task family, evaluates it on held-out tasks and writes
everything into a run directory, runs/<algo>_<env>/<time>.

  -m, --multirun           a sweep: one run for each combination of values,
                           metarl train -m seed=0,1 algo=maml,rl2
                           started again it goes on where it stopped
  --config-dir DIR         YAML files of your own, laid out like ours
                           (DIR/algo/mine.yaml), in addition to them
  -h, --help               this text; with overrides, every key of that config

Choices:
{choices}

Keys that are often set:
  seed=3                   the first seed
  seeds=5                  five seeds side by side in one program
  iterations=200           meta-iterations
  device=cpu               auto, cpu or gpu
  precision=float64        float32, float64 or bfloat16
  eval.split=ood           the held-out tasks: train, test or ood
  eval.tasks=100           how many of them
  logger=[jsonl,tensorboard]  metrics to TensorBoard or wandb as well
  eval.every=10            evaluate while training too, keep the best checkpoint
  algo.lr=3e-4             outer learning rate
  algo.inner_lr=0.05       step of the adaptation (maml)
  algo.inner_steps=2       adaptation steps in training (maml)
  algo.outer=trpo          outer optimiser (maml)
  algo.meta_batch=40       tasks of a meta-iteration
  algo.gamma=0.95          discount
  env.horizon=50           steps of an episode (point_nav)
  env.k=10 env.n=100       arms, and pulls of a trial (bandit)
  hydra.run.dir=PATH       the run directory

With -m also:
  hydra/launcher=vmap      runs that differ in seeds and numbers as one program
  hydra/launcher=joblib    in processes side by side
  hydra/sweeper=optuna     a search: algo.lr=interval(1e-4,1e-2)
  sweep=maml               a ready search space
  metric=return_after      what is compared
  hydra.sweep.dir=PATH     the directory of the sweep

metarl train algo=maml --help lists every key with its unit, range and default.
metarl list says what the choices are.
"""

_EVAL = """\
usage: metarl eval RUN [KEY=VALUE ...]
       metarl eval [--config-dir DIR] algo=NAME env=NAME [KEY=VALUE ...]

Evaluates a finished run again and writes RUN/evaluations/<name>.json. What the
run has recorded itself stays as it is. Without a run: evaluates a learner that
has nothing to train, in a directory of its own, runs/<algo>_<env>/<time>.

  eval.split=ood           other tasks: train, test or ood
  eval.tasks=100           how many
  eval.episodes=20         another budget of episodes in each
  eval.seed=1              another draw of tasks
  env.KEY=VALUE            another setting of the family
  device=cpu               elsewhere than before

Without a run also:
  algo.KEY=VALUE           a parameter of the learner
  tune.key=algo.epsilon tune.values=[0,0.1,0.2]
                           the best of several values of a parameter
  tune.tasks=other         chosen on other tasks than the reported ones
  hydra.run.dir=PATH       the directory

examples: metarl eval runs/maml_point_nav/2031-05-01_12-00-00 eval.split=ood
          metarl eval algo=thompson env=bandit env.k=10 env.n=100
          metarl eval algo=psrl --help    every key
"""

_RESUME = """\
usage: metarl resume RUN [KEY=VALUE ...]

Continues an interrupted run from its last checkpoint, as if it had never stopped.

  iterations=500           a finished run goes on to that many meta-iterations
  device=cpu               elsewhere than before
  logger=[jsonl,wandb]     metrics to somewhere else as well
"""

_RUNS = """\
usage: metarl runs [DIR]

Lists the runs and sweeps below DIR (default: runs), the newest last: what it is,
whether it is running, interrupted, completed or diverged, the trial return on
held-out tasks with its 95 % interval, when it last changed, and its size.
"""

_COMPARE = """\
usage: metarl compare RUN RUN ...

Prints the settings in which the runs differ, and below them what each reached.

example: metarl compare runs/maml_point_nav/*
"""

_DIAGNOSE = """\
usage: metarl diagnose estimators RUN [KEY=VALUE ...]

For a run of a gradient-based learner: the meta-gradient at its parameters, by
each estimator of the inner gradient (score, dice, lvc, and first order) and from
batches of several sizes. Prints, and writes into RUN/diagnoses, the cosine with
a reference from a large sample, the relative variance and the cost.

  episodes=[5,20,80]       batch sizes: episodes of a task before, and as many
                           after the inner step
  repeats=20               batches of each size
  tasks=20                 in how many tasks
  reference=5000           episodes of a task for the reference
  seed=1                   another draw of tasks and episodes
  env.KEY=VALUE            another setting of the family
  device=cpu               elsewhere than before
"""

_LIST = """\
usage: metarl list [algos|envs|memories] [--config-dir DIR]
       metarl list fields ID [plugins=[PACKAGE]]

What there is to train and to train on, with one line each; and what can vary
between the tasks of a gymnax environment, for the section `vary` of a family.

  --config-dir DIR         your own YAML files as well

examples: metarl list fields CartPole-v1
          metarl list fields my_package.my_env.MyEnv plugins=[my_package]
"""

_SHOW = """\
usage: metarl show env=NAME [KEY=VALUE ...] [--config-dir DIR] [-o DIR]

Draws a few tasks of a family with the trajectory of a random policy and, where
the family has one, of an oracle, who knows the task; and how the numbers that
make a task are distributed. Writes SVG and PNG.

  -o, --output DIR         where to; default: runs/show/<env>
  eval.split=ood           which tasks: train, test (the default) or ood
  eval.tasks=6             how many; default: 4
  eval.episodes=10         how long a trial; default: as the family has it
  eval.seed=1              another draw
  env.KEY=VALUE            a setting of the family
  --config-dir DIR         your own YAML files as well

example: metarl show env=cartpole eval.split=ood
"""

_TABLE = """\
usage: metarl table [NAME] [cells=A,B] [--format FORMAT] [--records DIR] [--config-dir DIR]

Prints a paper's table: published, ours, the best possible, the difference and a
verdict, with the commands that made ours. Without a name: which tables there are.
Ours are your own runs if there are any (runs/tables/NAME), else those that were
recorded with metarl.

  cells=n10k5,ucb1         rows, columns or single cells (n10k5.ucb1)
  --format FORMAT          text (the default), markdown, latex, csv or json
  --records DIR            other records than these
  --config-dir DIR         your own YAML files as well (DIR/table/mine.yaml)

example: metarl table rl2_bandits cells=rl2 --format markdown
"""

_REPRODUCE = """\
usage: metarl reproduce NAME [cells=A,B] [budget=BUDGET] [seeds=N] [--records DIR] [--config-dir DIR]

Trains and evaluates what is missing of a paper's table, each command in a process
of its own, and records every finished cell in runs/tables/NAME. Stop it whenever
you like: the same command goes on from there, and what is finished never runs
again.

  cells=n10k5,ucb1         rows, columns or single cells (n10k5.ucb1); default: all
  budget=cpu               smoke: does it run at all, seconds per cell; kept apart
                           cpu: for two cores, at most 20 minutes per seed
                           gpu: for one large GPU
                           full: the paper's own settings
  seeds=5                  of learners that are trained
  --records DIR            where the records go
  --config-dir DIR         your own YAML files as well

example: metarl reproduce wang_bandits cells=easy budget=cpu
"""

_REPORT = """\
usage: metarl report RUN|SWEEP|TABLE ... [-o FILE] [--config-dir DIR]

Writes one HTML page that needs nothing else: what was run, results and learning
curves, adaptation and regret of all learners over the same experience, who is
likely better, cost and provenance. A sweep is a directory of runs; a table brings
its verdicts and the runs behind them.

  -o, --output FILE        default: report.html
  --config-dir DIR         your own tables as well

example: metarl report runs/sweeps/2031-05-01_12-00-00 -o report.html
"""

_COMPLETION = """\
usage: metarl completion bash|zsh

Prints the completion script. For bash, add to ~/.bashrc:   eval "$(metarl completion bash)"
For zsh, add to ~/.zshrc after compinit:                    eval "$(metarl completion zsh)"
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command line and returns its exit code: 0, 2 for a mistake of the user's, 1 for one of ours."""
    try:
        code = _command(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except MetarlError as error:
        return _report(error)
    except BrokenPipeError:  # `metarl list | head -1`; the interpreter would complain once more when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return _report(MetarlError("interrupted"), 130)
    except Exception:
        import traceback

        traceback.print_exc()
        return _report(MetarlError("this is a bug in metarl. Please report it with the lines above and the command."), 1)


def _command(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_HELP, end="")
        return 0
    name, *words = argv
    if name == "--version":
        from importlib.metadata import version

        print(f"metarl {version('metarl')}")
        return 0
    if name == "_complete":
        from metarl_cli.completion import candidates

        for candidate in candidates(words, _COMMANDS):
            print(candidate)
        return 0
    if name.startswith("-"):
        known = ("--help", "--version")
        raise MetarlError(f"{name}: there is no such option before the command: --help, --version.{_nearest(name, known)}")
    if name not in _COMMANDS:
        hint = f" Did you mean `metarl train {name}`?" if "=" in name else _nearest(name, _COMMANDS)
        raise MetarlError(f"{name}: there is no such command. Commands: {', '.join(_COMMANDS)}.{hint}")
    return _COMMANDS[name](words)


def _train(words: list[str]) -> int:
    options, overrides = _options("train", words, {"--multirun": False, "--config-dir": True})
    config_dir = Path(options["--config-dir"]) if "--config-dir" in options else None
    if "--help" in options and not overrides:
        import textwrap

        from metarl_cli import catalogue

        known = catalogue.groups(config_dir)
        known["algo"] = catalogue.trained(known["algo"])
        choices = [
            textwrap.fill(f"  {group + '=':<25}{', '.join(files)}", 80, subsequent_indent=" " * 27)
            for group, files in known.items()
        ]
        print(_TRAIN.format(choices="\n".join(choices)), end="")
        return 0
    from metarl_cli import config

    if "--help" in options:
        _print_keys(config.compose(overrides, config_dir))
        return 0
    if "--multirun" in options:
        from metarl_cli import sweep

        return sweep.run(overrides, config_dir)
    if space := next((line for line in overrides if line.startswith("sweep=")), None):
        raise MetarlError(f"{space}: is a space to search: metarl train -m {space} ...")
    composed = config.compose(overrides, config_dir)
    from metarl_cli import runner

    runner.train(composed)
    return 0


def _eval(words: list[str]) -> int:
    options, words = _options("eval", words, {"--config-dir": True})
    if "--help" in options and not words:
        print(_EVAL, end="")
        return 0
    if not _without_run(words):
        if options:
            raise MetarlError(f"{', '.join(options)}: metarl eval RUN has no such option. metarl eval --help says more.")
        from metarl_cli import runner

        runner.evaluate(*_run_and_overrides("eval", words))
        return 0
    from metarl_cli import config

    composed = config.compose_eval(words, Path(options["--config-dir"]) if "--config-dir" in options else None)
    if "--help" in options:
        _print_keys(composed)
        return 0
    from metarl_cli import untrained

    untrained.evaluate(composed)
    return 0


def _without_run(words: list[str]) -> bool:
    """`metarl eval algo=... ...`: all words are overrides, and one of them chooses the learner."""
    return any(word.startswith("algo=") for word in words) and "=" in words[0] and not Path(words[0]).exists()


def _resume(words: list[str]) -> int:
    options, words = _options("resume", words, {})
    if "--help" in options:
        print(_RESUME, end="")
        return 0
    run, overrides = _run_and_overrides("resume", words)
    from metarl_cli import runner

    runner.resume(run, overrides)
    return 0


def _diagnose(words: list[str]) -> int:
    options, words = _options("diagnose", words, {})
    if "--help" in options:
        print(_DIAGNOSE, end="")
        return 0
    if words[:1] != ["estimators"]:
        given = words[0] if words else ""
        raise MetarlError(
            f"diagnose {given}".strip() + ": what? metarl diagnose estimators RUN." + _nearest(given, ["estimators"])
        )
    run, overrides = _run_and_overrides("diagnose estimators", words[1:])
    from metarl_cli import runner

    runner.diagnose(run, overrides)
    return 0


def _runs(words: list[str]) -> int:
    options, roots = _options("runs", words, {})
    if "--help" in options:
        print(_RUNS, end="")
        return 0
    if len(roots) > 1:
        raise MetarlError("runs: name one directory, or none for runs.")
    from metarl_cli import overview

    return overview.runs(Path(roots[0] if roots else "runs"))


def _compare(words: list[str]) -> int:
    options, paths = _options("compare", words, {})
    if "--help" in options:
        print(_COMPARE, end="")
        return 0
    if len(paths) < 2:
        raise MetarlError("compare: name two run directories or more. metarl runs lists what there is.")
    from metarl_cli import overview

    return overview.compare([Path(path) for path in paths])


def _list(words: list[str]) -> int:
    options, kinds = _options("list", words, {"--config-dir": True})
    if "--help" in options:
        print(_LIST, end="")
        return 0
    from metarl_cli import catalogue

    if kinds[:1] == ["fields"]:
        return _list_fields(kinds[1:])
    for kind in kinds:
        if kind not in catalogue.KINDS:
            lists = (*catalogue.KINDS, "fields")
            raise MetarlError(f"{kind}: there is no such list. Lists: {', '.join(lists)}.{_nearest(kind, lists)}")
    known = catalogue.groups(Path(options["--config-dir"]) if "--config-dir" in options else None)
    width = 2 + max(len(name) for group in catalogue.KINDS.values() for name in known.get(group, {}))
    for kind in kinds or catalogue.KINDS:
        group = catalogue.KINDS[kind]
        if len(kinds) != 1:
            print(f"{kind} ({group}=NAME)")
        for name, file in known.get(group, {}).items():
            print(f"{'' if len(kinds) == 1 else '  '}{name:<{width}}{catalogue.headline(file)}")
    return 0


def _list_fields(words: list[str]) -> int:
    """What can vary in a gymnax environment."""
    names = [word for word in words if "=" not in word]
    if len(names) != 1:
        raise MetarlError(
            "list fields: name one environment: gymnax's id, or the class of your own. metarl list fields CartPole-v1"
        )
    from metarl_cli import config
    from metarl_cli.envs import gymnax_family

    env = gymnax_family.make(config.environment(names[0], [word for word in words if "=" in word]))
    fields = gymnax_family.fields(env)
    width = max(len(field.name) for field in fields)
    print(f"{names[0]}: env.vary.FIELD={{uniform: [LOW, HIGH]}}")
    for field in fields:
        default = f"{field.default:.6g}" if isinstance(field.default, float) else str(field.default)
        print(f"  {field.name:<{width}}  {default:<10}  {'may vary' if field.varies else field.note}")
    return 0


def _show(words: list[str]) -> int:
    options, overrides = _options("show", words, {"--config-dir": True, "--output": True})
    if "--help" in options:
        print(_SHOW, end="")
        return 0
    if not any(word.startswith("env=") for word in overrides):
        raise MetarlError("show: which family? metarl show env=NAME; metarl list envs prints what there is.")
    from metarl_cli import config

    composed = config.compose(overrides, Path(options["--config-dir"]) if "--config-dir" in options else None)
    from metarl_cli import runner
    from metarl_cli.report.show import show

    runner.configure_jax(composed.config)
    folder = Path(options.get("--output", f"runs/show/{composed.env}")).expanduser()
    for file in show(composed.config, folder):
        print(file)
    return 0


def _table(words: list[str]) -> int:
    options, words = _options("table", words, {"--format": True, "--records": True, "--config-dir": True})
    if "--help" in options:
        print(_TABLE, end="")
        return 0
    names, given = _names_and_settings("table", words, ("cells",))
    config_dir = _path(options, "--config-dir")
    if not names:
        from metarl_cli import catalogue

        files = catalogue.tables(config_dir)
        for name, file in files.items():
            print(f"{name:<{2 + max(map(len, files))}}{catalogue.headline(file)}")
        return 0
    from metarl_cli.tables import table, view

    form = options.get("--format", "text")
    if form not in view.FORMATS:
        raise MetarlError(
            f"--format={form}: there is no such format: {', '.join(view.FORMATS)}.{_nearest(form, view.FORMATS)}"
        )
    for name in names:
        found = table.load(name, config_dir)
        chosen = table.select(found, _comma_separated(given.get("cells", "")))
        print(view.FORMATS[form](view.view(name, found, chosen, _path(options, "--records"))), end="")
    return 0


def _reproduce(words: list[str]) -> int:
    options, words = _options("reproduce", words, {"--records": True, "--config-dir": True})
    if "--help" in options:
        print(_REPRODUCE, end="")
        return 0
    names, given = _names_and_settings("reproduce", words, ("cells", "budget", "seeds"))
    if len(names) != 1:
        raise MetarlError("reproduce: name one table; metarl table prints which there are.")
    from metarl_cli.core.errors import ConfigError
    from metarl_cli.tables.reproduce import reproduce
    from metarl_cli.tables.table import BUDGETS

    budget, seeds = given.get("budget", "cpu"), given.get("seeds")
    if budget not in BUDGETS:
        raise ConfigError("budget", budget, "there is no such budget", allowed=BUDGETS)
    if seeds is not None and not (seeds.isascii() and seeds.isdigit() and int(seeds) > 0):
        raise ConfigError("seeds", seeds, "must be an integer >= 1")
    cells = _comma_separated(given.get("cells", ""))
    records, config_dir = _path(options, "--records"), _path(options, "--config-dir")
    reproduce(names[0], cells, budget, None if seeds is None else int(seeds), config_dir, records)
    return 0


def _report_page(words: list[str]) -> int:
    options, names = _options("report", words, {"--output": True, "--config-dir": True})
    if "--help" in options:
        print(_REPORT, end="")
        return 0
    if not names:
        raise MetarlError("report: of what? metarl report RUN ... -o report.html; a run, a directory of runs, or a table.")
    from metarl_cli.tables import pages

    output = Path(options.get("--output", "report.html")).expanduser()
    pages.write(names, output, _path(options, "--config-dir"))
    print(output)
    return 0


def _completion(words: list[str]) -> int:
    options, shells = _options("completion", words, {})
    if "--help" in options:
        print(_COMPLETION, end="")
        return 0
    from metarl_cli.completion import BASH, ZSH

    scripts = {"bash": BASH, "zsh": ZSH}
    if len(shells) != 1 or shells[0] not in scripts:
        raise MetarlError(f"completion {' '.join(shells)}".strip() + ": name one shell, bash or zsh.")
    print(scripts[shells[0]], end="")
    return 0


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "eval": _eval,
    "resume": _resume,
    "diagnose": _diagnose,
    "runs": _runs,
    "compare": _compare,
    "show": _show,
    "table": _table,
    "reproduce": _reproduce,
    "report": _report_page,
    "list": _list,
    "completion": _completion,
}


def _options(command: str, words: list[str], takes_value: dict[str, bool]) -> tuple[dict[str, str], list[str]]:
    """Splits options from the other words, in any order.

    Args:
        takes_value: the long names this command knows beside `--help`, and whether a value belongs to them.
    """
    takes_value = {**takes_value, "--help": False}
    found: dict[str, str] = {}
    others: list[str] = []
    remaining = iter(words)
    for word in remaining:
        if not word.startswith("-"):
            others.append(word)
            continue
        name, equals, value = word.partition("=")
        name = {"-h": "--help", "-m": "--multirun", "-o": "--output"}.get(name, name)
        if name not in takes_value:
            hint = _nearest(name, takes_value, cutoff=0.7)
            if not hint and name.startswith("--"):
                hint = f" Keys are set without dashes: {name[2:]}={value if equals else 'VALUE'}."
            raise MetarlError(f"{word}: metarl {command} has no such option: {', '.join(takes_value)}.{hint}")
        if takes_value[name] and not equals:
            value = next(remaining, "")
        if takes_value[name] != bool(value):
            raise MetarlError(f"{word}: this option takes {'a' if takes_value[name] else 'no'} value.")
        found[name] = value
    return found, others


def _names_and_settings(command: str, words: list[str], keys: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """Words without `=`, and the values of a few keys."""
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    for key in settings:
        if key not in keys:
            hint = _nearest(key, keys)
            raise MetarlError(
                f"{key}={settings[key]}: there is no such key. Those of metarl {command}: {', '.join(keys)}.{hint}"
            )
        if not settings[key]:
            raise MetarlError(f"{key}=: needs a value, or leave it out.")
    return [word for word in words if "=" not in word], settings


def _comma_separated(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _path(options: dict[str, str], name: str) -> Path | None:
    return Path(options[name]).expanduser() if name in options else None


def _run_and_overrides(command: str, words: list[str]) -> tuple[Path, list[str]]:
    if not words or ("=" in words[0] and not Path(words[0]).exists()):
        hint = f"{command}: which run? The run directory comes first: metarl {command} RUN [KEY=VALUE ...]."
        if command == "eval":
            hint += " A learner that has nothing to train needs none: metarl eval algo=NAME env=NAME."
        raise MetarlError(hint)
    return Path(words[0]), words[1:]


def _print_keys(composed: Composed) -> None:
    """Every key of a config as a table."""
    import shutil

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from metarl_cli import config

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title, style in (("key", "cyan"), ("default", ""), ("allowed", ""), ("what it is", "")):
        table.add_column(title, style=style, no_wrap=title == "key", overflow="fold")
    names = {"algo": f"algo={composed.algo}", "env": f"env={composed.env}"}
    section = ""
    for row in config.rows(composed):
        inside = row.key.rpartition(".")[0]
        if inside != section:
            section = inside
            table.add_row()
            if section in names:
                table.add_row(Text(names[section], style="bold"))
        allowed = row.allowed.replace("an integer", "integer").replace("a number", "number")
        allowed += f" ({row.unit})" if row.unit else ""
        table.add_row(*map(Text, (row.key, row.value, allowed, row.description)))
    Console(width=shutil.get_terminal_size((120, 24)).columns).print(table)
    print("\nWhat this command line sets stands in place of the default.")


def _nearest(word: str, options: Iterable[str], cutoff: float = 0.5) -> str:
    import difflib

    nearest = difflib.get_close_matches(word, list(options), n=1, cutoff=cutoff)
    return f" Did you mean {nearest[0]}?" if nearest else ""


def _report(error: MetarlError, code: int = 2) -> int:
    """Prints one paragraph for each line of the message and returns the exit code."""
    sys.stdout.flush()
    for line in str(error).splitlines():
        text = f"metarl: {line}"
        if sys.stderr.isatty():
            import shutil
            import textwrap

            width = shutil.get_terminal_size().columns
            text = textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
        print(text, file=sys.stderr)
    return getattr(error, "exit_code", code)
