"""What config files there are, read as plain text: help, `metarl list` and completion need neither Hydra nor JAX."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from metarl_cli.core.errors import ConfigError, MetarlError

Groups = dict[str, dict[str, Path]]  # {"algo": {"maml": .../algo/maml.yaml}, "algo/memory": ...}

KINDS = {
    "algos": "algo",
    "envs": "env",
    "memories": "algo/memory",
    "experiments": "experiment",
}  # what `metarl list` calls the groups
_NOUNS = {
    "algo": "algorithm",
    "env": "task family",
    "algo/memory": "memory model",
    "experiment": "experiment",
    "sweep": "search space",
}


def noun(group: str) -> str:
    """What a file of this group is, for messages."""
    return _NOUNS.get(group, f"file in {group}/")


def configs() -> Path:
    """The configs that come with metarl: inside the installed package, else beside it."""
    package = Path(__file__).parent
    for path in (package / "configs", package.parent / "configs"):
        if (path / "train.yaml").is_file():
            return path
    raise MetarlError(f"{package / 'configs'}: the config files of metarl are missing. Install metarl again.")


def groups(config_dir: Path | None = None) -> Groups:
    """Every config file by group and name; those of the user's own directory are added to ours.

    Raises:
        ConfigError: where the directory does not exist or a file of ours would hide one of the user's.
    """
    found: Groups = {}
    for root in filter(None, (configs(), config_dir)):
        if not root.is_dir():
            raise ConfigError("--config-dir", root, "is not a directory")
        for file in sorted(root.rglob("*.yaml")):
            folder = file.parent.relative_to(root).as_posix()
            if folder.startswith("hydra/"):  # Hydra's own groups, which it looks up itself
                continue
            group = found.setdefault(folder, {})
            if file.stem in group:
                raise ConfigError("--config-dir", file, "metarl has a config of that name", hint="Rename the file.")
            group[file.stem] = file
    del found["."]  # the commands' own files
    found.pop("table", None)  # no part of a run's config
    return {group: found[group] for group in sorted(found)}


def tables(config_dir: Path | None = None) -> dict[str, Path]:
    """The paper tables by name; those of the user's own directory are added to ours."""
    roots = [root for root in (configs(), config_dir) if root is not None]
    return {file.stem: file for root in roots for file in sorted((root / "table").glob("*.yaml"))}


def trained(algos: dict[str, Path]) -> dict[str, Path]:
    """Of the algorithms those that are trained: all but our classical learners."""
    return {name: file for name, file in algos.items() if "metarl_cli.baselines." not in file.read_text(encoding="utf-8")}


def fitting(command: str, known: Groups) -> Groups:
    """The files that a command can use: `train` the algorithms that are trained, `eval` without a run the others."""
    trains = trained(known["algo"])
    algos = trains if command == "train" else {name: file for name, file in known["algo"].items() if name not in trains}
    return known | {"algo": algos}


def headline(file: Path) -> str:
    """The first comment line that is no directive such as `# @package _global_`."""
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        text = line.removeprefix("#").strip()
        if text and not text.startswith("@"):
            return text if line.startswith("#") else ""
    return ""


def defaults(chosen: dict[str, str], config_dir: Path | None = None, command: str = "train") -> dict[str, Any]:
    """The dotted keys that a run may set, with the values that stand in the files.

    Args:
        chosen: group to name, e.g. `{"algo": "rl2"}`, where it differs from the default.
        command: `train`, or `eval` without a run.
    """
    known = groups(config_dir)
    if (file := known.get("experiment", {}).get(chosen.get("experiment", ""))) is not None:
        chosen = overridden(file) | chosen
    return dict(keys(configs() / f"{command}.yaml", "", chosen, known))


def overridden(experiment: Path) -> dict[str, str]:
    """What an experiment chooses in other groups, `{"algo": "rl2"}`: lines such as `override /algo: rl2` of its defaults."""
    import yaml

    below = (yaml.safe_load(experiment.read_text(encoding="utf-8")) or {}).get("defaults", [])
    items = [pair for item in below if isinstance(item, dict) for pair in item.items()]
    return {
        name.removeprefix("override ").strip(" /").split("@")[0]: str(choice)
        for name, choice in items
        if name.startswith("override ")
    }


def keys(file: Path, group: str, chosen: dict[str, str], known: Groups) -> Iterator[tuple[str, Any]]:
    """The dotted keys and values that a file and its defaults list set. `group` is where it stands, e.g. `algo`."""
    import yaml

    text = file.read_text(encoding="utf-8")
    values = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}
    package = re.match(r"(?:\s*\n)*#\s*@package\s+(\S+)", text)
    prefix = group.replace("/", ".") if package is None else package[1].replace("_global_", "")
    below = values.pop("defaults", [])
    values.pop("hydra", None)
    for item in below:
        if isinstance(item, str) and item in known.get(group, {}):  # of the same group: what this file starts from
            yield from keys(known[group][item], group, chosen, known)
    yield from leaves(values, prefix)
    for item in below:
        for name, choice in item.items() if isinstance(item, dict) else ():
            if name.startswith("override /"):
                continue  # it adds nothing here: see `overridden`
            path = (PurePosixPath("/") / group / name.removeprefix("override ").split("@")[0].strip()).as_posix()[1:]
            below_file = known.get(path, {}).get(chosen.get(path, str(choice)))
            if below_file is not None:
                yield from keys(below_file, path, chosen, known)


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted keys, without the `_target_`s."""
    if not isinstance(value, dict):
        yield key, value
        return
    for name, item in value.items():
        if name != "_target_":
            yield from leaves(item, f"{key}.{name}" if key else str(name))
