"""ProMP: proximal meta-policy search (Rothfuss et al. 2019, arXiv:1810.06784, algorithm 1).

Several epochs of Adam on

    mean_i [ L_clip(theta_i'(theta); D_i') + eta KL(pi_theta_0 || pi_theta on D_i) ],    theta_0: theta that sampled    (13)

with the ratio of the clipped surrogate `pi_{theta'(theta)} / pi_{theta'(theta_0)}`. The inner loss is a ratio to pi_theta_0
as well (LVC, equation 10; `algo.estimator=ratio`): theta' is recomputed from the current theta in each epoch, and D_i then
comes from another policy. With more than one inner step the KL divergence is the mean over the points before each.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from metarl_cli.core.adapt import Data
from metarl_cli.core.gradient_based import GradientBased, GradientBasedSettings, State
from metarl_cli.core.interfaces import Metrics, TaskFamily
from metarl_cli.core.losses import surrogate
from metarl_cli.core.returns import masked_mean
from metarl_cli.core.settings import setting
from metarl_cli.core.types import Batch, Params, pytree, static


@pytree
class ProMP(GradientBased):
    clip: float | jax.Array
    kl_penalty: float | jax.Array  # eta
    epochs: int = static()

    def improve(self, state: State, batch: Batch, data: Data) -> tuple[Params, optax.OptState, Metrics]:
        old = jax.vmap(lambda d: self.inner.policies(state.params, d)[:-1])(data)
        return self.descend(self.task_loss, state, (data, old), self.epochs)

    def task_loss(self, params: Params, task: tuple[Data, Any]) -> jax.Array:
        """The outer loss of one task: its data `[N + 1, K, T]` and the policies that acted at all points but the last."""
        data, old = task
        last = jax.tree.map(lambda x: x[-1], data)
        *before, adapted = self.inner.policies(params, data)
        kl = [masked_mean(p.kl(q), valid) for p, q, valid in zip(old, before, data.valid, strict=False)]
        loss = surrogate(adapted.log_prob(last.action), last.log_prob, last.advantage, last.valid, self.clip)
        return loss + self.kl_penalty * jnp.mean(jnp.stack(kl))


class ProMPSettings(GradientBasedSettings):
    inner_steps: int = setting("adaptation steps N in training", ge=1)
    epochs: int = setting("Adam steps on one meta-batch", ge=1)
    clip: float = setting("clip of the probability ratio", gt=0)
    kl_penalty: float = setting("weight eta of the KL divergence from the policy that sampled", ge=0)

    def build(self, family: TaskFamily) -> ProMP:
        return ProMP(**self.shared(family), epochs=self.epochs, clip=self.clip, kl_penalty=self.kl_penalty)
