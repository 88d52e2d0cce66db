"""Greedy and epsilon-greedy, on bandits and on tabular MDPs."""

from __future__ import annotations

from metarl_cli.baselines import bandits, mdps
from metarl_cli.baselines.base import refuse
from metarl_cli.core.interfaces import TaskFamily
from metarl_cli.core.rollout import spaces
from metarl_cli.core.settings import setting
from metarl_cli.core.types import TabularMDP


class EpsilonGreedySettings(mdps.BayesianMDPSettings):
    """The prior is of tabular MDPs; on bandits it is Beta(1, 1), or the family's where arms are Gaussian."""

    epsilon: float = setting("probability of a random action; 0 is greedy", ge=0, le=1)

    def build(self, family: TaskFamily) -> bandits.EpsilonGreedyArms | mdps.EpsilonGreedyMDP:
        if isinstance(family.prior, TabularMDP):
            prior = mdps.mdp_prior(self, family, "epsilon_greedy")
            return mdps.EpsilonGreedyMDP(epsilon=self.epsilon, prior=prior, spec=spaces(family))
        if not bandits.has_arms(family):
            refuse(family, "epsilon_greedy", f"{bandits.FITS} and {mdps.FITS}")
        return bandits.EpsilonGreedyArms(epsilon=self.epsilon, prior=family.prior, spec=spaces(family))
