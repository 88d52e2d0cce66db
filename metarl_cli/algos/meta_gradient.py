"""Meta-gradient reinforcement learning (Xu, van Hasselt & Silver 2018, arXiv:1805.09801).

An actor-critic whose discount, lambda, weight of the entropy and learning rate are meta-parameters eta, adapted online by
the gradient through the update (equations 3 to 8):

    theta' = theta - lr grad_theta mean_t [ -log pi(a_t|s_t) A_t + c (G_t - v(s_t))^2 / 2 - beta H(pi(.|s_t)) ]           (1)
    eta  <-  eta - eta_lr d/d eta L_out(theta'(eta)),    on fresh episodes, with a fixed discount                         (2)

G are lambda-returns, `A = G - v`, standardised; both are constants for the agent, and depend on eta as the step does. gamma
and lambda are sigmoids, beta and lr exponentials of what is learned: each stays where it has a meaning. The paper learns
gamma and lambda alone (beta and lr: as in Zahavy et al. 2020), tells the value function gamma, and does not standardise. It
has one long life; here several agents share eta, and with `meta_batch=1` there is one. It differentiates one update, as
`inner_steps=1` does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.special import logit

from metarl_cli.core.interfaces import Metrics, TaskFamily
from metarl_cli.core.lifetimes import Agent, Lifetimes, LifetimesSettings
from metarl_cli.core.returns import gae, masked_mean, standardise
from metarl_cli.core.settings import setting
from metarl_cli.core.types import Batch, Key, Params, pytree


@pytree
class MetaGradient(Lifetimes):
    gamma: float | jax.Array  # where they start
    lam: float | jax.Array
    entropy: float | jax.Array
    value: float | jax.Array  # c

    def init_rule(self, key: Key) -> Params:
        return {
            "gamma": logit(jnp.asarray(self.gamma, float)),
            "lam": logit(jnp.asarray(self.lam, float)),
            "entropy": jnp.log(jnp.asarray(self.entropy, float)),
            "lr": jnp.log(jnp.asarray(self.inner_lr, float)),
        }

    def describe(self, eta: Params) -> Metrics:
        """The meta-parameters in units of their own."""
        return {
            "gamma": jax.nn.sigmoid(eta["gamma"]),
            "lam": jax.nn.sigmoid(eta["lam"]),
            "entropy_weight": jnp.exp(eta["entropy"]),
            "inner_lr": jnp.exp(eta["lr"]),
        }

    def update_agent(self, eta: Params, agent: Agent, batch: Batch) -> tuple[Agent, jax.Array]:
        hyper = self.describe(eta)
        _, value = self.network.apply(agent.params, batch.observation)
        value = jnp.where(batch.valid, value[..., 0], 0)
        next_value = jnp.concatenate([value[:, 1:], jnp.zeros_like(value[:, :1])], axis=1)
        end = batch.terminated | batch.truncated  # the time limit is a part of the task: see `InnerLoop.data`
        reward = jnp.where(batch.valid, batch.reward, 0)
        advantage = gae(reward, value, next_value, end, end, hyper["gamma"], hyper["lam"])
        target = value + advantage
        if batch.valid.size > 1:
            advantage = standardise(advantage, batch.valid)

        def loss(params):  # advantage and target are constants here, but not for the meta-gradient
            policy, value = self.network.apply(params, batch.observation)
            actor = -masked_mean(policy.log_prob(batch.action) * advantage, batch.valid)
            critic = 0.5 * masked_mean((target - value[..., 0]) ** 2, batch.valid)
            return actor + self.value * critic - hyper["entropy_weight"] * masked_mean(policy.entropy(), batch.valid)

        return self.descend(agent, jax.grad(loss)(agent.params), hyper["inner_lr"]), jnp.zeros(())


class MetaGradientSettings(LifetimesSettings):
    gamma: float = setting("discount, where it starts", gt=0, lt=1)
    lam: float = setting("lambda of the advantage estimates, where it starts", gt=0, lt=1)
    entropy: float = setting("weight of the entropy bonus, where it starts", gt=0)
    value: float = setting("weight of the value loss", ge=0)

    def build(self, family: TaskFamily) -> MetaGradient:
        return MetaGradient(
            **self.shared(family, outputs=1), gamma=self.gamma, lam=self.lam, entropy=self.entropy, value=self.value
        )
