"""Settings of the methods by default: those of their papers, with each added term off."""

import dataclasses
import importlib
import pathlib

import pytest

from rlhf_jax import algorithms

MODULES = sorted(path.stem for path in pathlib.Path(algorithms.__file__).parent.glob("[!_]*.py"))
UPDATES = {"epochs": 1, "minibatches": 2, "microbatches": 1}
PPO = UPDATES | {
  "kl_coef": 0.1,
  "gamma": 1.0,
  "lam": 0.95,
  "clip": 0.2,  # arXiv 1707.06347.
  "dual_clip": 0.0,
  "value_clip": 0.2,
  "value_coef": 0.5,
  "entropy_coef": 0.0,
}
GROUPS = UPDATES | {
  "kl_coef": 0.04,  # arXiv 2402.03300.
  "clip_low": 0.2,
  "clip_high": 0.2,
  "scale": True,
  "average": "responses",
}
OPPONENT = {
  "tau": 0.01,
  "tau_end": -1.0,
  "mix": 0.25,
  "mix_end": -1.0,
  "missing_eos_penalty": 0.0,
  "microbatches": 1,
}
DEFAULTS = {
  "cgpo.CGPOConfig": UPDATES | {"kl_max": 20.0, "minibatches": 1},
  "cispo.CISPOConfig": GROUPS  # arXiv 2506.13585: no penalty and no lower bound.
  | {"kl_coef": 0.0, "clip_low": 1.0, "clip_high": 4.0, "average": "tokens"},
  "dpo.DPOConfig": {
    "loss": "dpo",
    "beta": 0.1,  # arXiv 2305.18290.
    "label_smoothing": 0.0,
    "divergence": "reverse_kl",
    "sft_coef": 0.0,
    "bonus_coef": 0.0,
    "microbatches": 1,
  },
  "epochs.UpdateConfig": UPDATES,
  "gkd.GKDConfig": {"divergence": "jsd", "mix": None, "student_share": 1.0, "microbatches": 1},
  "groups.GroupConfig": GROUPS,
  "grpo.GRPOConfig": GROUPS,
  "gspo.GSPOConfig": GROUPS  # arXiv 2507.18071.
  | {"kl_coef": 0.0, "clip_low": 3e-4, "clip_high": 4e-4},
  "ipo_md.IPOMDConfig": OPPONENT | {"tau": 0.1, "normalize_lengths": False},
  "kto.KTOConfig": {
    "beta": 0.1,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
    "microbatches": 1,
  },
  "nash_md.NashMDConfig": OPPONENT | {"ema": 0.0},
  "online_dpo.OnlineConfig": {"pick": "best_worst", "round_steps": 0, "bonus_coef": 0.0},
  "opponents.OpponentConfig": OPPONENT,
  "p3o.P3OConfig": UPDATES | {"kl_coef": 0.1, "clip": 0.2},
  "pairs.PairConfig": {"length_alpha": 1.0, "reweight": False},
  "pf_ppo.PFPPOConfig": PPO | {"keep": "best_worst"},
  "ppo.PPOConfig": PPO,
  "ppo_max.PPOMaxConfig": PPO
  | {
    "kl_target": 0.0,
    "kl_horizon": 10000,
    "normalize_values": False,
    "segment": 1,
    "cut": "ngram",
    "ptx_coef": 0.0,
  },
  "preference_model.PreferenceModelConfig": {"microbatches": 1},
  "reinforce_pp.ReinforcePPConfig": UPDATES | {"kl_coef": 0.1, "gamma": 1.0, "clip": 0.2},
  "rest.RestConfig": {
    "keep": "advantage",
    "quantiles": (0.5, 0.7, 0.85),
    "temperature": 0.0,
    "trust": False,
    "kappa": 0.0,
    "microbatches": 1,
  },
  "reward_model.RewardModelConfig": {
    "label_smoothing": 0.0,
    "margin": 0.0,
    "centering_coef": 0.0,
    "microbatches": 1,
  },
  "rloo.RLOOConfig": UPDATES | {"kl_coef": 0.1, "minibatches": 1},
  "sft.SFTConfig": {"microbatches": 1},
  "simpo.SimPOConfig": {
    "loss": "simpo",
    "beta": None,
    "margin": None,
    "sft_coef": None,
    "microbatches": 1,
  },
}


def test_every_config_is_listed():
  found = set()
  for name in MODULES:
    module = importlib.import_module(f"rlhf_jax.algorithms.{name}")
    found |= {f"{name}.{key}" for key in vars(module) if key.endswith("Config")}
  assert found == DEFAULTS.keys()


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name):
  module, _, config = name.partition(".")
  found = getattr(importlib.import_module(f"rlhf_jax.algorithms.{module}"), config)()
  assert dataclasses.asdict(found) == DEFAULTS[name]


@pytest.mark.parametrize(
  "loss, beta, sft_coef",
  [
    ("simpo", 2.0, 0.0),  # arXiv 2405.14734.
    ("orpo", 0.1, 1.0),  # arXiv 2403.07691.
    ("cpo", 0.1, 1.0),  # arXiv 2401.08417.
  ],
)
def test_defaults_of_losses_without_a_reference(loss, beta, sft_coef):
  config = importlib.import_module("rlhf_jax.algorithms.simpo").SimPOConfig(loss=loss)
  assert (config.value("beta"), config.value("sft_coef")) == (beta, sft_coef)
