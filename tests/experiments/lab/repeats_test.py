"""A prompt that is in a batch several times is answered anew each time."""

import itertools

import jax
import numpy as np
import pytest

from experiments.lab import models, responses, teachers
from experiments.lab.matches import Match
from rlhf_jax import sharding
from rlhf_jax.types import TrainState
from tests.testing import compilations

ANSWERS = {}
KEY = jax.random.key(3)


def engine(params, tokens, mask, prompt_ids, key, sampling, stop_ids):
  """The built-in sampler without regard to repeats."""
  del stop_ids
  rollout = ANSWERS["sample"](params, tokens, mask, prompt_ids, key)
  length = sampling.max_new_tokens
  return rollout.tokens[:, -length:], rollout.response_mask[:, -length:], rollout.logprobs


def plain(bench):
  return models.make_sampler(bench.model, bench.tokenizer, bench.config.sampling)


def respond(bench, prompts):
  """Responses of a `Responder`, and the ids that its reward gets."""
  seen = []

  def reward(rollout, ids):
    seen.append(np.asarray(ids))
    return np.zeros(len(ids), np.float32)

  options = bench.config.rollout
  responder = responses.Responder(bench, lambda _: reward, bench.config.shaping, options)
  state = responder.init(TrainState(np.int32(0), bench.start, ()), None)
  scored, following, _ = responder(bench.start, state, prompts, KEY)
  return [scored.rollout, *([following.rollout] if following else [])], seen[0]


def compare(bench, prompts):
  """Responses of both sides of a `Match`, and the ids that its judge gets."""
  seen = []

  def prefer(sampled, other, ids):
    seen.append((sampled, other, np.asarray(ids)))
    return np.full(len(ids), 0.5)

  match = Match(bench, prefer, bench.config.nash_md, count=1)
  match(bench.start, None, prompts, KEY, mix=0.5, tau=0.1)
  sampled, other, ids = seen[0]
  return [sampled, other], ids


def distill(bench, prompts):
  """Responses of a student or its teacher."""
  teacher = teachers.Teacher(bench.model, bench.start)
  rollout, _ = teachers.make_respond(bench, teacher)(bench.start, prompts, 0, KEY)
  return [rollout], np.asarray(prompts.prompt_id)


ENGINE = (f"--rollout.engine={__name__}:engine", "--rollout.importance_cap=2")
CASES = {
  "policy": (respond, "grpo", ()),
  "engine": (respond, "grpo", ENGINE),
  "match": (compare, "nash_md", ()),
  "student": (distill, "gkd", ("--gkd.student_share=1",)),
  "teacher": (distill, "gkd", ("--gkd.student_share=0",)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_prompt_that_is_twice_in_a_batch_has_other_responses(name, open_bench):
  """The numbers of the prompts, which rewards get, stay those of their rows."""
  answer, script, words = CASES[name]
  sizes = ("--data.rows=6", "--data.eval_rows=2", "--batch_size=4")
  bench = open_bench(script, "prompts", *sizes, *words)
  ANSWERS["sample"] = plain(bench)
  batch = next(b for b in bench.batches() if len(set(b.prompt_id.tolist())) < 4)
  rollouts, ids = answer(bench, sharding.place_batch(batch, bench.run.mesh))
  samples = len(ids) // 4
  assert ids.tolist() == np.repeat(batch.prompt_id, samples).tolist()
  for rollout in map(jax.device_get, rollouts):
    groups = rollout.tokens.reshape(4, samples, -1)
    for i, j in itertools.combinations(range(4), 2):
      assert not np.array_equal(groups[i], groups[j])


def test_prompts_that_differ_are_answered_as_by_their_ids(open_bench):
  """By the very program that evaluates."""
  words = ("--reward.name=gold", "--data.rows=6", "--data.eval_rows=2", "--batch_size=4")
  bench = open_bench("grpo", "prompts", *words)
  batches = itertools.islice(bench.batches(), 12)
  repeats = {
    len(set(b.prompt_id.tolist())) < 4: sharding.place_batch(b, bench.run.mesh) for b in batches
  }
  with compilations() as names:
    got = bench.sampler()(bench.start, *repeats[False], KEY)
  assert names.count("generate") == 1
  with compilations() as names:
    want = plain(bench)(bench.start, *repeats[False], KEY)
    bench.sampler()(bench.start, *repeats[True], KEY)
  assert not names
  jax.tree.map(np.testing.assert_array_equal, got, want)
