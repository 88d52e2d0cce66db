"""The training state on disk, exactly, and the lock of a run directory.

`run/checkpoints/<last|best>/<iteration>/` holds an orbax PyTree checkpoint (`arrays/`: one flat dict from dotted leaf
names to arrays, readable with orbax alone) and `manifest.json`: the name, shape and dtype of every leaf and the SHA-256
of every file. A folder with a number for a name is always complete: it is written under another name, synced and then
renamed, and its predecessor is moved out of the way and deleted only afterwards.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from metarl_cli import directory
from metarl_cli.core.errors import Misfit, RunError

Name = Literal["last", "best"]

_FORMAT = 1
_NEW, _OLD = ".unfinished-", ".replaced-"
_ROOM = 16_000_000  # bytes that a checkpoint may have beside twice its arrays
_REST = 10_000_000_000  # bytes that the rest of a state may have of which only a part is restored
_ADVICE = "Put the file back from a copy of the run, or delete this checkpoint and train again."
_log = logging.getLogger("metarl")


def save(run: Path, name: Name, iteration: int, state: Any) -> None:
    """Writes the whole state and returns when it is safely on disk; the checkpoint it replaces is deleted last.

    Args:
        run: the run directory.
        name: `last` or `best`.
        iteration: meta-iterations done, the name of the folder.
        state: a pytree of JAX arrays (typed keys included), numpy arrays and Python numbers.

    Raises:
        RunError: the checkpoint cannot be written (a full disk, no permission); the previous one is untouched.
    """
    leaves = _named_leaves(state)
    plain = {leaf: jax.random.key_data(x) if _is_key(x) else x for leaf, x in leaves.items()}
    arrays = {leaf: np.asarray(x) for leaf, x in jax.device_get(plain).items()}
    manifest = {
        "format": _FORMAT,
        "iteration": iteration,
        "leaves": {leaf: _describe(x) for leaf, x in leaves.items()},
        "keys": {leaf: str(jax.random.key_impl(x)) for leaf, x in leaves.items() if _is_key(x)},
        "empty": {leaf: [str(x.dtype), list(x.shape)] for leaf, x in arrays.items() if not x.size},  # orbax takes none
    }
    folder = run / "checkpoints" / name
    new, final = folder / f"{_NEW}{iteration}", folder / str(iteration)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        (new / "arrays").mkdir(parents=True)
        _write_arrays(new / "arrays", {leaf: x for leaf, x in arrays.items() if leaf not in manifest["empty"]})
        manifest["files"] = {str(path.relative_to(new)): _sha256(path, sync=True) for path in _files(new)}
        _write_synced(new / "manifest.json", json.dumps(_signed(manifest), indent=1))
        if final.exists():  # the same iteration again, after a resume: until the next line the old one stands in for it
            final.rename(folder / f"{_OLD}{iteration}")
        new.rename(final)
        _sync(folder)
        for other in folder.iterdir():
            if other.name.isdigit() and other != final:
                other.rename(folder / f"{_OLD}{other.name}")
        _remove_leftovers(folder)
    except (OSError, ValueError) as error:  # tensorstore reports a full disk as ValueError
        _log.debug("saving the checkpoint failed", exc_info=True)
        shutil.rmtree(new, ignore_errors=True)
        reason = str(error)
        if code := re.search(r"os_error_code='(\d+)'", reason):
            reason = os.strerror(int(code[1]))
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise RunError(
            f"{final}: the checkpoint cannot be written: {reason}. Check the free space and the permissions there; "
            "what was saved before is still in place."
        ) from error


def restore(run: Path, name: Name, like_state: Any, part: bool = False) -> tuple[int, Any]:
    """Reads the newest checkpoint, bit by bit as it was saved, onto the current default device.

    Args:
        run: the run directory.
        name: `last` or `best`.
        like_state: a pytree of the expected structure, concrete or abstract (`jax.eval_shape`). Its leaves also say
            what to return: a JAX array, a numpy array or a Python number.
        part: the state may lack leaves that the checkpoint has.

    Returns:
        The iteration and the state.

    Raises:
        RunError: there is no checkpoint; a file of it is missing or damaged; it does not fit `like_state`.
    """
    folder = _newest(run / "checkpoints" / name)
    if folder is None:
        raise RunError(
            f"{run / 'checkpoints' / name} holds no checkpoint. "
            "If the run was stopped before it saved the first one, train again."
        )
    manifest = _read_manifest(folder / "manifest.json")
    like = _named_leaves(like_state)
    saved = {leaf: x for leaf, x in manifest["leaves"].items() if leaf in like or not part}
    _check_fit(folder, saved, {leaf: _describe(x) for leaf, x in like.items()})
    room = _ROOM + 2 * sum(_bytes(x) for x in like.values()) + (_REST if part else 0)
    for relative, expected in manifest["files"].items():
        path = folder / relative
        if not path.resolve().is_relative_to(folder.resolve()):
            raise RunError(f"{folder / 'manifest.json'} is damaged: {relative} is no file of this checkpoint. {_ADVICE}")
        try:
            room -= path.stat().st_size
            if room < 0:
                raise RunError(f"{path} is damaged: the checkpoint is larger than the state it has to hold. {_ADVICE}")
            actual = _sha256(path)
        except FileNotFoundError:
            raise RunError(f"{path} is missing, so that the checkpoint cannot be used. {_ADVICE}") from None
        except OSError as error:
            raise RunError(f"{path} cannot be read: {error.strerror}. {_ADVICE}") from error
        if actual != expected:
            raise RunError(f"{path} is damaged: its content is not what was saved. {_ADVICE}")

    try:
        empty = {leaf: np.empty(shape, jnp.dtype(dtype)) for leaf, (dtype, shape) in manifest["empty"].items() if 0 in shape}
        arrays = empty | _read_arrays(folder / "arrays", {leaf: _shape(x) for leaf, x in like.items() if leaf not in empty})
        leaves = [_as_leaf(arrays[leaf], x, manifest["keys"].get(leaf)) for leaf, x in like.items()]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError) as error:
        # The checksums are right: somebody has written them anew.
        _log.debug("restoring the checkpoint failed", exc_info=True)
        raise RunError(f"{folder} is damaged: its content is not what was saved. {_ADVICE}") from error
    return manifest["iteration"], jax.tree.unflatten(jax.tree.structure(like_state), leaves)


def latest(run: Path, name: Name) -> int | None:
    """The iteration of the newest complete checkpoint, or `None` where there is none."""
    folder = _newest(run / "checkpoints" / name)
    return None if folder is None else int(folder.name.removeprefix(_OLD))


class RunLock:
    """Holds a run directory, so that no second process writes there: `with RunLock(run): ...`

    The lock is the kernel's: it goes with the process, however that ends. The file `.lock` names the process.

    Raises:
        RunError: on entering, when another process holds the run, or when the directory is missing or not writable.
    """

    def __init__(self, run: Path):
        self.run = run
        self._file: Any = None

    def __enter__(self) -> RunLock:
        path, attempts = self.run / ".lock", 3
        while self._file is None:
            try:
                file = path.open("a+")
            except FileNotFoundError:
                raise RunError(f"{self.run} is no directory. Check the path.") from None
            except OSError as error:
                raise RunError(f"{path} cannot be written: {error.strerror}. Check the permissions there.") from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if attempts := attempts - 1:  # `metarl runs` holds it for an instant, to see whether anybody does
                    file.close()
                    time.sleep(0.05)
                    continue
                file.seek(0)
                pid = file.read().strip()
                file.close()
                holder = f"process {pid}" if pid else "another process"
                raise RunError(
                    f"{self.run} is in use by {holder}. Wait until it has ended, stop it, or take another directory."
                ) from None
            except OSError as error:
                file.close()
                raise RunError(f"{path} cannot be locked: {error.strerror}. Take a local disk.") from error
            # The one before us deletes the file it held: then we have locked a file that nobody else can find.
            if _same_file(path, file.fileno()):
                self._file = file
            else:
                file.close()
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(FileNotFoundError):  # the run directory itself may have been deleted
            (self.run / ".lock").unlink()
        self._file.close()
        self._file = None


# --- leaves


def _is_key(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Dotted name -> leaf, in the order of the flattened tree."""
    named = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "state"
        if name in named:
            raise ValueError(f"two leaves of the state are called {name}")
        named[name] = leaf
    return named


