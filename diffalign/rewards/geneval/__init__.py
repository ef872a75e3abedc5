"""GenEval: whether the objects are there that a prompt asks for, in number, colour and place."""

from diffalign.rewards.geneval.detector import InstanceDetector
from diffalign.rewards.geneval.reward import GenEval
from diffalign.rewards.geneval.rules import Clause, Found, is_correct, relations, share_met, sort_out

__all__ = ["Clause", "Found", "GenEval", "InstanceDetector", "is_correct", "relations", "share_met", "sort_out"]
