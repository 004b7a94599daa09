"""Values that may change over training: a number, or a function of the optimizer steps that were taken."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["LinearRamp", "StepValue", "value_at"]

StepValue: TypeAlias = float | Callable[[int], float]
"""A number, or a function of the number of optimizer steps that were taken."""


@dataclass(frozen=True)
class LinearRamp:
    """A value that goes in a line from `start` to `end`, for recipes that warm a weight up or let it decay.

    Args:
        start: value until `after` steps were taken.
        end: value from `after + steps` on.
        steps: steps that it takes, at least 1.
        after: steps before it begins.

    Example:
        >>> ramp = LinearRamp(0.0, 0.5, steps=10)
        >>> [ramp(step) for step in (0, 5, 10, 11)]
        [0.0, 0.25, 0.5, 0.5]
    """

    start: float
    end: float
    steps: int
    after: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Expected `steps` to be at least 1, but got {self.steps}.")

    def __call__(self, step: int) -> float:
        """Return the value after so many steps."""
        share = min(1.0, max(0.0, (step - self.after) / self.steps))
        return self.start + share * (self.end - self.start)


def value_at(value: StepValue, step: int) -> float:
    """Return a value at a step."""
    return float(value(step)) if callable(value) else value
