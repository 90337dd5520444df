import dataclasses
import math

import pytest
from absl import flags as absl_flags

from rlhf_jax import flags, ranges


@dataclasses.dataclass(frozen=True)
class Ranges:
  """A field of each range."""

  positive: float = 1e-9
  non_negative: int = 0
  at_least_one: int = 1
  fraction: float = 1.0
  below_one: float = 0.0
  above_zero: float = 1.0
  unset: float | None = None
  loss: str = "ipo"
  works: tuple[str, ...] = ("sft",)

  def __post_init__(self):
    ranges.check(
      self,
      positive=("positive", "unset"),
      non_negative=("non_negative",),
      at_least_one=("at_least_one",),
      fraction=("fraction",),
      below_one=("below_one",),
      above_zero=("above_zero",),
      one_of={"loss": {"sigmoid": 0, "ipo": 1}},
      among={"works": ("sft", "dpo")},
    )


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"positive": 0}, "positive must be positive, got 0"),
    ({"unset": -1.5}, "unset must be positive, got -1.5"),
    ({"non_negative": -1}, "non_negative must not be negative, got -1"),
    ({"at_least_one": 0}, "at_least_one must be at least 1, got 0"),
    ({"at_least_one": 2**31}, "at_least_one must be less than 2**31, got 2147483648"),
    ({"fraction": 1.01}, "fraction must be in [0, 1], got 1.01"),
    ({"fraction": -0.01}, "fraction must be in [0, 1], got -0.01"),
    ({"below_one": 1.0}, "below_one must be in [0, 1), got 1.0"),
    ({"above_zero": 0.0}, "above_zero must be in (0, 1], got 0.0"),
    ({"loss": "hinge"}, "loss must be one of sigmoid, ipo, got 'hinge'"),
    ({"works": ("dpo", "ppo")}, "works must be among sft, dpo, got 'ppo'"),
  ],
)
def test_a_field_outside_its_range_is_named(changes, message):
  with pytest.raises(ValueError) as error:
    Ranges(**changes)
  assert str(error.value) == message


WORDS = ("loss", "works")
NUMBERS = tuple(field.name for field in dataclasses.fields(Ranges) if field.name not in WORDS)


@pytest.mark.parametrize("name", NUMBERS)
def test_nan_is_outside_every_range(name):
  with pytest.raises(ValueError, match=f"^{name} must "):
    Ranges(**{name: math.nan})


@pytest.mark.parametrize(
  "changes",
  [
    *({}, {"unset": 2.0}, {"fraction": 0.0}, {"below_one": 0.99}, {"above_zero": 1e-9}),
    {"at_least_one": 2**31 - 1},
  ],
)
def test_ends_of_a_range(changes):
  Ranges(**changes)


def test_the_message_names_the_flag():
  outer = dataclasses.make_dataclass("Outer", [("dpo", Ranges, Ranges())], frozen=True)
  registry = absl_flags.FlagValues()
  read = flags.define(outer, flag_values=registry)
  flags.parse(["prog", "--dpo.below_one=2"], registry)
  with pytest.raises(flags.UsageError, match=r"^--dpo.below_one must be in \[0, 1\), got 2.0$"):
    read()
