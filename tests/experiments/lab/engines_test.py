import dataclasses

import jax
import numpy as np
import pytest

from experiments.lab import engines, responses
from rlhf_jax import sharding, user
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.types import TrainState

NAME = f"{__name__}:twin"
ANSWERS = {}


def twin(params, tokens, mask, prompt_ids, key, sampling, stop_ids):
  """The built-in sampler as an engine, with other log-probabilities."""
  assert isinstance(tokens, np.ndarray) and mask.dtype == bool and stop_ids
  rollout = ANSWERS["sample"](params, tokens, mask, prompt_ids, key)
  length = sampling.max_new_tokens
  drawn, on = rollout.tokens[:, -length:], rollout.response_mask[:, -length:]
  return np.where(on, drawn, -7), on, rollout.logprobs - 0.25  # Nothing reads what is masked.


def broken(params, tokens, mask, prompt_ids, key, sampling, stop_ids):
  raise OSError("no such server")


def test_an_engine_takes_the_place_of_the_sampler(open_bench):
  words = ("--reward.name=gold", f"--rollout.engine={NAME}", "--rollout.importance_cap=2")
  bench = open_bench("grpo", "prompts", *words)
  config, sample = bench.config, bench.sampler()
  ANSWERS["sample"] = sample
  responder = responses.Responder(bench, bench.open_reward(), config.shaping, config.rollout)
  state = responder.init(TrainState(np.int32(0), bench.start, ()), None)
  prompts = sharding.place_batch(next(iter(bench.batches())), bench.run.mesh)
  key = jax.random.key(3)
  got, _, metrics = responder(bench.start, state, prompts, key)
  first = jax.random.fold_in(jax.random.fold_in(key, 1), 0)
  expected = sample(bench.start, *prompts, first)
  on = np.asarray(expected.response_mask[:, -config.sampling.max_new_tokens :])
  for name in ("tokens", "prompt_mask", "response_mask"):
    np.testing.assert_array_equal(getattr(got.rollout, name), getattr(expected, name))
  logprobs = np.where(on, np.asarray(expected.logprobs) - 0.25, 0)
  np.testing.assert_allclose(got.rollout.logprobs, logprobs, atol=1e-6)
  assert np.isfinite(got.scores).all()
  lengths = on.sum(axis=1)
  drawn = (lengths - 1).sum() / (len(lengths) * (lengths.max() - 1))
  assert metrics["sampling/occupancy"] == pytest.approx(drawn)
  assert metrics["sampling/steps"] == lengths.max() - 1

  rollout = dataclasses.replace(config.rollout, engine=f"{__name__}:broken")
  bench = bench._replace(config=dataclasses.replace(config, rollout=rollout))
  with pytest.raises(user.ResultError, match=r"engine=.*:broken raised .*OSError: no such server"):
    engines.make_sampler(bench)(bench.start, *prompts, key)
  ANSWERS["sample"] = lambda *_: sample(bench.start, *prompts, first)._replace(
    logprobs=logprobs + 9
  )
  with pytest.raises(user.ResultError, match=r"engine=.*:twin: logprobs must be finite"):
    engines.make_sampler(bench._replace(config=config))(bench.start, *prompts, key)


def answers():
  tokens, mask = np.full((2, 3), 4), np.array([[True, True, True], [True, False, False]])
  return {"tokens": tokens, "mask": mask, "logprobs": np.full((2, 3), -1.0)}


def changed(name, at, value):
  array = answers()[name]
  array[at] = value
  return {name: array}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({}, None),
    (changed("tokens", (1, 1), -1), None),
    (changed("logprobs", (1, 2), np.nan), None),
    (changed("tokens", (0, 2), 9), None),
    (changed("tokens", (0, 1), 9), "a response must end at its first stop token"),
    (changed("tokens", (0, 0), 10), "tokens must be ids of the tokenizer, from 0 to 9"),
    (changed("tokens", (1, 0), -1), "tokens must be ids of the tokenizer, from 0 to 9"),
    (changed("mask", (1, 0), False), "mask must be True on the tokens"),
    (changed("mask", (0, 1), False), "mask must be True on the tokens"),
    (changed("logprobs", (0, 2), np.nan), "logprobs must be finite"),
    (changed("logprobs", (0, 2), -np.inf), "logprobs must be finite"),
    (changed("logprobs", (0, 2), 0.1), "logprobs must be finite"),
    ({"tokens": np.zeros((2, 4), int)}, r"tokens must be integers \[2, 3\].*int64 \[2, 4\]"),
    ({"tokens": np.zeros((2, 3))}, r"tokens must be integers \[2, 3\].*got float64"),
    ({"mask": np.ones((2, 3), int)}, r"mask must be bools \[2, 3\]"),
    ({"logprobs": np.zeros(2)}, r"logprobs must be floats \[2, 3\].*got float64 \[2\]"),
  ],
)
def test_answers_are_checked(change, message):
  given = tuple((answers() | change).values())
  sampling = SamplingConfig(max_new_tokens=3)
  if message is None:
    for got, expected in zip(engines.check(given, 2, sampling, 10, (9,)), given, strict=True):
      np.testing.assert_array_equal(got, expected)
  else:
    with pytest.raises(ValueError, match=message):
      engines.check(given, 2, sampling, 10, (9,))


@pytest.mark.parametrize("given", [None, 3, (1, 2)])
def test_answers_are_three_arrays(given):
  with pytest.raises(ValueError, match="it must return three arrays"):
    engines.check(given, 2, SamplingConfig(max_new_tokens=3), 10, (9,))


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"engine": NAME}, "set rollout.importance_cap"),
    ({"engine": NAME, "importance_cap": 2.0, "devices": 1}, "engine and devices are both given"),
    ({"engine": "vllm", "importance_cap": 2.0}, "engine must be module:function of your own"),
    ({"engine": f"{__name__}:answers", "importance_cap": 2.0}, "must take .params, tokens, mask"),
  ],
)
def test_settings_of_an_engine_are_checked(settings, message):
  with pytest.raises(ValueError, match=message):
    responses.RolloutOptions(**settings)
