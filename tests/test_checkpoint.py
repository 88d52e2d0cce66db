"""Checkpoints are exact and survive kills; damage and misfits are named; a run has one writer."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metarl_cli import checkpoint
from metarl_cli.core.errors import RunError


class TrainState(NamedTuple):
    params: Any
    optimiser: Any
    extra: Any


def make_state(seeds: int = 5) -> TrainState:
    params = {"dense_0": {"kernel": jnp.linspace(-1, 1, seeds * 12).reshape(seeds, 3, 4), "bias": jnp.zeros(4)}}
    extra = {
        "keys": jax.random.split(jax.random.key(3), seeds),
        "other key": jax.random.key(4, impl="rbg"),
        "no keys": jax.random.split(jax.random.key(3), 0),
        "frozen": jnp.arange(seeds) % 2 == 0,
        "iteration": jnp.int32(7),
        "steps": jnp.uint32(2**32 - 1),
        "bfloat16": jnp.array([1.5, -0.0, jnp.inf], jnp.bfloat16),
        "float16": jnp.array([65504.0], jnp.float16),
        "odd": jnp.array([jnp.nan, -0.0, -jnp.inf, 1e-45], jnp.float32),
        "empty": jnp.zeros((0, 4)),
        "nothing": None,
        "numpy": np.array([1.0, 1e-300], np.float64),
        "number": np.float64(0.1),
        "best": -16.925,
        "count": 2**40,
        "done": True,
    }
    return TrainState(params, optax.adam(1e-3).init(params), extra)


def assert_identical(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert isinstance(x, jax.Array) == isinstance(y, jax.Array)
        if hasattr(x, "dtype"):
            assert x.dtype == y.dtype and x.shape == y.shape
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                x, y = jax.random.key_data(x), jax.random.key_data(y)
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
        else:
            assert type(x) is type(y) and x == y


# --- exactness


def test_restores_every_bit(tmp_path: Path):
    state = make_state()
    checkpoint.save(tmp_path, "last", 7, state)
    iteration, restored = checkpoint.restore(tmp_path, "last", state)
    assert iteration == 7
    assert_identical(restored, state)
    # Keys of different implementations go on as they would have.
    for name in ("keys", "other key"):
        key, same = state.extra[name], restored.extra[name]
        bits = jax.random.bits if key.ndim == 0 else jax.vmap(jax.random.bits)
        np.testing.assert_array_equal(bits(key), bits(same))


def test_restores_into_an_abstract_state(tmp_path: Path):
    state = {"w": jnp.ones((2, 3)), "key": jax.random.key(0), "none": jnp.zeros((0,), jnp.int32)}
    checkpoint.save(tmp_path, "best", 1, state)
    _, restored = checkpoint.restore(tmp_path, "best", jax.eval_shape(lambda: state))
    assert_identical(restored, state)
    assert restored["w"].devices() == {jax.devices()[0]}


def test_restores_float64(tmp_path: Path):
    with jax.enable_x64(True):
        state = {"w": jnp.array([0.1, 1e-300]), "n": jnp.int64(2**40)}
        checkpoint.save(tmp_path, "last", 1, state)
        _, restored = checkpoint.restore(tmp_path, "last", state)
        assert restored["w"].dtype == jnp.float64
        assert_identical(restored, state)
        narrow = {"w": jnp.array([0.1, 0.2], jnp.float32), "n": jnp.int64(0)}
    with pytest.raises(RunError, match=r"`w`: float64\[2\] in the checkpoint, float32\[2\] in this configuration"):
        checkpoint.restore(tmp_path, "last", narrow)


OTHER_DEVICE = """
import sys
from pathlib import Path
import jax
import jax.numpy as jnp
from metarl_cli import checkpoint
first, second = jax.devices()
state = jax.device_put({"w": jnp.arange(3.0), "key": jax.random.key(0)}, second)
checkpoint.save(Path(sys.argv[1]), "last", 1, state)
_, there = checkpoint.restore(Path(sys.argv[1]), "last", state)
with jax.default_device(second):
    _, here = checkpoint.restore(Path(sys.argv[1]), "last", state)
