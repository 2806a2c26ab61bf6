"""The one error a learner can cause: it says where, what, and what to do."""


class CourseError(Exception):
    """A mistake that a person can mend, told in one line: place, finding, remedy.

    >>> print(CourseError("data/sft.jsonl:17", "role 'bot' is unknown", "use system or user"))
    data/sft.jsonl:17: role 'bot' is unknown; use system or user
    """

    def __init__(self, place: str, finding: str, remedy: str) -> None:
        super().__init__(f"{place}: {finding}; {remedy}")
        self.place = place
        self.finding = finding
        self.remedy = remedy
