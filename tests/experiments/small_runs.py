"""Training scripts, as they are found, and the flags of small runs of them."""

from collections.abc import Sequence
from typing import Any

import pytest

from experiments.lab import plans
from tests.testing import full

METHODS = plans.methods()
# Methods whose script and state are those of a relative that is tested: PPO, GRPO, RLOO, DPO, SFT,
# Nash-MD.
KINDRED = {"cgpo", "cispo", "gkd", "gspo", "ipo_md", "p3o", "pf_ppo", "reinforce_pp", "simpo"}
# Settings with states of their own: adapters, averages, moments, rounds, packed rows, schedules.
SETTINGS = {
  "dpo": ("--data.packed_length=192", "--lora.rank=4", "--eval_every=3"),
  "cgpo": ("--reward.name=gold", "--reward.constraints=no_filler", "--rollout.redraws=2"),
  "gkd": ("--teacher={teacher}", "--gkd.student_share=0.5", "--eval_every=3"),
  "grpo": ("--shaping.normalize", "--rollout.packed_length=64", "--preference.name=expert"),
  "ipo_md": ("--preference.name=panel", "--ipo_md.mix=0", "--extragradient", "--lora.rank=2"),
  "nash_md": (
    "--preference.name=panel",
    "--nash_md.ema=0.9",
    "--nash_md.mix=0.25",
    "--nash_md.mix_end=0.5",
    "--nash_md.tau_end=0.11",
  ),
  "online_dpo": (
    "--preference.name=expert",
    "--online.round_steps=2",
    "--online.bonus_coef=0.01",
    "--lora.rank=2",
  ),
  "ppo": ("--critic.share_trunk", "--rollout.packed_length=64", "--dense.path={sft}"),
  "ppo_max": (
    "--reward.path={reward}",
    "--critic.warmup=2",
    "--ppo_max.kl_target=6",
    "--ppo_max.normalize_values",
    "--ppo_max.cut=sentence",
    "--rollout.importance_cap=2",
    "--eval_every=2",
  ),
  "preference_model": ("--lora.rank=2",),
  "rest": (
    "--grow_steps=1",
    "--batch_size=2",
    "--rest.kappa=0.3",
    "--reward.name=gold",
    "--reward.constraints=no_filler",
  ),
  "rloo": (
    "--reward.path={reward}",
    "--reward.name=filler,gold",
    "--reward.weights=1,-0.5,0.2",
    "--reward.constraints=finished,no_filler",
    "--shaping.function=par",
    "--lora.rank=4",
  ),
  "simpo": ("--data.share_prompts",),
}
_ROWS = ("--data.rows=64", "--data.eval_rows=8")
SIZES = ("--model.layers=1", "--model.width=32", "--model.heads=2", "--model.mlp_width=32")
_MODELS = ("--init_from=", "--model.path=", "--model.preset=")
# What the fields of a training script's config do not say.
_PARTICULAR = {
  "rest": ("--prompts=16", "--sampling.samples_per_prompt=4", "--rest.quantiles=0.3,0.6"),
  "evaluate": (*_ROWS, "--sampling.max_new_tokens=8"),
  "rlhf": (
    *(
      f"--{stage}.{size}"
      for stage in ("sft", "reward_model", "ppo")
      for size in ("steps=2", "batch_size=8", "data.rows=64", "data.eval_rows=8")
    ),
    *("--sft.model.layers=1", "--sft.model.width=32", "--sft.model.heads=2"),
  ),
}


def sizes(flags: Sequence[str]) -> tuple[str, ...]:
  """Sizes of a model, if flags give none that has sizes of its own."""
  return () if any(flag.startswith(_MODELS) for flag in flags) else SIZES


def small(script: str, flags: Sequence[str]) -> list[str]:
  """Flags of a run of seconds; those that are given replace others of their name."""
  base = dict(flag.split("=", 1) for flag in _PARTICULAR.get(script, ()))
  if script in METHODS:
    config = plans.script_of(script).Config()
    sampling = getattr(config, "sampling", None)
    usual = {"--batch_size": "8", "--steps": "4", **dict(flag.split("=") for flag in _ROWS)}
    if sampling is not None:
      usual["--sampling.max_new_tokens"] = "8"
      if sampling.samples_per_prompt > 1:
        usual["--sampling.samples_per_prompt"] = "2"
    base = usual | base
  if script == "sft":
    base |= dict(flag.split("=") for flag in sizes(flags))
  given = {flag.split("=")[0] for flag in flags}
  return [*(f"{name}={value}" for name, value in base.items() if name not in given), *flags]


def judges_of(script: str) -> list[str]:
  """Judges, `reward` or `preference`, that a script which samples takes."""
  config = plans.script_of(script).Config()
  rewarded = ["reward"] * hasattr(config, "shaping")
  return rewarded + ["preference"] * hasattr(config, "preference")


def whole_runs(scripts: Sequence[str]) -> list[Any]:
  """Returns the scripts as parameters of a test of whole runs; kindred ones are for FULL=1."""
  return [pytest.param(name, marks=full) if name in KINDRED else name for name in scripts]
