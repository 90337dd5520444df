"""Tabular preference games: `preference[i, j]` is the probability that response i beats j.

`preference[i, j] + preference[j, i] = 1`, so a response ties with itself. `losses.game` plays them.
"""

import numpy as np


def cycle(strength: float = 1.0) -> np.ndarray:
  """Rock, paper, scissors: each of three responses beats the next one.

  Args:
    strength: Probability that a response beats the next one, from 0.5 to 1.

  Returns:
    [3, 3] float64. No score per response explains it. The equilibrium is uniform if the reference
    is.

  Raises:
    ValueError: If `strength` is out of range.
  """
  if not 0.5 <= strength <= 1:
    raise ValueError(f"strength must be from 0.5 to 1, got {strength}")
  beats = np.eye(3)[[1, 2, 0]]
  return 0.5 * np.eye(3) + strength * beats + (1 - strength) * beats.T


def three_raters(surplus: float) -> np.ndarray:
  """Game of three raters who each know one comparison and call the others ties.

  Munos et al., 2023, https://arxiv.org/abs/2312.00886, section 3.3. With weights
  `1/3 - e, 1/3 + e/2, 1/3 + e/2` they say that response 1 beats 0, 0 beats 2, and 2 beats 1. The
  equilibrium without regularisation is `1/3 + e/2, 1/3 + e/2, 1/3 - e`, continuous in `e`. The
  response with the highest average win rate jumps at `e = 0`.

  Args:
    surplus: `e`, from -2/3 to 1/3.

  Returns:
    [3, 3] float64.

  Raises:
    ValueError: If a weight would be negative.
  """
  weights = 1 / 3 - surplus, 1 / 3 + surplus / 2, 1 / 3 + surplus / 2
  if min(weights) < 0:
    raise ValueError(f"surplus must be from -2/3 to 1/3, got {surplus}")
  preference = np.full((3, 3), 0.5)
  for (winner, loser), weight in zip(((1, 0), (0, 2), (2, 1)), weights, strict=True):
    preference[winner, loser] += weight / 2
    preference[loser, winner] -= weight / 2
  return preference


def random_game(responses: int, rng: np.random.Generator) -> np.ndarray:
  """Draws a game with uniformly random win probabilities.

  Args:
    responses: Number A of responses.
    rng: Random generator.

  Returns:
    [A, A] float64.
  """
  upper = np.triu(rng.random((responses, responses)), 1)
  return upper + np.tril(1 - upper.T, -1) + 0.5 * np.eye(responses)
