"""Benchmarks at tiny sizes: their fields, their count of operations, and taking turns."""

import contextlib
import functools
import importlib
import json
import os
import pathlib
import re
import shlex
import sys

import jax
import jax.extend
import pytest
from absl import flags as absl_flags
from jax.interpreters import partial_eval

from experiments.bench import compare, measure, memory, runs, save, start_up, timed, turns, works
from experiments.bench.peers import protocol
from experiments.bench.shapes import Shape, set_up
from rlhf_jax import flags
from tests.testing import full

FOLDER = pathlib.Path(compare.__file__).parent
TINY = {
  "vocab_size": 64,
  "layers": 1,
  "width": 16,
  "heads": 2,
  "mlp_width": 32,
  "batch_size": 4,
  "prompt": 4,
  "response": 4,
  "samples_per_prompt": 2,
  "epochs": 2,
  "minibatches": 2,
}
TABLES = {
  "train_step": works.TRAIN_STEPS,
  "generate": works.SAMPLING,
  "iteration": works.ITERATIONS,
}


# The others are only traced, but with FULL=1.
TIMED = TABLES if "FULL" in os.environ else {"train_step": ["sft"], "generate": ["generate"]}


def require_narrow(text: str) -> None:
  table = [line for line in text.splitlines() if line.startswith("  ")]
  assert table and max(map(len, table)) <= 80, text


@functools.cache
def wide(share_prompts=False):
  """Models in which attention, of which only the causal half is counted, weighs little."""
  wider = {"width": 128, "mlp_width": 256, "vocab_size": 512, "prompt": 16, "response": 16}
  return set_up(Shape(**TINY | wider, share_prompts=share_prompts))


@pytest.mark.parametrize("name", TIMED)
def test_works_are_timed_without_recompiling(name, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(measure, "measure_limits", lambda dtype: measure.Limits(1e10, 1e10))
  file = tmp_path / "out.json"
  config = timed.Config(**TINY, works=tuple(TIMED[name]), rounds=2, json=str(file))
  timed.time_works(config, name, TABLES[name])
  content = json.loads(file.read_text())
  assert content["config"]["batch_size"] == 4
  assert list(content["works"]) == list(TIMED[name])
  for row in content["works"].values():
    assert len(row["seconds"]) == len(row["cpu_seconds"]) == 2
    assert row["min"] <= row["median"] and row["median"] > 0
    assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["median"])
    assert min(row[key] for key in ("flops", "mfu", "peak_bytes", "compiles", "first_seconds")) > 0
    assert ("bandwidth_share" in row) == (name == "generate")
  require_narrow(capsys.readouterr().err)


def test_limits_are_measured():
  limits = measure.measure_limits(size=64)
  assert limits.flops > 1e6 and limits.bandwidth > 1e6


def test_unknown_works_are_refused():
  with pytest.raises(flags.UsageError, match="--works: typo is none of"):
    timed.time_works(timed.Config(**TINY, works=("typo",)), "title", works.SAMPLING)


def test_a_recompilation_is_an_error():
  lengths = iter(range(1, 9))
  work = measure.Work(lambda: jax.jit(lambda x: x + 1)(jax.numpy.ones(next(lengths))), 1, 1.0)
  with pytest.raises(measure.Recompiled, match="changing compiled"):
    measure.interleaved({"changing": work}, 1)


def count_dots(jaxpr, trips: int) -> float:
  """Operations of the products of a program; loops without a known end run `trips` times."""
  total = 0.0
  for eqn in jaxpr.eqns:
    times = {"scan": eqn.params.get("length"), "while": trips}.get(eqn.primitive.name, 1)
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      shared = [eqn.invars[0].aval.shape[n] for n in contracted]
      size = 2.0
      for n in (*shared, *eqn.outvars[0].aval.shape):
        size *= n
      total += size
    for inner in jax.extend.core.jaxprs_in_params(eqn.params):
      total += times * count_dots(inner, trips)
  return total


@pytest.mark.parametrize(
  ("name", "shared"),
  [*((name, False) for name in (*works.TRAIN_STEPS, "generate")), ("dpo", True)],
)
def test_counted_operations_are_those_of_the_products(name, shared):
  work = (works.TRAIN_STEPS | works.SAMPLING)[name](wide(shared))
  jaxpr = jax.make_jaxpr(work.run)().jaxpr
  jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))  # As compilers do.
  dots = count_dots(jaxpr, wide().shape.response - 1)
  assert dots == pytest.approx(work.flops, rel=0.04)
  if shared:
    assert work.flops < 0.87 * works.TRAIN_STEPS[name](wide()).flops  # A quarter of the layers.


class Side:
  """Process that takes turns, without a process."""

  def __init__(self, name, order, seconds, **facts):
    self.facts, self._name, self._order = facts, name, order
    self._seconds = iter(seconds)

  def run(self):
    self._order.append(self._name)
    seconds = next(self._seconds)
    return {
      "seconds": seconds,
      "cpu_seconds": seconds,
      "peak_bytes": 2**20,
      "updates": 1,
      "loss": 1.0,
    }


