"""Measures of behaviour that a limit can be put on: one object holds a measure's name, its option and its text.

missed    0 where the compact adapter behaves exactly as the original: 1 − retention, KL, 1 − agreement, the drop of accuracy
"""

from dataclasses import dataclass

from bslora_convert.recipe.options import flag_of


@dataclass(frozen=True, slots=True)
class Measure:
    """One measure. name: its field in records. option: the limit's name in Python. text: what it is, for a reader.

    more_is_better: whether the limit is a least value; otherwise it is a greatest one.
    """

    name: str
    option: str
    text: str
    more_is_better: bool = False

    @property
    def bound(self) -> str:
        """How a limit binds a value, in words."""
        return "at least" if self.more_is_better else "at most"

    @property
    def flag(self) -> str:
        """The limit's name on the command line."""
        return flag_of(self.option)

    def is_met(self, value: float, limit: float) -> bool:
        """Whether a value keeps to a limit."""
        return value >= limit if self.more_is_better else value <= limit

    def missed(self, value: float) -> float:
        """What a value lacks of the original's behaviour; of a limit, what may be lacking."""
        return 1 - value if self.more_is_better else value


RETENTION = Measure("retention", "min_retention", "share of the adapter's effect kept", more_is_better=True)
KL = Measure("kl", "max_kl", "KL to the original")
AGREEMENT = Measure("agreement", "min_agreement", "share of tokens with the same first choice", more_is_better=True)
ACCURACY_DROP = Measure("accuracy_drop", "max_accuracy_drop", "largest drop of a task's score")

ON_PROMPTS = {measure.option: measure for measure in (RETENTION, KL, AGREEMENT)}
MEASURES = {**ON_PROMPTS, ACCURACY_DROP.option: ACCURACY_DROP}
