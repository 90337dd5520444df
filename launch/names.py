"""Names of scripts: `ppo` and `experiments.ppo` are of the package, all others are of the user."""

import importlib.util
import pathlib

PACKAGE = __name__.rpartition(".")[0]  # `launch` in a clone, `rlhf_jax.launch` where installed.
FOLDER = pathlib.Path(__file__).resolve().parents[1] / "experiments"  # Beside this in both.
_TYPED = {
  "python -m launch.run": "rlhf-jax launch",
  "python -m launch.": "rlhf-jax ",
  "python -m experiments.": "rlhf-jax ",
  "-- experiments.": "-- ",
}


def scripts() -> list[str]:
  """Returns the names of the scripts of the package."""
  return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def module_of(word: str) -> str:
  """Returns the module that a word of the command line names.

  A script of the package gets the name that is the same in a clone and on hosts that pip installs
  it on. `experiments.ppo` of a user with a package `experiments` stays what it is.
  """
  package, _, name = word.rpartition(".")
  if package not in ("", "experiments") or name not in scripts() or (package and _is_of_user()):
    return word
  return f"rlhf_jax.experiments.{name}"


def _is_of_user() -> bool:
  """Returns whether `experiments` is a package of the user."""
  spec = importlib.util.find_spec("experiments")
  places = spec.submodule_search_locations or () if spec else ()
  return spec is not None and FOLDER not in [pathlib.Path(place).resolve() for place in places]


def as_typed(text: str) -> str:
  """Returns a text with its commands as they are typed: `rlhf-jax` where installed."""
  if PACKAGE == "launch":
    return text
  for old, new in _TYPED.items():
    text = text.replace(old, new)
  return text
