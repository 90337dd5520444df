"""Real processes: they meet, and none waits for one that is gone."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.testing import full


@pytest.fixture
def pod(repository):
  """Starts `python -m launch.pod` with Python code in each of its processes."""

  def start(code: str, *sizes: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "launch.pod", *sizes, "--", sys.executable, "-c", code]
    return subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, text=True)

  return start


def test_each_process_has_its_place(pod):
  code = (
    "import os, sys\n"
    'words = [*sys.argv[1:], os.environ["XLA_FLAGS"].split()[-1]]\n'
    'os.write(1, " ".join(words).encode() + b"\\n")'  # At once: they share the pipe.
  )
  output, _ = pod(code, "--processes=3", "--devices=4").communicate(timeout=30)
  lines = sorted(line.split() for line in output.splitlines())
  assert [line[2] for line in lines] == [f"--process_id={i}" for i in range(3)]
  assert len({line[0] for line in lines}) == 1
  assert re.fullmatch(r"--coordinator=127\.0\.0\.1:\d+", lines[0][0])
  assert {line[1] for line in lines} == {"--processes=3"}
  assert {line[3] for line in lines} == {"--xla_force_host_platform_device_count=4"}


def test_one_process_is_alone(pod):
  output, _ = pod("import sys; print(sys.argv[1:])", "--processes=1").communicate(timeout=30)
  assert output == "[]\n"


def test_the_first_code_is_that_of_the_pod(pod):
  code = 'import sys; sys.exit(70 if sys.argv[-1].endswith("1") else 0)'
  running = pod(code, "--processes=2")
  running.communicate(timeout=30)
  assert running.returncode == 70


def test_stop_reaches_all(pod):
  code = (
    "import os, signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
    'os.write(1, b"\\n")\n'
    "time.sleep(60)"
  )
  running = pod(code, "--processes=2")
  for _ in range(2):
    running.stdout.readline()
  running.send_signal(signal.SIGTERM)
  running.communicate(timeout=30)
  assert running.returncode == 75


def test_those_that_are_left_are_ended(pod):
  code = (
    "import os, sys, time\n"
    'os.write(1, b"%d\\n" % os.getpid())\n'
    'os.kill(os.getpid(), 9) if sys.argv[-1].endswith("0") else time.sleep(600)'
  )
  begin = time.monotonic()
  running = pod(code, "--processes=2", "--patience=1")
  output, _ = running.communicate(timeout=30)
  assert running.returncode == 137
  assert time.monotonic() - begin < 20
  for pid in map(int, output.split()):
    with pytest.raises(ProcessLookupError):
      os.kill(pid, 0)


_GROUP = """
import os, sys, time
from absl import flags
from rlhf_jax import entry, processes
group = dict(word.removeprefix("--").split("=") for word in sys.argv[1:])
number = int(group["process_id"])
class Broken(RuntimeError):
  exit_code = 70
def main(argv):
  processes.Group(
    coordinator=group["coordinator"], processes=int(group["processes"]), process_id=number
  ).connect()
  os.write(1, b"met\\n")
  if number in WHO:
    if KILL:
      os.kill(os.getpid(), 9)
    time.sleep(number)  # Not quite at the same time.
    raise Broken("no numbers")
  time.sleep(600)
entry.flags.parse = lambda args: flags.FLAGS(args[:1])
entry.run(main, ["script"])
"""


@pytest.mark.parametrize(
  "who", [(1,), pytest.param((0,), marks=full), pytest.param((0, 1), marks=full)]
)
def test_a_process_that_fails_keeps_its_code(pod, who):
  code = _GROUP.replace("WHO", str(who)).replace("KILL", "False")
  begin = time.monotonic()
  running = pod(code, "--processes=2", "--patience=60" if len(who) == 2 else "--patience=0")
  output, _ = running.communicate(timeout=60)
  assert running.returncode == 70, output
  assert output.count("met") == 2
  assert time.monotonic() - begin < 30


@full
@pytest.mark.parametrize("number", [0, 1])
def test_those_that_are_left_end_by_themselves(pod, number):
  code = _GROUP.replace("WHO", str((number,))).replace("KILL", "True")
  begin = time.monotonic()
  running = pod(code, "--processes=2", "--patience=600")
  running.communicate(timeout=120)
  assert running.returncode == 137
  assert time.monotonic() - begin < 60
