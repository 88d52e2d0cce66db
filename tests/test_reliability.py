"""What a run survives: kills, a full disk, too little memory, impatient users, and directories from anybody."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import (
    ROOT,
    assert_same_run,
    driver,
    environment,
    hasty_compiler,
    metarl,
    no_figures,
    own_configs,
    small,
    train,
    walker,
)

from metarl_cli import catalogue, checkpoint, config, directory, logs, optimality, overview, runner
from metarl_cli.core import footprint
from metarl_cli.core.errors import ConfigError, MetarlError, RunError

WALK = walker("iterations=12", "eval.every=4", "log_every=2")


@pytest.fixture(scope="module", autouse=True)
def hasty() -> Iterator[None]:
    with hasty_compiler(), pytest.MonkeyPatch.context() as patch:
        no_figures(patch)
        patch.setattr(optimality, "compare", lambda *_: {})
        yield


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("walked") / "run", WALK)


@pytest.fixture
def run(walked: Path, tmp_path: Path) -> Path:
    """A copy, to be tampered with."""
    return shutil.copytree(walked, tmp_path / "copy")


# --- kills, signals, disks


@pytest.mark.slow
def test_three_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`scripts/kill_test.py --kills 50` is the whole of it."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import kill_test

    assert len(list(kill_test.killed_runs(3, 0, tmp_path))) == 3


def test_a_run_that_was_killed_before_it_began(walked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its directory is one in which nothing has begun."""
    run = tmp_path / "run"
    words = [f"--config-dir={own_configs(tmp_path)}", *WALK, f"hydra.run.dir={run}"]
    killed = driver("import os\nos.replace = lambda *_: os.kill(os.getpid(), 9)", "train", *words)
    assert subprocess.run(killed, env=environment()).returncode == -signal.SIGKILL
    assert sorted(path.name for path in run.iterdir()) == [".config.yaml", ".lock", "log.txt"]
    assert metarl("resume", run) == 2
    assert f"metarl train ... hydra.run.dir={run}" in capsys.readouterr().err
    assert metarl("train", *words) == 0
    assert_same_run(run, walked)


LONG_PROGRAM = """
import jax
def compiling(self, text):
    if text == "compiling":
        print("long", flush=True)
        jax.jit(lambda: jax.lax.fori_loop(0, 2**31 - 1, lambda i, x: x * 1.0001, 1.0))().block_until_ready()
logs.Progress.status = compiling
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_running_program_at_once(signum: signal.Signals, tmp_path: Path) -> None:
    """Python's own handlers would wait for its end: minutes here."""
    words = [f"--config-dir={own_configs(tmp_path)}", *WALK, f"hydra.run.dir={tmp_path / 'run'}"]
    command = driver(LONG_PROGRAM, "train", *words)
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert "long\n" in process.stdout
        time.sleep(0.5)
        process.send_signal(signum)
        said = process.stderr.readline() + process.stderr.readline()
        assert "once more to end at once" in said
        sent = time.monotonic()
        process.send_signal(signum)
        assert process.wait(60) == 128 + signum
        assert time.monotonic() - sent < 1
    with checkpoint.RunLock(tmp_path / "run"):  # is free again
        pass


SLOWLY = """
runner.CHUNK_SECONDS, runner.SAVE_SECONDS = 0, -1
import time
write = logs.MetricsFile.write
logs.MetricsFile.write = lambda *row: (write(*row), time.sleep(0.5))
"""


def test_a_full_disk_keeps_the_last_checkpoint(walked: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount a file system: run as root")
    try:
        words = [f"--config-dir={own_configs(tmp_path)}", *WALK, f"hydra.run.dir={disk / 'run'}"]
        with subprocess.Popen(
            driver(SLOWLY, "train", *words), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            while checkpoint.latest(disk / "run", "last") is None and process.poll() is None:
                time.sleep(0.01)
            with contextlib.suppress(OSError), (disk / "others").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(100_000))
            with contextlib.suppress(OSError), (disk / "others2").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1))
            assert process.stderr is not None
            errors = process.stderr.read()
        assert process.returncode == 2, errors
        assert "No space left on device" in errors and "Traceback" not in errors, errors
        done = checkpoint.latest(disk / "run", "last")
        assert done and done < 12
        for name in ("others", "others2"):
            (disk / name).unlink()
        assert metarl("resume", disk / "run") == 0
        assert_same_run(disk / "run", walked)
    finally:
        subprocess.run(["umount", disk], check=True)


