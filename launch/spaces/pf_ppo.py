"""PF-PPO: learning rates of policy and critic, KL penalty, samples per prompt and their selection.

A policy with a weak penalty exploits the reward model. On real data, where there is no gold reward,
also bound the distance with --constraint='kl<10'. The learning rates are for the built-in task;
experiments/README.md has those of a pretrained model.
"""

METRIC = "gold/win_rate"
DEFAULTS = {
  "optim.learning_rate": 1e-3,
  "critic.learning_rate": 1e-3,
  "pf_ppo.kl_coef": 0.15,
  "pf_ppo.keep": "best_worst",
  "sampling.samples_per_prompt": 4,
}
GRID = {
  "pf_ppo.keep": ["best_worst", "best_random"],
  "sampling.samples_per_prompt": [4, 8],
  "pf_ppo.kl_coef": [0.1, 0.15, 0.3],
}


def space(trial):
  """The flags of a trial."""
  return {
    "optim.learning_rate": trial.suggest_float("optim.learning_rate", 5e-5, 2e-3, log=True),
    "critic.learning_rate": trial.suggest_float("critic.learning_rate", 3e-4, 1e-2, log=True),
    "pf_ppo.kl_coef": trial.suggest_float("pf_ppo.kl_coef", 0.005, 0.3, log=True),
    "pf_ppo.keep": trial.suggest_categorical("pf_ppo.keep", ["best_worst", "best_random"]),
    "sampling.samples_per_prompt": trial.suggest_categorical("sampling.samples_per_prompt", [4, 8]),
  }
