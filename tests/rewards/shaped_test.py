"""Shaping of scores against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.reward import RunningMoments
from rlhf_jax.rewards import shaped
from rlhf_jax.rewards.shaped import ShapingConfig

ROWS, M = 12, 3
shape = jax.jit(shaped.shape, static_argnames="config")


def inputs(seed=0, scale=1.0, shift=0.0):
  """Scores [B], which responses ended [B], and scores of the reference's responses [B, M]."""
  rng = np.random.default_rng(seed)
  scores = scale * rng.normal(size=ROWS) + shift
  ended = rng.random(ROWS) < 0.6
  assert 0 < ended.sum() < ROWS
  return np.float32(scores), ended, np.float32(scale * rng.normal(size=(ROWS, M)) + shift)


def sigmoid(x):
  return 1 / (1 + np.exp(-np.float64(x)))


COMPARED = {
  "": lambda scores, ref: scores,
  "par": lambda scores, ref: sigmoid(scores[:, None] - ref).mean(axis=1),
  "center": lambda scores, ref: scores - ref.mean(axis=1),
  "log_sigmoid": lambda scores, ref: np.log(sigmoid(scores - ref.mean(axis=1))),
}


def test_every_function_is_tested():
  assert COMPARED.keys() == {"", *shaped.SHAPINGS}


@pytest.mark.parametrize("function", COMPARED)
def test_scores_are_compared_with_those_of_the_reference(function):
  scores, ended, ref = inputs()
  config = ShapingConfig(function=function, missing_eos_penalty=0.0)
  result, moments = shape(scores, ended, RunningMoments.zero(), config, ref)
  want = COMPARED[function](scores, ref)
  np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-6)
  assert result.dtype == jnp.float32
  # The moments are those of the compared scores, in which they are to be normalised.
  np.testing.assert_allclose(moments.mean, want.mean(), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(moments.m2 / ROWS, want.var(), rtol=1e-4)


@pytest.mark.parametrize("function", shaped.SHAPINGS)
def test_a_function_without_scores_of_the_reference_is_refused(function):
  scores, ended, _ = inputs()
  with pytest.raises(ValueError, match=f"function={function} needs scores of the reference's"):
    shaped.shape(scores, ended, RunningMoments.zero(), ShapingConfig(function=function))


def test_scores_are_normalised_by_history_then_clipped():
  config = ShapingConfig(normalize=True, clip=0.8, missing_eos_penalty=0.0)
  moments, seen = RunningMoments.zero(), []
  for i in range(3):
    scores, ended, _ = inputs(seed=i, scale=37, shift=-12)
    seen.append(scores)
    result, moments = shape(scores, ended, moments, config)
    history = np.concatenate(seen)
    want = np.clip((scores - history.mean()) / history.std(), -0.8, 0.8)
    np.testing.assert_allclose(result, want, atol=1e-5)
    assert np.abs(want).max() == 0.8
  assert moments.count == 3 * ROWS


@pytest.mark.parametrize("penalty", [0.0, 2.5])
def test_the_clip_does_not_swallow_the_penalty_of_cut_responses(penalty):
  scores, ended, _ = inputs()
  config = ShapingConfig(clip=0.5, missing_eos_penalty=penalty)
  result, moments = shape(scores, ended, RunningMoments.zero(), config)
  np.testing.assert_allclose(result, np.clip(scores, -0.5, 0.5) - penalty * ~ended, atol=1e-6)
  np.testing.assert_allclose(moments.mean, scores.mean(), rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("function", COMPARED)
def test_scores_that_are_no_numbers_are_left_out(function, bad):
  scores, ended, ref = inputs()
  config = ShapingConfig(function=function, normalize=True, clip=1.0)
  others = np.arange(ROWS) != 5
  want, want_moments = shape(
    scores[others], ended[others], RunningMoments.zero(), config, ref[others]
  )
  scores[5] = bad
  result, moments = shape(scores, ended, RunningMoments.zero(), config, ref)
  np.testing.assert_array_equal(np.isnan(result), ~others)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  close(np.asarray(result)[others], want)
  jax.tree.map(close, moments, want_moments)


@pytest.mark.parametrize("function", shaped.SHAPINGS)
def test_scores_of_the_reference_that_are_no_numbers_leave_their_row_out(function):
  scores, ended, ref = inputs()
  config = ShapingConfig(function=function, normalize=True)
  others = np.arange(ROWS) != 5
  _, want = shape(scores[others], ended[others], RunningMoments.zero(), config, ref[others])
  ref[5, 1] = np.nan
  result, moments = shape(scores, ended, RunningMoments.zero(), config, ref)
  np.testing.assert_array_equal(np.isnan(result), ~others)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), moments, want)


def test_nothing_but_bad_scores_leaves_the_moments_as_they_were():
  _, ended, _ = inputs()
  before = RunningMoments(*map(jnp.float32, (4, 1, 2)))
  result, moments = shape(
    np.full(ROWS, np.nan, np.float32), ended, before, ShapingConfig(normalize=True)
  )
  assert np.isnan(result).all()
  jax.tree.map(np.testing.assert_array_equal, moments, before)


@pytest.mark.parametrize(
  "settings", [{"function": "tanh"}, {"clip": -1.0}, {"reference_samples": 0}], ids=str
)
def test_impossible_settings_are_refused(settings):
  with pytest.raises(ValueError, match=f"^{next(iter(settings))} must"):
    ShapingConfig(**settings)


def test_samples_that_no_function_reads_are_refused():
  with pytest.raises(ValueError, match="^reference_samples is not read without shaping.function"):
    ShapingConfig(reference_samples=4)
