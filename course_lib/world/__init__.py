"""The small world that the shipped model was pretrained on: sums with checkable answers, and a
village.
"""

from course_lib.world.sums import (
    QUESTION_FORMS,
    SumProblem,
    direct_answer,
    is_heldout,
    sum_problem,
    worked_answer,
)
from course_lib.world.village import VILLAGERS, fact_question, fact_sentence

__all__ = [
    "QUESTION_FORMS",
    "VILLAGERS",
    "SumProblem",
    "direct_answer",
    "fact_question",
    "fact_sentence",
    "is_heldout",
    "sum_problem",
    "worked_answer",
]
