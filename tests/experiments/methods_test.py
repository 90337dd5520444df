import dataclasses
import json
import os
import pathlib
import shutil
import signal
import sys
import threading
import time

import pytest

from experiments import methods
from experiments.lab import stages
from rlhf_jax import flags, loop

SUMMARY = {
  "gold/mean": 6.0,
  "gold/mean_before": 4.0,
  "kl": 5.0,
  "gold/win_rate": 0.7,
  "gold/win_rate_low": 0.66,
  "gold/win_rate_high": 0.74,
}


@pytest.fixture
def started(monkeypatch):
  """The stages that were started, of which those in `codes` end with that exit code, or error."""
  begun, codes = [], {}

  def run(line):
    assert line[:2] == [sys.executable, "-m"]
    workdir = line[3].removeprefix("--workdir=")
    name = workdir.rpartition("/")[2]
    begun.append(name)
    if isinstance(codes.get(name), type):
      raise codes[name]
    if not codes.get(name):
      pathlib.Path(workdir).mkdir(exist_ok=True)
      (pathlib.Path(workdir) / "summary.json").write_text(json.dumps(SUMMARY))
      (pathlib.Path(workdir) / "metrics.jsonl").touch()
    return codes.get(name, 0)

  monkeypatch.setattr(methods, "run", run)
  return begun, codes


def test_what_has_finished_is_not_started_again(started, tmp_path, capsys):
  begun, codes = started
  config = methods.Config(str(tmp_path), rows=("dpo", "kto"), seeds=(0,))
  codes["dpo"] = 70
  with pytest.raises(SystemExit, match="seed 0: dpo ended with exit code 70"):
    methods.measure(config)
  assert begun == ["sft", "reward_model", "dpo", "kto"]
  assert "KTO" in capsys.readouterr().err
  codes.clear()
  begun.clear()
  methods.measure(config)
  assert begun == ["dpo"]
  assert {"sft", "dpo", "kto"} == set(json.loads((tmp_path / "summary.json").read_text()))


def test_a_command_that_has_changed_is_measured_in_a_new_workdir(started, tmp_path, monkeypatch):
  begun, _ = started
  page = tmp_path / "page.md"
  page.write_text("<!-- results -->\n<!-- end of results -->\n")
  config = methods.Config(str(tmp_path), ("ppo", "dpo", "rto"), seeds=(0, 1), page=(str(page),))
  methods.measure(config)
  begun.clear()
  monkeypatch.setitem(stages.COMMANDS, "dpo", "dpo --dpo.beta=0.3")
  with pytest.raises(flags.UsageError) as caught:  # RTO reads the policy of DPO.
    methods.measure(config)
  folders = [f"{tmp_path}/seed_{seed}/{name}" for seed in (0, 1) for name in ("dpo", "rto")]
  assert f"delete {' '.join(folders)}, or take another --workdir" in str(caught.value)
  # Another row is measured, and the numbers of the old command are not shown beside the new one.
  page.write_text("<!-- results -->\n<!-- end of results -->\n")
  methods.measure(dataclasses.replace(config, rows=("kto",)))
  assert "| PPO |" in page.read_text() and "| DPO |" not in page.read_text()
  assert {*begun} == {"kto"}
  for folder in folders:
    shutil.rmtree(folder)
  begun.clear()
  methods.measure(config)
  assert begun == ["dpo", "rto"] * 2 and "| DPO |" in page.read_text()


def test_minutes_of_a_method_that_is_continued_add_up(started, tmp_path, monkeypatch):
  """They are not known if its controller was killed, and what it had taken with it."""
  _, codes = started
  clock = iter(range(100))
  monkeypatch.setattr(methods, "cpu_minutes", lambda: float(next(clock)))
  config = methods.Config(str(tmp_path), rows=("dpo", "kto"), seeds=(0,))
  codes["dpo"] = loop.Preempted.exit_code
  with pytest.raises(loop.Preempted):
    methods.measure(config)
  codes["dpo"], codes["kto"] = 0, SystemError  # As a kill: nothing is written behind it.
  with pytest.raises(SystemError):
    methods.measure(config)
  codes["kto"] = 0
  methods.measure(config)
  summary = json.loads((tmp_path / "summary.json").read_text())
  assert summary["dpo"]["0"]["cpu_minutes"] == 2.0
  assert summary["kto"]["0"]["cpu_minutes"] == "NaN"


