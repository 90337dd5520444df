"""GSPO: learning rate, KL penalty, upper clip, minibatches.

A policy with a weak penalty exploits the reward model. On real data, where there is no gold reward,
also bound the distance with --constraint='kl<10'. The learning rates are for the built-in task;
experiments/README.md has those of a pretrained model.
"""

METRIC = "gold/win_rate"
DEFAULTS = {
  "optim.learning_rate": 1e-3,
  "gspo.kl_coef": 0.1,
  "gspo.clip_high": 4e-4,
  "gspo.minibatches": 2,
}
GRID = {"optim.learning_rate": [5e-4, 1e-3, 2e-3], "gspo.kl_coef": [0.05, 0.1, 0.2]}


def space(trial):
  """The flags of a trial."""
  return {
    "optim.learning_rate": trial.suggest_float("optim.learning_rate", 5e-5, 2e-3, log=True),
    "gspo.kl_coef": trial.suggest_float("gspo.kl_coef", 0.005, 0.3, log=True),
    "gspo.clip_high": trial.suggest_float("gspo.clip_high", 1e-4, 1e-1, log=True),
    "gspo.minibatches": trial.suggest_categorical("gspo.minibatches", [1, 2, 4]),
  }
