"""The range of a number stands beside its field, as in `Annotated[float, Above(0)]`; one function checks them all."""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, fields
from functools import partial
from typing import Any, get_type_hints

from launch.errors import UsageError

LARGEST = 2**31 - 1  # of a C int
MOST_SECONDS = LARGEST // 1000  # poll() takes milliseconds as a C int


@dataclass(frozen=True)
class AtLeast:
    """Numbers from `low` to `most`, without `below` itself. NaN and infinity are in no range."""

    low: float
    _: KW_ONLY
    most: float = LARGEST
    below: float | None = None
    such_as: float | None = None  # a value that works, for the message
    start: str = "at least"

    def text(self) -> str:
        """The rule in words."""
        end = f"at most {self.most:,}" if self.below is None else f"below {self.below}"
        return f"must be {self.start} {self.low:,} and {end}" + (f"; try {self.such_as}" if self.such_as else "")


Above = partial(AtLeast, start="above")  # the same without `low` itself


def check_number(flag: str, number: float, rule: AtLeast) -> None:
    """Hold one number to its rule: `FLAG NUMBER: rule` as a UsageError if it breaks it."""
    starts = rule.low < number if rule.start == "above" else rule.low <= number  # NaN compares false with everything
    if not (starts and number <= rule.most and (rule.below is None or number < rule.below)):
        raise UsageError(f"{flag} {number}: {rule.text()}")


def rules_of(config_class: type) -> Iterator[tuple[str, AtLeast]]:
    """Each field that has a rule, with it."""
    hints = get_type_hints(config_class, include_extras=True)
    for field in fields(config_class):
        notes = getattr(hints[field.name], "__metadata__", ())
        yield from ((field.name, note) for note in notes if isinstance(note, AtLeast))


def check_numbers(config: Any) -> None:
    """Hold the numbers of a config to the rules beside their fields; None is off, and each number of a tuple counts."""
    for name, rule in rules_of(type(config)):
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else () if value is None else (value,):
            check_number(f"--{name.replace('_', '-')}", number, rule)
