"""KTO: learning rate, KL penalty, weight of undesirable responses.

The learning rates are for the built-in task; experiments/README.md has those of a pretrained model.
"""

METRIC = "gold/win_rate"
DEFAULTS = {"optim.learning_rate": 3e-4, "kto.beta": 0.1, "kto.undesirable_weight": 1.0}
GRID = {"optim.learning_rate": [1e-4, 3e-4, 1e-3], "kto.beta": [0.03, 0.1, 0.3]}


def space(trial):
  """The flags of a trial."""
  return {
    "optim.learning_rate": trial.suggest_float("optim.learning_rate", 5e-5, 2e-3, log=True),
    "kto.beta": trial.suggest_float("kto.beta", 0.01, 0.5, log=True),
    "kto.undesirable_weight": trial.suggest_float("kto.undesirable_weight", 0.5, 2.0, log=True),
  }
