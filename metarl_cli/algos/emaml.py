"""E-MAML: credit for the exploration before the update (Stadie et al. 2018, arXiv:1803.01118, section 3).

MAML takes the data D_i that an inner step learns from as given. They were sampled with theta, too: what they lead to is a
reason to sample such data again. The outer loss gets one more term,

    - c mean_i [ mean_t log pi(a_t | s_t) R_i' ],    over the steps before each inner step,

R_i' the return after adaptation, standardised over the tasks of the meta-batch. The mean over t and the standardisation are
a scaling of the exact term `sum_t log pi_theta J(theta'(D))`. The rest is MAML with the clipped surrogate.
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
from metarl_cli.core.returns import episode_returns, masked_mean, standardise
from metarl_cli.core.settings import setting
from metarl_cli.core.types import Batch, Params, pytree, static


@pytree
class EMAML(GradientBased):
    clip: float | jax.Array
    credit: float | jax.Array  # c
    epochs: int = static()

    def improve(self, state: State, batch: Batch, data: Data) -> tuple[Params, optax.OptState, Metrics]:
        after = jnp.mean(episode_returns(batch)[:, -1], axis=-1)  # [B]
        tasks = data, standardise(after, jnp.ones(after.shape, bool))
        return self.descend(self.task_loss, state, tasks, self.epochs)

    def task_loss(self, params: Params, task: tuple[Data, Any]) -> jax.Array:
        """The outer loss of one task: its data `[N + 1, K, T]` and R'."""
        data, outcome = task
        last = jax.tree.map(lambda x: x[-1], data)
        *before, adapted = [p.log_prob(a) for p, a in zip(self.inner.policies(params, data), data.action, strict=True)]
        exploration = -masked_mean(jnp.stack(before), data.valid[:-1]) * outcome
        return surrogate(adapted, last.log_prob, last.advantage, last.valid, self.clip) + self.credit * exploration


class EMAMLSettings(GradientBasedSettings):
    inner_steps: int = setting("adaptation steps N in training", ge=1)
    epochs: int = setting("Adam steps on one meta-batch", ge=1)
    clip: float = setting("clip of the probability ratio", gt=0)
    credit: float = setting("weight c of the exploration term; 0 is MAML", ge=0)

    def build(self, family: TaskFamily) -> EMAML:
        return EMAML(**self.shared(family), epochs=self.epochs, clip=self.clip, credit=self.credit)
