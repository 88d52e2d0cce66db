"""The house: arrows only point down, one file per algorithm, memory and family, and what is quick to start stays so."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from metarl_cli import catalogue

PACKAGE = Path(catalogue.__file__).parent
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py" or path.parent == PACKAGE
}
CONFIGS = catalogue.groups()

# A module imports only what stands on a lower floor, and its own package.
FLOORS = {
    "core": 0,
    "catalogue": 1,
    "directory": 1,
    "config": 2,
    "training": 2,
    "evaluation": 2,
    "checkpoint": 2,
    "logs": 2,
    "completion": 3,
    "diagnosis": 3,
    "optimality": 3,
    "tracking": 3,
    "overview": 3,
    "report": 3,
    "runner": 4,
    "tables": 5,
    "untrained": 5,
    "search": 5,
    "sweep": 6,
    "launchers": 7,
    "cli": 7,
    "__main__": 8,
    "__init__": 8,
}
# These know core alone, and nobody knows them: what a user chooses is found by way of its YAML file.
PLUGINS = {"algos": "algo", "memories": "algo/memory", "envs": "env", "baselines": "algo"}
EXCEPTIONS = {
    ("optimality", "baselines"),  # the yardsticks of every evaluation: chance and the optimum
    ("cli", "envs.gymnax_family"),  # `metarl list fields` is about the one family that takes any environment
}


class Import(NamedTuple):
    name: str  # "numpy", "metarl_cli.core.types"
    line: int
    at_start: bool  # when the module is imported, and not only when a function is called


def imports(path: Path) -> Iterator[Import]:
    def visit(node: ast.AST, at_start: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, at_start) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}, line {node.lineno}: imports are absolute"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = inner.removeprefix("metarl_cli.") in FILES and inner.startswith("metarl_cli.")
                yield Import(inner if is_module else node.module, node.lineno, at_start)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, False)
            for child in node.orelse:
                yield from visit(child, at_start)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, at_start and not inside)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), True)


def ours(path: Path) -> Iterator[tuple[str, int]]:
    """What is imported of metarl_cli, without that prefix."""
    for item in imports(path):
        if item.name == "metarl_cli":
            yield "__init__", item.line
        elif item.name.startswith("metarl_cli."):
            yield item.name.removeprefix("metarl_cli."), item.line


def test_every_module_is_read() -> None:
    assert {"cli", "runner", "core.types", "algos.maml", "envs.point_nav", "memories.gru"} <= FILES.keys()
    found = set(ours(FILES["runner"]))
    assert {"config", "evaluation", "core.errors", "report.figures"} <= {name for name, _ in found}


@pytest.mark.parametrize("module", FILES)
def test_arrows_only_point_down(module: str) -> None:
    package = module.split(".")[0]
    wrong = []
    for name, line in ours(FILES[module]):
        target = name.split(".")[0]
        if (module, target) in EXCEPTIONS or (module, name) in EXCEPTIONS:
            continue
        if package in PLUGINS:
            allowed = target == "core" or (package == target == "baselines")  # classical learners are variations of few
        elif target in PLUGINS:
            allowed = False
        else:
            assert package in FLOORS and target in FLOORS, f"give {package} and {target} their floors in this file"
            allowed = FLOORS[target] < FLOORS[package] or (target == package and "." in module)
        if not allowed:
            wrong.append(f"{module}, line {line}: imports {name}")
    assert not wrong, "\n".join(wrong)


def test_only_networks_and_memories_know_flax() -> None:
    users = {module for module, path in FILES.items() if any(i.name.split(".")[0] == "flax" for i in imports(path))}
    assert "core.networks" in users
    assert all(module == "core.networks" or module.startswith("memories.") for module in users), users


@pytest.mark.parametrize(("package", "group"), PLUGINS.items())
def test_every_yaml_has_its_file_and_every_file_its_yaml(package: str, group: str) -> None:
    named = set()
    for name, file in CONFIGS[group].items():
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        target = content.get("_target_") or content.get(group, {}).get("_target_")
        if target is None:  # a variant: switches of another
            bases = [item for item in content["defaults"] if isinstance(item, str) and item != "_self_"]
            assert len(bases) == 1 and bases[0] in CONFIGS[group], name
            continue
        module, _, cls = target.removeprefix("metarl_cli.").rpartition(".")
        if group == "algo" and module.split(".")[0] in PLUGINS and module.split(".")[0] != package:
            continue  # a baseline among the algorithms, or the other way round
        assert module in FILES and module.startswith(f"{package}."), f"{name}.yaml: {target}"
        classes = [node.name for node in ast.parse(FILES[module].read_text()).body if isinstance(node, ast.ClassDef)]
        assert cls in classes, f"{name}.yaml: {module} defines no {cls}"
        named.add(module)
    files = {module for module in FILES if module.startswith(f"{package}.")}
    if package != "baselines":  # where some files are what others have in common
        assert files == named
    assert named


def test_help_imports_nothing_heavy() -> None:
    """What is loaded when metarl starts, file by file: nothing but Python itself."""
    seen: set[str] = set()
    waiting = ["cli", "__init__", "completion", "catalogue"]
    while waiting:
        module = waiting.pop()
        seen.add(module)
        for item in imports(FILES[module]):
            if not item.at_start:
                continue
            if item.name.split(".")[0] == "metarl_cli":
                name = item.name.removeprefix("metarl_cli.")
                waiting += [name] if name in FILES and name not in seen else []
            else:
                assert item.name.split(".")[0] in sys.stdlib_module_names, f"{module}, line {item.line}: {item.name}"
    assert "core.errors" in seen and "config" not in seen


def test_the_key_help_needs_no_jax() -> None:
    """`metarl train algo=maml --help` reads the classes of the settings: their base has no JAX, and no gymnax."""
    heavy = {"jax", "gymnax", "flax", "optax", "orbax", "matplotlib", "numpy"}
    for module in ("config", "core.settings", "core.errors"):
        found = {item.name.split(".")[0] for item in imports(FILES[module]) if item.at_start}
        assert not found & heavy, module


def test_gymnax_is_imported_where_tasks_are_made() -> None:
    """It takes seconds: not for listing, completing or describing."""
    users = {
        module
        for module, path in FILES.items()
        if any(item.at_start and item.name.split(".")[0] == "gymnax" for item in imports(path))
    }
    assert users
    assert all(module.split(".")[0] in ("envs", "core") for module in users), users


def test_nothing_of_ours_stands_in_the_code() -> None:
    """No absolute paths, least of all of where this checkout lies: the package finds its files relative to itself."""
    roots = [f"/{name}/" for name in ("home", "Users", "root", "tmp", Path(__file__).resolve().parts[1])]
    for path in [*FILES.values(), *(file for group in CONFIGS.values() for file in group.values())]:
        text = path.read_text(encoding="utf-8")
        assert not any(root in text for root in roots), path