# --- memory


def test_the_footprint_of_a_program() -> None:
    """By hand, in float32: a matrix of n x n has 4 n^2 bytes."""
    import jax
    import jax.numpy as jnp

    n, steps = 10, 7
    matrix = jax.ShapeDtypeStruct((n, n), jnp.float32)
    one = 4 * n * n

    def needs(program: Callable[..., object]) -> int:
        return footprint.footprint(jax.jit(program).trace(matrix).jaxpr)

    def step(x: jax.Array, _: object) -> tuple[jax.Array, jax.Array]:
        y = jnp.tanh(x @ x)
        return y @ x, y

    assert needs(lambda x: jnp.tanh(x) * jnp.exp(x) + 1) == 2 * one  # fused: what comes in and what goes out
    assert needs(lambda x: x @ x @ x @ x) == 3 * one  # the input is needed to the end; of each product only its successor
    assert needs(lambda x: jnp.sin(x @ x) @ jnp.cos(x @ x + 1)) == 3 * one  # both products, and theirs
    assert needs(jax.jit(lambda x: (x @ x).sum())) == 2 * one  # through a call; the sum comes when the input is gone
    # The state is written over, the outputs are stacked; inside a step the first product waits for the second.
    assert needs(lambda x: jax.lax.scan(step, x, length=steps)) == one + steps * one + one
    assert needs(lambda x: jax.lax.scan(step, x, length=steps)[0]) == one + one  # nobody needs the stack
    assert needs(lambda x: jax.lax.fori_loop(0, steps, lambda _, y: step(y, 0)[0], x)) == one + one


def test_what_cannot_fit_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither compiled nor begun; the system would end something at random."""
    monkeypatch.setattr(runner.Session, "compile", lambda _: pytest.fail("compiled"))
    lines = small("rl2", "bandit", "algo.meta_batch=500000000", "seeds=1", "iterations=1")
    # An action, a reward and a log-probability of 4 bytes in each of 4 steps.
    too_big(lines, tmp_path / "many", "A meta-iteration", 24, "algo.meta_batch=500000000", "algo.minibatches=2")
    too_big(
        small("rl2", "bandit", "algo.memory.features=500000"), tmp_path / "wide", "A meta-iteration", 4 * 3 * 0.5**2 * 1000
    )
    too_big(small("rl2", "bandit", "eval.tasks=20000000000"), tmp_path / "long", "The evaluation", 4 * 5 * 20, "eval.tasks")


def too_big(lines: list[str], run: Path, what: str, least: float, *named: str) -> None:
    """
    Args:
        least: GB that must be found to be needed.
    """
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert metarl("train", *lines, f"hydra.run.dir={run}") == 2
    message = said.getvalue()
    needed, free = map(float, re.findall(r"([\d.]+) GB", message))
    assert needed > free > 0 and needed > least and message.startswith(f"metarl: {what} needs")
    assert all(name in message for name in named) and len(message.splitlines()) == 1
    assert directory.empty(run), "smaller settings could not be tried there"


def test_what_only_the_compiled_program_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(footprint, "footprint", lambda _: 0)
    monkeypatch.setattr(footprint, "free", lambda _: 1000)
    assert (
        metarl("train", f"--config-dir={own_configs(tmp_path)}", *WALK, "eval.tasks=1", f"hydra.run.dir={tmp_path / 'run'}")
        == 2
    )
    assert "A meta-iteration needs" in capsys.readouterr().err


def test_the_device_runs_out_of_memory_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import jax

    def full(*_: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12884901888 bytes.")

    monkeypatch.setattr(runner.Point, "finish", full)
    assert metarl("train", f"--config-dir={own_configs(tmp_path)}", *WALK, f"hydra.run.dir={tmp_path / 'run'}") == 2
    message = capsys.readouterr().err
    assert "not enough memory on the device" in message and "seeds=3" in message and len(message.splitlines()) == 1


# --- directories from anybody


def refused(run: Path, fragment: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command, words in (("resume", ["iterations=20"]), ("eval", [])):
        capsys.readouterr()
        assert metarl(command, run, *words) == 2
        message = capsys.readouterr().err
        assert fragment in message and len(message.splitlines()) == 1, message


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "evaluations", "log.txt", ".lock", "figures/x.svg"])
def test_a_link_out_of_the_directory(name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through it, a run would write elsewhere."""
    outside, link = tmp_path / "mine", run / name
    outside.write_text("mine")
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(os.path.relpath(outside, link.parent))
    refused(run, f"{link}: is a link that leads out of the run directory", capsys)
    assert outside.read_text() == "mine"


