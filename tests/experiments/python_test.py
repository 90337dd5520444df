"""Scripts that are called from Python: the code of the page, the notebook, several runs."""

import json
import os
import pathlib
import re
import runpy

import pytest

from experiments import dpo, rest
from experiments.lab import models
from rlhf_jax import flags, loop, workdir
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.models import hf
from tests.testing import define_flags, forked

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "experiments"
PAGE = (FOLDER / "PYTHON.md").read_text(encoding="utf-8")
NOTEBOOK = json.loads((FOLDER / "story.ipynb").read_text(encoding="utf-8"))
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
# In place of the model and the data of the built-in task, so that a run takes seconds.
SMALL = """
from rlhf_jax.data import DataConfig as Data
from rlhf_jax.generation import SamplingConfig as Sampling
from rlhf_jax.experiments.lab.models import ModelOptions as Model
DATA = Data(rows=64, eval_rows=8)
MODEL = Model(layers=1, width=32, heads=2, mlp_width=32)
"""


def _main(path: pathlib.Path, output: pathlib.Path) -> None:
  """In the forked process: what `python FILE > OUTPUT` does in the folder of the file."""
  with open(output, "wb") as file:
    os.dup2(file.fileno(), 1)
  os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"
  os.chdir(path.parent)
  runpy.run_path(path.name, run_name="__main__")


def run_file(path: pathlib.Path) -> str:
  """Output of a file of Python, run in its folder."""
  output = path.with_suffix(".out")
  process = forked(_main, path, output)
  process.join(300)
  assert process.exitcode == 0
  return output.read_text()


@pytest.mark.slow
def test_the_code_of_the_page_runs(tmp_path):
  (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
  assert len(code.splitlines()) <= 20
  code = re.sub(r"steps=\d+", "steps=2", code).replace("Config(steps", "Config(data=DATA, steps")
  code = code.replace("sft.Config(", "sft.Config(model=MODEL, ")
  code = code.replace("ppo.Config(", "ppo.Config(data=DATA, batch_size=8, ")
  (tmp_path / "mine.py").write_text(SMALL + code)
  lines = run_file(tmp_path / "mine.py").splitlines()
  assert 0 <= float(lines[0].split()[0]) <= 1
  assert len(json.loads(lines[1])) == 2
  # The flags repeat a run, as if it had been a command.
  given = (tmp_path / "runs/ppo/flags").read_text().splitlines()
  assert {"--steps=2", "--seed=1", "--ppo.kl_coef=0.1", "--reward.path=runs/rm"} <= set(given)
  registry, readers = define_flags("experiments.ppo")
  flags.parse(["ppo", f"--flagfile={tmp_path}/runs/ppo/flags"], registry)
  assert readers[0]() == loop.Session("runs/ppo", seed=1)


def source(cell) -> str:
  return "".join(cell["source"])


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
  tagged = [cell for cell in CELLS if "parameters" in cell["metadata"].get("tags", ())]
  (parameters,) = map(source, tagged)
  tiny = "SFT_STEPS = REWARD_STEPS = PPO_STEPS = 2\nHELD_OUT = 8\nFOLDER = 'runs/story'\n"
  assert set(re.findall(r"[A-Z_]{5,}", tiny)) == set(re.findall(r"[A-Z_]{5,}", parameters))
  cells = [tiny if cell in tagged else source(cell) for cell in CELLS]
  code = "\n\n".join(cells).replace("DataConfig(eval_rows=HELD_OUT)", "DATA")
  assert code.count("data=DATA") == 3
  code = code.replace("data=DATA", "data=DATA, batch_size=8").replace(
    "sft.Config(", "sft.Config(model=MODEL, "
  )
  (tmp_path / "story.py").write_text(SMALL + code)
  output = run_file(tmp_path / "story.py")
  assert "win rate of PPO against SFT" in output
  assert output.count("gold reward") == 4


def test_the_notebook_is_small_and_its_outputs_are_whole():
  assert (FOLDER / "story.ipynb").stat().st_size < 300_000
  for cell in CELLS:
    for output in cell["outputs"]:
      assert output["output_type"] != "error"
      assert output.get("name") != "stderr"
  assert not re.search(r"/(home|root|tmp|work)/", json.dumps(NOTEBOOK))


def test_several_runs_in_one_process(tmp_path, sft_run):
  """Each has its own folder and identity, and one that is called again goes on or refuses."""
  config = dpo.Config(
    init_from=str(sft_run),
    steps=2,
    batch_size=8,
    data=DataConfig(rows=64, eval_rows=8),
    sampling=SamplingConfig(max_new_tokens=4),
  )
  first = dpo.train(loop.Session(str(tmp_path / "a")), config)
  other = dpo.train(loop.Session(str(tmp_path / "b"), seed=1), config)
  assert first.keys() == other.keys() and first != other
  assert dpo.train(loop.Session(str(tmp_path / "a")), config) == pytest.approx(first)
  with pytest.raises(workdir.WorkdirError, match="holds another run"):
    dpo.train(loop.Session(str(tmp_path / "a"), seed=2), config)
  # The folder is unlocked again, also after a refusal.
  assert dpo.train(loop.Session(str(tmp_path / "a")), config) == pytest.approx(first)


def test_settings_are_checked_when_a_config_is_made():
  with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
    dpo.Config(steps=0)
  with pytest.raises(flags.UsageError, match=r"no reward: give --reward.path=DIR or --reward.name"):
    rest.train(loop.Session("runs/x"), rest.Config())
  with pytest.raises(ValueError, match="name=mine:f cannot be imported: there is no module mine"):
    dpo.RewardOptions(name="mine:f")
  with pytest.raises(hf.ModelFolderError, match="there is no such folder"):
    models.model_folder("runs/absent")
