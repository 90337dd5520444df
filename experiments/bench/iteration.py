r"""Times iterations of PPO, GRPO and Nash-MD: sampling, scoring and update.

All methods (ten minutes on one core):
  python -m experiments.bench.iteration
One of them:
  python -m experiments.bench.iteration --works=ppo --epochs=1 --json=ppo.json

The names are ppo, grpo and nash_md. Tokens are sampled tokens. A reward model scores the responses
of PPO and compares those of Nash-MD; the reward of GRPO takes no time.
"""

from . import timed, works

if __name__ == "__main__":
  timed.run("Iterations", works.ITERATIONS)
