"""Turns any judge of two responses into a `PreferenceFn`, `(a, b, prompt_ids) -> [B] P(a > b)`.

A preference in turn becomes a reward: of each sample against the others to its prompt, or against
a response of another policy. Pairwise-RL, Yuan et al., 2025, https://arxiv.org/abs/2504.04950.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import simulation
from rlhf_jax.algorithms import given
from rlhf_jax.losses import packing
from rlhf_jax.rewards import checks, parts
from rlhf_jax.rewards.functions import ask
from rlhf_jax.rewards.rollouts import RewardFn, response_texts
from rlhf_jax.types import ApplyFn, Params, Rollout

# (a, b, prompt_ids [B]) -> [B] float32, probability that each response in `a` is preferred to the
# one in `b` to the same prompt, NaN where it cannot be used.
PreferenceFn = Callable[[Rollout, Rollout, np.ndarray], jax.Array | np.ndarray]
# (prompts, responses a, responses b, rows) -> one probability per pair.
TextPreference = Callable[
  [Sequence[str], Sequence[str], Sequence[str], Sequence[Mapping[str, Any]]],
  Sequence[float] | np.ndarray,
]


def _annotator(name: str) -> TextPreference:
  """Preference function of an annotator of the built-in task."""

  def judge(
    prompts: Sequence[str],
    a: Sequence[str],
    b: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
  ) -> np.ndarray:
    del rows
    return simulation.preference_probability(name, prompts, a, b)

  return judge


# Add yours here. The expert judges by the gold reward; the panel is three raters whose majority
# preference is intransitive.
PREFERENCES: dict[str, TextPreference] = {name: _annotator(name) for name in ("expert", "panel")}


def join_pairs(a: Rollout, b: Rollout, stop_ids: Sequence[int]) -> tuple[jax.Array, jax.Array]:
  """Joins each prompt with both responses, in both orders, as input of a preference model.

  Args:
    a: B responses.
    b: B responses to the same prompts.
    stop_ids: Tokens that end a response. The first one is appended to truncated responses, to
      separate the two.

  Returns:
    tokens [B, 2, T] int32 and mask [B, 2, T] bool as in `types.ComparisonBatch`, right padded.
  """
  prompt_length = a.tokens.shape[1] - a.logprobs.shape[1]

  def response(rollout: Rollout) -> tuple[jax.Array, jax.Array]:
    pad = ((0, 0), (0, 1))
    tokens = jnp.pad(rollout.tokens[:, prompt_length:], pad)
    mask = jnp.pad(rollout.response_mask[:, prompt_length:], pad)
    length = jnp.sum(mask, axis=1, keepdims=True)
    column = jnp.arange(tokens.shape[1])[None]
    stops = jnp.isin(tokens, jnp.asarray(stop_ids))
    ended = jnp.any(stops & mask, axis=1, keepdims=True)
    added = (column == length) & ~ended
    return jnp.where(added, stop_ids[0], tokens), mask | added

  prompt, prompt_mask = a.tokens[:, :prompt_length], a.prompt_mask[:, :prompt_length]
  first, second = response(a), response(b)

  def join(one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]):
    tokens = jnp.concatenate([prompt, one[0], other[0]], axis=1)
    mask = jnp.concatenate([jnp.zeros_like(prompt_mask), one[1], other[1]], axis=1)
    real = jnp.concatenate([prompt_mask, one[1], other[1]], axis=1)
    return packing.move_padding_right(real, tokens, mask)

  tokens, mask = zip(join(first, second), join(second, first), strict=True)
  return jnp.stack(tokens, axis=1), jnp.stack(mask, axis=1)


def make_preferrer(
  apply_fn: ApplyFn, stop_ids: Sequence[int]
) -> Callable[[Params, Rollout, Rollout], jax.Array]:
  """Builds the jitted `(params, a, b) -> [B]` preferences of a preference model.

  Args:
    apply_fn: `(params, tokens [B, T]) -> scores [B, T]`.
    stop_ids: Tokens that end a response; see `join_pairs`.
  """

  @jax.jit
  def prefer(params: Params, a: Rollout, b: Rollout) -> jax.Array:
    logits = given.read_preferences(apply_fn, params, *join_pairs(a, b, stop_ids))
    return jax.nn.sigmoid(logits)

  return prefer


def model_preference(apply_fn: ApplyFn, params: Params, *, stop_ids: Sequence[int]) -> PreferenceFn:
  """Preferences of a trained preference model, which reads the sampled tokens themselves.

  Args:
    apply_fn: `(params, tokens [B, T]) -> scores [B, T]`.
    params: Params of a preference model that shares the policy's tokenizer.
    stop_ids: Tokens of that tokenizer that end a response.
  """
  prefer = make_preferrer(apply_fn, stop_ids)
  return lambda a, b, prompt_ids: prefer(params, a, b)


class _OfReward(NamedTuple):
  """Preference of a reward, which can score each response once for all of its matches."""

  reward_fn: RewardFn

  def scores(self, rollout: Rollout, prompt_ids: np.ndarray) -> jax.Array:
    return jnp.asarray(parts.total(self.reward_fn(rollout, prompt_ids)))

  def __call__(self, a: Rollout, b: Rollout, prompt_ids: np.ndarray) -> jax.Array:
    return jax.nn.sigmoid(self.scores(a, prompt_ids) - self.scores(b, prompt_ids))


def reward_preference(reward_fn: RewardFn) -> PreferenceFn:
  """Preferences of a Bradley-Terry reward: the sigmoid of the score difference."""
  return _OfReward(reward_fn)


def text_preference(
  function: TextPreference,
  rows: Sequence[Mapping[str, Any]],
  decode: Callable[[list[list[int]]], list[str]],
) -> PreferenceFn:
  """Preferences of a Python function of a prompt and two responses.

  Args:
    function: The judge.
    rows: Data rows, indexed by prompt id, with the prompt under "prompt_text".
    decode: Function from the token ids of several texts to the texts.
  """

  def prefer(a: Rollout, b: Rollout, prompt_ids: np.ndarray) -> np.ndarray:
    first, second = response_texts(a, decode), response_texts(b, decode)
    chosen = [rows[i] for i in np.asarray(prompt_ids).tolist()]
    prompts = [row["prompt_text"] for row in chosen]
    return ask(function, prompts, first, second, rows=chosen)

  return prefer


def tournament_reward(
  prefer: PreferenceFn, samples: int, watch: checks.Watch | None = None
) -> RewardFn:
  """Scores samples by the mean preference over the other samples of the prompt.

  The two scores of a pair sum to 1. Comparisons without a usable preference do not count; a sample
  without any other has NaN.

  Args:
    prefer: The preference.
    samples: Samples per prompt, in adjacent rows; at least 2.
    watch: Check of the preferences; None makes one.
  """
  if samples < 2:
    raise ValueError(f"a tournament needs at least 2 samples per prompt, got {samples}")
  watch = watch or checks.Watch("the judge")

  def matches(rollout: Rollout, prompt_ids: np.ndarray) -> Callable[[int, int], Any]:
    """Builds `(a, b) -> [P]`, preferences for sample a of each prompt over sample b."""
    if isinstance(prefer, _OfReward):
      scores = prefer.scores(rollout, prompt_ids).reshape(-1, samples)
      return lambda a, b: jax.nn.sigmoid(scores[:, a] - scores[:, b])
    nth = [jax.tree.map(lambda x, n=n: x[n::samples], rollout) for n in range(samples)]
    return lambda a, b: prefer(nth[a], nth[b], prompt_ids[::samples])

  def score(rollout: Rollout, prompt_ids: np.ndarray) -> jax.Array:
    meet = matches(rollout, prompt_ids)
    total = count = jnp.zeros([len(prompt_ids) // samples, samples])
    given = []
    for a, b in itertools.combinations(range(samples), 2):
      given.append(jnp.asarray(meet(a, b)))
      usable = jnp.isfinite(given[-1])
      wins, counts = jnp.where(usable, given[-1], 0.0), usable.astype(jnp.float32)
      total = total.at[:, a].add(wins).at[:, b].add(jnp.where(usable, 1 - wins, 0.0))
      count = count.at[:, a].add(counts).at[:, b].add(counts)
    watch.check(jnp.concatenate(given))
    return jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan).ravel()

  return score


def anchored_reward(
  prefer: PreferenceFn, anchors: Callable[[Rollout, np.ndarray], Rollout]
) -> RewardFn:
  """Scores responses by the preference over a response of another policy to the same prompt.

  Args:
    prefer: The preference.
    anchors: `(rollout, prompt_ids) -> rollout` of as many responses to the same prompts.
  """
  return lambda rollout, prompt_ids: prefer(rollout, anchors(rollout, prompt_ids), prompt_ids)