assert all(x.devices() == {first} for x in jax.tree.leaves(there)), there
assert all(x.devices() == {second} for x in jax.tree.leaves(here)), here
assert (there["w"] == jnp.arange(3.0)).all()
"""


def test_restores_onto_the_default_device(tmp_path: Path):
    """Wherever it was saved; two CPU devices stand for a CPU and a GPU."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", OTHER_DEVICE, tmp_path], env=environment, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr.decode()


def test_restored_state_can_be_donated(tmp_path: Path):
    """It must not share memory with anything: a donated buffer is overwritten."""
    checkpoint.save(tmp_path, "last", 1, {"w": jnp.zeros(1000)})
    _, state = checkpoint.restore(tmp_path, "last", {"w": jnp.zeros(1000)})
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    for _ in range(3):
        state = step(state)
    np.testing.assert_array_equal(state["w"], 3.0)


def test_restores_in_a_notebook(tmp_path: Path):
    """There an event loop is running already, and orbax is asynchronous inside."""
    import asyncio

    checkpoint.save(tmp_path, "last", 1, {"w": jnp.ones(3)})

    async def cell():
        return checkpoint.restore(tmp_path, "last", {"w": jnp.zeros(3)})

    iteration, state = asyncio.run(cell())
    assert iteration == 1 and state["w"].sum() == 3


def test_orbax_alone_can_read_it(tmp_path: Path):
    import orbax.checkpoint as ocp

    checkpoint.save(tmp_path, "last", 1, make_state())
    arrays = ocp.PyTreeCheckpointer().restore(tmp_path / "checkpoints/last/1/arrays")
    np.testing.assert_array_equal(arrays["params.dense_0.kernel"], make_state().params["dense_0"]["kernel"])


def test_two_leaves_of_one_name_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"two leaves .* a\.b"):
        checkpoint.save(tmp_path, "last", 1, {"a.b": jnp.ones(1), "a": {"b": jnp.zeros(1)}})


def test_quick_and_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    state = make_state()
    checkpoint.save(tmp_path, "last", 0, state)
    times = []
    for i in range(1, 6):
        start = time.perf_counter()
        checkpoint.save(tmp_path, "last", i, state)
        times.append(time.perf_counter() - start)
    checkpoint.restore(tmp_path, "last", state)
    assert min(times) < 0.2  # 0.03 to 0.06 s on an idle machine
    assert capfd.readouterr() == ("", "")


# --- which checkpoint


def test_keeps_the_newest(tmp_path: Path):
    assert checkpoint.latest(tmp_path, "last") is None
    for i in (9, 10, 11):
        checkpoint.save(tmp_path, "last", i, {"w": jnp.full(2, i)})
    checkpoint.save(tmp_path, "best", 4, {"w": jnp.full(2, 4)})
    assert checkpoint.latest(tmp_path, "last") == 11
    assert checkpoint.latest(tmp_path, "best") == 4
    assert [p.name for p in (tmp_path / "checkpoints/last").iterdir()] == ["11"]
    assert checkpoint.restore(tmp_path, "best", {"w": jnp.zeros(2, int)})[1]["w"][0] == 4


def test_the_same_iteration_replaces(tmp_path: Path):
    for value in (1.0, 2.0):
        checkpoint.save(tmp_path, "last", 5, {"w": jnp.array(value)})
    assert checkpoint.restore(tmp_path, "last", {"w": jnp.array(0.0)})[1]["w"] == 2.0
    assert [p.name for p in (tmp_path / "checkpoints/last").iterdir()] == ["5"]


class Kill(BaseException):
    pass


