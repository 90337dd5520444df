"""Programs of every training script: shapes for all, compiled for a slice of TPUs with libtpu."""

import json
from typing import NamedTuple

import jax
import pytest

from experiments import compile as compile_script
from experiments.lab import case, plans, training
from rlhf_jax import preflight, reporting, sharding
from rlhf_jax.flags import UsageError
from rlhf_jax.models import ModelConfig, build
from tests.experiments.small_runs import METHODS, SETTINGS, SIZES, judges_of
from tests.testing import full, read_configs

SHORT = (
  "--data.max_prompt_length=16",
  "--data.max_response_length=16",
  "--batch_size=16",
)


def sampled(script):
  """The flag of the length of a response, if a script samples."""
  samples = hasattr(plans.script_of(script).Config(), "sampling")
  return ["--sampling.max_new_tokens=16"] if samples else []


def traced(script, *words):
  """Names of the programs of a script, which are traced with shapes on absent devices.

  Each has the shapes of what is in memory while it runs, by its name.
  """
  names = {}

  def trace(name, function, *args, work=None, held=(), **kwargs):
    del work
    if not hasattr(function, "lower"):
      return function(*args, **kwargs)
    assert name not in names
    names[name] = held
    if hasattr(function, "eval_shape"):
      shapes = function.eval_shape(*args, **kwargs)
    else:  # A step with frozen params.
      shapes = function.lower(*args, **kwargs).out_info
    return sharding.abstract(shapes, sharding.replicated(opened.bench.run.mesh))

  sizes = [] if any(word.startswith("--model.preset=") for word in words) else SIZES
  flags = [*sizes, *SHORT, *sampled(script), *words]
  _, config = read_configs(
    "experiments.compile", [f"--algorithm={script}", "--topology=v5e:2x2", *flags]
  )
  devices, head = jax.devices()[:4], plans.HEADS.get(script, "language")
  opened = case.open_case(config, "data:2,fsdp:2", devices, lambda mesh: trace, head)
  plans.script_of(script).programs(opened)
  return names


@pytest.fixture
def absent(monkeypatch):
  """Devices count as absent: nothing is placed on them."""
  monkeypatch.setattr(sharding, "is_absent", lambda mesh: True)


@pytest.mark.parametrize("script", METHODS)
def test_the_programs_of_a_script_fit_together(script, absent):
  names = [*traced(script)]
  assert names[-1] in case.TRAINING


@pytest.mark.parametrize("script", SETTINGS)
def test_the_programs_of_its_settings_fit_together(script, absent):
  words = [word.replace("={sft}", "=any") for word in SETTINGS[script]]
  left_out = ("{", "batch_size", "--reward.weights")  # Files, and what goes with them.
  words = [word for word in words if not any(part in word for part in left_out)]
  names = [*traced(script, *words)]
  assert names[-1] in case.TRAINING
  assert ("dense" in names) == any(word.startswith("--dense.path") for word in words)


@pytest.mark.parametrize("preset", ["llama3_8b"])
def test_the_memory_of_what_is_not_trained_falls_as_the_panel_promises(preset, absent):
  """PPO with a reward model and a critic of the size of the policy; its reference is the start."""
  held = {
    dtype: traced("ppo", f"--model.preset={preset}", f"--model.frozen_dtype={dtype}")["update"]
    for dtype in ("float32", "bfloat16", "nf4")
  }
  idle = {dtype: {name: of[name] for name in ("reference", "reward")} for dtype, of in held.items()}
  sizes = {dtype: preflight.bytes_in_all(of) for dtype, of in idle.items()}
  line = training.memory_line(held["float32"]["state"], idle["float32"])
  whole, half, eighth = (reporting.human_bytes(sizes[dtype]) for dtype in held)
  assert f"{whole} for models that are not trained ({half} with --model.frozen" in line
  assert f" {eighth} with --model.frozen_dtype=nf4)" in line
  assert sizes["bfloat16"] / sizes["float32"] == pytest.approx(0.5, abs=0.001)
  memory = {dtype: preflight.bytes_per_device(of) for dtype, of in held.items()}
  for dtype in ("bfloat16", "nf4"):  # Over two devices of fsdp.
    assert memory["float32"] - memory[dtype] == (sizes["float32"] - sizes[dtype]) / 2


