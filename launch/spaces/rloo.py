"""RLOO: learning rate, KL penalty and samples per prompt.

A policy with a weak penalty exploits the reward model. On real data, where there is no gold reward,
also bound the distance with --constraint='kl<10'. The learning rates are for the built-in task;
experiments/README.md has those of a pretrained model.
"""

METRIC = "gold/win_rate"
DEFAULTS = {
  "optim.learning_rate": 1e-3,
  "rloo.kl_coef": 0.2,
  "sampling.samples_per_prompt": 4,
}
GRID = {"optim.learning_rate": [5e-4, 1e-3, 2e-3], "rloo.kl_coef": [0.1, 0.2, 0.3]}


def space(trial):
  """The flags of a trial."""
  return {
    "optim.learning_rate": trial.suggest_float("optim.learning_rate", 5e-5, 2e-3, log=True),
    "rloo.kl_coef": trial.suggest_float("rloo.kl_coef", 0.005, 0.3, log=True),
    "sampling.samples_per_prompt": trial.suggest_categorical(
      "sampling.samples_per_prompt", [2, 4, 8]
    ),
  }
