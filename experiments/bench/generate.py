r"""Times sampling, and says which share of the floor it reaches that reading the weights sets.

  python -m experiments.bench.generate --batch_size=64

All responses have full length. The floor is the bytes of weights and caches that each token reads,
at the speed of a copy.
"""

from . import timed, works

if __name__ == "__main__":
  timed.run("Sampling", works.SAMPLING)
