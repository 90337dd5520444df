"""Preference model: learning rate and weight decay, by the log loss on held-out comparisons.

The learning rates are for the built-in task; experiments/README.md has those of a pretrained model.
"""

METRIC = "log_loss"
DIRECTION = "minimize"
DEFAULTS = {"optim.learning_rate": 1e-3, "optim.weight_decay": 0.0}
GRID = {"optim.learning_rate": [3e-4, 1e-3, 3e-3], "optim.weight_decay": [0.0, 0.1]}


def space(trial):
  """The flags of a trial."""
  return {
    "optim.learning_rate": trial.suggest_float("optim.learning_rate", 1e-4, 5e-3, log=True),
    "optim.weight_decay": trial.suggest_float("optim.weight_decay", 0.0, 0.3),
  }
