"""Shell completion. The scripts ask `metarl _complete WORDS...`, which reads file names and YAML only."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from metarl_cli import catalogue
from metarl_cli.core.errors import MetarlError

# A candidate that is complete ends with a space; one that ends with `=`, `.` or `/` is to be continued.
BASH = r"""# metarl completion for bash: add this line to ~/.bashrc
#     eval "$(metarl completion bash)"
_metarl() {
    local line=${COMP_LINE:0:COMP_POINT} word words IFS=$' \t\n'
    read -r -a words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    word=${words[${#words[@]} - 1]}
    IFS=$'\n'
    COMPREPLY=($("$1" _complete "${words[@]:1}" 2> /dev/null))
    # Bash takes a word to begin anew after `=`, so what stands before must not be repeated.
    [[ $word == *=* && $COMP_WORDBREAKS == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*=}"}"}")
}
complete -o nospace -F _metarl metarl
"""

ZSH = r"""#compdef metarl
# metarl completion for zsh: add this line to ~/.zshrc, after compinit
#     eval "$(metarl completion zsh)"
_metarl() {
    local -a found
    found=("${(@f)$("${words[1]}" _complete "${(@Q)words[2,CURRENT]}" 2> /dev/null)}")
    found=(${found:#})
    compadd -Q -S ' ' -- ${${(M)found:#* }% }
    compadd -Q -S '' -- ${found:#* }
}
if [[ $funcstack[1] == _metarl ]]; then _metarl "$@"; else compdef _metarl metarl; fi
"""


def candidates(words: list[str], commands: Iterable[str]) -> list[str]:
    """What the last of the words may become; the words follow `metarl` on the command line."""
    *before, word = words or [""]
    if not before:
        found = [f"{name} " for name in (*commands, "--help", "--version")]
    elif before[0] in ("train", "show") or (before[0] == "eval" and _overrides_only(before[1:], word)):
        found = _train(before, word)
    elif before[0] in ("table", "reproduce", "report"):
        found = _table(before[0], before[1:], word)
    elif before[0] in ("eval", "resume", "compare") or (before[0] == "runs" and len(before) == 1):
        found = _run(before, word)
    else:
        rest = {"list": (*catalogue.KINDS, "fields"), "completion": ("bash", "zsh")}.get(before[0], ())
        found = [f"{name} " for name in rest] if len(before) == 1 else []
    return sorted({name for name in found if name.startswith(word)})


def _overrides_only(before: list[str], word: str) -> bool:
    """Whether `metarl eval ...` is without a run, or about to be."""
    first = (*before, word)[0]
    return first.startswith("-") or "=" in first or (not before and word != "" and "algo=".startswith(word))


def _train(before: list[str], word: str) -> list[str]:
    """`metarl train ...`, `metarl show ...` and `metarl eval algo=...`."""
    command, *before = before
    if before and before[-1] in ("--config-dir", "--output", "-o"):
        return _directories(word)
    try:
        own = Path(before[before.index("--config-dir") + 1]) if "--config-dir" in before else None
        known = catalogue.groups(own)
    except (IndexError, MetarlError):
        own, known = None, catalogue.groups()
    trained = catalogue.trained(known["algo"])
    known["algo"] = {name: file for name, file in known["algo"].items() if (name in trained) != (command == "eval")}
    if command == "eval":
        known = {"algo": known["algo"], "env": known["env"]}
    group, equals, _ = word.partition("=")
    if equals:
        return [f"{group}={name} " for name in known.get(group, ())]
    if word.startswith("-"):
        return ["--help ", "--config-dir ", {"train": "--multirun ", "show": "--output ", "eval": ""}[command]]
    chosen = dict(other.split("=", 1) for other in before if "=" in other)
    keys = [*catalogue.defaults(chosen, own, "eval" if command == "eval" else "train"), "hydra.run.dir"]
    if command == "show":
        known = {"env": known["env"]}
        keys = [key for key in keys if key.split(".")[0] in ("env", "eval", "device", "plugins")]
    return [f"{name}=" for name in known] + _steps(keys, word)


def _table(command: str, before: list[str], word: str) -> list[str]:
    """`metarl table ...`, `metarl reproduce ...` and `metarl report ...`."""
    if before and before[-1] in ("--config-dir", "--records"):
        return _directories(word)
    names = [f"{name} " for name in catalogue.tables()]
    if command == "report":
        return [*names, *_directories(word or ("runs/" if Path("runs").is_dir() else ""))]
    if before and before[-1] == "--format":
        return ["text ", "markdown ", "latex ", "csv ", "json "]
    if word.startswith("-"):
        return ["--help ", "--config-dir ", "--records ", *(["--format "] if command == "table" else [])]
    if command == "reproduce" and word.startswith("budget="):
        return [f"budget={name} " for name in ("smoke", "cpu", "gpu", "full")]
    keys = ["cells=", *(["budget=", "seeds="] if command == "reproduce" else [])]
    return keys if before else names


def _run(before: list[str], word: str) -> list[str]:
    """`metarl eval RUN ...`, `metarl resume RUN ...`, `metarl compare RUN RUN ...` and `metarl runs DIR`."""
    if len(before) == 1 or before[0] == "compare":
        return _directories(word or ("runs/" if Path("runs").is_dir() else ""))
    import yaml

    sections = {"eval": ("eval", "env", "device"), "resume": ("iterations", "device", "devices", "logger")}[before[0]]
    try:
        config = yaml.safe_load((Path(before[1]) / "config.yaml").read_text(encoding="utf-8"))
        keys = [key for key, _ in catalogue.leaves({name: config[name] for name in sections})]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return []
    return _steps(keys, word)


def _steps(keys: list[str], word: str) -> list[str]:
    """The keys, each as far as the next dot after what has been typed."""
    found = []
    for key in keys:
        section, dot, _ = key[len(word) :].partition(".")
        found.append(f"{word}{section}." if dot else f"{key}=")
    return [name for name, key in zip(found, keys, strict=True) if key.startswith(word)]


def _directories(word: str) -> list[str]:
    """Directories that continue a path; one that holds a run is complete."""
    head = word[: word.rfind("/") + 1]
    parent = Path(head or ".").expanduser()
    if not parent.is_dir():
        return []
    inside = [path for path in parent.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return [f"{head}{path.name}{' ' if (path / 'config.yaml').is_file() else '/'}" for path in inside]
