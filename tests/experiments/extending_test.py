"""A newcomer's own parts and own method: files of a folder outside the repository."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import dpo
from experiments.lab import judges, models, workbench
from experiments.records import record
from rlhf_jax import checkpoint, data, loop, rewards, simulation, user, workdir
from rlhf_jax.models import hf
from tests.testing import define_flags, full, read_flags

PAGE = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "EXTENDING.md"
TEXT = PAGE.read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`(\w+\.py)`:\n\n```python\n(.*?)```", TEXT, re.S | re.M))
PROGRAMS = re.findall(r"```python\n(def programs.*?)```", TEXT, re.S)[0]
PACKAGE = "rlhf_jax.experiments."  # As `rlhf-jax` starts them.
COMMANDS = [
  line.replace("rlhf-jax ", f"python -m {PACKAGE}").split()[1:]
  for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S)
  for line in block.splitlines()
]
SCRIPTS = [command[1:] for command in COMMANDS if command[1].startswith(PACKAGE)]
SHORT = ("--steps=4", "--batch_size=4", "--data.rows=64", "--data.eval_rows=8")
SAMPLED = (*SHORT, "--sampling.max_new_tokens=4")
SMALL = {
  "dpo": (*SAMPLED, "--checkpoint_every=2"),
  "online_dpo": SAMPLED,
  "nash_md": SAMPLED,
  "ppo": SAMPLED,
  "rloo": SAMPLED,
  "rest": (*SAMPLED, "--prompts=16", "--grow_steps=1", "--rest.keep=best", "--rest.quantiles=0"),
  "generate": ("--limit=4", "--data.rows=64", "--data.eval_rows=8", "--sampling.max_new_tokens=4"),
  "evaluate": ("--data.rows=64", "--data.eval_rows=8", "--sampling.max_new_tokens=4"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A user's folder, which is the working directory, with the files of the page."""
  folder = tmp_path / "mine"
  folder.mkdir()
  for name, source in FILES.items():
    (folder / name).write_text(source)
  monkeypatch.chdir(folder)
  for module in ("my_parts", "my_rewards", "remax"):  # Of the folder of another test.
    monkeypatch.delitem(sys.modules, module, raising=False)
  return folder


