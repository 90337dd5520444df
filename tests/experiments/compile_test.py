"""The programs of every algorithm compile for a slice of TPUs, and take what they must."""

import json

import jax
import pytest

from rlhf_jax.models import ModelConfig, build

pytest.importorskip("libtpu", reason="without libtpu nothing compiles for TPUs: -e '.[tpu]'")

CHIPS = 16
# Wide enough that the part of a chip is whole tiles of 8 x 128, in which TPUs keep arrays.
LAYERS, WIDTH, HEADS, MLP_WIDTH = 6, 1024, 8, 2048
SMALL = (
  "--topology=v5e:4x4",
  "--mesh=fsdp:8,tensor:2",
  f"--model.layers={LAYERS}",
  f"--model.width={WIDTH}",
  f"--model.heads={HEADS}",
  f"--model.mlp_width={MLP_WIDTH}",
  "--model.dtype=bfloat16",
  "--data.max_prompt_length=16",
  "--data.max_response_length=16",
  "--batch_size=16",
)
ROLLOUTS = {"ppo": "rollout", "nash_md": "rollout", "online_dpo": "rollout", "rest": "grow"}
TRAINS = {"ppo": "update", "rest": "improve"}
SCRIPTS = ("sft", "reward_model", "preference_model", "dpo", "kto", *ROLLOUTS)


def sizes() -> tuple[int, int]:
  """Numbers in the matrices of the model, which are split, and in what every chip holds whole."""
  config = ModelConfig(
    vocab_size=275,  # Of the built-in task.
    layers=LAYERS,
    width=WIDTH,
    heads=HEADS,
    kv_heads=HEADS,
    head_dim=WIDTH // HEADS,
    mlp_width=MLP_WIDTH,
  )
  shapes = jax.eval_shape(build(config).init, jax.random.key(0))
  split = sum(x.size for x in jax.tree.leaves(shapes["layers"]) if x.ndim == 3)
  return split, sum(x.size for x in jax.tree.leaves(shapes["layers"]) if x.ndim < 3) + 2000


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_fits(script, tmp_path, run_script):
  more = ("--sampling.max_new_tokens=16",) if script in (*ROLLOUTS, "dpo", "kto") else ()
  file = tmp_path / "figures.json"
  finished = run_script(
    "compile", tmp_path / "x", f"--algorithm={script}", f"--json={file}", *SMALL, *more
  )
  assert finished.code == 0, finished.output
  assert "rematerialization" not in finished.output
  figures = json.loads(file.read_text())
  assert figures["fits"]
  (plan,) = figures["plans"]
  programs = {program["name"]: program for program in plan["programs"]}
  split, whole = sizes()
  trained = programs[TRAINS.get(script, "train")]
  models = 2 if script == "ppo" else 1  # Policy and critic.
  # float32 params and two moments; the embedding and a batch are small.
  least = models * 12 * split / CHIPS
  frozen = 4 * split / CHIPS if script == "rest" else 0  # Its reference is an argument too.
  assert least < trained["arguments"] < 1.02 * (least + frozen) + models * 12 * whole
  if script in ("dpo", "kto", "ppo", "nash_md", "online_dpo"):  # The reference stays in memory.
    assert trained["beside"] >= 4 * split / CHIPS
  assert all(max(program["seconds"].values()) > 0 for program in plan["programs"])
  if script in ROLLOUTS:
    gathers = programs[ROLLOUTS[script]]["collectives"].get("all-gather", {"bytes": 0})
    assert gathers["bytes"] < 2 * split  # Once over all weights in 16 tokens would be more.
    moved = programs["reshard"]["collectives"]["all-gather"]["bytes"]
    assert 2 * split / 2 * 0.8 < moved < 2 * split / 2 * 1.2  # bfloat16, half for each chip.


def without(flags, *names):
  return [flag for flag in flags if flag.split("=")[0] not in names]


def test_a_search_ranks_what_fits(tmp_path, run_script):
  file = tmp_path / "figures.json"
  flags = ("--algorithm=dpo", f"--json={file}", "--search=3", "--lora.rank=4")
  anywhere = without(SMALL, "--mesh")
  finished = run_script(
    "compile", tmp_path / "x", *anywhere, *flags, "--sampling.max_new_tokens=16"
  )
  assert finished.code == 0, finished.output
  plans = json.loads(file.read_text())["plans"]
  assert len({plan["mesh"] for plan in plans}) == 3
  times = [sum(max(p["seconds"].values()) for p in plan["programs"]) for plan in plans]
  assert times == sorted(times)
  assert all((plan["remat"], plan["microbatches"]) == ("none", 1) for plan in plans)


def test_a_search_takes_less_memory_until_it_fits(tmp_path, run_script):
  """A batch whose activations are too many to keep, on a mesh that is given."""
  file = tmp_path / "figures.json"
  flags = ("--algorithm=sft", f"--json={file}", "--search=1")
  larger = ("--batch_size=4096", "--data.max_prompt_length=512", "--data.max_response_length=512")
  smaller = without(SMALL, *(flag.split("=")[0] for flag in larger))
  finished = run_script("compile", tmp_path / "x", *smaller, *larger, *flags)
  assert finished.code == 0, finished.output
  (plan,) = json.loads(file.read_text())["plans"]
  assert plan["mesh"] == "fsdp:8,tensor:2"
  assert plan["remat"] != "none" or plan["microbatches"] > 1
  assert "remat none, microbatches 1: train: " in " ".join(finished.output.split())


def test_what_does_not_fit_is_refused_in_words(tmp_path, run_script):
  finished = run_script(
    "compile",
    tmp_path / "x",
    "--algorithm=ppo",
    "--topology=v5e:2x2",
    "--mesh=fsdp:4",
    "--model.preset=llama3_8b",
    "--model.dtype=bfloat16",
    "--batch_size=8",
  )
  assert finished.code == 69, finished.output
  assert "does not fit: reshard" in finished.output
  assert "exceeds available HBM (15.75G)" in finished.output
  assert "Traceback" not in finished.output
