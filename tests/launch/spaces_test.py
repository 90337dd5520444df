import pathlib

import optuna
import pytest

from experiments.lab import plans
from launch.space import flag, grid_points, load_space
from tests.testing import read_flags

_FOLDER = pathlib.Path(__file__).parents[2] / "launch" / "spaces"
_SPACES = sorted(file.stem for file in _FOLDER.glob("*.py"))
_ABLATIONS = sorted(f"ablations/{file.stem}" for file in _FOLDER.glob("ablations/*.py"))


@pytest.fixture(params=[*_SPACES, *_ABLATIONS])
def case(request):
  """A shipped space, and a function that reads flags as its script does."""
  script = f"experiments.{pathlib.PurePath(request.param).name}"

  def read(own):
    given = [flag(name, value) for name, value in own.items()]
    return read_flags(script, ["--workdir=runs/trial", *given])

  return load_space(request.param), read


def test_every_training_script_has_a_space():
  assert plans.methods() == _SPACES


def test_scripts_accept_what_is_drawn(case):
  space, read = case
  study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
  for _ in range(20 if space.sample else 0):
    read(space.sample(study.ask()))
  for point in grid_points(space.grid):
    read(point)


def test_defaults_are_those_of_the_script(case):
  space, read = case
  script = read({})
  drawn = space.sample(optuna.trial.FixedTrial(space.defaults)) if space.sample else space.defaults
  given = read(drawn)
  for name in drawn:
    # What is unset is that of the paper of `--simpo.loss`.
    unset = {"simpo.beta": 2.0, "simpo.margin": 0.25, "simpo.sft_coef": 0.0}.get(name)
    default = getattr(script, name)
    assert getattr(given, name) == (unset if default is None else default), name
  if space.sample is None:
    return
  # A sweep that begins with them must not warn that they are out of range.
  study = optuna.create_study()
  study.enqueue_trial(space.defaults)
  assert space.sample(study.ask()) == drawn


def test_grids_contain_the_defaults(case):
  space, _ = case
  assert {name: space.defaults[name] for name in space.grid} in grid_points(space.grid)