def _describe(x: Any) -> str:
    """`float32[64, 2]`, `key<fry>[5]`, `python int`."""
    if isinstance(x, bool | int | float) and not isinstance(x, np.generic):
        return f"python {type(x).__name__}"
    return f"{x.dtype}{list(x.shape)}"


def _shape(x: Any) -> tuple[int, ...]:
    """Of the array that holds it."""
    return jax.eval_shape(jax.random.key_data, x).shape if _is_key(x) else np.shape(x)


def _bytes(x: Any) -> int:
    return math.prod(_shape(x)) * (4 if _is_key(x) else np.dtype(getattr(x, "dtype", "int64")).itemsize)


def _as_leaf(array: np.ndarray, like: Any, key: str | None) -> Any:
    if key is not None:
        return jax.random.wrap_key_data(jnp.array(array), impl=key)
    if isinstance(like, np.generic):
        return array[()]
    if isinstance(like, np.ndarray):
        return array
    if isinstance(like, bool | int | float):
        return type(like)(array.item())
    return jnp.array(array)  # a copy: the state is donated, so that it must not share memory with `array`


def _check_fit(folder: Path, saved: dict[str, str], expected: dict[str, str]) -> None:
    # What one of them lacks says more than another shape; then the order of what is expected: what the reader knows.
    for leaf in sorted(expected | saved, key=lambda leaf: leaf in expected and leaf in saved):
        there, here = saved.get(leaf, "missing"), expected.get(leaf, "unknown")
        if there != here:
            raise Misfit(
                f"{folder} does not fit: it was saved by another algorithm or with other settings. "
                f"The first difference is `{leaf}`: {there} in the checkpoint, {here} in this configuration. "
                "Use the settings in config.yaml of the run."
            )


