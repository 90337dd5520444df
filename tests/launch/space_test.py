import math

import pytest

from launch import space


@pytest.mark.parametrize(
  "text, value, keeps",
  [
    ("kl<10", 9.9, True),
    ("kl<10", 10.0, False),
    ("kl<=10", 10.0, True),
    ("gold/mean >= 5", 5.0, True),
    ("gold/mean>5", 5.0, False),
    ("x>-1e-3", 0.0, True),
    ("x<1", math.nan, False),
  ],
)
def test_constraint(text, value, keeps):
  assert (space.Constraint.parse(text).violation(value) <= 0) == keeps


@pytest.mark.parametrize(
  "text, message",
  [
    ("x = 1", "must define a function space"),
    ("def space(trial): return {}", None),
    ("DEFAULTS = {'x': 1.0}\ndef space(trial): return [trial]", "must return a dict of flags"),
    ("DEFAULTS = {'x': 1.0}\ndef space(trial): return {'--x': 1}", "'--x' is no name of a flag"),
    (
      "DEFAULTS = {'x': 1.0}\ndef space(trial): return {'y': trial.suggest_float('y', 0, 1)}",
      "with DEFAULTS, ",
    ),
  ],
)
def test_space_files(tmp_path, text, message):
  (tmp_path / "space.py").write_text(text)
  if message is None:
    assert space.load_space(str(tmp_path / "space.py")).sample is not None
    return
  with pytest.raises(space.SweepError, match=message):
    space.load_space(str(tmp_path / "space.py"))


@pytest.mark.parametrize(
  "value, text",
  [(True, "true"), (None, "none"), ((0.5, 0.7), "0.5,0.7"), (1e-05, "1e-05"), ("ipo", "ipo")],
)
def test_flag(value, text):
  assert space.flag("a.b", value) == f"--a.b={text}"
