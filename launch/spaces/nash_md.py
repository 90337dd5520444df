"""Nash-MD: learning rate, KL penalty, weight of the reference in the opponent.

The metric is the win rate against the initial policy. It does not measure exploitability: for that,
train a best response to the winner and compare them with experiments.evaluate. The learning rates
are for the built-in task; experiments/README.md has those of a pretrained model.
"""

METRIC = "preference/win_rate"
DEFAULTS = {"optim.learning_rate": 3e-4, "nash_md.tau": 0.01, "nash_md.mix": 0.25}
GRID = {"nash_md.tau": [0.003, 0.01, 0.03], "nash_md.mix": [0.0, 0.125, 0.25, 0.5]}


def space(trial):
  """The flags of a trial."""
  return {
    "optim.learning_rate": trial.suggest_float("optim.learning_rate", 5e-5, 2e-3, log=True),
    "nash_md.tau": trial.suggest_float("nash_md.tau", 1e-3, 0.1, log=True),
    "nash_md.mix": trial.suggest_float("nash_md.mix", 0.0, 0.5),
  }
