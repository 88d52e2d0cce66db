"""MAML: model-agnostic meta-learning (Finn, Abbeel & Levine 2017, arXiv:1703.03400, algorithm 3).

    minimise over theta   mean_i L_out(theta_i'(theta); D_i'),    theta_i' = theta - alpha grad L_in(theta; D_i)

The outer gradient goes *through* the inner step, which `core.adapt.InnerLoop` holds. L_out is the surrogate of the adapted
policies, on which three outer optimisers work:

* `trpo`, as in the paper: natural gradient, KL bound on the adapted policies, line search (Schulman et al. 2015);
* `ppo`: Adam on the clipped surrogate, several epochs, theta_i' recomputed from the current theta in each (Schulman et al.
  2017). The paper has no such variant; it reaches the same returns in a fraction of the time;
* `vpg`: one Adam step along the plain policy gradient.

Switches of the inner loop make of it first-order MAML, ANIL, Meta-SGD and CAVIA, and without an inner step the multi-task
policy and the one that sees the task, with which they are compared: these are YAML files.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from metarl_cli.core.adapt import Data, map_tasks
from metarl_cli.core.errors import ConfigError
from metarl_cli.core.gradient_based import GradientBased, GradientBasedSettings, State
from metarl_cli.core.interfaces import Metrics, TaskFamily
from metarl_cli.core.losses import surrogate
from metarl_cli.core.settings import setting
from metarl_cli.core.solvers import TrustRegion, add, trust_region_step
from metarl_cli.core.types import Batch, Params, pytree, static


@pytree
class MAML(GradientBased):
    clip: float | jax.Array
    max_kl: float | jax.Array
    damping: float | jax.Array
    shrink: float | jax.Array
    outer: Literal["ppo", "trpo", "vpg"] = static()
    epochs: int = static()
    fisher_tasks: int | None = static()
    cg_iterations: int = static()
    backtracks: int = static()

    def improve(self, state: State, batch: Batch, data: Data) -> tuple[Params, optax.OptState, Metrics]:
        match self.outer:
            case "trpo":
                params, metrics = self.trpo(state.params, data)
                return params, state.optimizer, metrics
            case "ppo":
                return self.descend(self.task_loss, state, data, self.epochs)
            case "vpg":
                return self.descend(self.task_loss, state, data, 1)

    def task_loss(self, params: Params, data: Data) -> jax.Array:
        """L_out of one task, `data [N + 1, K, T]`: a function of theta through the inner steps."""
        policy, last = self.inner.adapted(params, data)
        clip = self.clip if self.outer == "ppo" else None
        return surrogate(policy.log_prob(last.action), last.log_prob, last.advantage, last.valid, clip)

    def trpo(self, params: Params, data: Data) -> tuple[Params, Metrics]:
        """The adapted outputs are linearised once: gradient and all Fisher-vector products `J^T H J v` reuse it.

        The Fisher matrix is that of the first `fisher_tasks` tasks; loss, gradient and the bound on the KL are of all.
        """
        last = jax.tree.map(lambda x: x[:, -1], data)  # [B, K, T]
        weight = last.valid / jnp.maximum(jnp.sum(last.valid, (1, 2), keepdims=True), 1) / self.meta_batch

        def outputs(params, data=data):
            return map_tasks(lambda d: self.inner.adapted(params, d)[0], data, self.task_batch)

        def loss(policy):
            ratio = jnp.exp(policy.log_prob(last.action) - last.log_prob)
            return -jnp.sum(weight * ratio * last.advantage)

        def evaluate(params):
            new = outputs(params)
            return loss(new), jnp.sum(weight * old.kl(new))

        n = self.fisher_tasks or self.meta_batch

        def halves(tree):
            return [jax.tree.map(lambda x, part=part: x[part], tree) for part in (slice(n), slice(n, None))]

        some, rest = halves(data)
        old_some, jvp = jax.linearize(lambda params: outputs(params, some), params)
        pull_some = jax.linear_transpose(jvp, params)

        def fisher(v):
            product = old_some.fisher(jvp(v))
            return pull_some(jax.tree.map(lambda x: weight[:n, ..., None] * (self.meta_batch / n) * x, product))[0]

        old, pull = old_some, pull_some
        if n < self.meta_batch:
            old_rest, pull_rest = jax.vjp(lambda params: outputs(params, rest), params)
            old = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), old_some, old_rest)

            def pull(slope):
                first, second = halves(slope)
                return (add(pull_some(first)[0], pull_rest(second)[0]),)

        value, slope = jax.value_and_grad(loss)(old)
        gradient = pull(slope)[0]
        step: TrustRegion = trust_region_step(
            params,
            value,
            gradient,
            fisher,
            evaluate,
            max_kl=self.max_kl,
            damping=self.damping,
            shrink=self.shrink,
            iterations=self.cg_iterations,
            backtracks=self.backtracks,
        )
        metrics = {
            "loss": value,
            "grad_norm": optax.tree.norm(gradient),
            "kl": step.kl,
            "accepted": step.accepted.astype(float),
            "backtracks": step.backtracks.astype(float),
        }
        return step.params, metrics


class MAMLSettings(GradientBasedSettings):
    outer: Literal["ppo", "trpo", "vpg"] = setting("outer optimiser; lr and max_grad_norm are those of ppo and vpg")
    epochs: int = setting("Adam steps on one meta-batch (ppo)", ge=1)
    clip: float = setting("clip of the probability ratio (ppo)", gt=0)
    max_kl: float = setting("bound on the mean KL of the adapted policies (trpo)", unit="nats", gt=0)
    fisher_tasks: int | None = setting(
        "tasks of the meta-batch of which the Fisher matrix is made (trpo); null: all", unit="tasks", ge=1
    )
    cg_iterations: int = setting("conjugate gradient iterations (trpo)", ge=1)
    damping: float = setting("added to the Fisher matrix (trpo)", ge=0)
    shrink: float = setting("factor of the line search (trpo)", gt=0, lt=1)
    backtracks: int = setting("trials of the line search (trpo)", ge=1)

    def build(self, family: TaskFamily) -> MAML:
        if self.fisher_tasks is not None and self.fisher_tasks > self.meta_batch:
            problem = f"a meta-batch has only algo.meta_batch={self.meta_batch} tasks"
            raise ConfigError("algo.fisher_tasks", self.fisher_tasks, problem)
        return MAML(
            **self.shared(family),
            outer=self.outer,
            epochs=self.epochs,
            clip=self.clip,
            max_kl=self.max_kl,
            fisher_tasks=self.fisher_tasks,
            cg_iterations=self.cg_iterations,
            damping=self.damping,
            shrink=self.shrink,
            backtracks=self.backtracks,
        )
