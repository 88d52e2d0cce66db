"""How much memory a program needs, told from what JAX has traced of it: before the seconds that its compilation takes.

Values are followed from the operation that makes them to the last one that needs them. Only what XLA has to write down is
counted: what leaves the program, what loops take, carry and stack, and results of matrix products, sorts, scatters and the
like. Whatever else there is can be computed where it is needed, so that the estimate is mostly too low.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

INSIDE = ("scan", "while", "cond", "custom_linear_solve")  # what happens inside needs memory of its own
IN_PLACE = ("scan", "while", "scatter", "dynamic_update_slice")  # write over operands that nobody needs any more
PRODUCTS = (
    "dot_general",
    "conv_general_dilated",
    "cum",
    "sort",
    "top_k",
    "cholesky",
    "qr",
    "lu",
    "eigh",
    "triangular_solve",
)
WRITTEN = (*INSIDE, *IN_PLACE, *PRODUCTS)  # how names of operations begin whose results are arrays in memory


class Value:
    """An array. What counts is which one it is."""

    def __init__(self, aval: Any):
        self.bytes = math.prod(aval.shape) * aval.dtype.itemsize if hasattr(aval, "shape") else 0


class Operation(NamedTuple):
    name: str
    inside: list[Jaxpr]
    takes: list[Value]
    makes: list[Value]

    def among(self, names: tuple[str, ...]) -> bool:
        return self.name.startswith(names)


def footprint(program: ClosedJaxpr) -> int:
    """Bytes, with the inputs of the program, which it may overwrite, and its outputs."""
    return _peak(program.jaxpr, alone=True)


def check(needed: int, what: str) -> None:
    """Raises `MemoryError` where more is needed than is free: before the system ends what it likes.

    Args:
        needed: bytes.
        what: needs them.
    """
    available = free(jax.config.jax_default_device or jax.local_devices()[0])  # type: ignore[attr-defined]
    if available is None:
        return
    logging.getLogger("metarl").debug(f"{what} needs {needed / 1e6:.0f} MB of {available / 1e6:.0f}")
    if needed > available:
        raise MemoryError(f"{what} needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free.")


def free(device: Any) -> int | None:
    """Bytes; `None` where nobody tells."""
    if stats := device.memory_stats():
        return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
        with contextlib.suppress(OSError, ValueError, KeyError):  # the limit of a container; `max`, where there is none
            group = Path("/sys/fs/cgroup")
            limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
            cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
            available = min(available, limit - used + int(cached))
        return available
    return None


def _peak(program: Jaxpr, alone: bool) -> int:
    """
    Args:
        alone: the inputs and outputs count; those of what is inside a loop are the loop's.
    """
    # As XLA, which computes nothing in vain.
    program, _ = dce_jaxpr(program, [True] * len(program.outvars), instantiate=True)
    values = {x: Value(x.aval) for x in (*program.invars, *program.constvars)}
    inputs = set(values.values())
    operations = list(_operations(program, values))
    outputs = {_value(x, values) for x in program.outvars}
    written = {x for op in operations if op.among(WRITTEN) for x in op.makes}
    written |= {x for op in operations if op.name in INSIDE for x in op.takes} | inputs | outputs
    # What is smaller than what it is made of, a sum or a slice, takes its place at once.
    written |= {x for op in operations for x in op.makes if x.bytes < max((y.bytes for y in op.takes), default=0)}
    counted = written if alone else written - inputs - outputs

    last = dict.fromkeys(outputs, len(operations))  # where each value is needed for the last time
    for place, op in reversed([*enumerate(operations)]):
        # What is not written down is computed where it is needed, out of what has to be there still.
        until = max([place, *(last.get(x, place) for x in op.makes if x not in written)])
        for x in op.takes:
            last[x] = max(last.get(x, place), until)
    ending: dict[int, set[Value]] = {}
    for x, place in last.items():
        ending.setdefault(place, set()).add(x)

    alive = inputs & counted
    now = most = _bytes(alive)
    for place, op in enumerate(operations):
        new, old = counted.intersection(op.makes), alive & ending.get(place, set())
        over = _bytes(old) if op.among(IN_PLACE) else 0
        inside = max((_peak(x, alone=False) for x in op.inside), default=0)
        most = max(most, now + max(0, _bytes(new) - over) + inside)
        new &= last.keys()
        now += _bytes(new) - _bytes(old)
        alive -= old
        alive |= new
    return most


def _operations(program: Jaxpr, values: dict[Any, Value]) -> Iterator[Operation]:
    """In their order; functions that are called are taken apart. `values` is completed."""
    for equation in program.eqns:
        name, inside = equation.primitive.name, [*jaxprs_in_params(equation.params)]
        takes = [_value(x, values) for x in equation.invars]
        called = next((x for x in inside if [*map(_aval, x.outvars)] == [*map(_aval, equation.outvars)]), None)
        if name in INSIDE or called is None:
            makes = [_value(x, values) for x in equation.outvars]
            yield Operation(name, inside if name in INSIDE else [], takes, makes)
        else:
            own = dict(zip(called.invars, takes[len(takes) - len(called.invars) :], strict=True))
            yield from _operations(called, own)
            values.update(zip(equation.outvars, [_value(x, own) for x in called.outvars], strict=True))


def _value(x: Any, values: dict[Any, Value]) -> Value:
    if isinstance(x, Literal):
        return Value(x.aval)
    if x not in values:
        values[x] = Value(x.aval)
    return values[x]


def _aval(x: Any) -> tuple[Any, ...]:
    return getattr(x.aval, "shape", None), getattr(x.aval, "dtype", None)


def _bytes(values: set[Value]) -> int:
    return sum(x.bytes for x in values)
