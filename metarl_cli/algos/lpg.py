"""LPG: a learned policy gradient (Oh et al. 2020, arXiv:2007.08794).

The agent has a policy and, instead of a value, a categorical prediction y(s), whose meaning the rule finds by itself. A
recurrent network with weights eta reads an episode backwards and says what to aim at (equations 2 and 3):

    theta' = theta + lr mean_t [ grad log pi(a_t|s_t) pi_hat_t - alpha_y grad KL(y(s_t) || y_hat_t) ]                     (1)
    (pi_hat_t, y_hat_t) = LPG_eta(r_t, d_t, gamma, pi(a_t|s_t), phi_eta(y(s_t)), phi_eta(y(s_{t+1})); later steps)

phi has a hidden layer and one output. eta is learned (equations 3 and 4) for the return of the agents after N updates, with
their entropy, and these regularisers, averaged over the updates:

    - beta_1 H(y(s_t)) + beta_2 pi_hat_t^2 + beta_3 |y_hat_t|^2,    the last of the network's output before its softmax

No number of eta depends on a family, so a rule runs on any. pi(a|s) of continuous actions is a density, given as
p / (1 + p). The paper's agents step on in parallel environments, here each update has K whole episodes; it fits a critic
along each life to lower the variance of the meta-gradient, here a baseline is fitted to the episodes after the last update.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from metarl_cli.core.distributions import Categorical
from metarl_cli.core.interfaces import TaskFamily
from metarl_cli.core.lifetimes import Agent, Lifetimes, LifetimesSettings
from metarl_cli.core.networks import BackwardNetwork
from metarl_cli.core.returns import masked_mean
from metarl_cli.core.settings import setting
from metarl_cli.core.types import Batch, Key, Params, pytree, static


@pytree
class LPG(Lifetimes):
    gamma: float | jax.Array
    prediction: float | jax.Array  # alpha_y
    prediction_entropy: float | jax.Array  # beta_1
    policy_l2: float | jax.Array  # beta_2
    prediction_l2: float | jax.Array  # beta_3
    rule: BackwardNetwork = static()

    def init_rule(self, key: Key) -> Params:
        return self.rule.init(key)

    def targets(self, eta: Params, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """pi_hat `[K, T]` and y_hat `[K, T, M]` before its softmax, of K episodes."""
        policy, y = self.network.apply(params, batch.observation)
        log_prob = policy.log_prob(batch.action)
        taken = jnp.exp(log_prob) if self.network.policy.spec.discrete else jax.nn.sigmoid(log_prob)
        end = batch.terminated | batch.truncated | ~batch.valid
        steps = jnp.stack([batch.reward, end.astype(float), jnp.full_like(batch.reward, self.gamma), taken], axis=-1)
        return self.rule.apply(eta, steps, jax.nn.softmax(y), end)

    def update_agent(self, eta: Params, agent: Agent, batch: Batch) -> tuple[Agent, jax.Array]:
        pi_hat, y_hat = self.targets(eta, agent.params, batch)

        def loss(params):  # the targets are constants here, but not for the meta-gradient
            policy, y = self.network.apply(params, batch.observation)
            aim = masked_mean(policy.log_prob(batch.action) * pi_hat, batch.valid)
            return self.prediction * masked_mean(Categorical(y).kl(Categorical(y_hat)), batch.valid) - aim

        _, y = self.network.apply(agent.params, batch.observation)
        cost = (
            self.policy_l2 * masked_mean(pi_hat**2, batch.valid)
            + self.prediction_l2 * masked_mean(jnp.mean(y_hat**2, axis=-1), batch.valid)
            - self.prediction_entropy * masked_mean(Categorical(y).entropy(), batch.valid)
        )
        return self.descend(agent, jax.grad(loss)(agent.params), self.inner_lr), cost


class LPGSettings(LifetimesSettings):
    gamma: float = setting("discount that the rule is told", ge=0, le=1)
    predictions: int = setting("categories of an agent's prediction y", ge=2)
    units: int = setting("of the rule's recurrent network", unit="units", ge=1)
    embedding: int = setting("hidden units of what the rule makes of a prediction", unit="units", ge=1)
    prediction: float = setting("weight alpha_y of the predictions in an agent's update", ge=0)
    prediction_entropy: float = setting(
        "weight of the predictions' entropy in what the rule is learned for (gradient)", ge=0
    )
    policy_l2: float = setting("penalty on the square of policy targets (gradient)", ge=0)
    prediction_l2: float = setting("penalty on the square of prediction targets (gradient)", ge=0)

    def build(self, family: TaskFamily) -> LPG:
        return LPG(
            **self.shared(family, outputs=self.predictions),
            gamma=self.gamma,
            prediction=self.prediction,
            prediction_entropy=self.prediction_entropy,
            policy_l2=self.policy_l2,
            prediction_l2=self.prediction_l2,
            rule=BackwardNetwork(self.predictions, self.units, self.embedding),
        )
