"""PPO-max: each of its additions on and off, for --sampler=grid.

Scores normalised and clipped, a critic that trains first, a loss on demonstrations: 16 runs. The
column `value/explained_variance/first` of table.csv is that of the critic when the policy is first
updated. Run `experiments.evaluate` on the trials for `nll`, which the demonstrations are for.
"""

METRIC = "gold/win_rate"
DEFAULTS = {
  "shaping.normalize": True,
  "shaping.clip": 2.0,
  "critic.warmup": 5,
  "ppo_max.ptx_coef": 0.1,
}
GRID = {
  "shaping.normalize": [False, True],
  "shaping.clip": [0.0, 2.0],
  "critic.warmup": [0, 5],
  "ppo_max.ptx_coef": [0.0, 0.1],
}
