"""GKD: learning rate, divergence, share of the student's responses.

Give the teacher with the other flags of the script: --teacher=RUN. The learning rates are for the
built-in task; experiments/README.md has those of a pretrained model.
"""

METRIC = "gold/mean"
DEFAULTS = {
  "optim.learning_rate": 1e-3,
  "gkd.divergence": "jsd",
  "gkd.student_share": 1.0,
}
GRID = {
  "gkd.divergence": ["forward_kl", "reverse_kl", "jsd"],
  "gkd.student_share": [0.0, 0.5, 1.0],
}


def space(trial):
  """The flags of a trial."""
  return {
    "optim.learning_rate": trial.suggest_float("optim.learning_rate", 5e-5, 5e-3, log=True),
    "gkd.divergence": trial.suggest_categorical("gkd.divergence", GRID["gkd.divergence"]),
    "gkd.student_share": trial.suggest_float("gkd.student_share", 0.0, 1.0),
  }
