"""SimPO: learning rate, scale of the margin, margin, weight of the chosen responses' likelihood.

The learning rates are for the built-in task; experiments/README.md has those of a pretrained model.
The other losses of the script read no margin and have another scale: this space is not theirs.
"""

METRIC = "gold/win_rate"
DEFAULTS = {
  "optim.learning_rate": 3e-5,
  "simpo.beta": 2.0,
  "simpo.margin": 0.25,
  "simpo.sft_coef": 0.0,
}
GRID = {"optim.learning_rate": [1e-5, 3e-5, 1e-4], "simpo.beta": [2.0, 4.0, 10.0]}


def space(trial):
  """The flags of a trial."""
  return {
    "optim.learning_rate": trial.suggest_float("optim.learning_rate", 3e-6, 3e-4, log=True),
    "simpo.beta": trial.suggest_float("simpo.beta", 1.0, 10.0, log=True),
    "simpo.margin": trial.suggest_float("simpo.margin", 0.0, 0.8),
    "simpo.sft_coef": trial.suggest_float("simpo.sft_coef", 0.0, 1.0),
  }
