"""Types of constants with the range of their values, for the constants of the stages: `EPOCHS: Count = 300`."""

import math
from typing import Annotated, NamedTuple

LARGEST = 2**31 - 1  # whole numbers above it do not fit into the index types of the libraries


class Range(NamedTuple):
    """The values that a constant may have."""

    words: str  # for --help and messages
    low: float
    high: float = LARGEST
    without_low: bool = False  # whether the lowest value is excluded
    without_high: bool = False

    def holds(self, value: float) -> bool:
        if not math.isfinite(value) or not self.low <= value <= self.high:
            return False
        return not (self.without_low and value == self.low) and not (self.without_high and value == self.high)


Whole = Annotated[int, Range("at least 0", 0)]
Count = Annotated[int, Range("at least 1", 1)]
Several = Annotated[int, Range("at least 2", 2)]
Seed = Annotated[int, Range("0 to 4,294,967,295", 0, 2**32 - 1)]  # what NumPy takes
NotNegative = Annotated[float, Range("at least 0", 0)]
Positive = Annotated[float, Range("above 0", 0, without_low=True)]
Share = Annotated[float, Range("0 to 1", 0, 1)]
Fraction = Annotated[float, Range("between 0 and 1", 0, 1, without_low=True, without_high=True)]
Part = Annotated[float, Range("0 to less than 1", 0, 1, without_high=True)]
Percent = Annotated[float, Range("above 0, at most 100", 0, 100, without_low=True)]