@pytest.mark.parametrize("iteration", [3, 4], ids=["same iteration", "next iteration"])
def test_a_kill_at_any_step_of_a_save_leaves_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, iteration: int):
    """Dies before the 1st, 2nd, ... operation that touches the disk, until a save gets through."""
    operations = [(Path, "mkdir"), (Path, "rename"), (checkpoint.shutil, "rmtree")]
    operations += [(checkpoint, name) for name in ("_write_arrays", "_sha256", "_write_synced", "_sync")]
    like = {"w": jnp.zeros(3)}
    died_at, through = 0, False
    while not through:
        died_at += 1
        run = tmp_path / str(died_at)
        checkpoint.save(run, "last", 3, {"w": jnp.full(3, 3.0)})
        left = died_at

        def dying(real):
            def inner(*args, **kwargs):
                nonlocal left
                left -= 1
                if left == 0:
                    raise Kill
                return real(*args, **kwargs)

            return inner

        with monkeypatch.context() as patch:
            for owner, name in operations:
                patch.setattr(owner, name, dying(getattr(owner, name)))
            try:
                checkpoint.save(run, "last", iteration, {"w": jnp.full(3, 10.0)})
                through = True
            except Kill:
                pass
        at, state = checkpoint.restore(run, "last", like)
        assert at == checkpoint.latest(run, "last")
        assert (at, float(state["w"][0])) in [(3, 3.0), (iteration, 10.0)]
        # The next save tidies up, whatever was left.
        checkpoint.save(run, "last", 6, {"w": jnp.full(3, 6.0)})
        assert [p.name for p in (run / "checkpoints/last").iterdir()] == ["6"]
        assert checkpoint.restore(run, "last", like)[1]["w"][0] == 6.0
    assert died_at > 10  # it did die in many places before it got through


SAVES = """
import sys
from pathlib import Path
import numpy as np
from metarl_cli import checkpoint
run, first = Path(sys.argv[1]), int(sys.argv[2])
for i in range(first, first + 1000):
    checkpoint.save(run, "last", i, {"w": np.full(50_000, i), "i": i})
    print(i, flush=True)
"""


@pytest.mark.slow
def test_kill_9_while_saving(tmp_path: Path):
    rng = np.random.default_rng(0)
    done = 0
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", SAVES, tmp_path, str(done + 1)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        saved = [int(process.stdout.readline()) for _ in range(3)]
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        saved += [int(line) for line in process.stdout.read().split()]
        process.wait()
        done, state = checkpoint.restore(tmp_path, "last", {"w": np.zeros(50_000, int), "i": 0})
        assert done in (saved[-1], saved[-1] + 1)  # killed before or after the rename
        assert state["i"] == done and (state["w"] == done).all()


# --- what goes wrong


def test_no_checkpoint(tmp_path: Path):
    with pytest.raises(RunError, match=r"checkpoints/last holds no checkpoint\. .* train again"):
        checkpoint.restore(tmp_path, "last", {"w": jnp.zeros(2)})


@pytest.mark.parametrize("damage", ["truncated", "garbled", "missing", "empty"])
@pytest.mark.parametrize("which", ["data", "manifest.json", "_METADATA"])
def test_damage_names_the_file(tmp_path: Path, which: str, damage: str):
    state = make_state()
    checkpoint.save(tmp_path, "last", 3, state)
    folder = tmp_path / "checkpoints/last/3"
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    path = next(p for p in files if p.name == which or (which == "data" and p.parent.name == "d"))
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "garbled":
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    with pytest.raises(RunError, match="missing" if damage == "missing" else "damaged") as error:
        checkpoint.restore(tmp_path, "last", state)
    assert str(path) in str(error.value)
    assert "train again" in str(error.value)


def test_a_changed_manifest_is_damage_not_another_algorithm(tmp_path: Path):
    checkpoint.save(tmp_path, "last", 3, {"w": jnp.zeros(2)})
    path = tmp_path / "checkpoints/last/3/manifest.json"
    path.write_text(path.read_text().replace("float32[2]", "float32[3]"))
    with pytest.raises(RunError, match=r"manifest\.json is damaged"):
        checkpoint.restore(tmp_path, "last", {"w": jnp.zeros(2)})


def test_a_later_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "_FORMAT", 2)
    checkpoint.save(tmp_path, "last", 3, {"w": jnp.zeros(2)})
    monkeypatch.undo()
    with pytest.raises(RunError, match=r"format 2, but this version of metarl reads format 1"):
        checkpoint.restore(tmp_path, "last", {"w": jnp.zeros(2)})


