"""What spreading the tasks gains: seconds of a meta-iteration on one device and with `devices=auto`.

.venv/bin/python scripts/devices.py algo=maml env=point_nav
"""

from __future__ import annotations

import sys
import time

import jax
import jax.numpy as jnp

from metarl_cli import config, runner, training
from metarl_cli.core import devices

ITERATIONS = 10


def main() -> None:
    composed = config.compose(sys.argv[1:])
    runner.configure_jax(composed.config)
    learner, family = config.build(composed.config)
    for spread in ("one", "auto"):
        devices.start(spread, composed.config.algo.model_dump()["meta_batch"])
        state = devices.place(training.init(learner, family, [0]))
        counts = (jnp.asarray(1_000_000), jnp.asarray(1))
        chunk = training.train_chunk.lower(state, learner, family, jnp.asarray(1), *counts).compile()
        seconds = []
        for _ in range(4):
            began = time.monotonic()
            state, _ = chunk(state, learner, family, jnp.asarray(ITERATIONS), *counts)
            jax.block_until_ready(state.failed_at)
            seconds.append((time.monotonic() - began) / ITERATIONS)
        times = ", ".join(f"{x:.3f}" for x in seconds[1:])
        print(f"{devices.count()} of {jax.device_count()} devices: {times} s a meta-iteration", flush=True)


if __name__ == "__main__":
    main()
