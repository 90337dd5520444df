"""The ladder of memory, and the search for a mesh, with a compiler that is made up."""

import dataclasses

import jax
import pytest

from experiments import dpo, preference_model
from experiments.lab import models, plans
from rlhf_jax import flags, preflight, sharding
from tests.experiments.small_runs import METHODS

CONFIG = dpo.Config(batch_size=8, model=models.ModelOptions(layers=1, width=32, heads=2))


@pytest.mark.parametrize("script", METHODS)
def test_micro_batches_are_a_setting_of_the_method(script):
  config = plans.script_of(script).Config()
  name = plans.settings_name(config)
  if script == "kto":  # Its loss compares the rows of a batch.
    with pytest.raises(ValueError, match="microbatches must be 1"):
      dataclasses.replace(getattr(config, name), microbatches=2)
  elif name:
    changed = dataclasses.replace(getattr(config, name), microbatches=2)
    assert getattr(dataclasses.replace(config, **{name: changed}), name).microbatches == 2


@pytest.fixture
def compiler(monkeypatch):
  """`compiler(fits)`: plans that fit, or are refused at a program; the ones that were tried."""
  tried = []

  def install(verdict, seconds=lambda mesh: 1.0):
    def compile_plan(algorithm, mesh, config, absent):
      rung = (config.model.remat, getattr(getattr(config, algorithm), "microbatches", 1))
      tried.append((mesh, *rung))
      stopped = verdict(mesh, *rung)
      program = preflight.Program("train", 1, 1, 1, 0, 0.0, 0.0, {}, {}, {"compute": seconds(mesh)})
      refused = f"{stopped}: too large" if stopped else ""
      return plans.Plan(mesh, *rung, [program], refused, stopped)

    monkeypatch.setattr(plans, "compile_plan", compile_plan)
    return tried

  return install


def test_the_first_rung_that_fits_is_taken(compiler):
  tried = compiler(lambda mesh, remat, parts: "" if remat == "full" and parts == 2 else "train")
  plan = plans.climb("dpo", "data:1", CONFIG, None)
  assert (plan.remat, plan.microbatches, plan.refused) == ("full", 2, "")
  assert [rung[1:] for rung in tried] == [("none", 1), ("dots", 1), ("full", 1), ("full", 2)]


def test_no_rung_helps_a_program_without_gradients(compiler):
  tried = compiler(lambda mesh, remat, parts: "reshard")
  assert plans.climb("dpo", "data:1", CONFIG, None).refused
  assert len(tried) == 1


def test_rungs_that_do_not_split_the_batch_are_left_out(compiler, monkeypatch):
  tried = compiler(lambda mesh, remat, parts: "train")
  monkeypatch.setattr(plans, "settings_name", lambda config: "")  # No micro-batches.
  plan = plans.climb("preference_model", "data:1", preference_model.Config(), None)
  assert (plan.remat, plan.refused) == ("full", "train: too large")
  assert [rung[1] for rung in tried] == ["none", "dots", "full"]


def test_plans_that_fit_come_first_and_the_fastest_of_them(compiler, monkeypatch):
  times = {"data:4": 3.0, "fsdp:4": 2.0, "tensor:4": 1.0, "data:2,fsdp:2": 0.5}
  compiler(lambda mesh, *rung: "reshard" if mesh == "tensor:4" else "", times.__getitem__)
  monkeypatch.setattr(plans, "promising", lambda *args: list(times))
  ranked = plans.search("dpo", "", 3, CONFIG, plans.Slice(range(4), None, {}))
  assert [plan.mesh for plan in ranked] == ["fsdp:4", "data:4", "tensor:4"]
  (only,) = plans.search("dpo", "data:4", 3, CONFIG, plans.Slice(range(4), None, {}))
  assert only.mesh == "data:4"


def test_meshes_divide_the_batch_and_the_model(monkeypatch):
  monkeypatch.setattr(sharding, "is_absent", lambda mesh: True)
  absent = plans.Slice(jax.devices()[:4], preflight.CHIPS["v5e"], {})
  specs = plans.promising("dpo", CONFIG, absent)
  assert {"data:4", "fsdp:4", "data:2,fsdp:2", "fsdp:2,tensor:2"} <= set(specs)
  assert not any("tensor:4" in spec for spec in specs)  # Two heads.
  odd = dataclasses.replace(CONFIG, batch_size=3)
  with pytest.raises(flags.UsageError, match="no mesh of 4 chips divides --batch_size=3"):
    plans.search("dpo", "", 1, odd, absent)


class Chips:
  """Absent chips, of which only the number matters."""

  def __init__(self, count):
    self.devices = range(count)


@pytest.mark.parametrize(
  ("chips", "rows", "mesh"),
  [(8, 8, "fsdp:8"), (8, 64, "fsdp:8"), (8, 4, "fsdp:4,tensor:2"), (12, 8, "fsdp:4,tensor:3")],
)
def test_a_plan_by_hand_splits_everything_and_keeps_nothing(compiler, chips, rows, mesh):
  tried = compiler(lambda *of: "")
  config = dataclasses.replace(CONFIG, batch_size=rows)
  hand = plans.by_hand("dpo", config, Chips(chips))
  assert tried == [(mesh, "full", 1)] == [(hand.mesh, hand.remat, hand.microbatches)]


def test_a_model_that_is_too_narrow_has_no_plan_by_hand(monkeypatch):
  def compile_plan(*of):
    raise ValueError("2 heads are not divisible by 4")

  monkeypatch.setattr(plans, "compile_plan", compile_plan)
  assert plans.by_hand("dpo", CONFIG, Chips(32)) is None


def test_a_search_shows_the_plan_by_hand_beside_what_it_found(compiler, capsys):
  compiler(lambda mesh, remat, parts: "", seconds=lambda mesh: 2.0 if mesh == "fsdp:8" else 1.5)
  found = [plans.climb("dpo", mesh, CONFIG, None) for mesh in ("data:8", "data:4,fsdp:2")]
  hand = plans.by_hand("dpo", CONFIG, Chips(8))
  plans.show_search(found, hand)
  shown = capsys.readouterr().err
  assert "by hand: fsdp:8" in shown and "1.5" in shown and "2" in shown
  assert hand.to_dict()["programs"][0]["name"] == "train"
  plans.show_search(found, None)
  assert "by hand" not in capsys.readouterr().err
