"""Dynamic sampling, against loops over groups written by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.lab import redraws, responses
from rlhf_jax import rewards, sharding
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.rewards.shaped import ShapingConfig
from rlhf_jax.types import TrainState
from tests.experiments.lab.rollouts import rollout_of

N = 3
NAN = np.nan


def draw_of(number, groups, ended=None, satisfied=None):
  """Draw of groups of rewards, in which every token and id says whose it is."""
  scores = np.array(groups, np.float32).reshape(-1)
  rollout = rollout_of([[1000 * number + row, 7] for row in range(len(scores))])
  ids = 100 * number + np.repeat(np.arange(len(groups)), N)
  ended = np.ones(len(scores), bool) if ended is None else np.array(ended).reshape(-1)
  satisfied = None if satisfied is None else np.array(satisfied).reshape(-1)
  parts = rewards.Parts(scores, scores[:, None] * 0, satisfied, {"one": scores + number})
  rollout = jax.tree.map(jax.numpy.asarray, rollout)
  return redraws.Draw(rollout, ids, parts, ended, ref_scores=scores[:, None] - 1)


DRAWS = (
  [[1, 1, 1], [0, 1, 1], [NAN, 2, 2], [0, 0, 0], [NAN, NAN, NAN]],
  [[0, 0, 0], [5, 6, 5], [3, 3, 3], [NAN, 7, 8], [1, 1, 1]],
  [[9, 8, 9], [1, 1, 1], [6, 6, 7], [4, 5, 4], [3, 3, 3]],
)


def test_groups_without_signal_give_their_place_to_later_ones():
  first, *later = [draw_of(number, groups) for number, groups in enumerate(DRAWS)]
  batch = redraws.Filled(first, N, penalty=0.0)
  source = [(0, g) for g in range(5)]  # Draw and group of each place.
  lacking = {0, 2, 3, 4}
  assert set(np.flatnonzero(batch.lacking)) == lacking
  for number, draw in enumerate(later, 1):
    batch.add(draw)
    having = [g for g in range(5) if len({r for r in DRAWS[number][g] if r == r}) > 1]
    for place, g in zip(sorted(lacking), having, strict=False):
      source[place] = (number, g)
      lacking.discard(place)
    assert set(np.flatnonzero(batch.lacking)) == lacking
    rows = [(n, N * g + i) for n, g in source for i in range(N)]
    got, all_of = batch.draw, [first, *later]
    leaves = zip(jax.tree.leaves(got), *(jax.tree.leaves(d) for d in all_of), strict=True)
    for have, *of in leaves:
      np.testing.assert_array_equal(have, np.stack([of[n][row] for n, row in rows]))
  assert not lacking
  metrics = batch.metrics()
  values = np.array(DRAWS).reshape(-1)
  assert metrics["groups/draws"] == 3
  assert metrics["tokens/drawn"] == sum(d.rollout.response_mask.sum() for d in [first, *later])
  assert metrics["groups/zero_std/drawn"] == pytest.approx((4 + 3 + 2) / 15)
  assert metrics["reward/drawn"] == pytest.approx(np.nanmean(values))


@pytest.mark.parametrize(
  ("penalty", "constrained", "lacking"),
  [
    (0.0, False, [True, True, False]),
    (1.0, False, [True, False, False]),
    (0.0, True, [False, True, True]),
  ],
)
def test_what_the_method_compares_counts(penalty, constrained, lacking):
  ended = [[1, 1, 1], [1, 0, 1], [1, 1, 1]]
  satisfied = [[1, 0, 1], [1, 1, 1], [0, 0, 0]]
  groups = [[2, 2, 2], [3, 3, 3], [1, 2, 3]]
  draw = draw_of(0, groups, np.array(ended, bool), np.array(satisfied, bool))
  batch = redraws.Filled(draw, N, penalty, constrained)
  assert batch.lacking.tolist() == lacking


def test_a_step_draws_until_it_is_filled_and_a_resumed_run_draws_the_same(open_bench):
  words = ("--reward.name=gold", "--rollout.redraws=3", "--shaping.missing_eos_penalty=0")
  bench = open_bench("grpo", "prompts", *words)
  config = bench.config
  samples = config.sampling.samples_per_prompt
  calls = []

  def reward(rollout, ids):  # Every second prompt pays for the parity of the first token.
    calls.append(np.array(ids))
    length = rollout.logprobs.shape[1]
    first = np.asarray(rollout.tokens)[:, -length]
    return np.where(np.asarray(ids) % 2, first + np.arange(len(first)) % 2, 1).astype(np.float32)

  def run(position=None, redraws=config.rollout.redraws):
    options = dataclasses.replace(config.rollout, redraws=redraws)
    respond = responses.Responder(bench, lambda _: reward, config.shaping, options)
    if position is not None:
      respond.batches.set_state(position)
    state = respond.init(TrainState(np.int32(4), bench.start, ()), None)
    calls.clear()
    prompts = sharding.place_batch(next(respond.batches), bench.run.mesh)
    scored, _, metrics = respond(bench.start, state, prompts, jax.random.key(3))
    return scored, metrics, respond.batches.get_state(), list(calls)

  start = bench.batches().get_state()
  scored, metrics, end, drawn = run(start)
  groups = np.asarray(scored.scores).reshape(-1, samples)
  assert 2 <= metrics["groups/draws"] == len(drawn) <= 4
  distinct = [len(set(group)) > 1 for group in groups]
  assert all(distinct) or metrics["groups/draws"] == 4
  assert len({tuple(ids) for ids in drawn}) == len(drawn)  # Other prompts at each draw.
  again = run(start)
  for one, other in zip(
    jax.tree.leaves((scored, end)), jax.tree.leaves(again[::2][:2]), strict=True
  ):
    np.testing.assert_array_equal(one, other)
  plain, of_plain, moved, _ = run(start, redraws=0)
  assert "groups/draws" not in of_plain and moved != end
  kept = [len(set(group)) > 1 for group in np.asarray(plain.scores).reshape(-1, samples)]
  assert 0 < np.mean(kept) < 1 and np.mean(kept) < np.mean(distinct)
  for got, before in zip(scored, plain, strict=True):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(before), strict=True):
      assert (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding)  # No compilation.
      rows = np.repeat(kept, samples)
      np.testing.assert_array_equal(np.asarray(x)[rows], np.asarray(y)[rows])


@pytest.mark.parametrize(
  ("samples", "clip", "message"),
  [(1, 0.0, "set sampling.samples_per_prompt to 2"), (4, 2.0, "before shaping.clip")],
)
def test_settings_that_cannot_be_compared_are_refused(open_bench, samples, clip, message):
  config = open_bench("rloo", "prompts", "--reward.name=gold").config
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(
      config,
      sampling=SamplingConfig(8, samples_per_prompt=samples),
      shaping=ShapingConfig(clip=clip),
      rollout=responses.RolloutOptions(redraws=2),
    )
  with pytest.raises(ValueError, match="redraws and devices are both given"):
    responses.RolloutOptions(redraws=1, devices=1, importance_cap=2.0)
