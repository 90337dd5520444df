"""Runs the tests of mutants and lists those that survive: `python -m tests.mutants ppo grpo/2`.

Words select mutants whose name has one of them as a part; without words all run. `--jobs=2` runs
two at a time. It exits with 1 if a mutant survives or its tests do not run.
"""

import importlib
import re
import sys
import warnings

from tests.mutants import planting

# What every test imports and no mutant changes.
_LIBRARIES = ("tests.conftest", "absl.flags", "chex", "flax.nnx", "jax", "optax", "scipy.special")


def main(words: list[str]) -> int:
  """Runs the mutants that the words select."""
  jobs = [int(word.removeprefix("--jobs=")) for word in words if word.startswith("--jobs=")]
  words = [word for word in words if not word.startswith("--")]
  mutants = planting.read_table()
  mutants = [m for m in mutants if not words or any(f"/{w}/" in f"/{m.name}/" for w in words)]
  for name in _LIBRARIES:
    importlib.import_module(name)
  warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)
  wrong = 0
  for verdict in planting.run(mutants, jobs=jobs[-1] if jobs else 1):
    mutant = verdict.mutant
    failed = re.findall(r"^FAILED tests/(.*?)(?: - .*)?$", verdict.output, re.MULTILINE)
    by = f" by {failed[0]}" if failed else ""
    print(f"{verdict.result:8} {verdict.seconds:5.1f} s  {mutant.name}{by}", flush=True)
    if verdict.result != "killed":
      wrong += 1
      print(f"  {mutant.file}\n  - {mutant.old}\n  + {mutant.new}\n  ! {' '.join(mutant.tests)}")
      if verdict.result == "broken":
        print(*verdict.output.splitlines()[-12:], sep="\n")
  print(f"{len(mutants) - wrong} of {len(mutants)} mutants killed")
  return int(wrong > 0)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