@pytest.fixture
def start(folder, repository, sft_run):
  """`start(*words) -> Popen` of `python words`, as in a terminal, with the package installed."""
  (folder / "runs").mkdir()
  (folder / "runs" / "sft").symlink_to(sft_run)

  def start(*words: str, cwd=folder, path=repository) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(path)}
    env["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *words], cwd=cwd, env=env, **pipes)

  return start


@pytest.fixture
def run(start):
  """`run(*words, code=0, **options) -> output`."""

  def run(*words: str, code: int = 0, **options) -> str:
    process = start(*words, **options)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output

  return run


def words_of(script: str) -> list[str]:
  """Words of the command of the page that runs a script, shortened."""
  (found,) = [words for words in SCRIPTS if words[0] == f"{PACKAGE}{script}"]
  return ["-m", *found, *SMALL[script]]


def test_the_page_shows_files_and_commands():
  assert set(FILES) == {"my_parts.py", "remax.py"}
  assert len(FILES["remax.py"].splitlines()) <= 120
  assert {words[0].removeprefix(PACKAGE) for words in SCRIPTS} == {*SMALL, "plot", "compile"}


@pytest.mark.parametrize("words", SCRIPTS, ids=lambda words: words[0])
def test_a_command_is_accepted(folder, monkeypatch, words):
  monkeypatch.setattr(sys, "path", list(sys.path))
  if words[0] != f"{PACKAGE}compile":
    read_flags(words[0], words[1:])


@full
@pytest.mark.slow
def test_a_loss_of_a_folder_of_ones_own(folder, run, run_script, sft_run):
  """Through real processes: from the folder, from elsewhere, and with the file changed."""
  words = words_of("dpo")
  run(*words)
  first = json.loads((folder / "runs/squared/metrics.jsonl").read_text().splitlines()[0])
  assert first["loss"] == pytest.approx(1, abs=1e-3)  # At the start the margin is 0.
  identity = json.loads((folder / "runs/squared/identity.json").read_text())
  assert identity["file of --dpo.loss"] == workdir.file_digest(folder / "my_parts.py")
  digests = json.loads((folder / "runs/squared/run.json").read_text())["digests"]
  assert digests["file of --dpo.loss"] == identity["file of --dpo.loss"]

  elsewhere = folder.parent / "elsewhere"
  elsewhere.mkdir()
  flags = [word for word in words if "runs/" not in word]
  flags += [f"--init_from={sft_run}", "--workdir=squared"]
  output = run(*flags, cwd=elsewhere, code=64)
  assert (
    f"--dpo.loss=my_parts:squared cannot be imported: there is no module my_parts in {elsewhere}"
    in output
  )
  run(*flags, cwd=elsewhere, path=f"{PAGE.parents[1]}{os.pathsep}{folder}")

  with open(folder / "my_parts.py", "a") as file:
    file.write("# Edited.\n")
  flags = [word for word in words[2:] if not word.startswith("--workdir=")]
  finished = run_script("dpo", pathlib.Path("runs/squared"), *flags)
  assert finished.code == 78, finished.output
  assert "file of --dpo.loss was" in finished.output


@pytest.mark.slow
@pytest.mark.parametrize(
  "others", [(), pytest.param(("nash_md", "online_dpo", "evaluate"), marks=full)]
)
def test_rewards_and_judges_of_a_folder_of_ones_own(folder, run_script, sft_run, others):
  (folder / "runs").mkdir()
  (folder / "runs" / "sft").symlink_to(sft_run)
  for script in ("ppo", "rloo", "rest", "generate", *others):
    (words,) = [words[1:] for words in SCRIPTS if words[0] == f"{PACKAGE}{script}"]
    words = [word for word in words if not word.startswith("--workdir=")]
    place = folder / "runs" / ("brief" if script == "ppo" else script)
    finished = run_script(script, place, *words, *SMALL[script])
    assert finished.code == 0, finished.output
  rows = [
    json.loads(line)
    for line in (folder / "runs/generate/samples/step_00000000.jsonl").read_text().splitlines()
  ]
  assert [row["reward"] for row in rows] == [
    -abs(len(row["response"].split()) - 20) for row in rows
  ]
  with open(folder / "my_parts.py", "a") as file:
    file.write("# Edited.\n")
  finished = run_script("rest", folder / "runs/rest", *words_of("rest")[3:])
  assert finished.code == 78, finished.output
  assert "file of --reward.name was" in finished.output


REWARDS = """
def empty(prompts, responses, rows):
  return [sum(map(len, r.split())) / len(r.split()) for r in responses]

def short(prompts, responses, rows):
  return [0.0]

def missing(prompts, responses, rows):
  return [row["label"] for row in rows]

def nothing(prompts, responses, rows):
  pass

def words(prompts, responses, rows):
  return ["good"] * len(responses)

def later(prompts, responses, rows):
  return [float("nan") if len(r) > 3 else 0.0 for r in responses]

calls = []

def remote(prompts, responses, rows):
  calls.append(1)
  if len(calls) == 4:  # The first one tries it, the second opens the run.
    raise ConnectionError("no route to host")
  return [0.0 for r in responses]

def hung(prompts, responses, rows):
  calls.append(1)
  if len(calls) == 4:
    import time
    time.sleep(600)
  return [0.0 for r in responses]

def even(prompts, a, b, rows):
  return [2.0 for x in a]
"""


@pytest.mark.parametrize(
  "name, message",
  [
    ("empty", r"raised .*my_rewards\.py:3: ZeroDivisionError: division by zero"),
    ("short", r"gave shape \(1,\) for 3 responses"),
    ("missing", r"raised .*my_rewards\.py:9: KeyError: 'label'"),
    ("nothing", "gave None for 3 responses"),
    ("words", "gave a list without numbers"),
  ],
)
def test_a_reward_is_tried_before_anything_is_compiled(folder, monkeypatch, name, message):
  monkeypatch.setattr(sys, "path", list(sys.path))
  (folder / "my_rewards.py").write_text(REWARDS)
  tokenizer = models.open_tokenizer(None)
  _, prompts = data.load("prompts", data.DataConfig(rows=64, eval_rows=8), tokenizer, seed=0)
  options = judges.RewardOptions(name=f"my_rewards:{name}")
  message = f"^reward function my_rewards:{name} {message}.*; it was tried with empty responses"
  with pytest.raises(user.ResultError, match=message):
    judges.open_reward(None, options, models.ModelOptions(), tokenizer)(prompts)
  options = judges.PreferenceOptions(name="my_rewards:even")
  with pytest.raises(
    ValueError, match=r"function my_rewards:even gave a value outside \[0, 1\]: 2 for pair 0"
  ):
    judges.open_preference(None, options, models.ModelOptions(), tokenizer)(prompts)


def test_the_reward_of_segments_of_the_page(folder, monkeypatch):
  monkeypatch.setattr(sys, "path", list(sys.path))
  function = judges.RewardOptions(name="my_parts:politeness").functions()["my_parts:politeness"]
  texts = ["please sit\nnow", "no\nplease\n", "", "no"]
  assert function([""] * 4, texts, [{}] * 4)[0] == [(11, True), (14, False)]
  given = rewards.ask(function, [""] * 4, texts, rows=[{}] * 4)
  np.testing.assert_array_equal(given, [1, 1, 0, 0])


@pytest.mark.parametrize(
  "name, code, message",
  [
    ("later", 70, r"UnusableScoresError: --reward\.name=my_rewards:later: [34] of 4 scores cannot"),
    ("remote", 70, "RaisedError: reward function my_rewards:remote raised .*: no route to host"),
    (
      "hung",
      70,
      "RaisedError: reward function my_rewards:hung raised TimeoutError: it took more than 2",
    ),
  ],
)
def test_a_reward_that_turns_bad_ends_the_run(folder, run_script, sft_run, name, code, message):
  (folder / "my_rewards.py").write_text(REWARDS)
  flags = (f"--init_from={sft_run}", f"--reward.name=my_rewards:{name}", *SAMPLED)
  flags += ("--reward.function_timeout=2",) if name == "hung" else ()
  finished = run_script("ppo", folder / "run", *flags)
  assert finished.code == code, finished.output
  assert re.match(message, finished.output.splitlines()[-1]), finished.output
  assert "Traceback" not in finished.output
  assert ("the last one before the error" in finished.output) == (name != "later")


EVIL = "import pathlib\npathlib.Path('was_imported').touch()\ndef f(*args, **kwargs): ...\n"
NAMED = {
  "reward.name": "my_evil:f",
  "preference.name": "my_evil:f",
  "dpo.loss": "my_evil:f",
  "reward": {"name": "my_evil:f"},
  "loss": "my_evil:f",
  "name": "my_evil:f",
  "--reward.name=my_evil:f": "my_evil:f",
}


def test_files_that_are_read_name_no_function(folder, sft_run):
  """Data, a model folder, a run that is built upon and a checkpoint, each full of such names."""
  (folder / "my_evil.py").write_text(EVIL)
  known = " ".join(sorted(simulation.WORDS)[:12])  # Most words are those of the tokenizer.
  row = NAMED | {"chosen": f"my_evil:f {known}", "rejected": f"{known} --dpo.loss=my_evil:f"}
  prompts = [row["prompt"] for row in simulation.prompts("train", 32, seed=0)]
  lines = [json.dumps(row | {"prompt": prompt}) + "\n" for prompt in prompts]
  (folder / "rows.jsonl").write_text("".join(lines))
  shutil.copytree(sft_run, folder / "run")
  for name in ("run.json", "identity.json", "export/config.json"):
    path = folder / "run" / name
    content = json.loads(path.read_text())
    content |= NAMED | {"auto_map": {"AutoModel": "my_evil.f"}}
    content["settings"] = {**(content.get("settings") or {}), **NAMED}
    content["changed"] = NAMED
    path.write_text(json.dumps(content))
  with open(folder / "run" / "flags", "a") as file:
    file.writelines(f"--{name}=my_evil:f\n" for name in ("reward.name", "dpo.loss"))
  (folder / "new").mkdir()
  (folder / "new" / "flags").write_text("--reward.name=my_evil:f\n")

  config = dpo.Config(
    init_from=str(folder / "run"),
    steps=2,
    batch_size=4,
    data=data.DataConfig(path=str(folder / "rows.jsonl"), eval_fraction=0.25),
    sampling=dpo.SamplingConfig(max_new_tokens=4),
  )
  session = loop.Session(str(folder / "new"))
  with workbench.open(session, config, "dpo", "preferences") as bench:
    assert bench.train_set.rows[0]["reward.name"] == "my_evil:f"
    assert "my_evil:f" not in (folder / "new" / "identity.json").read_text()
    with checkpoint.Checkpointer(folder / "new" / "checkpoints") as saver:
      saver.save(1, {"state": bench.start}, NAMED)
      saver.wait()
      assert saver.restore({"state": bench.start}).meta == NAMED
  assert record.read(folder / "run")["changed"] == NAMED
  hf.parse_config(folder / "run" / "export")
  assert "my_evil" not in sys.modules and not (folder / "was_imported").exists()


def kill_after(start, mark: pathlib.Path, *words: str) -> None:
  """Kills a process as soon as a file is there."""
  process = start(*words)
  while not mark.exists() and process.poll() is None:
    time.sleep(0.01)
  process.kill()
  output, _ = process.communicate()
  assert process.returncode == -signal.SIGKILL, output


@pytest.mark.slow
def test_a_method_of_ones_own_trains_and_resumes(folder, run, run_script, start):
  """Killed as `python remax.py`, continued as `python -m remax`, repeated from its flags."""
  flags = ("--init_from=runs/sft", "--reward.name=my_parts:brevity", *SHORT[2:])
  # Enough tokens that a response ends early: only lengths earn a reward.
  flags = (*flags, "--batch_size=16", "--sampling.max_new_tokens=16")
  flags = (*flags, "--steps=8", "--checkpoint_every=2")
  killed = ("remax.py", "--workdir=runs/killed", *flags)
  kill_after(start, folder / "runs/killed/checkpoints/2.digest.json", *killed)
  output = run("-m", "remax", *killed[1:])
  assert "continuing from step" in output
  repeat = ("remax", pathlib.Path("runs/whole"), "--flagfile=runs/killed/flags")
  finished = run_script(*repeat, package="")
  assert finished.code == 0, finished.output
  again, whole, start_model = (
    (folder / "runs" / name / "export/model.safetensors").read_bytes()
    for name in ("killed", "whole", "sft")
  )
  assert whole == again != start_model
  summary = json.loads((folder / "runs/whole/summary.json").read_text())
  assert {"reward/mean", "gold/win_rate", "kl"} <= set(summary)
  of_run = json.loads((folder / "runs/whole/run.json").read_text())
  assert (of_run["script"], of_run["module"]) == ("remax", "remax")
  assert of_run["method"].startswith("ReMax: the policy gradient")
  card = (folder / "runs/whole/export/README.md").read_text()
  assert "python -m remax --flagfile=RUN/flags" in card

  with open(folder / "remax.py", "a") as file:
    file.write("# Edited.\n")
  finished = run_script(*repeat, package="")
  assert finished.code == 78, finished.output
  assert "file of the script was" in finished.output


def test_help_of_a_method_of_ones_own(run):
  output = run("remax.py", "--help")
  assert output.startswith("ReMax: the policy gradient of whole responses")
  assert re.search(r"--remax\.kl_coef=\S+\n +Weight of the KL penalty", output)


@pytest.mark.parametrize(
  "script, flag", [("ppo", "reward.name"), ("nash_md", "preference.name"), ("dpo", "dpo.loss")]
)
def test_help_of_the_flags_teaches_it(script, flag):
  values, _ = define_flags(f"experiments.{script}")
  text = values[flag].help
  assert "your own `module:function`, such as my_" in text
  assert "in the working directory or on PYTHONPATH" in " ".join(text.split())


@full
def test_compile_takes_a_module_of_ones_own(folder, run):
  pytest.importorskip("libtpu")
  source = FILES["remax.py"]
  main = "if __name__"
  (folder / "remax.py").write_text(source.replace(main, f"{PROGRAMS}\n\n{main}"))
  flags = ("--algorithm=remax", "--topology=v5e:2x2", "--mesh=fsdp:4", "--batch_size=8")
  output = run("-m", f"{PACKAGE}compile", *flags)
  assert "fits; roofline" in output


@pytest.mark.parametrize(
  "name, message",
  [
    (
      "dop",
      "--algorithm must be one of cgpo, cispo, dpo, .*or a module of your own; .*no module dop in",
    ),
    ("my_parts", "--algorithm=my_parts: .*my_parts.py has no Config, which experiments.dpo has"),
    ("remax", "--algorithm=remax: .*remax.py has no programs, which experiments.dpo has"),
  ],
)
def test_compile_refuses_what_is_no_script(run, name, message):
  output = run("-m", f"{PACKAGE}compile", f"--algorithm={name}", "--batch_size=2", code=64)
  assert re.fullmatch(message + r".*\n", output.splitlines(keepends=True)[-1])
