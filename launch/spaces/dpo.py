"""DPO and variants: learning rate, KL penalty, weight of the chosen responses' likelihood.

The learning rates are for the built-in task; experiments/README.md has those of a pretrained model.
"""

METRIC = "gold/win_rate"
DEFAULTS = {"optim.learning_rate": 3e-4, "dpo.beta": 0.1, "dpo.sft_coef": 0.0}
GRID = {"optim.learning_rate": [1e-4, 3e-4, 1e-3], "dpo.beta": [0.03, 0.1, 0.3]}


def space(trial):
  """The flags of a trial."""
  return {
    "optim.learning_rate": trial.suggest_float("optim.learning_rate", 5e-5, 2e-3, log=True),
    "dpo.beta": trial.suggest_float("dpo.beta", 0.01, 0.5, log=True),
    "dpo.sft_coef": trial.suggest_float("dpo.sft_coef", 0.0, 1.0),
  }
