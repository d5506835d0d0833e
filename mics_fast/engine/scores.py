"""Scores of a stage on the val rows: the latest one, the best one, and how long ago that was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Scores:
    """Keeps the best score, and counts validations since.

    Args:
        title: Of the score, for the terminal.
        patience: Validations without a better score after which training ends; 0 = it never does.
    """

    def __init__(self, title: str, patience: int = 0) -> None:
        self.title, self.patience = title, patience
        self.best: float | None = None
        self.best_step = 0
        self.waited = 0

    def add(self, step: int, score: float) -> bool:
        """Take in the score of a step; return whether it is the best so far."""
        if self.best is not None and self.best >= score:
            self.waited += 1
            return False
        self.best, self.best_step, self.waited = score, step, 0
        return True

    def out_of_patience(self) -> bool:
        """Return whether training should end."""
        return 0 < self.patience <= self.waited

    def words(self, score: float) -> str:
        """Say how a score compares, as in "val F1 0.74 (best 0.76, step 300)"."""
        return f"{self.title} {score:.3f} (best {self.best:.3f}, step {self.best_step})"

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.best_step = state["best"], state["best_step"]
        self.waited = state["waited"]
