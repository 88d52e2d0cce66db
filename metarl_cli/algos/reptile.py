"""Reptile: theta moves towards where the inner steps lead (Nichol, Achiam & Schulman 2018, arXiv:1803.02999, algorithm 1).

    theta <- theta + eps mean_i (theta_i^(N) - theta),    N >= 2: with one step this is training one policy for all tasks

The paper has supervised tasks; here the inner steps are policy gradients on fresh episodes. Nothing is differentiated twice.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from metarl_cli.core.adapt import Data
from metarl_cli.core.errors import ConfigError
from metarl_cli.core.gradient_based import GradientBased, GradientBasedSettings, State
from metarl_cli.core.interfaces import Metrics, TaskFamily
from metarl_cli.core.settings import setting
from metarl_cli.core.types import Batch, Params, pytree


@pytree
class Reptile(GradientBased):
    def improve(self, state: State, batch: Batch, data: Data) -> tuple[Params, optax.OptState, Metrics]:
        def back(d):
            adapted = self.inner.replay(state.params, d)[-1]
            return jax.tree.map(jnp.subtract, state.params, adapted)

        # The way back, as if it were a gradient: so one step of SGD is the update above.
        gradient = jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.vmap(back)(data))
        updates, optimizer = self.optimizer().update(gradient, state.optimizer, state.params)
        return optax.apply_updates(state.params, updates), optimizer, {"grad_norm": optax.tree.norm(gradient)}


class ReptileSettings(GradientBasedSettings):
    inner_steps: int = setting("adaptation steps N in training", ge=2)

    def build(self, family: TaskFamily) -> Reptile:
        if self.adapts == "context":
            problem = "a context is no part of theta, which would not move"
            raise ConfigError("algo.adapts", self.adapts, problem, allowed=["all", "head"])
        if self.learned_lr:
            problem = "Reptile has no gradient with respect to the inner step"
            raise ConfigError("algo.learned_lr", "true", problem, allowed=["false"])
        if self.inner_optimizer not in ("sgd", "adam"):
            problem = "Reptile has no gradient with respect to a learned rule"
            raise ConfigError("algo.inner_optimizer", self.inner_optimizer, problem, allowed=["sgd", "adam"])
        return Reptile(**self.shared(family))
