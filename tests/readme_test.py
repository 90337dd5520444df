"""README's Python runs as printed."""

import pathlib
import re

README = pathlib.Path(__file__).resolve().parents[1] / "README.md"


def test_python_blocks_run(capsys):
  blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
  assert blocks
  for block in blocks:
    exec(compile(block, "README.md", "exec"), {})
  assert capsys.readouterr().out.startswith("0.7")


def test_commands_name_flags_that_exist():
  text = README.read_text(encoding="utf-8")
  from absl import flags as absl_flags

  from experiments import evaluate, generate, ppo, reward_model, rlhf, sft
  from rlhf_jax import flags, loop

  known = set()
  for config in (c.Config for c in (evaluate, generate, ppo, reward_model, rlhf, sft)):
    values = absl_flags.FlagValues()
    flags.define(loop.Session, flag_values=values)
    flags.define(config, flag_values=values)
    known |= set(values)
  used = set(re.findall(r"--([a-z_]+(?:\.[a-z_]+)*)", text)) - {"quiet", "flagfile", "help"}
  assert used <= known, used - known
