"""IPO-MD: learning rate, KL penalty, weight of the reference in the opponent.

The metric is the win rate against the initial policy. The learning rates are for the built-in task;
experiments/README.md has those of a pretrained model.
"""

METRIC = "preference/win_rate"
DEFAULTS = {"optim.learning_rate": 3e-4, "ipo_md.tau": 0.1, "ipo_md.mix": 0.25}
GRID = {"ipo_md.tau": [0.03, 0.1, 0.3], "ipo_md.mix": [0.0, 0.125, 0.25, 0.5]}


def space(trial):
  """The flags of a trial."""
  return {
    "optim.learning_rate": trial.suggest_float("optim.learning_rate", 5e-5, 2e-3, log=True),
    "ipo_md.tau": trial.suggest_float("ipo_md.tau", 0.01, 1.0, log=True),
    "ipo_md.mix": trial.suggest_float("ipo_md.mix", 0.0, 0.5),
  }
