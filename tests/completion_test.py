import shutil
import subprocess

import pytest

from rlhf_jax import __main__ as command
from rlhf_jax import completion


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """The file of each shell."""
  folder = tmp_path_factory.mktemp("completion")
  for shell in completion.SHELLS:
    (folder / shell).write_text(completion.render(shell, command.modules()))
  return folder


@pytest.mark.parametrize(
  "typed, completed",
  [
    ("rlhf-jax pp", "ppo ppo_max"),
    ("rlhf-jax swe", "sweep"),
    ("rlhf-jax compl", "completion"),
    ("rlhf-jax ppo --ste", "--steps="),
    ("rlhf-jax ppo --workdir = x --reward.p", "--reward.path="),
    ("rlhf-jax ppo --critic.sh", "--critic.share_trunk"),
    ("rlhf-jax compile --topo", "--topology="),
    ("rlhf-jax methods --work", "--workdir="),
    ("rlhf-jax plot --flagf", "--flagfile="),
    ("rlhf-jax launch --dry", "--dry_run"),
    ("rlhf-jax launch --to = local -- kt", "kto"),
    ("rlhf-jax launch --to = local -- kto --ste", "--steps="),
    ("rlhf-jax launch --to = local -- experiments.kto --ste", "--steps="),
    ("rlhf-jax sweep --spa", "--space="),
    ("rlhf-jax pod --proc", "--processes="),
    ("rlhf-jax sft runs/x", ""),
  ],
)
def test_bash_completes(written, typed, completed):
  words = typed.split(" ")
  script = (
    f"source {written}/bash; compopt() {{ :; }}; COMP_WORDS=({' '.join(words)});"
    f" COMP_CWORD={len(words) - 1}; _rlhf_jax; echo ${{COMPREPLY[@]}}"
  )
  done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=False)
  assert (done.stdout.strip(), done.stderr) == (completed, "")


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh")
def test_zsh_reads_it(written):
  subprocess.run(["zsh", "-n", str(written / "zsh")], check=True)


def test_zsh_gets_what_bash_gets(written):
  bash, zsh = ((written / shell).read_text() for shell in ("bash", "zsh"))
  assert zsh.startswith("#compdef rlhf-jax\n")
  cases = [line.replace("words=", "flags=") for line in bash.splitlines() if line.endswith(";;")]
  assert len(cases) == len(command.modules())
  assert set(cases) <= set(zsh.splitlines())
