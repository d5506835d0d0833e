"""Answers: what ``predict`` states about each sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from torch import Tensor

from mics_fast.evaluation.operating_point import OperatingPoint
from mics_fast.evaluation.opinions import Opinions
from mics_kernels import opinion

PLAIN = OperatingPoint()

# Functional syntax: "class" is a keyword.
Stated = TypedDict("Stated", {"class": str, "belief": dict[str, float], "uncertainty": float})
"""One opinion: its class (highest belief), the belief in each class, and the vacuity."""

Answer = TypedDict(
    "Answer",
    {
        "id": str,
        "class": str,
        "probability": dict[str, float],
        "belief": dict[str, float],
        "uncertainty": float,
        "conflict": float,
        "refer": bool | None,
        "reason": NotRequired[str],
        "set": NotRequired[list[str]],
        "views": dict[str, Stated],
    },
)
"""The fused opinion on a sample, and under "views" the opinion of each head that has its input.

"belief" and "uncertainty" sum to 1. "refer" is None if no referral rule was chosen; "reason" is
present if "refer" is true, "set" if prediction sets were chosen.
"""


class Failure(TypedDict):
    """A sample without an answer: its id, and the reason in a sentence."""

    id: str
    error: str


def answer(
    opinions: Opinions, ids: Sequence[str], classes: Sequence[str], point: OperatingPoint = PLAIN
) -> list[Answer]:
    """State an answer per row.

    Args:
        opinions: Of N rows.
        ids: Names of the N rows.
        classes: Names of the C classes.
        point: Calibration of the fused opinion, and the referral rule.
    """
    fused, single = point.opinion(opinions.fused_evidence()), opinion(opinions.evidence)
    disagreement = opinions.conflict().tolist()

    def named(values: Tensor) -> dict[str, float]:
        return dict(zip(classes, values.tolist(), strict=True))

    def stated(belief: Tensor, uncertainty: Tensor) -> Stated:
        return {
            "class": classes[int(belief.argmax())],
            "belief": named(belief),
            "uncertainty": uncertainty.item(),
        }

    answers: list[Answer] = []
    for row, name in enumerate(ids):
        own = stated(fused.belief[row], fused.uncertainty[row])
        one: Answer = {
            "id": name,
            "class": own["class"],
            "probability": named(fused.probability[row]),
            "belief": own["belief"],
            "uncertainty": own["uncertainty"],
            "conflict": disagreement[row],
            "refer": None,
            "views": {
                head: stated(single.belief[row, column], single.uncertainty[row, column])
                for column, head in enumerate(opinions.heads)
                if opinions.present[row, column]
            },
        }
        if point.sets:
            members = point.sets.members(fused.probability[row])
            one["set"] = [name for name, own in zip(classes, members, strict=True) if own]
        if point.rule:
            top = max(one["probability"].values())
            reason = point.rule.reason(own["uncertainty"], top)
            one["refer"] = bool(reason)
            if reason:
                one["reason"] = reason
        answers.append(one)
    return answers


def flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a record to one line of a table; nested names are joined by a dot."""
    line: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            prefix = "" if name == "views" else f"{name}."
            line |= {f"{prefix}{inner}": kept for inner, kept in flat(value).items()}
        elif isinstance(value, list):
            line[name] = "; ".join(value)
        else:
            line[name] = value
    return line
