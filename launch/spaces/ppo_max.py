"""PPO-max: learning rates of policy and critic, KL penalty, weight of demonstrations.

A policy with a weak penalty exploits the reward model. On real data, where there is no gold reward,
also bound the distance with --constraint='kl<10'. The learning rates are for the built-in task;
experiments/README.md has those of a pretrained model.
"""

METRIC = "gold/win_rate"
DEFAULTS = {
  "optim.learning_rate": 1e-3,
  "critic.learning_rate": 1e-3,
  "ppo_max.kl_coef": 0.2,
  "ppo_max.ptx_coef": 0.1,
}
GRID = {"optim.learning_rate": [5e-4, 1e-3, 2e-3], "ppo_max.kl_coef": [0.1, 0.2, 0.3]}


def space(trial):
  """The flags of a trial."""
  return {
    "optim.learning_rate": trial.suggest_float("optim.learning_rate", 5e-5, 2e-3, log=True),
    "critic.learning_rate": trial.suggest_float("critic.learning_rate", 3e-4, 1e-2, log=True),
    "ppo_max.kl_coef": trial.suggest_float("ppo_max.kl_coef", 0.005, 0.3, log=True),
    "ppo_max.ptx_coef": trial.suggest_float("ppo_max.ptx_coef", 0.0, 0.3),
  }
