"""REINFORCE++: learning rate, KL penalty, minibatches.

A policy with a weak penalty exploits the reward model. On real data, where there is no gold reward,
also bound the distance with --constraint='kl<10'. The learning rates are for the built-in task;
experiments/README.md has those of a pretrained model.
"""

METRIC = "gold/win_rate"
DEFAULTS = {
  "optim.learning_rate": 1e-3,
  "reinforce_pp.kl_coef": 0.2,
  "reinforce_pp.minibatches": 2,
}
GRID = {"optim.learning_rate": [5e-4, 1e-3, 2e-3], "reinforce_pp.kl_coef": [0.1, 0.2, 0.3]}


def space(trial):
  """The flags of a trial."""
  return {
    "optim.learning_rate": trial.suggest_float("optim.learning_rate", 5e-5, 2e-3, log=True),
    "reinforce_pp.kl_coef": trial.suggest_float("reinforce_pp.kl_coef", 0.005, 0.3, log=True),
    "reinforce_pp.minibatches": trial.suggest_categorical("reinforce_pp.minibatches", [1, 2, 4]),
  }
