"""Supervised fine-tuning: learning rate, warm-up, weight decay, by the loss on held-out rows.

The learning rates are for the built-in task; experiments/README.md has those of a pretrained model.
"""

METRIC = "eval/loss"
DIRECTION = "minimize"
DEFAULTS = {"optim.learning_rate": 3e-3, "optim.warmup": 0.05, "optim.weight_decay": 0.0}
GRID = {"optim.learning_rate": [1e-3, 3e-3, 1e-2], "optim.weight_decay": [0.0, 0.1]}


def space(trial):
  """The flags of a trial."""
  return {
    "optim.learning_rate": trial.suggest_float("optim.learning_rate", 3e-4, 2e-2, log=True),
    "optim.warmup": trial.suggest_float("optim.warmup", 0.0, 0.2),
    "optim.weight_decay": trial.suggest_float("optim.weight_decay", 0.0, 0.3),
  }
