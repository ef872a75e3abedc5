"""Does an image keep to the map that it was conditioned on? Edges, depth and segmentation, differentiable."""

from diffalign.rewards.conditions.base import ConditionReward, uncertainty_weighted_loss
from diffalign.rewards.conditions.depth import DepthConsistency
from diffalign.rewards.conditions.edges import EdgeConsistency, edge_strength
from diffalign.rewards.conditions.segmentation import SegmentationConsistency

__all__ = [
    "ConditionReward",
    "DepthConsistency",
    "EdgeConsistency",
    "SegmentationConsistency",
    "edge_strength",
    "uncertainty_weighted_loss",
]