def test_a_pipe_in_the_place_of_a_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would never be read to its end."""
    (run / "result.json").unlink()
    os.mkfifo(run / "result.json")
    refused(run, "result.json: is neither a file nor a directory", capsys)


@pytest.mark.parametrize("name", ["config.yaml", "overrides.yaml", "result.json", "checkpoints/last/12/manifest.json"])
def test_a_giant_file(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (run / name).open("ab") as file:
        file.truncate(10**12)
    refused(run, f"{name}: has 1,000,000 MB", capsys)


def test_aliases_that_unfold_into_gigabytes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bomb = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]
    (run / "config.yaml").write_text("\n".join(bomb))
    refused(run, "config.yaml: cannot be read: aliases are not allowed", capsys)


def test_classes_of_the_run_directory_itself(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though the run names its package among the plug-ins that it was made with, and the package could be found."""
    package = run.parent / "copy" / "evil.py"
    package.write_text("raise SystemExit('executed')")
    monkeypatch.syspath_prepend(run)
    monkeypatch.syspath_prepend(run.parent)
    stored = yaml.safe_load((run / "config.yaml").read_text())
    for module in ("evil", "copy.evil"):
        if module == "copy.evil":
            continue  # the standard library's `copy` comes first
        stored["algo"]["_target_"], stored["plugins"] = f"{module}.Settings", [module.split(".")[0]]
        (run / "config.yaml").write_text(yaml.safe_dump(stored))
        refused(run, f"{module}.Settings lies in the run directory itself", capsys)


def manifest(run: Path) -> tuple[Path, dict]:
    path = run / "checkpoints" / "last" / "12" / "manifest.json"
    return path, json.loads(path.read_text())


def forge(path: Path, content: dict) -> None:
    """With a checksum that is right."""
    path.write_text(json.dumps(checkpoint._signed(content)))


