"""The operating point of a run: calibration and referral rule, chosen once on the val rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from torch import Tensor

from mics_fast.common.errors import InputError
from mics_fast.evaluation import CRITERIA
from mics_fast.evaluation.calibration import Calibration, Kind, calibrate
from mics_fast.evaluation.opinions import FUSED, Predictions, Source
from mics_fast.evaluation.prediction_sets import SetRule
from mics_fast.evaluation.referral import Rule, Target
from mics_kernels import Opinion, opinion

VALUES = ("ppv", "npv")


@dataclass(frozen=True)
class OperatingPoint:
    """Calibration and referral rule that turn the opinions of a run into answers.

    Args:
        calibration: Factors of the opinions; None: not calibrated.
        rule: Referral rule; None: not chosen.
        target: The guarantee that the rule was chosen for; None without a rule.
        predictive_values: Class -> "ppv" and "npv" among the answered rows on which the rule was
            measured; None where undefined.
        flips: True to average the opinions on an image and three mirror images of it.
        sets: Rule of the conformal prediction sets; None: no sets.
    """

    calibration: Calibration | None = None
    rule: Rule | None = None
    target: Target | None = None
    predictive_values: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    flips: bool = False
    sets: SetRule | None = None

    def opinion(self, evidence: Tensor) -> Opinion:
        """State the calibrated opinion of fused evidence (N, C).

        A temperature changes only the probabilities, not belief and uncertainty.
        """
        factor = self.fused_factor()
        if self.calibration is None or factor is None:
            return opinion(evidence)
        if self.calibration.kind == "evidence":
            return opinion(evidence * factor)
        stated = opinion(evidence)
        zeros = stated.uncertainty.long() * 0
        own = Predictions(stated.probability, stated.uncertainty, zeros, zeros)
        return stated._replace(probability=calibrate(own, "temperature", factor).probability)

    def fused_factor(self) -> float | None:
        """Return the factor of the fused opinion; None without one."""
        return None if self.calibration is None else self.calibration.factors.get(FUSED)

    def json(self) -> dict[str, Any]:
        """Return everything as one JSON object."""
        rule, target = self.rule, self.target
        return {
            "calibration": self.calibration and self.calibration.json(),
            "referral": rule
            and {
                "by": rule.by,
                "limit": rule.limit if math.isfinite(rule.limit) else None,
                "target_risk": target and target.risk,
                "confidence": target and target.confidence,
                "predictive_values": self.predictive_values,
            },
            "flips": self.flips,
            "sets": self.sets and vars(self.sets),
        }


def read_operating_point(values: Any, classes: Sequence[str], whose: object) -> OperatingPoint:
    """Check an operating point read from a file.

    Args:
        values: Parsed JSON, as ``OperatingPoint.json`` returns it.
        classes: Of the model.
        whose: The file, for the message.

    Raises:
        InputError: a value is missing or invalid.
    """
    try:
        calibration, referral = values["calibration"], values["referral"]
        found = None
        if calibration is not None:
            if calibration["kind"] not in get_args(Kind):
                raise ValueError(f"calibration is of kind {calibration['kind']!r}")
            factors = calibration["factors"]
            found = Calibration(
                calibration["kind"],
                {Source(name, key == "missing"): _number(own, 1e-6, 1e6)
                 for key in ("views", "missing") for name, own in factors[key].items()},
            )  # fmt: skip
        # Absent in files of older versions.
        flips, chosen = values.get("flips", False), values.get("sets")
        if not isinstance(flips, bool):
            raise ValueError(f"flips is {flips!r}, wanted true or false")
        sets = None
        if chosen is not None:
            sets = SetRule(_number(chosen["coverage"], 0, 1), _number(chosen["limit"], 0, 1))
        if referral is None:
            return OperatingPoint(found, flips=flips, sets=sets)
        if referral["by"] not in CRITERIA:
            raise ValueError(f"referral is by {referral['by']!r}")
        limit = math.inf if referral["limit"] is None else _number(referral["limit"], 0, 1)
        confidence = referral["confidence"]
        target = Target(
            _number(referral["target_risk"], 0, 1),
            None if confidence is None else _number(confidence, 0, 1),
        )
        given = referral["predictive_values"]
        if set(given) - set(classes):
            raise ValueError(f"class {min(set(given) - set(classes))!r} is not the model's")
        measured = {
            name: {key: None if own[key] is None else _number(own[key], 0, 1) for key in VALUES}
            for name, own in given.items()
        }
        return OperatingPoint(found, Rule(referral["by"], limit), target, measured, flips, sets)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{whose} holds no operating point: {error}") from None


def _number(value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{value!r} is given, wanted a number from {low:g} to {high:g}")
    return float(value)