SAVED = {"a": jnp.zeros(2), "w": jnp.zeros((3, 3)), "k": jax.random.key(0)}


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (SAVED | {"w": jnp.zeros((4, 3))}, r"`w`: float32\[3, 3\] in the checkpoint, float32\[4, 3\] in this config"),
        (SAVED | {"w": jnp.zeros((3, 3), int)}, r"`w`: float32\[3, 3\] .*int32\[3, 3\]"),
        (SAVED | {"w": None}, r"`w`: float32\[3, 3\] in the checkpoint, unknown in this configuration"),
        (SAVED | {"z": 1}, "`z`: missing in the checkpoint, python int in this configuration"),
        (SAVED | {"k": jnp.zeros(2, jnp.uint32)}, r"`k`: key<fry>\[\] .*uint32\[2\]"),
        (SAVED | {"k": jax.random.key(0, impl="rbg")}, r"`k`: key<fry>\[\] .*key<rbg>\[\]"),
        (SAVED | {"a": 1.0}, r"`a`: float32\[2\] .*python float"),
        (SAVED | {"a": 1.0, "z": 1}, "`z`: missing in the checkpoint"),  # what one of them lacks says more
    ],
)
def test_a_misfit_names_the_first_difference(tmp_path: Path, other: Any, difference: str):
    checkpoint.save(tmp_path, "last", 1, SAVED)
    with pytest.raises(RunError, match=difference) as error:
        checkpoint.restore(tmp_path, "last", other)
    assert str(tmp_path / "checkpoints/last/1") in str(error.value)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from metarl_cli import checkpoint
from metarl_cli.core.errors import RunError
run, like = Path(sys.argv[1]), {"w": np.zeros(100_000)}
checkpoint.save(run, "last", 1, {"w": np.ones(100_000)})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    checkpoint.save(run, "last", 2, {"w": np.random.default_rng(0).normal(size=100_000)})
except RunError as error:
    print(error)
at, state = checkpoint.restore(run, "last", like)
assert at == 1 and state["w"].all()
"""


def test_a_failed_write_is_reported_and_keeps_the_previous(tmp_path: Path):
    """A limit on the size of files fails as a full disk does, deep inside tensorstore."""
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "checkpoints/last/2: the checkpoint cannot be written: File too large. Check the free space" in done.stdout
    assert "what was saved before is still in place" in done.stdout
    assert len(done.stdout.splitlines()) == 1 and done.stderr == ""
    assert [p.name for p in (tmp_path / "checkpoints/last").iterdir()] == ["1"]  # what was written frees its room


def test_a_file_in_the_way_is_reported(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(RunError, match="checkpoints/last/1: the checkpoint cannot be written"):
        checkpoint.save(tmp_path, "last", 1, {"w": jnp.zeros(2)})


def test_nothing_is_pickled(tmp_path: Path):
    """A checkpoint is data: no file in it holds the opcodes of a pickle, and the manifest is JSON."""
    import pickletools

    checkpoint.save(tmp_path, "last", 1, make_state())
    files = [p for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()]
    assert len(files) > 3
    for path in files:
        with pytest.raises(ValueError):
            list(pickletools.genops(path.read_bytes()))
    json.loads((tmp_path / "checkpoints/last/1/manifest.json").read_text())


# --- the lock

HOLD = """
import sys, time
from pathlib import Path
from metarl_cli.checkpoint import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_dies(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(RunError, match=f"in use by process {process.pid}"), checkpoint.RunLock(tmp_path):
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    with checkpoint.RunLock(tmp_path):  # the file is still there, the lock is not
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
        with pytest.raises(RunError, match=f"in use by process {os.getpid()}"), checkpoint.RunLock(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()  # the refused one has left it alone
    assert not (tmp_path / ".lock").exists()
    with checkpoint.RunLock(tmp_path):
        pass


def test_a_lock_on_a_deleted_file_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Between opening the file and locking it, its holder may let go and delete it, and a third may make a new one."""
    real, opened = checkpoint.fcntl.flock, []

    def flock(file, how):
        if not opened:
            (tmp_path / ".lock").unlink()
            (tmp_path / ".lock").touch()
        opened.append(file)
        real(file, how)

    monkeypatch.setattr(checkpoint.fcntl, "flock", flock)
    with checkpoint.RunLock(tmp_path):
        monkeypatch.undo()
        assert len(opened) == 2
        with pytest.raises(RunError, match="in use"), checkpoint.RunLock(tmp_path):
            pass


def test_locking_what_is_no_directory(tmp_path: Path):
    with pytest.raises(RunError, match="is no directory"), checkpoint.RunLock(tmp_path / "nowhere"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written: Not a directory"), checkpoint.RunLock(tmp_path / "file"):
        pass
