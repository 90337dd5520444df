"""README's Python runs as printed, and its commands name flags that exist."""

import importlib
import math
import pathlib
import re

README = pathlib.Path(__file__).resolve().parents[1] / "README.md"


def test_python_blocks_run(capsys):
  blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
  assert blocks
  for block in blocks:
    exec(compile(block, "README.md", "exec"), {})
  # Both pairs have a margin of 0.15, and the reward is 0.7 less 0.1 times the log-ratio of -0.2.
  dpo, ppo = map(float, capsys.readouterr().out.split())
  assert dpo == round(math.log1p(math.exp(-0.15)), 4)
  rewards = [-0.1 * 0.1, -0.1 * 0.2, 0.7 + 0.1 * 0.5]
  to_go = [sum(0.95 ** (s - t) * rewards[s] for s in range(t, 3)) for t in range(3)]
  assert abs(ppo + math.exp(0.1) * sum(to_go) / 3) < 1e-4


def test_commands_name_flags_that_exist():
  text = README.read_text(encoding="utf-8")
  from absl import flags as absl_flags

  from rlhf_jax import flags, loop

  known = set()
  for script in README.parent.glob("experiments/*.py"):
    module = importlib.import_module(f"experiments.{script.stem}")
    if hasattr(module, "Config"):
      values = absl_flags.FlagValues()
      if script.stem != "plot":  # Has a session of its own.
        flags.define(loop.Session, flag_values=values)
      flags.define(module.Config, flag_values=values)
      known |= set(values)
    if hasattr(module, "Options"):  # Of experiments.compile, in the place of a session.
      values = absl_flags.FlagValues()
      flags.define(module.Options, flag_values=values)
      known |= set(values)
  for launcher in README.parent.glob("launch/*.py"):
    known |= set(
      re.findall(r'(?:DEFINE_\w+\(|add\()\s*"(?:--)?(\w+)"', launcher.read_text("utf-8"))
    )
  used = set(re.findall(r"--([a-z_]+(?:\.[a-z_]+)*)", text)) - {"quiet", "dist", "flagfile", "help"}
  assert used <= known, used - known
