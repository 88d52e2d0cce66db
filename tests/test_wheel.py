"""The wheel, installed elsewhere, runs: nothing of it is taken from the checkout."""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from running import ROOT, small

pytestmark = pytest.mark.slow


def command(*words: str | Path, cwd: Path, **variables: str) -> str:
    """Its output. It has to succeed, and sees neither this environment's path nor its own user's packages."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "PIP_"))}
    process = subprocess.run(
        list(map(str, words)), cwd=cwd, env=kept | variables, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dist")
    command(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", directory, cwd=ROOT)
    (wheel,) = directory.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a fresh environment in `env`, within a git repository of somebody else. No network is used."""
    directory = tmp_path_factory.mktemp("somebody else's")
    command("git", "init", "-q", cwd=directory)
    command("git", "-c", "user.name=a", "-c", "user.email=b", "commit", "-q", "--allow-empty", "-m", "c", cwd=directory)
    environment = directory / "env"
    command(sys.executable, "-m", "venv", environment, cwd=directory)
    pip = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--disable-pip-version-check"]
    command(environment / "bin" / "python", *pip, wheel, cwd=directory)
    # The libraries are those of this environment. A path file is read, but not those that stand there: the checkout, which
    # is installed by one of them, is out of sight.
    ours = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text("\n".join(sorted(ours)) + "\n")
    return directory


def test_what_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, target in (("metarl_cli", "metarl_cli"), ("configs", "metarl_cli/configs")):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert len(files) > 10
        inside = {f"{target}/{path.relative_to(ROOT / folder).as_posix()}" for path in files}
        assert {name.replace("metarl_cli/launchers/hydra_plugins/", "hydra_plugins/") for name in inside} <= names
    assert "hydra_plugins/metarl/vmap_launcher.py" in names and "hydra_plugins/__init__.py" not in names, (
        "others have plug-ins in it as well"
    )
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "scripts", "configs")) or "__pycache__" in name]


def test_the_wheel_runs_elsewhere(elsewhere: Path) -> None:
    python, metarl = elsewhere / "env" / "bin" / "python", elsewhere / "env" / "bin" / "metarl"
    where = "import metarl_cli.catalogue as c; print(c.__file__); print(c.configs())"
    file, configs = map(Path, command(python, "-c", where, cwd=elsewhere).splitlines())
    assert file.is_relative_to(elsewhere / "env") and configs == file.parent / "configs"

    assert "maml" in command(metarl, "list", cwd=elsewhere)
    lines = small("rl2", "bandit", "seeds=1")
    output = command(metarl, "train", *lines, "hydra.run.dir=run", cwd=elsewhere, JAX_DISABLE_MOST_OPTIMIZATIONS="True")
    assert output.rstrip().endswith("run")
    result = json.loads((elsewhere / "run" / "result.json").read_text())
    assert result["status"] == "completed"
    assert result["git_revision"] is None, "that of somebody else's repository"
    assert len(list((elsewhere / "run" / "figures").iterdir())) == 6
