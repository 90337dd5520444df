import dataclasses
import os
import subprocess
import sys

import pytest

from launch import run
from launch.job import Job, JobError, Plan

PPO = ("experiments.ppo", "--workdir=/mnt/runs/ppo")


@pytest.fixture(scope="module")
def launch(repository):
  """`python -m launch.run ARGUMENTS`."""

  def start(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch.run", *arguments]
    env = os.environ | env
    return subprocess.run(command, cwd=repository, env=env, capture_output=True, text=True)

  return start


BAD_SCRIPTS = [
  (("experiments.sft", "--stesp=3"), "unknown flag --stesp"),
  (("experiments.sft", "--steps=three"), "--steps=three"),
  (("experiments.sft", "--steps=0"), "--steps must be at least 1"),
  (("experiments.sft", "--seed=-1"), "--seed must be in"),
  (("experiments.sft", "--trackers=mlflow"), "--trackers must be"),
  (("experiments.ppo",), "no reward: give --reward.path=DIR or --reward.name"),
  (("experiments.rest",), "no reward: give --reward.path=DIR or --reward.name"),
  (("experiments.nash_md",), "no preference: give --preference.path"),
  (("experiments.online_dpo",), "no reward: give --reward.path=DIR or --reward.name"),
  (("sft", "--steps=0"), "--steps must be at least 1"),
  (("pppo",), "there is no module pppo; did you mean ppo?"),
  (("rlhf_jax.experiments.pppo",), "did you mean rlhf_jax.experiments.ppo?"),
  (("experiments.sft_",), "there is no module experiments.sft_; did you mean experiments.sft?"),
  (("experiments.reward",), "did you mean experiments.reward_model?"),
  (("experiments.sft", "--init_from=~/runs/sft"), "--init_from=~/runs/sft: write the folder in"),
]


@pytest.mark.parametrize(("words", "message"), BAD_SCRIPTS, ids=lambda x: str(x)[:60])
@pytest.mark.parametrize("to", ["slurm", "sky"])
def test_a_script_that_would_refuse_is_not_submitted(to, words, message, launch_here, tmp_path):
  module, *flags = words
  shared = [f"--shared={tmp_path}", "--mount=10.0.0.2:/runs"] if to == "sky" else []
  given = [f"--to={to}", *shared, "--accelerator=H100:8", "--dry_run", "--", module]
  code, said = launch_here(*given, f"--workdir={tmp_path}/run", *flags)
  assert code == 64
  assert message in said and "\n" not in said


@pytest.mark.parametrize("name", run._PATHS)
def test_a_file_that_is_not_there_is_not_submitted(name, tmp_path):
  job = Job(module="experiments.ppo", flags=("--workdir=x", f"--{name}={tmp_path}/absent"))
  with pytest.raises(JobError, match=f"--{name}={tmp_path}/absent: there is no such file"):
    run.check_paths(job)
  run.check_paths(dataclasses.replace(job, extra=("--dependency=afterok:7",)))
  run.check_paths(dataclasses.replace(job, flags=("--workdir=x", f"--{name}={tmp_path}")))
  run.check_paths(dataclasses.replace(job, flags=("--workdir=x", f"--{name}={tmp_path}/*.jsonl")))


@pytest.mark.parametrize(
  ("name", "value"),
  [
    *(("init_from", end) for end in ("runs/sft", "runs/sft@300", "runs/sft@best", "hf://me/my@v1")),
    *(("reward.path", end) for end in ("runs/rm@300", "runs/rm@best,runs/sft, runs/rm")),
    *(("data.path", end) for end in ("a.jsonl:0.7,b.jsonl:.3", "a.jsonl:1e-3, b.jsonl:2")),
    *(("data.path", end) for end in ("x,y.jsonl", "c:3", "no/*.jsonl", "gs://b/a.jsonl")),
  ],
)
def test_what_a_script_accepts_is_submitted(name, value, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for folder in ("runs/sft", "runs/rm"):
    (tmp_path / folder).mkdir(parents=True)
  for file in ("a.jsonl", "b.jsonl", "x,y.jsonl", "c:3"):
    (tmp_path / file).touch()
  run.check_paths(Job(module="experiments.ppo", flags=("--workdir=x", f"--{name}={value}")))


@pytest.mark.parametrize("value", ["absent@300", "runs/sft@last", "runs/sft,absent@best", "no:0.5"])
def test_the_run_of_a_step_has_to_be_there(value, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "runs/sft").mkdir(parents=True)
  job = Job(module="experiments.ppo", flags=("--workdir=x", f"--reward.path={value}"))
  with pytest.raises(JobError, match=f"--reward.path={value.split(',')[-1]}: there is no such"):
    run.check_paths(job)


def test_help_says_how_to_use_it(launch):
  text = launch("--help").stdout
  assert text.lstrip().startswith("Runs a script here or on a cluster")
  assert "python -m launch.run --to=local -- experiments.sft --workdir=runs/sft" in text
  for name in ("to", "accelerator", "slices", "shared", "[no]dry_run", "[no]preflight", "extra"):
    assert f"  --{name}:" in text


def test_needs_neither_jax_nor_the_library(repository):
  code = (
    "import launch.run, sys; print([m for m in ('jax', 'rlhf_jax', 'numpy') if m in sys.modules])"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
  )
  assert done.stdout == "[]\n"


def test_dry_run_shows_and_does_nothing(launch, tmp_path):
  workdir = tmp_path / "ppo"
  start = f"--init_from={tmp_path}"
  words = ("experiments.ppo", f"--workdir={workdir}", start, "--reward.name=gold")
  done = launch("--to=slurm", "--dry_run", "--", *words)
  assert (done.returncode, done.stderr) == (0, "")
  lines = done.stdout.splitlines()
  assert lines[0] == "# ppo: rlhf_jax.experiments.ppo on CPU"
  assert f"# {workdir}/launch.sbatch" in lines
  assert f"$ sbatch {workdir}/launch.sbatch" in lines
  assert not workdir.exists()


@pytest.mark.parametrize(
  "arguments, message",
  [
    ((), "--to is needed, one of local, slurm, tpu_vm, xpk, sky; see --help"),
    (("--to=slum",), "flag --to=slum: value should be one of <local|slurm|tpu_vm|xpk|sky>"),
    (("--to=sky", "--extra='x", "--", *PPO), "--extra='x cannot be read: No closing quotation"),
    (("--to=local",), "no script is given; write it after --, such as: -- experiments.sft"),
    (
      ("--to=local", *PPO),
      "Unknown command line flag 'workdir'. Did you mean: log_dir ?;"
      " the script and its flags come after --",
    ),
    (
      ("--to=local", "--", "experiments.pppo", "--workdir=x"),
      "there is no module experiments.pppo; did you mean experiments.ppo?",
    ),
    (
      ("--to=xpk", "--accelerator=v5e-16", "--", *PPO),
      "--accelerator=v5e-16 is not known; did you mean v5litepod-16?",
    ),
    (
      ("--to=slurm", "--accelerator=H100:8", "--slices=2", "--", *PPO),
      "--workdir=/mnt/runs/ppo: the 2 hosts have to see the same folder; put it on a file system"
      " that all hosts mount, and give the folder of that as --shared",
    ),
    (
      ("--to=slurm", "--preflight", "--", *PPO),
      "--preflight compiles for one slice of TPUs; leave it out",
    ),
  ],
)
def test_refuses_in_one_line(launch, arguments, message):
  done = launch(*arguments)
  assert (done.returncode, done.stdout) == (64, "")
  assert done.stderr.splitlines() == [message]


def test_a_missing_engine_is_named():
  message = "no-such-engine is not installed here; launch/README.md says how to get it"
  with pytest.raises(JobError, match=message):
    run.submit(Plan({}, (("no-such-engine", "create"),), {}))


def test_a_wrong_flag_of_the_script_is_not_submitted(launch, tmp_path):
  sbatch = tmp_path / "sbatch"
  sbatch.write_text(f"#!/bin/bash\ntouch {tmp_path}/submitted\n")
  sbatch.chmod(0o755)
  arguments = ("--to=slurm", "--", "experiments.sft", f"--workdir={tmp_path}/sft", "--stesp=3")
  done = launch(*arguments, PATH=f"{tmp_path}:{os.environ['PATH']}")
  assert done.returncode == 64
  assert done.stderr == (
    "rlhf_jax.experiments.sft: unknown flag --stesp; did you mean --steps?; nothing was submitted\n"
  )
  assert not (tmp_path / "submitted").exists() and not (tmp_path / "sft").exists()
  again = launch(*arguments[:-1], PATH=f"{tmp_path}:{os.environ['PATH']}")
  assert again.returncode == 0, again.stderr
  assert (tmp_path / "submitted").exists() and (tmp_path / "sft" / "launch.sbatch").exists()
  assert "squeue --me --name=sft" in again.stdout


def test_commands_run_in_order_up_to_the_first_that_fails(tmp_path):
  def shell(text: str) -> tuple[str, ...]:
    return ("bash", "-c", text)

  log = tmp_path / "log"
  commands = (
    shell(f"cat {tmp_path}/new/a >>{log}"),
    shell(f"echo two >>{log}; exit 7"),
    shell(f"echo three >>{log}"),
  )
  assert run.submit(Plan({f"{tmp_path}/new/a": "one\n"}, commands, {})) == 7
  assert log.read_text() == "one\ntwo\n"
  assert run.submit(Plan({}, (shell("kill -9 $$"),), {})) == 137


def test_preflight_compiles_what_the_job_runs():
  flags = (
    "--workdir=x",
    "--seed=3",
    "--mesh=fsdp:16",
    "--model.preset=llama3_8b",
    "--batch_size=16",
  )
  job = Job(module="experiments.dpo", flags=flags, accelerator="v5litepod-16")
  command = run.preflight_command(job)
  compiles = ("-m", "rlhf_jax.experiments.compile", "--algorithm=dpo", "--topology=v5e:4x4")
  assert command[1:5] == compiles
  assert command[5:] == flags[2:]
  with pytest.raises(JobError, match="--preflight compiles for one slice"):
    run.preflight_command(Job(module="experiments.dpo", flags=("--workdir=x",)))


def test_preflight_takes_every_flag_of_a_script():
  """Those that it leaves out are those of a session that `experiments.compile` does not have."""
  from absl import flags as absl_flags

  from experiments import compile as compile_script
  from rlhf_jax import flags, loop, processes

  def names(*classes) -> set[str]:
    values = absl_flags.FlagValues()
    for cls in classes:
      flags.define(cls, flag_values=values)
    return set(values)

  session = names(loop.Session) - names(processes.Group)
  assert session - names(compile_script.Options) == set(run._SESSION_FLAGS)


def test_goldens_have_a_target_each(repository):
  names = [path.name for path in (repository / "tests/launch/goldens").iterdir()]
  assert {name for name in run.TARGETS if any(n.startswith(name) for n in names)} == {*run.TARGETS}
