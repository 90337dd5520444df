"""Fields of settings: range checks, and marks for `--help`. Imports no other rlhf_jax module."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

_END = 2**31  # Counts on devices are int32.


def rare(default: Any) -> Any:
  """A dataclass field with a default that is rarely changed: `--help` leaves its flag out."""
  return dataclasses.field(default=default, metadata={"rare": True})


def check(
  config: Any,
  *,
  positive: Sequence[str] = (),
  non_negative: Sequence[str] = (),
  at_least_one: Sequence[str] = (),
  fraction: Sequence[str] = (),
  below_one: Sequence[str] = (),
  above_zero: Sequence[str] = (),
  one_of: Mapping[str, Collection[Any]] | None = None,
  among: Mapping[str, Collection[Any]] | None = None,
) -> None:
  """Refuses a config with a field outside its range; for `__post_init__`.

  A NaN is outside every range. A None, of a field that may be left unset, is not checked.

  Args:
    config: Object with the fields.
    positive: Names of fields that must be above 0.
    non_negative: Names of fields that must be 0 or more.
    at_least_one: Names of fields that must be 1 or more.
    fraction: Names of fields that must be in [0, 1].
    below_one: Names of fields that must be in [0, 1).
    above_zero: Names of fields that must be in (0, 1].
    one_of: Field name -> its known values.
    among: Field name -> the known values of its items.

  Raises:
    ValueError: A field is outside its range. The message starts with the name of the field.
  """
  checks = (
    (positive, lambda x: x > 0, "be positive"),
    (non_negative, lambda x: x >= 0, "not be negative"),
    (at_least_one, lambda x: x >= 1, "be at least 1"),
    (fraction, lambda x: 0 <= x <= 1, "be in [0, 1]"),
    (below_one, lambda x: 0 <= x < 1, "be in [0, 1)"),
    (above_zero, lambda x: 0 < x <= 1, "be in (0, 1]"),
  )
  for names, holds, words in checks:
    for name in names:
      value = getattr(config, name)
      if value is not None and not holds(value):
        raise ValueError(f"{name} must {words}, got {value}")
      if isinstance(value, int) and value >= _END:
        raise ValueError(f"{name} must be less than 2**31, got {value}")
  for name, known in (one_of or {}).items():
    value = getattr(config, name)
    if value not in known:
      raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")
  for name, known in (among or {}).items():
    for value in getattr(config, name):
      if value not in known:
        raise ValueError(f"{name} must be among {', '.join(map(str, known))}, got {value!r}")
