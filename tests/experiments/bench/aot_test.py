"""Train steps compiled for absent devices: ours for CPUs in their place, tunix' by a fake."""

import json
import sys

import jax
import pytest

from experiments.bench import aot, compare
from rlhf_jax import flags, preflight, sharding
from rlhf_jax.models import presets
from tests.testing import TINY_MODEL

# Program in place of `peers/tunix_programs.py`: it compiles nothing.
PEER = """
import json, pathlib, sys
spec = json.loads(pathlib.Path(sys.argv[1]).read_text())
folder = pathlib.Path(spec["folder"]) / sys.argv[2]
folder.mkdir()
if sys.argv[2] == "dpo" and spec["dtype"] == "bfloat16":
  sys.exit("a library fails")
if spec["dtype"] == "float32":
  (folder / "reference.refused").write_text("XLA: Used 19.08G exceeds available HBM (15.75G)")
memory = {"arguments": 1, "temporaries": 2, "peak": 2**30, "compile_seconds": 3.0}
(folder / "train.json").write_text(json.dumps(memory))
(folder / "train.hlo").write_text('''HloModule jit_f

ENTRY %main (a: f32[8,64], b: f32[64,32]) -> f32[8,32] {
  %a = f32[8,64]{1,0} parameter(0)
  %b = f32[64,32]{1,0} parameter(1)
  %dot.1 = f32[8,32]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %sum.1 = f32[8,32]{1,0} all-reduce(%dot.1), replica_groups={{0,1}}, to_apply=%add
}
''')
"""
CHIP = preflight.Chip(1e9, 1e6, 1e3, 1e2)


@pytest.fixture
def absent(monkeypatch, tmp_path):
  """Devices of this machine as the absent ones, and a peer that answers at once."""
  program = tmp_path / "peer.py"
  program.write_text(PEER)
  monkeypatch.setattr(aot, "PROGRAM", program)
  monkeypatch.setattr(aot, "tpu_library", lambda: "libtpu.so")
  monkeypatch.setattr(compare, "make_environment", lambda folder, needs: sys.executable)
  monkeypatch.setattr(preflight, "topology_devices", lambda name: (jax.devices()[:2], CHIP))
  monkeypatch.setattr(sharding, "is_absent", lambda mesh: True)
  monkeypatch.setitem(presets.PRESETS, "llama3_1b", TINY_MODEL)
  monkeypatch.setattr(jax.config, "update", lambda name, value: None)


def config_of(tmp_path, **changes):
  given = {"presets": ("llama3_1b",), "topologies": ("v5e:4x4",), "prompt": 4, "response": 4}
  return aot.Config(**given | {"json": str(tmp_path / "aot.json")} | changes)


def test_both_sides_are_compiled_and_counted(absent, tmp_path, capsys):
  content = aot.run(config_of(tmp_path, works=("sft",), peer_dtypes=("float32",)))
  assert json.loads((tmp_path / "aot.json").read_text()) == content
  (sides,) = content["results"].values()
  ours, theirs = sides["ours"]["sft train"], sides["tunix float32"]["sft train"]
  # Recomputation is work that is done beyond the least.
  assert ours["flops"] == pytest.approx(ours["least_flops"], rel=0.5) and ours["peak"] > 0
  assert theirs["flops"] == 2 * 8 * 64 * 32
  assert theirs["bytes"] == 4 * (8 * 64 + 64 * 32 + 8 * 32) + 2 * 4 * 8 * 32
  assert theirs["sent"] == 4 * 8 * 32 and theirs["collectives"]["all-reduce"]["count"] == 1
  assert theirs["roofline"] == theirs["bytes"] / 1e3
  assert sides["tunix float32"]["sft reference"]["refused"].startswith("Used 19.08G")
  shown = capsys.readouterr().err
  assert "sft reference, tunix float32: Used 19.08G exceeds available HBM (15.75G)" in shown
  assert aot.run(aot.Config(show=str(tmp_path / "aot.json"))) == content


def test_a_side_is_written_before_the_next_one_starts(absent, tmp_path, monkeypatch):
  started = []

  def compile_theirs(python, spec, *_):
    if started:
      raise KeyboardInterrupt
    started.append(spec["dtype"])
    return {}

  monkeypatch.setattr(aot, "compile_ours", lambda *_: {})
  monkeypatch.setattr(aot, "compile_theirs", compile_theirs)
  with pytest.raises(KeyboardInterrupt):
    aot.run(config_of(tmp_path, peer_dtypes=("float32", "bfloat16")))
  (sides,) = json.loads((tmp_path / "aot.json").read_text())["results"].values()
  assert list(sides) == ["ours", "tunix float32"]


def test_a_table_is_narrow(capsys):
  sent = {"all-gather": {"count": 117, "in_loops": 100, "bytes": 1.0}}
  row = {"peak": 95.5 * 2**30, "flops": 1.234e15, "bytes": 1.234e12, "sent": 1.234e10}
  row |= {"collectives": sent, "seconds": {"network": 12.34}, "roofline": 12.34}
  aot.show({"results": {"llama3_8b on v5e:4x4": {"tunix bfloat16": {"dpo reference": row}}}})
  shown = capsys.readouterr().err
  assert "12.3 network" in shown and max(map(len, shown.splitlines())) <= 80


def test_a_peer_that_fails_is_said(absent, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(aot, "compile_ours", lambda *args: {})
  content = aot.run(config_of(tmp_path, works=("dpo",), peer_dtypes=("bfloat16",)))
  (sides,) = content["results"].values()
  assert sides["tunix bfloat16"] == {"dpo": {"refused": "a library fails"}}
  assert "dpo, tunix bfloat16: a library fails" in capsys.readouterr().err


def test_settings_that_cannot_be_compared_are_refused(absent, tmp_path, monkeypatch):
  monkeypatch.setattr(aot, "compile_ours", lambda *args: {})
  with pytest.raises(flags.UsageError, match="tunix has no data axis"):
    aot.run(config_of(tmp_path, mesh="data:2"))
  with pytest.raises(ValueError, match="works must be among sft, dpo, got 'ppo'"):
    aot.Config(works=("ppo",))


def test_a_missing_compiler_is_said(monkeypatch):
  monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(flags.UsageError, match="pip install 'rlhf_jax\\[tpu\\]'"):
    aot.tpu_library()
