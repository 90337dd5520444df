"""Names of scripts: `experiments.ppo` in a clone, `rlhf_jax.experiments.ppo` where installed."""

import pathlib
import shlex

FOLDER = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = __name__.removesuffix(".lab.scripts")


def module_name(script: str) -> str:
  """Returns the name of the module of a script in this process, by which `python -m` runs it."""
  return f"{PACKAGE}.{script}"


def command(script: str, *words: str) -> str:
  """Returns the line that a user types to run a script."""
  line = shlex.join([script, *words])
  return f"python -m experiments.{line}" if PACKAGE == "experiments" else f"rlhf-jax {line}"
