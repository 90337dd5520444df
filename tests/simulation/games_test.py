import numpy as np
import pytest

from rlhf_jax.simulation import games


@pytest.mark.parametrize(
  "preference",
  [games.cycle(), games.cycle(0.7), games.three_raters(0.1), games.three_raters(-0.4)]
  + [games.random_game(n, np.random.default_rng(n)) for n in (1, 2, 10)],
)
def test_both_ways_round_sum_to_one(preference):
  np.testing.assert_allclose(preference + preference.T, 1.0, atol=1e-12)
  assert ((preference >= 0) & (preference <= 1)).all()


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_a_cycle_beats_no_uniform_policy(strength):
  preference = games.cycle(strength)
  np.testing.assert_allclose(preference.mean(axis=1), 0.5)
  assert ((preference > 0.5).sum(axis=1) == 1).all()
  assert preference[0, 1] == preference[1, 2] == preference[2, 0] == strength


@pytest.mark.parametrize("surplus", [-0.2, -0.01, 0.1, 0.3])
def test_the_equilibrium_of_three_raters_is_beaten_by_nothing(surplus):
  preference = games.three_raters(surplus)
  equilibrium = np.array([1 / 3 + surplus / 2, 1 / 3 + surplus / 2, 1 / 3 - surplus])
  np.testing.assert_allclose(preference @ equilibrium, 0.5, atol=1e-12)
  # Average win rates against all three put response 0 first for e > 0, and 1 first for e < 0.
  assert preference.mean(axis=1).argmax() == (0 if surplus > 0 else 1)


def test_games_that_are_none_are_refused():
  for call in (lambda: games.cycle(0.4), lambda: games.three_raters(0.5)):
    with pytest.raises(ValueError, match="must be from"):
      call()
