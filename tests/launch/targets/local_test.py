"""A pod on this machine: real scripts, started by the launcher."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from launch.job import Job, JobError
from launch.targets import local


@pytest.fixture
def launch(repository, tmp_path):
  """Starts `python -m launch.run --to=local ARGUMENTS`; modules may lie in `tmp_path`."""

  def start(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "launch.run", "--to=local", *arguments]
    env = os.environ | {"PYTHONPATH": f"{repository}:{tmp_path}"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=tmp_path, env=env, stdout=pipe, stderr=pipe, text=True)

  return start


def test_a_pod_of_two_hosts_trains(launch, tmp_path):
  tiny = ("--model.layers=1", "--model.width=32", "--model.heads=2", "--model.mlp_width=32")
  rows = ("--data.rows=64", "--data.eval_rows=8", "--batch_size=8", "--sampling.max_new_tokens=8")
  flags = (
    f"--workdir={tmp_path}/run",
    "--mesh=data:2,fsdp:2",
    "--steps=3",
    "--log_every=1",
    *tiny,
    *rows,
  )
  running = launch("--processes=2", "--devices=2", "--", "experiments.sft", *flags)
  output, errors = running.communicate(timeout=300)
  assert running.returncode == 0, errors
  assert "mesh: 4 x cpu in 2 processes (data 2, fsdp 2)" in output + errors
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
  assert (tmp_path / "run" / "export" / "model.safetensors").exists()


_SCRIPT = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
os.write(1, " ".join([os.environ["A"], *sys.argv[1:]]).encode() + b"\\n")  # At once.
signal.pause()
"""


@pytest.mark.parametrize("sizes", [(), ("--processes=2",)])
def test_stop_reaches_the_script_and_its_code_comes_back(launch, tmp_path, sizes):
  (tmp_path / "script.py").write_text(_SCRIPT)
  running = launch(*sizes, "--env=A=x y", "--", "script", "--workdir=run", "--text=a; b")
  for _ in range(len(sizes) + 1):
    assert running.stdout.readline().startswith("x y --workdir=run --text=a; b")
  running.send_signal(signal.SIGTERM)
  running.communicate(timeout=30)
  assert running.returncode == 75


_ENDS = """
import os, sys
code, starts = int(sys.argv[2].split("=")[1]), sys.argv[1].split("=")[1]
with open(starts, "a") as file:
  file.write("x")
if len(open(starts).read()) < 3:
  os.kill(os.getpid(), code - 128) if code > 128 else os._exit(code)
"""


@pytest.mark.parametrize(
  ("codes", "starts"), [((1, 64, 65, 69, 70, 73, 78), 1), ((74, 75, 134, 137, 143), 3)]
)
def test_what_may_pass_is_started_again(launch, tmp_path, codes, starts):
  """A script that ends with a code twice and then well."""
  (tmp_path / "ends.py").write_text(_ENDS)
  running = {}
  for code in codes:
    words = (f"--workdir={tmp_path}/c{code}", f"--code={code}")
    running[code] = launch("--restarts=3", "--", "ends", *words)
  for code, process in running.items():
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (0 if starts > 1 else code), errors
    assert (tmp_path / f"c{code}").read_text() == "x" * starts
    assert errors.count("starting again") == starts - 1


def test_restarts_are_counted(launch, tmp_path):
  (tmp_path / "ends.py").write_text(_ENDS)
  process = launch("--restarts=1", "--", "ends", f"--workdir={tmp_path}/c", "--code=75")
  process.communicate(timeout=60)
  assert process.returncode == 75
  assert (tmp_path / "c").read_text() == "xx"


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"accelerator": "v5litepod-16"}, "--accelerator means nothing for --to=local; leave it out"),
    ({"slices": 2}, "--slices means nothing for --to=local"),
  ],
)
def test_refuses(settings, message):
  with pytest.raises(JobError, match=re.escape(message)):
    local.render(Job(module="experiments.ppo", flags=("--workdir=runs/ppo",), **settings))
