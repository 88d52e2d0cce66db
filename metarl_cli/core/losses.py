"""Losses of policies and values. All arrays share their leading axes; means run over `mask`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from metarl_cli.core.returns import masked_mean


def surrogate(
    log_prob: jax.Array, old_log_prob: jax.Array, advantage: jax.Array, mask: jax.Array, clip: float | jax.Array | None
) -> jax.Array:
    """`-E[r A]` with `r = pi / pi_old`; with `clip`, `-E[min(r A, clip(r, 1 - eps, 1 + eps) A)]` (Schulman et al. 2017)."""
    ratio = jnp.exp(jnp.where(mask, log_prob - old_log_prob, 0))
    objective = ratio * advantage
    if clip is not None:
        objective = jnp.minimum(objective, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)
    return -masked_mean(objective, mask)