def test_sampling_on_other_devices_is_not_compiled_for(absent):
  flags = ("--rollout.devices=1", "--rollout.importance_cap=2")
  with pytest.raises(UsageError, match="--rollout.devices is not compiled for; leave it at 0"):
    traced("ppo", *flags)


@pytest.fixture
def compile_here(tmp_path, monkeypatch, capsys):
  """`compile_here(script, *flags) -> (exit code, plans, output)` for a slice of TPUs."""
  pytest.importorskip("libtpu", reason="without libtpu nothing compiles for TPUs: -e '.[tpu]'")
  for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):  # Set anyway, and taken back.
    monkeypatch.setenv(name, "1")

  def run(script, *flags):
    file = tmp_path / "plans.json"
    words = [f"--algorithm={script}", f"--json={file}", *flags]
    cached = jax.config.jax_enable_compilation_cache
    try:
      code = compile_script.main(*read_configs("experiments.compile", words))
    finally:
      jax.config.update("jax_enable_compilation_cache", cached)
    return code, json.loads(file.read_text()), capsys.readouterr().err

  return run


class Slice(NamedTuple):
  """Absent chips and a model that is wide enough for the part of a chip to be whole tiles.

  TPUs keep arrays in tiles of 8 x 128.
  """

  topology: str
  mesh: str
  chips: int
  layers: int
  width: int
  heads: int
  mlp_width: int

  @property
  def flags(self) -> list[str]:
    """Flags of a script on the slice."""
    sizes = ("layers", "width", "heads", "mlp_width")
    model = [f"--model.{name}={getattr(self, name)}" for name in sizes]
    return [*model, f"--topology={self.topology}", "--model.dtype=bfloat16", *SHORT]

  def count(self) -> tuple[int, int, int]:
    """Numbers in arrays of the model that are split, in the embedding, and in what each chip holds.

    The number of ids is odd, so that only `tensor` splits the embedding.
    """
    config = ModelConfig(
      vocab_size=275,  # Of the built-in task.
      layers=self.layers,
      width=self.width,
      heads=self.heads,
      kv_heads=self.heads,
      head_dim=self.width // self.heads,
      mlp_width=self.mlp_width,
    )
    shapes = jax.eval_shape(build(config).init, jax.random.key(0))
    layers = jax.tree.leaves(shapes["layers"])
    split = sum(x.size for x in layers if x.ndim == 3)
    return (
      split,
      shapes["embed"]["embedding"].size,
      sum(x.size for x in layers if x.ndim < 3) + 2000,
    )


TINY = Slice("v5e:2x2", "fsdp:2,tensor:2", 4, 2, 256, 2, 512)
LARGE = Slice("v5e:4x4", "fsdp:8,tensor:2", 16, 2, 1024, 8, 2048)
ROLLOUTS = {"rest": "grow"}


@pytest.mark.slow
@pytest.mark.parametrize(
  ("script", "on"),
  [
    pytest.param("dpo", TINY, id="dpo-tiny"),
    pytest.param("ppo", TINY, id="ppo-tiny", marks=full),
    *(pytest.param(script, LARGE, id=f"{script}-large", marks=full) for script in METHODS),
  ],
)
def test_it_fits(script, on, compile_here):
  code, report, output = compile_here(script, f"--mesh={on.mesh}", *on.flags, *sampled(script))
  assert code == 0
  assert "rematerialization" not in output
  assert report["fits"]
  (plan,) = report["plans"]
  programs = {program["name"]: program for program in plan["programs"]}
  split, embedding, whole = on.count()
  of_chip = split / on.chips + embedding / 2  # Both slices have two parts in `tensor`.
  config = plans.script_of(script).Config()
  (trained,) = (programs[name] for name in case.TRAINING if name in programs)
  models = 2 if hasattr(config, "critic") else 1  # Policy and critic.
  # float32 params and two moments; a batch is small.
  least = models * 12 * of_chip
  frozen = 4 * of_chip if script == "rest" else 0  # Its reference is an argument too.
  assert 0.98 * least < trained["arguments"] < 1.02 * (least + frozen) + models * 12 * whole
  if script in ("dpo", "kto") or (judges_of(script) and script != "rest"):
    assert trained["beside"] >= 4 * of_chip  # The reference stays in memory.
  assert all(max(program["seconds"].values()) > 0 for program in plan["programs"])
  if judges_of(script):
    gathers = programs[ROLLOUTS.get(script, "rollout")]["collectives"].get("all-gather")
    assert gathers is None or gathers["bytes"] < 2 * split  # Once over all weights would be more.
    moved = programs["reshard"]["collectives"]["all-gather"]["bytes"]
    # In bfloat16 each chip gets a half, of which it has one part in `fsdp`.
    assert moved == pytest.approx(2 * split / 2 * (1 - 2 / on.chips), rel=0.02)


