"""CGPO: learning rate, KL budget and samples per prompt.

Responses beyond the budget have no reward. On real data, where there is no gold reward, also bound
the violations with --constraint='reward/violations<0.02'. The learning rates are for the built-in
task; experiments/README.md has those of a pretrained model.
"""

METRIC = "gold/win_rate"
DEFAULTS = {
  "optim.learning_rate": 1e-3,
  "cgpo.kl_max": 20.0,
  "sampling.samples_per_prompt": 4,
}
GRID = {"optim.learning_rate": [5e-4, 1e-3, 2e-3], "cgpo.kl_max": [10.0, 20.0, 40.0]}


def space(trial):
  """The flags of a trial."""
  return {
    "optim.learning_rate": trial.suggest_float("optim.learning_rate", 5e-5, 2e-3, log=True),
    "cgpo.kl_max": trial.suggest_float("cgpo.kl_max", 5.0, 100.0, log=True),
    "sampling.samples_per_prompt": trial.suggest_categorical(
      "sampling.samples_per_prompt", [2, 4, 8]
    ),
  }
