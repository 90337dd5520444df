import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import hlo, sharding
from rlhf_jax.generation import (
  MixtureParams,
  SamplingConfig,
  make_generate,
  make_mixture,
  stop_text,
  usage,
)
from rlhf_jax.models import ModelConfig, build
from tests.testing import FAMILY_MODELS

V, P, R, EOS, PAD = 16, 6, 9, 3, 0
CONFIG = SamplingConfig(max_new_tokens=R)
TINY = ModelConfig(
  vocab_size=V, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp_width=24, init_std=0.25
)
# Lengths of answers in HH-RLHF's helpful test set, in units of four words.
LENGTHS = """
  7 8 13 16 6 7 4 19 3 20 8 5 15 29 8 8 19 13 21 5 5 9 10 7 26 37 1 4 14 13 22 22 9 4 10 16 4 6 8
  1 20 9 2 7 2 6 4 10 6 13 7 6 35 23 8 14 5 1 13 7 20 17 3 20 12 7 11 11 4 4 8 6 5 6 5 6 36 7 4
  18 5 15 12 6 6 10 3 5 3 3 15 2 19 6 10 14 7 14 29 2 10 16 15 11 2 1 20 4 12 38 10 16 8 6 11 12
  11 4 1 14 17 4 11 11 5 27 13 1 15 18 39 4 12 5 11 4 11 5 5 10 2 14 5 6 2 30 50 3 5 3 6 35 6 11
  4 14 16 7 5 8 2 50 3 2 5 4 4 24 8 11 23 11 21 6 8 8 14 3 12 7 17 6 4 8 7
"""
LENGTHS = 2 * [int(length) for length in LENGTHS.split()]


class Script(NamedTuple):
  """A cache that knows its script and how many of its tokens it has given."""

  row: jax.Array
  given: jax.Array

  def repeat(self, n):
    return Script(jnp.repeat(self.row, n), jnp.repeat(self.given, n))

  def seek(self, index):
    return self

  def seat(self, row, prompts, prompt):
    return Script(
      self.row.at[row].set(prompts.row[prompt]), self.given.at[row].set(prompts.given[prompt])
    )


def of_lengths(lengths):
  """A script of responses that end after so many tokens."""
  script = np.arange(len(lengths))[:, None] * 5 + np.arange(max(lengths)) * 3
  script = 4 + script % (V - 4)
  for row, length in zip(script, lengths, strict=True):
    row[length - 1 :] = EOS
  return script


def scripted(script, config, stops=None):
  """Runs a decoder that wants the token `script[row, t]`, and counts its calls after the first."""
  calls, rows, script = [], len(script), jnp.asarray(script)

  def decode(params, tokens, cache, *, mask):
    jax.debug.callback(lambda: calls.append(1))
    wanted = script[cache.row, jnp.minimum(cache.given, config.max_new_tokens - 1)]
    return 30.0 * jax.nn.one_hot(wanted, V), Script(cache.row, cache.given + 1)

  def init_cache(batch, slots):
    return Script(jnp.arange(batch), jnp.zeros(batch, jnp.int32))

  generate = make_generate(decode, init_cache, config, stop_ids=(EOS,), pad_id=PAD, stop_text=stops)
  prompts = np.full((rows, 2), 7), np.ones((rows, 2), bool), np.arange(rows)
  rollout = jax.device_get(generate({}, *prompts, jax.random.key(0)))
  jax.effects_barrier()
  return rollout, len(calls) - 1


def test_short_responses_do_not_wait_for_long_ones():
  slots, longest = 16, max(LENGTHS)
  assert np.mean(LENGTHS) < 0.22 * longest
  config = SamplingConfig(max_new_tokens=longest, slots=slots)
  rollout, steps = scripted(of_lengths(LENGTHS), config)
  plain, _ = scripted(of_lengths(LENGTHS), dataclasses.replace(config, slots=0))
  jax.tree.map(np.testing.assert_array_equal, rollout, plain)
  assert rollout.response_mask.sum(axis=1).tolist() == LENGTHS
  batches = [LENGTHS[i : i + slots] for i in range(0, len(LENGTHS), slots)]
  assert sum(usage(batch)[0] for batch in batches) >= 2.5 * steps
  assert usage(LENGTHS, slots)[0] == steps and usage(LENGTHS, slots)[1] >= 0.85


@pytest.mark.parametrize("slots", [1, 2, 5, 50])
def test_decode_steps_are_counted(slots):
  lengths = [1, 1, 4, 2, 9, 1, 3, 1, 1, 9, 2]
  rollout, steps = scripted(of_lengths(lengths), SamplingConfig(max_new_tokens=9, slots=slots))
  assert rollout.response_mask.sum(axis=1).tolist() == lengths
  drawn = sum(lengths) - len(lengths)
  assert usage(lengths, slots) == (steps, drawn / (min(slots, 11) * steps))


