"""The trust region step (Schulman et al. 2015, appendix C). Vectors are pytrees shaped like the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metarl_cli.core.types import Params

Product = Callable[[Params], Params]


def dot(x: Params, y: Params) -> jax.Array:
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, x, y)), start=jnp.zeros(()))


def add(x: Params, y: Params, scale: Any = 1.0) -> Params:
    """x + scale * y."""
    return jax.tree.map(lambda a, b: a + scale * b, x, y)


def conjugate_gradient(product: Product, b: Params, iterations: int) -> tuple[Params, Params]:
    """Solves `A x = b` from x = 0 for a positive definite `A`, given as `product(v) = A v`.

    Returns:
        x, and the residual `b - A x`, which tells `A x` without another product.
    """

    def step(_, state):
        x, r, p, rr = state
        ap = product(p)
        # A solved system has r = 0: dividing by it would give NaN, a step of length 0 does not.
        alpha = jnp.where(rr > 0, rr / jnp.maximum(dot(p, ap), jnp.finfo(rr.dtype).tiny), 0)
        x, r = add(x, p, alpha), add(r, ap, -alpha)
        new_rr = dot(r, r)
        beta = jnp.where(rr > 0, new_rr / jnp.maximum(rr, jnp.finfo(rr.dtype).tiny), 0)
        return x, r, add(r, p, beta), new_rr

    zeros = jax.tree.map(jnp.zeros_like, b)
    x, r, _, _ = jax.lax.fori_loop(0, iterations, step, (zeros, b, b, dot(b, b)))
    return x, r


class TrustRegion(NamedTuple):
    """What a step did."""

    params: Params
    accepted: jax.Array  # bool; if false the parameters are unchanged
    kl: jax.Array  # of the accepted step, else 0
    improvement: jax.Array  # fall of the loss, else 0
    backtracks: jax.Array  # int


def trust_region_step(
    params: Params,
    loss: jax.Array,
    gradient: Params,
    fisher: Product,
    evaluate: Callable[[Params], tuple[jax.Array, jax.Array]],
    *,
    max_kl: Any,
    damping: Any,
    shrink: Any,
    iterations: int,
    backtracks: int,
) -> TrustRegion:
    """Natural gradient direction by conjugate gradient, its length by the KL bound, then a back-tracking line search.

    Args:
        loss: at `params`.
        fisher: the Fisher-vector product at `params`; `damping` times the identity is added to it.
        evaluate: `params -> (loss, mean KL from the old policy)`.
        max_kl: bound in nats. A step is accepted only if the loss falls and the bound holds.
    """
    direction, residual = conjugate_gradient(lambda v: add(fisher(v), v, damping), gradient, iterations)
    curvature = dot(direction, add(gradient, residual, -1.0))
    length = jnp.sqrt(2 * max_kl / jnp.maximum(curvature, jnp.finfo(curvature.dtype).tiny))

    def accepts(new_loss, kl):
        return (new_loss < loss) & (kl <= max_kl)  # false for NaN

    def searching(state):
        tries, new_loss, kl = state
        return (tries < backtracks) & ~accepts(new_loss, kl)

    def search(state):
        tries, _, _ = state
        return tries + 1, *evaluate(add(params, direction, -length * shrink**tries))

    start = (jnp.zeros((), int), jnp.full_like(loss, jnp.inf), jnp.zeros_like(loss))
    tries, new_loss, kl = jax.lax.while_loop(searching, search, start)
    accepted = accepts(new_loss, kl)
    scale = jnp.where(accepted, length * shrink ** (tries - 1), 0)
    # `where`, not a step of length 0: an infinite direction must leave the parameters alone as well.
    moved = jax.tree.map(lambda p, d: jnp.where(accepted, p - scale * d, p), params, direction)
    return TrustRegion(moved, accepted, jnp.where(accepted, kl, 0), jnp.where(accepted, loss - new_loss, 0), tries - 1)
