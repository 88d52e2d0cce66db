"""One run on many devices: the tasks of a meta-batch are spread over them.

`devices=auto` makes each core of a CPU a device of one thread, which is faster than one device with XLA's threads, and takes
one GPU; `all` takes all devices, of all processes. Each lives through its share of the tasks and differentiates them; XLA
puts the sums across devices where means over tasks are taken, so that no learner knows of it beyond naming the axis of
tasks, `over_tasks`. The state is the same on all.

Several processes, on one machine or on many, do this together: `connect`. Each runs the same program and
computes the same numbers; only the first of them writes (`first`).
"""

from __future__ import annotations

import contextlib
import os
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec, get_abstract_mesh

from metarl_cli.core.errors import ConfigError

AXIS = "tasks"
FORCED = "--xla_force_host_platform_device_count"
Devices = Literal["auto", "one", "all"]


def offer_cores() -> None:
    """Before anything is computed: each core that this process may use becomes a device, unless XLA_FLAGS says otherwise."""
    if FORCED not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # something was computed: the devices are what they are
            jax.config.update("jax_num_cpu_devices", cores())


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def connect() -> None:
    """Where this process is one of several: finds the others. Before anything is computed.

    Raises:
        ConfigError: they are not found.
    """
    if not jax.distributed.is_initialized() and (several := _several()):
        try:
            jax.distributed.initialize(**several)
        except (RuntimeError, ValueError) as error:
            problem = f"the processes cannot be connected: {str(error).splitlines()[0]}"
            hint = "Each needs JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or srun."
            raise ConfigError("devices", "all", problem, hint=hint) from error


def start(spread: Devices, tasks: int | None) -> None:
    """Sets the devices of the programs that come.

    Args:
        spread: `one`: the first; `auto`: on a CPU as many as share the tasks out evenly; `all`: all, of all processes.
        tasks: of a meta-batch, where there is one.

    Raises:
        ConfigError: all devices cannot share the tasks out evenly.
    """
    devices = (
        jax.devices() if spread == "all" or (spread == "auto" and jax.default_backend() == "cpu") else jax.devices()[:1]
    )
    if spread == "auto":
        devices = devices[: max(n for n in range(1, len(devices) + 1) if (tasks or 1) % n == 0)]
    elif tasks is not None and tasks % len(devices):
        n = len(devices)
        hint = f"Take a multiple of {n}, or devices=auto."
        raise ConfigError("algo.meta_batch", tasks, f"cannot be shared out evenly over {n} devices (devices=all)", hint=hint)
    if len(devices) > 1 or count() > 1:
        jax.set_mesh(jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices))


def _several() -> dict[str, Any] | None:
    """How this process finds the others, if it is one of several."""
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        numbers = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
        return {name: int(os.environ[key]) for name, key in numbers.items() if os.environ.get(key, "").isdigit()}
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return {"cluster_detection_method": "slurm"}
    return None


def count() -> int:
    """Devices that tasks are spread over."""
    return get_abstract_mesh().shape.get(AXIS, 1)


def memories() -> int:
    """Over how many memories tasks are spread: the devices of a CPU share one."""
    return min(count(), jax.process_count()) if jax.default_backend() == "cpu" else count()


def first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def over_tasks(tree: Any, axis: int = 0) -> Any:
    """Within a program: the axis `[B]` of each leaf is spread. What cannot be shared out evenly is whole on each device."""
    size = jax.tree.leaves(tree)[0].shape[axis]
    return jax.lax.with_sharding_constraint(tree, PartitionSpec(*[None] * axis, AXIS)) if shares(size) > 1 else tree


def shares(tasks: int) -> int:
    """Over how many devices so many tasks are spread."""
    return count() if tasks % count() == 0 else 1


def everywhere(tree: Any) -> Any:
    """Within a program: the same on all devices, as what the next program takes and the host reads."""
    return tree if count() == 1 else jax.lax.with_sharding_constraint(tree, PartitionSpec())


def place(tree: Any) -> Any:
    """Outside of programs: a state that each process has, on all devices."""
    if count() == 1:
        return tree
    sharding = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())

    def copy(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(copy(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(copy, tree)


def agree(value: int) -> int:
    """The first process's: what depends on clocks and signals has to be the same in all."""
    return value if jax.process_count() == 1 else int(_gather(value)[0])


def most(value: int) -> int:
    """The largest of all processes."""
    return value if jax.process_count() == 1 else int(_gather(value).max())


def _gather(value: int) -> np.ndarray:
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(np.asarray(value, np.int32)))