def test_one_token_takes_no_step():
  rollout, steps = scripted(of_lengths([1] * 5), SamplingConfig(max_new_tokens=1, slots=2))
  assert steps == 0 and usage([1] * 5, 2) == (0, 1.0)
  assert (rollout.tokens[:, 2:] == EOS).all()


def test_stop_strings_are_read_anew_in_every_response():
  texts = [b""] * V
  texts[4:7] = [b"a", b"b", b"c"]
  a, b, c = 4, 5, 6
  script = [[a, b, EOS, a], [c, a, b, c], [b, c, a, b]]  # "ab" and "c" are of two responses.
  config = SamplingConfig(max_new_tokens=4, slots=1)
  rollout, _ = scripted(script, config, stop_text(["abc", "bca"], texts))
  assert rollout.response_mask.sum(axis=1).tolist() == [3, 4, 3]


def prompts_of(rows):
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, P + 1, rows)
  mask = np.arange(P)[None] >= P - lengths[:, None]
  tokens = np.where(mask, rng.integers(4, V, (rows, P)), PAD).astype(np.int32)
  return tokens, mask, rng.permutation(rows).astype(np.int32)


def both(model, params, config, rows=8, mixture=False, stops=None, place=lambda x: x):
  """The responses in slots and the plain ones."""
  decoder = model.decode, model.init_cache
  decoder = make_mixture(*decoder) if mixture else decoder
  for sampling in (config, dataclasses.replace(config, slots=0)):
    generate = make_generate(*decoder, sampling, stop_ids=(EOS,), pad_id=PAD, stop_text=stops)
    yield jax.device_get(generate(params, *place(prompts_of(rows)), jax.random.key(5)))


WINDOWS = dataclasses.replace(TINY, layers=5, windows=(3, None, 2, None, 3))
LEARNED = dataclasses.replace(FAMILY_MODELS["gpt2"], vocab_size=V, max_length=P + R - 1)


@pytest.mark.parametrize(
  ("model", "config"),
  [
    (TINY, SamplingConfig(max_new_tokens=R, samples_per_prompt=3, slots=5, temperature=1.3)),
    (WINDOWS, SamplingConfig(max_new_tokens=R, slots=3, top_k=6, top_p=0.9)),
    (LEARNED, SamplingConfig(max_new_tokens=R, slots=2, stop=("ab",))),
    (dataclasses.replace(TINY, dtype="bfloat16"), SamplingConfig(max_new_tokens=R, slots=3)),
  ],
  ids=["samples", "windows", "learned", "bfloat16"],
)
def test_responses_are_those_of_the_plain_sampler(model, config):
  model = build(model)
  params = jax.jit(model.init)(jax.random.key(0))
  texts = [b"", b"", b"", b"", *([b"a", b"b", b"ba"] * 4)]
  stops = stop_text(config.stop, texts) if config.stop else None
  got, expected = both(model, params, config, stops=stops)
  tokens = expected.tokens[:, P:], expected.response_mask[:, P:]
  assert len({row.tobytes() for row in tokens[0]}) > 5 and 0.2 < tokens[1].mean() < 0.95
  for name in ("tokens", "prompt_mask", "response_mask"):
    np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
  np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-5)


def test_mixtures_are_sampled_in_slots():
  model = build(TINY)
  policy, ref = (jax.jit(model.init)(jax.random.key(seed)) for seed in range(2))
  params = MixtureParams(policy, ref, jnp.float32(0.3))
  got, expected = both(model, params, dataclasses.replace(CONFIG, slots=3), mixture=True)
  np.testing.assert_array_equal(got.tokens, expected.tokens)
  np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-5)


def test_a_mesh_samples_the_same_and_moves_one_prompt_at_a_time():
  mesh = sharding.make_mesh("data:4,tensor:2")
  config = dataclasses.replace(CONFIG, slots=4, samples_per_prompt=2)
  model, alone = build(TINY, mesh=mesh), build(TINY)
  params = jax.jit(alone.init)(jax.random.key(0))
  generate = functools.partial(make_generate, config=config, stop_ids=(EOS,), pad_id=PAD)
  placed = jax.device_put(params, sharding.rollout_shardings(params, mesh))
  inputs = placed, *sharding.place_batch(prompts_of(8), mesh), jax.random.key(5)
  compiled = generate(model.decode, model.init_cache).lower(*inputs).compile()
  heads = TINY.kv_heads // 2
  row = 4 * (2 * TINY.layers * heads * P * TINY.head_dim + V)  # Bytes: cache and logits.
  sent = [c for c in hlo.collectives(compiled.as_text()) if None in c.trips]
  assert sent and max(c.bytes for c in sent) <= 2 * row
  expected, _ = both(alone, params, config)
  np.testing.assert_array_equal(compiled(*inputs).tokens, expected.tokens)