def test_a_preempted_run_stops_the_others(started, tmp_path):
  begun, codes = started
  codes["dpo"] = loop.Preempted.exit_code
  with pytest.raises(loop.Preempted):
    methods.measure(methods.Config(str(tmp_path), rows=("dpo", "kto")))
  assert begun == ["sft", "reward_model", "dpo"]


def test_a_seed_without_its_start_is_left_out(started, tmp_path):
  begun, codes = started
  codes["reward_model"] = 1
  with pytest.raises(SystemExit):
    methods.measure(methods.Config(str(tmp_path), rows=("dpo",), seeds=(0, 1)))
  assert begun == ["sft", "reward_model"] * 2


def test_pages_get_the_results(started, tmp_path):
  page = tmp_path / "page.md"
  places = ("results", "claims")
  page.write_text("".join(f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in places))
  methods.measure(methods.Config(str(tmp_path / "run"), ("ppo",), seeds=(0, 1), page=(str(page),)))
  assert "| PPO | 6.00 / 6.00 | 0.70 / 0.70 | 0.70 ± 0.03 |" in page.read_text()
  assert "PF-PPO" not in page.read_text()
  for name in ("pf_ppo", "pf_best"):  # The claim is there as soon as both have finished.
    config = methods.Config(str(tmp_path / "run"), (name,), seeds=(0, 1), page=(str(page),))
    methods.measure(config)
  assert (
    "| PF-PPO, the best alone | 6.00 / 6.00 | 6.00 | PF-PPO | 6.00 / 6.00 |" in page.read_text()
  )


def test_what_an_arm_reads_is_run_before_it(started, tmp_path):
  begun, _ = started
  methods.measure(methods.Config(str(tmp_path), rows=("maxmin", "hacked_robust"), seeds=(0,)))
  needed = ["terse", "lavish", "maxmin", "weak_0", "weak_1", "weak_2", "hacked_robust"]
  assert begun == ["sft", "reward_model", *needed]
  begun.clear()
  methods.measure(methods.Config(str(tmp_path), rows=("pooled", "maxmin"), seeds=(0,)))
  assert begun == ["pooled"]


@pytest.mark.parametrize(
  ("settings", "message"),
  [({"rows": ("best",)}, "dr_grpo"), ({"seeds": (-1,)}, "seeds"), ({"page": ("x.md",)}, "x.md")],
)
def test_bad_settings_are_refused(settings, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    methods.Config(str(tmp_path), **settings)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run(number, tmp_path):
  """Ctrl-C, which the terminal sends to both; SIGTERM is handed on."""
  ready = tmp_path / "ready"
  program = (
    "import os, pathlib, signal, sys, time\n"
    f"signal.signal({number:d}, lambda *_: sys.exit(75))\n"
    f"pathlib.Path({str(ready)!r}).write_text(str(os.getpid()))\n"
    "time.sleep(60)\n"
  )

  def stop():
    while not (ready.exists() and ready.read_text()):
      time.sleep(0.01)
    signal.pthread_kill(threading.main_thread().ident, number)
    if number == signal.SIGINT:
      os.kill(int(ready.read_text()), number)

  before = signal.getsignal(number)
  threading.Thread(target=stop, daemon=True).start()
  assert methods.run([sys.executable, "-c", program]) == 75
  assert signal.getsignal(number) is before


def test_minutes_are_those_that_a_run_takes():
  before = methods.cpu_minutes()
  assert methods.run([sys.executable, "-c", "sum(range(10**6))"]) == 0
  assert methods.cpu_minutes() > before


@pytest.mark.slow
def test_a_method_is_measured(monkeypatch, run_script, sft_run, reward_run, tmp_path):
  """With small runs, of which those before the method are there already."""
  finished = {"sft": sft_run, "reward_model": reward_run}

  def run(line):
    script, workdir, flags = line[2].removeprefix("experiments."), line[3].split("=")[1], line[4:]
    if script in finished:
      (tmp_path / "seed_0" / script).symlink_to(finished[script])
      return 0
    return run_script(script, workdir, *flags, "--sampling.max_new_tokens=8").code

  monkeypatch.setattr(methods, "run", run)
  methods.measure(methods.Config(str(tmp_path), rows=("ppo",), seeds=(0,)))
  results = json.loads((tmp_path / "summary.json").read_text())
  assert 0 <= results["ppo"]["0"]["low"] <= results["ppo"]["0"]["win_rate"] <= 1
