"""ReST: learning rate and its decay, thresholds of the Improve steps, KL penalty.

The learning rates are for the built-in task; experiments/README.md has those of a pretrained model.
"""

METRIC = "gold/win_rate"
# A list is one word of the command line, so Optuna chooses between words.
_QUANTILES = ["0.5,0.7,0.85", "0.5,0.75,0.9,0.95", "0.8,0.9", "0.9"]
DEFAULTS = {
  "optim.learning_rate": 5e-4,
  "learning_rate_decay": 0.7,
  "rest.quantiles": _QUANTILES[0],
  "rest.kappa": 0.0,
}
GRID = {"optim.learning_rate": [2e-4, 5e-4, 1e-3], "rest.quantiles": _QUANTILES}


def space(trial):
  """The flags of a trial."""
  return {
    "optim.learning_rate": trial.suggest_float("optim.learning_rate", 1e-4, 3e-3, log=True),
    "learning_rate_decay": trial.suggest_float("learning_rate_decay", 0.3, 1.0),
    "rest.quantiles": trial.suggest_categorical("rest.quantiles", _QUANTILES),
    "rest.kappa": trial.suggest_float("rest.kappa", 0.0, 1.0),
  }
