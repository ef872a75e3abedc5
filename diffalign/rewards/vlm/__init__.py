"""Rewards from vision-language models: yes-probability, rating, pairs, written scores, here or on a server; VLM-RM."""

from diffalign.rewards.vlm.answer_pairs import AnswerPairs
from diffalign.rewards.vlm.cache import AnswerCache
from diffalign.rewards.vlm.goal_baseline import GoalBaseline
from diffalign.rewards.vlm.judge import AnswerError, Answers, Judge, PointwiseReward, Question, Readings
from diffalign.rewards.vlm.local import LocalVLM
from diffalign.rewards.vlm.pairwise import PairwiseJudge
from diffalign.rewards.vlm.questions import PAIRWISE, RATING, YES_NO
from diffalign.rewards.vlm.rating import Rating
from diffalign.rewards.vlm.server import JudgeServer
from diffalign.rewards.vlm.written import AnswerForm, WrittenPairs, WrittenRating
from diffalign.rewards.vlm.yes_logit import YesLogit

__all__ = [
    "PAIRWISE",
    "RATING",
    "YES_NO",
    "AnswerCache",
    "AnswerError",
    "AnswerForm",
    "AnswerPairs",
    "Answers",
    "GoalBaseline",
    "Judge",
    "JudgeServer",
    "LocalVLM",
    "PairwiseJudge",
    "PointwiseReward",
    "Question",
    "Rating",
    "Readings",
    "WrittenPairs",
    "WrittenRating",
    "YesLogit",
]