@pytest.mark.slow
@full
def test_a_search_ranks_what_fits(compile_here):
  flags = ("--search=3", "--lora.rank=4", "--sampling.max_new_tokens=16", *LARGE.flags)
  code, report, _ = compile_here("dpo", *flags)
  assert code == 0
  ranked = report["plans"]
  assert len({plan["mesh"] for plan in ranked}) == 3
  times = [sum(max(p["seconds"].values()) for p in plan["programs"]) for plan in ranked]
  assert times == sorted(times)
  assert all((plan["remat"], plan["microbatches"]) == ("none", 1) for plan in ranked)


CUBE = LARGE._replace(topology="v5p:2x2x2", chips=8)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("script", "on"),
  [
    pytest.param("sft", TINY, id="sft-tiny", marks=full),
    *(
      pytest.param(script, on, id=f"{script}-{on.topology}", marks=full)
      for script in ("dpo", "ppo", "nash_md")
      for on in (LARGE, CUBE)
    ),
  ],
)
def test_what_is_found_is_not_slower_than_what_one_writes_by_hand(script, on, compile_here):
  search = f"--search={1 if on is TINY else 4}"
  code, report, output = compile_here(script, search, *on.flags, *sampled(script))
  assert code == 0
  seconds = [
    sum(max(program["seconds"].values()) for program in plan["programs"])
    for plan in (report["plans"][0], report["by_hand"])
  ]
  assert 0 < seconds[0] <= seconds[1]
  assert (report["by_hand"]["mesh"], report["by_hand"]["remat"]) == (f"fsdp:{on.chips}", "full")
  assert f"by hand: fsdp:{on.chips}" in output


@pytest.mark.slow
@full
def test_a_search_takes_less_memory_until_it_fits(compile_here):
  """A batch whose activations are too many to keep, on a mesh that is given."""
  larger = ("--batch_size=4096", "--data.max_prompt_length=512", "--data.max_response_length=512")
  model = [flag for flag in TINY.flags if flag not in SHORT]
  code, report, output = compile_here("sft", f"--mesh={TINY.mesh}", "--search=1", *model, *larger)
  assert code == 0
  (plan,) = report["plans"]
  assert plan["mesh"] == TINY.mesh
  assert plan["remat"] != "none" or plan["microbatches"] > 1
  assert "remat none, microbatches 1: train: " in " ".join(output.split())


@pytest.mark.parametrize("words", [["--algorithm=ppo"], ["-x", "--algorithm", "ppo", "--y"]])
def test_the_algorithm_is_read_before_the_flags_of_its_script(words):
  assert compile_script.algorithm_of(["compile", *words]) == "ppo"
  assert compile_script.algorithm_of(["compile", "--topology=v5e:4x4"]) == ""
  with pytest.raises(UsageError, match="--algorithm=NAME must be on the command line"):
    compile_script.main(compile_script.Options("ppo", "v5e:4x4"), None)


def test_what_does_not_fit_is_refused_in_words(compile_here):
  flags = ("--mesh=fsdp:4", "--model.preset=llama3_8b", "--model.dtype=bfloat16")
  code, report, output = compile_here("ppo", "--topology=v5e:2x2", *flags, "--batch_size=8")
  assert code == 69
  assert not report["fits"]
  assert "does not fit: reshard" in output
  assert "exceeds available HBM (15.75G)" in " ".join(output.split())
