"""Reward model: learning rate, label smoothing, centring, by the accuracy on held-out pairs.

The learning rates are for the built-in task; experiments/README.md has those of a pretrained model.
"""

METRIC = "accuracy"
DEFAULTS = {
  "optim.learning_rate": 1e-3,
  "reward_model.label_smoothing": 0.0,
  "reward_model.centering_coef": 0.0,
}
GRID = {"optim.learning_rate": [3e-4, 1e-3, 3e-3], "reward_model.centering_coef": [0.0, 0.01]}


def space(trial):
  """The flags of a trial."""
  return {
    "optim.learning_rate": trial.suggest_float("optim.learning_rate", 1e-4, 5e-3, log=True),
    "reward_model.label_smoothing": trial.suggest_float("reward_model.label_smoothing", 0.0, 0.2),
    "reward_model.centering_coef": trial.suggest_float("reward_model.centering_coef", 0.0, 0.1),
  }
