"""The types of reward recipe that are made of other rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from diffalign.rewards import combination, combine, constraints, ensembles, groups, pareto, references
from diffalign.rewards.base import Reward
from diffalign.rewards.recipe import REWARD_TYPES, RewardRecipe, part
from diffalign.rewards.statistics import StandardisedSum, Statistics

Part = str | dict[str, Any]
"""A reward inside another: its name, the file of its recipe (relative to this one), or a recipe in place."""


class Term(BaseModel):
    """A reward and its weight."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    reward: Part
    weight: float = 1.0


class Constraint(BaseModel):
    """A reward and what its mean must reach."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    reward: Part
    at_least: float


def _as_term(value: Any) -> Any:
    return {"reward": value} if isinstance(value, str) else value


Terms = Annotated[list[Annotated[Term, BeforeValidator(_as_term)]], Field(min_length=1)]


class TermsRecipe(RewardRecipe):
    """A combination of weighted rewards."""

    terms: Terms

    def pairs(self, folder: Path) -> list[tuple[Reward, float]]:
        """(reward, weight) of each term."""
        return [(part(term.reward, folder), term.weight) for term in self.terms]


class MembersRecipe(RewardRecipe):
    """A combination of rewards that are on one scale."""

    members: Annotated[list[Part], Field(min_length=1)]

    def rewards(self, folder: Path) -> list[Reward]:
        """The members."""
        return [part(member, folder) for member in self.members]


@REWARD_TYPES.register("weighted_sum")
class WeightedSumRecipe(TermsRecipe):
    """sum_k w_k r_k."""

    def build(self, folder: Path) -> Reward:
        """A `WeightedSum`."""
        return combination.WeightedSum(self.pairs(folder), self.name)


@REWARD_TYPES.register("standardised_sum")
class StandardisedSumRecipe(TermsRecipe):
    """sum_k w_k (r_k - mean_k) / std_k."""

    statistics: dict[str, Statistics] = Field(description="mean and std of each reward, by name")

    def build(self, folder: Path) -> Reward:
        """A `StandardisedSum`."""
        return StandardisedSum(self.pairs(folder), self.statistics, name=self.name)


@REWARD_TYPES.register("group_standardised")
class GroupStandardisedRecipe(TermsRecipe):
    """sum_k w_k (r_k - mean_k) / std_k, with mean and std of the images of the prompt."""

    def build(self, folder: Path) -> Reward:
        """A `GroupStandardised`."""
        return groups.GroupStandardised(self.pairs(folder), name=self.name)


@REWARD_TYPES.register("harmonic")
class HarmonicRecipe(TermsRecipe):
    """The weighted harmonic mean."""

    def build(self, folder: Path) -> Reward:
        """A `Harmonic`."""
        return combine.Harmonic(self.pairs(folder), name=self.name)


@REWARD_TYPES.register("log_sigmoid")
class LogSigmoidRecipe(TermsRecipe):
    """sum_k w_k log sigmoid((r_k - tau_k) / s_k)."""

    thresholds: dict[str, float | dict[str, float] | str] = Field(
        description="tau of each reward: a number, prompt -> number, or the key of the prompt's metadata"
    )
    scales: dict[str, float] | None = Field(None, description="s of each reward; 1 where it is left out")

    def build(self, folder: Path) -> Reward:
        """A `LogSigmoid`."""
        return references.LogSigmoid(self.pairs(folder), self.thresholds, self.scales, name=self.name)


@REWARD_TYPES.register("mean")
class MeanRecipe(MembersRecipe):
    """The mean of an ensemble."""

    def build(self, folder: Path) -> Reward:
        """A `Mean`."""
        return ensembles.Mean(self.rewards(folder), name=self.name)


@REWARD_TYPES.register("worst_case")
class WorstCaseRecipe(MembersRecipe):
    """The least of an ensemble (WCO)."""

    def build(self, folder: Path) -> Reward:
        """A `WorstCase`."""
        return ensembles.WorstCase(self.rewards(folder), name=self.name)


@REWARD_TYPES.register("uncertainty_weighted")
class UncertaintyWeightedRecipe(MembersRecipe):
    """Mean minus penalty times variance (UWO)."""

    penalty: float = Field(ge=0)

    def build(self, folder: Path) -> Reward:
        """An `UncertaintyWeighted`."""
        return ensembles.UncertaintyWeighted(self.rewards(folder), self.penalty, name=self.name)


@REWARD_TYPES.register("soft_min")
class SoftMinRecipe(MembersRecipe):
    """Between the mean and the least, by temperature."""

    temperature: float = Field(gt=0)

    def build(self, folder: Path) -> Reward:
        """A `SoftMin`."""
        return ensembles.SoftMin(self.rewards(folder), self.temperature, name=self.name)


@REWARD_TYPES.register("inverse_variance")
class InverseVarianceRecipe(MembersRecipe):
    """The mean weighted by each member's own certainty."""

    def build(self, folder: Path) -> Reward:
        """An `InverseVariance`."""
        return ensembles.InverseVariance(self.rewards(folder), name=self.name)


@REWARD_TYPES.register("pareto_rank")
class ParetoRankRecipe(MembersRecipe):
    """The share of the images of one prompt that an image beats, by non-dominated sorting."""

    def build(self, folder: Path) -> Reward:
        """A `ParetoRank`."""
        return pareto.ParetoRank(self.rewards(folder), name=self.name)


@REWARD_TYPES.register("hinge")
class HingeRecipe(RewardRecipe):
    """min(r, target)."""

    reward: Part
    target: float

    def build(self, folder: Path) -> Reward:
        """A `Hinge`."""
        return combine.Hinge(part(self.reward, folder), self.target, name=self.name)


@REWARD_TYPES.register("gate")
class GateRecipe(RewardRecipe):
    """A reward that counts only where another is high enough."""

    reward: Part
    where: Part
    at_least: float
    otherwise: float = Field(description="the score of an image that does not pass")

    def build(self, folder: Path) -> Reward:
        """A `Gate`."""
        opened, where = part(self.reward, folder), part(self.where, folder)
        return combine.Gate(opened, where, at_least=self.at_least, otherwise=self.otherwise, name=self.name)


@REWARD_TYPES.register("par")
class ParRecipe(RewardRecipe):
    """The mean of sigmoid(r - r_m) over reference samples of the prompt."""

    reward: Part
    references: dict[str, float | list[float]] | str = Field(
        description="prompt -> rewards of its reference samples, or the key of the prompt's metadata with them"
    )

    def build(self, folder: Path) -> Reward:
        """A `PAR`."""
        return references.PAR(part(self.reward, folder), self.references, name=self.name)


@REWARD_TYPES.register("lagrangian")
class LagrangianRecipe(RewardRecipe):
    """A reward under constraints on the means of others."""

    objective: Part
    constraints: Annotated[list[Constraint], Field(min_length=1)]
    rate: float = Field(gt=0, description="step of the multipliers")

    def build(self, folder: Path) -> Reward:
        """A `Lagrangian`."""
        bounds = [(part(each.reward, folder), each.at_least) for each in self.constraints]
        return constraints.Lagrangian(part(self.objective, folder), bounds, self.rate, name=self.name)