def compare_sides(ours, theirs, **peer):
  """Results and reasons of a comparison of two sides."""
  sides = {"ours": ours, "quick": theirs}
  peers = {
    "quick": compare.Peer("quick.py", (), ("sft",), **peer),
    "absent": compare.Peer("absent.py", (), ("sft",)),
    "other": compare.Peer("other.py", (), ("dpo",)),
  }

  def command_of(name, work):
    if name == "absent":
      raise turns.Unavailable("no such package")
    return [name, work]

  def start(name, command):
    assert command == [name, "sft"]
    return contextlib.nullcontext(sides[name])

  return compare.compare(["sft"], peers, command_of, start, rounds=3)


def test_sides_take_turns_and_ratios_are_of_medians(capsys):
  order = []
  ours = Side("ours", order, [1.0, 2.0, 9.0], params=5, nll=2.0)
  theirs = Side("quick", order, [3.0, 1.0, 4.0], params=5, nll=2.0001)
  results, skipped = compare_sides(ours, theirs, same_loss=True)
  assert order == ["ours", "quick"] * 3
  assert results["sft quick"]["ratio_seconds"] == 3.0 / 2.0
  assert skipped == {"sft absent": "no such package"}
  compare.show({"results": results, "skipped": skipped})
  shown = capsys.readouterr().err
  require_narrow(shown)
  assert "1.50" in shown and "sft absent: left out: no such package" in shown


@pytest.mark.parametrize("name, value", [("params", 6), ("nll", 2.1)])
def test_other_work_is_left_out(name, value):
  facts = {"params": 5, "nll": 2.0}
  ours = Side("ours", [], [1.0] * 3, **facts)
  results, skipped = compare_sides(ours, Side("quick", [], [1.0] * 3, **facts | {name: value}))
  assert not results and f"{name} of facts is {value}" in skipped["sft quick"]


@pytest.mark.parametrize("name, value", [("updates", 2), ("loss", 1.001), ("generated", 3)])
def test_other_runs_are_left_out(name, value):
  answer = {"seconds": 1.0, "cpu_seconds": 1.0, "peak_bytes": 1, "updates": 1, "loss": 1.0}
  answer["generated"] = 4

  class Answering:
    def __init__(self, **changes):
      self.facts, self._changes = {}, changes

    def run(self):
      return answer | self._changes

  results, skipped = compare_sides(Answering(), Answering(**{name: value}), same_loss=True)
  assert not results and f"{name} of a run is {value}" in skipped["sft quick"]
  if name == "loss":  # Of a library with another order of its rows, say.
    assert compare_sides(Answering(), Answering(loss=value))[0]


FAKE = """
import sys
sys.path.insert(0, {peers!r})
import protocol

runs = 0

def run():
  global runs
  runs += 1
  print("a library says something")
  if runs == 5:
    raise SystemExit("the fifth run fails")
  return {{"updates": runs}}

peer = protocol.Peer()
peer.serve(run, lambda: {{"params": peer.spec["params"]}})
"""


def test_a_program_runs_by_order(tmp_path):
  program, spec, log = (tmp_path / name for name in ("fake.py", "spec.json", "log"))
  program.write_text(FAKE.format(peers=str(FOLDER / "peers")))
  spec.write_text('{"params": 3}')
  command = [sys.executable, "-S", str(program), str(spec), "sft"]
  with turns.started(command, log, turns.available_cores()[:1]) as process:
    assert process.facts == {"params": 3}
    answers = [process.run() for _ in range(2)]
    assert [answer["updates"] for answer in answers] == [3, 4]
    assert min(answers[0][key] for key in ("seconds", "cpu_seconds", "peak_bytes")) > 0
    with pytest.raises(turns.Unavailable, match="the fifth run fails"):
      process.run()
  assert "a library says something" in log.read_text()


def test_what_cannot_be_installed_is_left_out(tmp_path, monkeypatch):
  pip = "import sys; sys.exit('no matching distribution')"

  def create(folder, **options):
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    (folder / "bin" / "python").write_text(f"#!{sys.executable} -S\n{pip}\n")
    (folder / "bin" / "python").chmod(0o755)

  monkeypatch.setattr(compare.venv, "create", create)
  with pytest.raises(turns.Unavailable, match="pip install trl==0.* no matching distribution"):
    compare.make_environment(tmp_path / "trl", ["trl==0"])
  with pytest.raises(turns.Unavailable):  # It is not taken for one that is complete.
    compare.make_environment(tmp_path / "trl", ["trl==0"])