# --- files


def _newest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or the one that was about to be replaced by the same iteration."""
    if not folder.is_dir():
        return None
    complete = [path for path in folder.iterdir() if path.name.isdigit()]
    replaced = [path for path in folder.iterdir() if path.name.startswith(_OLD)]
    return max(complete or replaced, key=lambda path: int(path.name.removeprefix(_OLD)), default=None)


def _remove_leftovers(folder: Path) -> None:
    """Removes what an interrupted save left, except a replaced checkpoint that is the only one."""
    complete = any(path.name.isdigit() for path in folder.iterdir())
    for path in list(folder.iterdir()):
        if path.name.startswith(_NEW) or (path.name.startswith(_OLD) and complete):
            shutil.rmtree(path)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _signed(manifest: dict[str, Any]) -> dict[str, Any]:
    """With its own checksum, so that a garbled manifest is not taken for another algorithm's."""
    text = json.dumps({key: value for key, value in manifest.items() if key != "sha256"}, sort_keys=True)
    return manifest | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > directory.LIMITS["manifest.json"]:
            raise ValueError
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} is missing, so that the checkpoint cannot be used. {_ADVICE}") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}. {_ADVICE}") from error
    except (ValueError, RecursionError):  # no UTF-8, no JSON
        raise RunError(f"{path} is damaged: it is no JSON. {_ADVICE}") from None
    if not isinstance(manifest, dict) or manifest != _signed(manifest):
        raise RunError(f"{path} is damaged: its content is not what was saved. {_ADVICE}")
    if manifest.get("format") != _FORMAT:
        raise RunError(
            f"{path}: format {manifest.get('format')}, but this version of metarl reads format {_FORMAT}. "
            "Use the version that wrote the run (it is named in result.json)."
        )
    kinds = {"iteration": int, "leaves": dict, "keys": dict, "empty": dict, "files": dict}
    if any(not isinstance(manifest.get(key), kind) for key, kind in kinds.items()):
        raise RunError(f"{path} is damaged: its content is not what was saved. {_ADVICE}")
    return manifest


# --- orbax, imported late (0.3 s)


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[Any]:
    import orbax.checkpoint as ocp

    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.CRITICAL + 1)  # an error that it logs is raised as well, and told by us
    _silence_late_callbacks()
    try:
        yield ocp
    finally:
        absl.setLevel(level)


@functools.cache
def _silence_late_callbacks() -> None:
    """After a failed write (a full disk), those that come too late for orbax print stack traces from threads of C++, and
    asyncio those that nobody asked for any more."""
    excepthook, unraisablehook = sys.excepthook, sys.unraisablehook
    late = "Event loop is closed"
    sys.excepthook = lambda kind, error, trace: None if str(error) == late else excepthook(kind, error, trace)
    sys.unraisablehook = lambda found: None if str(found.exc_value) == late else unraisablehook(found)
    logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())


def _write_arrays(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    with _quiet_orbax() as ocp, contextlib.closing(ocp.PyTreeCheckpointHandler(use_zarr3=True)) as handler:
        handler.save(folder.absolute(), args=ocp.args.PyTreeSave(arrays))
        handler.finalize(folder.absolute())


def _read_arrays(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Raises `ValueError` where an array has another shape, before there is memory for it."""
    with _quiet_orbax() as ocp, contextlib.closing(ocp.PyTreeCheckpointHandler(use_zarr3=True)) as handler:
        there = handler.metadata(folder.absolute())
        for leaf, shape in shapes.items():
            if tuple(there[leaf].shape) != shape:
                raise ValueError(f"{leaf}: {there[leaf].shape}, not {shape}")
        how = {leaf: ocp.RestoreArgs(restore_type=np.ndarray) for leaf in shapes}
        wanted = ocp.args.PyTreeRestore(dict.fromkeys(shapes, 0), restore_args=how, partial_restore=True)
        return handler.restore(folder.absolute(), args=wanted)