def test_a_manifest_that_names_files_elsewhere(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, content = manifest(run)
    for name in ("../../../../../../../../etc/passwd", "/etc/passwd"):
        forge(path, content | {"files": {name: "0"}})
        refused(run, f"{name} is no file of this checkpoint", capsys)


def test_a_checkpoint_larger_than_its_state(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is not even read."""
    path, content = manifest(run)
    with (path.parent / "arrays" / "more").open("wb") as file:
        file.truncate(10**13)
    forge(path, content | {"files": content["files"] | {"arrays/more": "0"}})
    refused(run, "larger than the state it has to hold", capsys)


def test_an_array_of_another_shape_than_the_manifest_says(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, content = manifest(run)
    other = path.parent.parent / "13"
    with checkpoint._quiet_orbax() as ocp, contextlib.closing(ocp.PyTreeCheckpointHandler(use_zarr3=True)) as handler:
        import numpy as np

        shutil.rmtree(path.parent / "arrays")
        handler.save(
            (path.parent / "arrays").absolute(), args=ocp.args.PyTreeSave({x: np.zeros(9) for x in content["leaves"]})
        )
        handler.finalize((path.parent / "arrays").absolute())
    files = {str(x.relative_to(path.parent)): checkpoint._sha256(x) for x in checkpoint._files(path.parent / "arrays")}
    forge(path, content | {"files": files})
    assert not other.exists()
    refused(run, "is damaged: its content is not what was saved", capsys)


def test_no_pickle_is_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by us nor by orbax: `eval` and `resume` work where nothing can be unpickled."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was loaded")

    def reading(*_: object, **__: object) -> None:
        if sys._getframe(1).f_code.co_filename.startswith(("metarl_cli", "orbax")):
            refuse()

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "Unpickler", reading)
    assert metarl("eval", run) == 0
    assert metarl("resume", run, "iterations=13") == 0
    for path in Path(config.__file__).parent.rglob("*.py"):
        text = path.read_text()
        assert "import pickle" not in text and "allow_pickle" not in text, path


# --- anything at all

GROUPS = catalogue.groups()
KEYS = [key for key in catalogue.defaults({}) if key not in ("plugins",)]
WORDS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["null", "true", "-1", "0", "1e400", "nan", "[1,2", "{a:1}", "${seed}", "${oc.env:HOME}", "???", "1,2"]),
    st.sampled_from([name for group in GROUPS.values() for name in group]),
)
OVERRIDES = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.builds("{}={}".format, st.sampled_from([*KEYS, *GROUPS, "hydra.run.dir", "hydra.launcher", "plugins"]), WORDS),
        st.builds("{}{}={}".format, st.sampled_from(["+", "++", "~", ""]), st.text(max_size=8), WORDS),
    ),
    min_size=1,
    max_size=3,
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
FILES = ("config.yaml", "overrides.yaml", "result.json", "metrics.jsonl", "checkpoints/last/12/manifest.json")


def fuzz(n: int):
    return settings(
        max_examples=n,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def compose(lines: list[str]) -> None:
    with contextlib.suppress(MetarlError):
        config.compose(lines)


def read_everything(run: Path) -> None:
    """All that reads a run directory before anything is computed."""
    for reader in (
        lambda: config.from_run(run, [], ()),
        lambda: directory.read_result(run),
        lambda: logs.MetricsFile(run).read(),
        lambda: overview._read(run),
        lambda: checkpoint._read_manifest(run / FILES[-1]),
    ):
        with contextlib.suppress(RunError, ConfigError):
            reader()


def mutated(data: st.DataObject, name: str, original: bytes) -> bytes:
    """Of a file: bytes changed, cut or put in; or a value of it replaced."""
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(original)))
        return original[:start] + data.draw(st.binary(max_size=8)) + original[start + data.draw(st.integers(0, 8)) :]
    lines = original.decode().splitlines() if name.endswith("l") and "json" in name else [original.decode()]
    content = yaml.safe_load(lines[-1]) if name.endswith(".yaml") else json.loads(lines[-1])
    if isinstance(content, dict):
        content[data.draw(st.sampled_from(sorted(content)))] = data.draw(VALUES)
    else:
        content = data.draw(VALUES)
    if name.endswith("manifest.json"):
        content = checkpoint._signed(content)
    lines[-1] = yaml.safe_dump(content) if name.endswith(".yaml") else json.dumps(content)
    return "\n".join(lines).encode(errors="surrogatepass")


def loader(walked: Path, tmp_path: Path, data: st.DataObject) -> None:
    run = tmp_path / "fuzzed"
    if not run.exists():
        shutil.copytree(walked, run)
    name = data.draw(st.sampled_from(FILES))
    (run / name).write_bytes(mutated(data, name, (walked / name).read_bytes()))
    try:
        read_everything(run)
    finally:
        shutil.copyfile(walked / name, run / name)


@fuzz(40)
@given(OVERRIDES)
def test_any_command_line_is_a_config_or_a_message(lines: list[str]) -> None:
    compose(lines)


@fuzz(100)
@given(st.data())
def test_any_run_directory_is_a_run_or_a_message(walked: Path, tmp_path: Path, data: st.DataObject) -> None:
    loader(walked, tmp_path, data)


@pytest.mark.slow
@fuzz(500)
@given(OVERRIDES)
def test_500_command_lines(lines: list[str]) -> None:
    compose(lines)


@pytest.mark.slow
@fuzz(1500)
@given(st.data())
def test_1500_run_directories(walked: Path, tmp_path: Path, data: st.DataObject) -> None:
    loader(walked, tmp_path, data)