def test_a_recorded_comparison_is_shown(tmp_path, capsys):
  side = {"seconds": 2.0, "cpu_seconds": 1.5, "peak_bytes": 2**30, "runs": []}
  result = {"ours": side, "theirs": side, "ratio_seconds": 1.0, "ratio_cpu_seconds": 1.0}
  content = {"results": {"reward_model compiled": result}, "skipped": {"ppo trl": "why"}}
  file = tmp_path / "compare.json"
  file.write_text(json.dumps(content))
  assert compare.run(compare.Config(show=str(file))) == content
  shown = capsys.readouterr().err
  require_narrow(shown)
  assert "ppo trl: left out: why" in shown


def test_our_side_runs_by_order_and_says_what_it_did(tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr(protocol.Peer, "__init__", lambda self: None)
  peer = protocol.Peer()
  peer.spec, peer.work, peer._start = {"shape": TINY}, "grpo", (0.0, 0.0)
  monkeypatch.setattr(peer, "_say", lambda **content: said.append(content), raising=False)

  def wait():
    if len(said) == 2:
      raise EOFError

  monkeypatch.setattr(peer, "wait", wait)
  from experiments.bench import ours

  with pytest.raises(EOFError):
    ours.serve(peer)
  facts, answer = said
  assert facts["ready"]["largest_program"]["program"] > 4 * facts["ready"]["params"]
  assert facts["ready"]["first_seconds"] > facts["ready"]["set_up_seconds"] > 0
  assert answer["generated"] == 16 and answer["updates"] == 1 and answer["compiles"] == 0


def test_saves_are_timed(tmp_path, capsys):
  file = tmp_path / "out.json"
  save.run(save.Config(**TINY, folder=str(tmp_path), rounds=1, json=str(file)))
  content = json.loads(file.read_text())
  assert content["bytes"] > 0
  assert all(row["bytes_per_second"] > 0 for row in content["works"].values())
  assert content["works"]["blocked"]["min"] <= content["works"]["saved"]["min"]
  for kind in ("with", "without"):
    assert min(content["stall"][kind]["seconds"] + content["stall"][kind]["cpu_seconds"]) > 0
  assert list(tmp_path.iterdir()) == [file]
  require_narrow(capsys.readouterr().err)


def answering(facts):
  """Replacement of `turns.started` for a process with these facts."""
  side = Side("ours", [], [1.0] * 9, **facts)
  return lambda *args: contextlib.nullcontext(side)


def test_runs_in_one_program_are_timed_if_they_are_the_same_runs(tmp_path, monkeypatch, capsys):
  file = tmp_path / "out.json"
  config = runs.Config(**TINY, runs=2, steps=3, rounds=1, json=str(file))
  runs.run(config)
  rows = json.loads(file.read_text())["works"]
  assert list(rows) == ["step by step", "scanned", "vmapped"]
  assert rows["step by step"]["ratio"] == 1
  require_narrow(capsys.readouterr().err)
  ways = runs.ways

  def other(*args):
    table = ways(*args)
    return table | {"vmapped": lambda: 1.001 * table["vmapped"]()}

  monkeypatch.setattr(runs, "ways", other)
  with pytest.raises(ArithmeticError, match="vmapped"):
    runs.run(config)


def test_starts_and_memory_are_measured(tmp_path, monkeypatch, capsys):
  sizes = {"arguments": 3, "temporaries": 4, "program": 7}
  facts = {"set_up_seconds": 1.0, "first_seconds": 2.0, "largest_program": sizes}
  monkeypatch.setattr(turns, "started", answering(facts))
  file = tmp_path / "out.json"
  start_up.run(start_up.Config(**TINY, json=str(file)))
  row = json.loads(file.read_text())["works"]["sft"]
  assert row["cold"]["first_seconds"] == row["warm"]["first_seconds"] == 2.0
  memory.run(memory.Config(**TINY, vocabularies=(64, 128), json=str(file)))
  rows = json.loads(file.read_text())["works"]
  assert rows["sft 128"] == {**sizes, "process": 2**20}
  require_narrow(capsys.readouterr().err)


def test_commands_of_the_page_are_accepted():
  text = (FOLDER / "README.md").read_text(encoding="utf-8")
  (block,) = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
  commands = [shlex.split(line) for line in block.splitlines()]
  named = {command[2].rpartition(".")[2] for command in commands}
  listed = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
  scripts = {path.stem for path in FOLDER.glob("*.py") if "__main__" in path.read_text()}
  assert named == listed == scripts - {"ours"}
  for _, _, name, *words in commands:
    module = importlib.import_module(name)
    values = absl_flags.FlagValues()
    read = flags.define(getattr(module, "Config", timed.Config), flag_values=values)
    values(["program", *words])
    read()


@full
@pytest.mark.slow
def test_loops_written_by_hand_do_the_same_work(tmp_path):
  tiny = TINY | {"minibatches": 1}
  config = compare.Config(**tiny, peers=("torch", "hf"), rounds=1)
  content = compare.run(config)
  assert not content["skipped"] and len(content["results"]) == len(compare.WORKS) + 1
