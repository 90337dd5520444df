import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import hlo, sharding
from rlhf_jax.generation import SamplingConfig, ended, make_generate, sample, stop_text
from rlhf_jax.models import ModelConfig, build, hf, lora
from tests.testing import compilations

V, P, R, EOS, PAD = 16, 8, 10, 3, 0
CONFIG = SamplingConfig(max_new_tokens=R)
TINY = ModelConfig(
  vocab_size=V, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp_width=24, init_std=0.25
)


class Case(NamedTuple):
  model: object
  params: dict
  tokens: np.ndarray  # [8, P], left padded.
  mask: np.ndarray
  ids: np.ndarray


@pytest.fixture(scope="module")
def case():
  model = build(TINY)
  params = jax.jit(model.init)(jax.random.key(0))
  rng = np.random.default_rng(0)
  lengths = np.array([1, 8, 3, 5, 2, 8, 4, 6])
  mask = np.arange(P)[None] >= P - lengths[:, None]
  tokens = np.where(mask, rng.integers(4, V, (8, P)), PAD).astype(np.int32)
  return Case(model, params, tokens, mask, np.array([5, 2, 9, 100, 7, 0, 1, 31], np.int32))


@functools.cache
def sampler(model, config=CONFIG, stop_ids=(EOS,), pad_id=PAD):
  return make_generate(model.decode, model.init_cache, config, stop_ids=stop_ids, pad_id=pad_id)


@functools.cache
def forward(model):
  return jax.jit(model.apply)


draw = jax.jit(sample, static_argnums=2)


def run(case, rows=slice(None), config=CONFIG, key=0, params=None, **kwargs):
  generate = sampler(case.model, config, **kwargs)
  return jax.device_get(
    generate(
      case.params if params is None else params,
      case.tokens[rows],
      case.mask[rows],
      case.ids[rows],
      jax.random.key(key),
    )
  )


def responses(rollout, length=R):
  return rollout.tokens[:, -length:]


def slow_sample(case, row, sample_id, config, key=0, stop_ids=(EOS,)):
  """One response by full forwards without a cache, from the definition of the keys."""
  prompt = case.tokens[row][case.mask[row]]
  tokens = np.zeros((1, P + R), np.int32)
  tokens[0, : len(prompt)] = prompt
  apply = forward(case.model)
  row_key = jax.random.fold_in(jax.random.key(key), int(case.ids[row]))
  row_key = jax.random.fold_in(row_key, sample_id)
  out = []
  for t in range(config.max_new_tokens):
    at = len(prompt) + t
    segments = (np.arange(P + R)[None] < at).astype(np.int32)
    logits = apply(case.params, tokens, segment_ids=segments)[:, at - 1]
    token, _ = draw(logits, jax.random.fold_in(row_key, t)[None], config)
    out.append(int(token[0]))
    tokens[0, at] = out[-1]
    if out[-1] in stop_ids:
      break
  return out


@pytest.mark.parametrize(
  "config",
  [CONFIG, dataclasses.replace(CONFIG, temperature=0.7, top_k=6, top_p=0.9)],
  ids=["plain", "adjusted"],
)
def test_samples_follow_their_own_keys(case, config):
  config = dataclasses.replace(config, samples_per_prompt=3)
  rollout = run(case, config=config)
  assert rollout.tokens.shape == (24, P + R)
  drawn = [row[on].tolist() for row, on in zip(rollout.tokens, rollout.response_mask, strict=True)]
  expected = [slow_sample(case, i, s, config) for i in range(8) for s in range(3)]
  assert drawn == expected
  # The prompts are repeated next to each other.
  np.testing.assert_array_equal(rollout.tokens[:, :P], np.repeat(case.tokens, 3, axis=0))
  np.testing.assert_array_equal(rollout.prompt_mask[:, :P], np.repeat(case.mask, 3, axis=0))
  # The samples of a prompt differ, the first is the one of a single sample.
  assert all(len({tuple(r) for r in drawn[i : i + 3]}) == 3 for i in range(0, 24, 3))
  alone = run(case, config=dataclasses.replace(config, samples_per_prompt=1))
  np.testing.assert_array_equal(responses(alone), responses(rollout)[::3])
  np.testing.assert_allclose(alone.logprobs, rollout.logprobs[::3], atol=1e-5)


def test_tokens_do_not_depend_on_the_batch(case):
  full = run(case)
  order = np.array([6, 0, 3, 7, 1, 5, 2, 4])
  for rows in (order, np.array([4]), np.tile(order, 4)):
    part = run(case, rows)
    np.testing.assert_array_equal(responses(part), responses(full)[rows])
    np.testing.assert_array_equal(part.response_mask, full.response_mask[rows])
    np.testing.assert_allclose(part.logprobs, full.logprobs[rows], atol=1e-5)


def test_tokens_do_not_depend_on_left_padding(case):
  full = run(case)
  for extra in (1, 5):
    pad = ((0, 0), (extra, 0))
    wider = case._replace(
      # Any ids: padding is what the mask says.
      tokens=np.pad(case.tokens, pad, constant_values=9),
      mask=np.pad(case.mask, pad),
    )
    rollout = run(wider)
    np.testing.assert_array_equal(responses(rollout), responses(full))
    np.testing.assert_allclose(rollout.logprobs, full.logprobs, atol=1e-5)
    assert rollout.tokens.shape == (8, P + extra + R)


@pytest.mark.parametrize("spec", ["data:8", "fsdp:8", "fsdp:4,tensor:2"])
def test_tokens_do_not_depend_on_the_mesh_or_the_layout(case, spec):
  config = dataclasses.replace(CONFIG, samples_per_prompt=2)
  expected = run(case, config=config)
  mesh = sharding.make_mesh(spec)
  trained = sharding.named_shardings(case.params, mesh, sharding.DECODER_RULES)
  params = jax.device_put(case.params, trained)
  rows = sharding.place_batch((case.tokens, case.mask, case.ids), mesh)
  reshard = sharding.make_reshard(mesh, TINY.dtype)
  generate = sampler(build(TINY, mesh=mesh), config)
  for layout in (params, reshard(params)):
    rollout = generate(layout, *rows, jax.random.key(0))
    assert len(rollout.tokens.sharding.device_set) == 8
    np.testing.assert_array_equal(rollout.tokens, expected.tokens)
    np.testing.assert_array_equal(rollout.response_mask, expected.response_mask)
    np.testing.assert_allclose(rollout.logprobs, expected.logprobs, atol=1e-5)


def test_no_token_waits_for_weights():
  """In the layout of rollouts the loop over tokens gathers no weights; in that of training it does.

  No activation has as many numbers as the smallest matrix of a layer.
  """
  model_config = dataclasses.replace(TINY, layers=6, width=32, mlp_width=64, kv_heads=4, head_dim=8)
  shapes = jax.eval_shape(build(model_config).init, jax.random.key(0))
  smallest = min(x.size // 6 for x in jax.tree.leaves(shapes["layers"]) if x.ndim == 3)
  for spec in ("fsdp:8", "fsdp:4,tensor:2"):
    mesh = sharding.make_mesh(spec)
    model = build(model_config, mesh=mesh)
    rows = sharding.batch_sharding(mesh)
    prompts = sharding.abstract(
      (jnp.zeros([8, P], int), jnp.zeros([8, P], bool), jnp.zeros(8, int)), rows
    )

    def gathered(places, model=model, mesh=mesh, prompts=prompts):
      generate = sampler(model, dataclasses.replace(CONFIG, max_new_tokens=4))
      lowered = generate.lower(sharding.abstract(shapes, places), *prompts, jax.random.key(0))
      found = hlo.collectives(lowered.compile().as_text())
      decoding = [c for c in found if None in c.trips and c.kind == "all-gather"]
      least = 4 * smallest / mesh.shape["tensor"] / 2  # In bytes; a ring of two sends half.
      return [c for c in decoding if c.bytes >= least]

    assert gathered(sharding.rollout_shardings(shapes, mesh)) == []
    assert gathered(sharding.named_shardings(shapes, mesh, sharding.DECODER_RULES))


def test_resharding_for_rollouts(case):
  config = dataclasses.replace(TINY, tied=False)
  model = build(config)
  params = jax.jit(model.init)(jax.random.key(0))
  mesh = sharding.make_mesh("fsdp:4,tensor:2")
  placed = jax.device_put(params, sharding.named_shardings(params, mesh, sharding.DECODER_RULES))
  moved = sharding.make_reshard(mesh, "bfloat16")(placed)
  for path, x in jax.tree_util.tree_leaves_with_path(moved):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    is_matrix = not name.endswith("scale")
    assert x.dtype == (jnp.bfloat16 if is_matrix else jnp.float32), name
    assert x.addressable_shards[0].data.size == x.size // (2 if is_matrix else 1), name
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), moved, params)
  # Where there is nothing to do, nothing is copied.
  for spec in ("data:8", "data:4,tensor:2"):
    assert sharding.make_reshard(sharding.make_mesh(spec), "float32")(params) is params


@pytest.mark.parametrize("spec", ["data:8", "fsdp:4,tensor:2"])
def test_adapters_of_any_rank_are_rounded_as_often_as_in_training(spec):
  """A layer rounds `lora_scale * lora_b`, and `lora_a`, once."""
  params = jax.eval_shape(build(TINY).init, jax.random.key(0))
  adapters = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=12))
  rng, mesh = np.random.default_rng(0), sharding.make_mesh(spec)
  adapters = jax.tree.map(lambda x: np.float32(x + rng.normal(size=x.shape)), adapters)
  places = sharding.named_shardings(adapters, mesh, sharding.DECODER_RULES)
  moved = sharding.make_reshard(mesh, "bfloat16")(jax.device_put(adapters, places))
  for sampled, trained in zip(*map(layers_of, (moved, adapters)), strict=True):
    products = [
      (np.float32(of["lora_b"]) * np.float32(of["lora_scale"])[:, None, None]).astype(jnp.bfloat16)
      for of in (sampled, trained)
    ]
    np.testing.assert_array_equal(*products)
    factors = [np.asarray(of["lora_a"]).astype(jnp.bfloat16) for of in (sampled, trained)]
    np.testing.assert_array_equal(*factors)


def layers_of(adapters):
  """Adapter of each layer, in the same order for all."""
  return [of for group in adapters["layers"].values() for of in group.values()]


def test_a_copy_in_the_computation_dtype_computes_the_same(case):
  """The same as with weights of its values: XLA may leave out rounding that it is not forced to."""
  for more in ({}, {"positions": "learned"}):
    model = build(dataclasses.replace(TINY, dtype="bfloat16", **more))
    params = jax.jit(model.init)(jax.random.key(0))
    copy = sharding.make_reshard(sharding.make_mesh("data:8"), "bfloat16")(params)
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), copy)
    own = case._replace(model=model)
    jax.tree.map(np.testing.assert_array_equal, run(own, params=rounded), run(own, params=copy))


def equations(jaxpr, times=1):
  """Yields (equation, times that it runs) of a jaxpr and those inside; a while loop counts once."""
  for equation in jaxpr.eqns:
    runs = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
    yield equation, times
    inner = lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")  # noqa: E731
    for leaf in jax.tree.leaves(list(equation.params.values()), is_leaf=inner):
      if inner(leaf):
        yield from equations(getattr(leaf, "jaxpr", leaf), runs)


def traced(model, config, rows):
  params = jax.eval_shape(model.init, jax.random.key(0))
  prompts = np.zeros((rows, P), np.int32), np.ones((rows, P), bool), np.arange(rows)
  return jax.make_jaxpr(sampler(model, config))(params, *prompts, jax.random.key(0)).jaxpr


@pytest.mark.parametrize("slots", [0, 2])
@pytest.mark.parametrize("layers", [2, 6])
def test_the_loop_over_tokens_neither_casts_nor_cuts_weights(layers, slots):
  """Layers are cut apart only by a loop over many of them."""
  config = dataclasses.replace(TINY, layers=layers, width=32, mlp_width=48, dtype="bfloat16")
  jaxpr = traced(build(config), dataclasses.replace(CONFIG, slots=slots), 3)
  weights = {(32, 32), (32, 16), (16, 32), (32, 48), (48, 32), (V, 32)}
  weights |= {(n, *shape) for n in (1, layers) for shape in weights}
  loops = [found for found, _ in equations(jaxpr) if found.primitive.name == "while"]
  body = [e for loop in loops for e, _ in equations(loop.params["body_jaxpr"].jaxpr)]
  costly = ("convert_element_type", "slice", "dynamic_slice", "squeeze", "transpose", "copy")
  costly = [
    e
    for e in body
    if e.primitive.name in costly
    and {x.aval.shape for x in e.invars if hasattr(x, "aval")} & weights
  ]
  assert len(body) > 100 and not costly


def test_samples_of_a_prompt_share_its_prefill():
  """Counted: with eight samples per prompt, prefill takes an eighth of the products."""

  def products(samples, prompts, slots):
    config = SamplingConfig(max_new_tokens=4, samples_per_prompt=samples, slots=slots)
    total = 0
    for found, runs in equations(traced(build(TINY), config, prompts)):
      if found.primitive.name == "while":
        break
      if found.primitive.name == "dot_general":
        (contracted, _), _ = found.params["dimension_numbers"]
        left, out = found.invars[0].aval.shape, found.outvars[0].aval.shape
        total += runs * np.prod(out) * np.prod([left[i] for i in contracted])
    return total

  one_each = products(1, 16, 0)
  for slots in (0, 4):
    assert 0 < products(8, 2, slots) * 8 <= one_each  # In slots there is less of the cache to read.


def test_the_key_decides(case):
  first, again, other = run(case), run(case), run(case, key=1)
  jax.tree.map(np.testing.assert_array_equal, first, again)
  changed = (responses(first) != responses(other)).any(1)
  assert changed.mean() > 0.7
  # As a script makes it: the key of a step.
  steps = [run(case, key=int(step)) for step in range(4)]
  assert len({responses(r).tobytes() for r in steps}) == 4


def test_compiles_once(case):
  config = dataclasses.replace(CONFIG, max_new_tokens=4)
  with compilations() as names:
    for key in range(3):
      run(case, config=config, key=key)
  assert names.count("generate") == 1


def teacher_forced(model, params, rollout, temperature, length):
  segments = (rollout.prompt_mask | rollout.response_mask).astype(np.int32)
  logits = forward(model)(params, rollout.tokens, segment_ids=segments)
  logits = np.asarray(logits, np.float64)[:, -length - 1 : -1] / temperature
  targets = rollout.tokens[:, -length:]
  chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
  peak = logits.max(-1)
  return chosen - peak - np.log(np.exp(logits - peak[..., None]).sum(-1))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_trainer(case, temperature):
  config = dataclasses.replace(CONFIG, temperature=temperature, samples_per_prompt=4)
  rollout = run(case, config=config)
  expected = teacher_forced(case.model, case.params, rollout, temperature, R)
  on = rollout.response_mask[:, P:]
  np.testing.assert_allclose(rollout.logprobs[on], expected[on], atol=1e-5)
  np.testing.assert_array_equal(rollout.logprobs[~on], 0.0)
  assert (rollout.logprobs[on] < 0).all() and not on.all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_a_trained_model(shared, temperature):
  folder = shared / "models/stories260k"
  model = build(hf.parse_config(folder)[0])
  params = hf.load_params(folder, model)
  golden = np.load(folder / "golden.npz")["input_ids"]
  tokens = np.zeros((4, 12), np.int32)
  mask = np.zeros((4, 12), bool)
  for i, length in enumerate((12, 1, 7, 4)):
    tokens[i, 12 - length :], mask[i, 12 - length :] = golden[i, :length], True
  config = SamplingConfig(max_new_tokens=40, temperature=temperature, samples_per_prompt=2)
  generate = sampler(model, config, stop_ids=(1,))
  rollout = generate(params, tokens, mask, np.arange(4), jax.random.key(0))
  rollout = jax.device_get(rollout)
  expected = teacher_forced(model, params, rollout, temperature, 40)
  on = rollout.response_mask[:, 12:]
  # Its logits reach 20: 1e-6 of that is the round-off of float32. Neither side is exact.
  np.testing.assert_allclose(rollout.logprobs[on], expected[on], rtol=0, atol=2e-5)
  assert np.abs(rollout.logprobs[on] - expected[on]).mean() < 2e-6
  # The model has learnt something: better than 1 in 20 per token.
  assert rollout.logprobs[on].mean() > -3.0


def test_temperature_0_is_greedy(case):
  rollout = run(case, config=dataclasses.replace(CONFIG, temperature=0.0))
  top_1 = run(case, config=dataclasses.replace(CONFIG, top_k=1))
  np.testing.assert_array_equal(rollout.tokens, top_1.tokens)
  config = dataclasses.replace(CONFIG, temperature=0.0)
  on = rollout.response_mask
  drawn = [row[m].tolist() for row, m in zip(rollout.tokens, on, strict=True)]
  assert drawn == [slow_sample(case, i, 0, config) for i in range(8)]


# Ends of responses, with a decoder that follows a script.


class Script(NamedTuple):
  """A cache that knows its row and how many times it was used."""

  row: jax.Array
  calls: jax.Array
  mask: jax.Array  # [B, slots]: what `decode` was told is real.

  def repeat(self, n):
    return Script(jnp.repeat(self.row, n), self.calls, jnp.repeat(self.mask, n, axis=0))


def scripted(script, *, pad_id=PAD, stop_ids=(EOS,), samples=1, stop_text=None):
  """Runs a decoder that wants token `script[row, t]`, and counts how often it is called."""
  script = jnp.asarray(script)
  rows, length = script.shape
  calls = []

  def decode(params, tokens, cache, *, mask):
    jax.debug.callback(lambda: calls.append(1))
    wanted = script[cache.row, jnp.minimum(cache.calls, length - 1)]
    start = jnp.where(cache.calls == 0, 0, 1 + cache.calls)
    seen = jax.lax.dynamic_update_slice_in_dim(cache.mask, mask, start, axis=1)
    return 5.0 * jax.nn.one_hot(wanted, V), Script(cache.row, cache.calls + 1, seen)

  def init_cache(batch, slots):
    return Script(jnp.arange(batch), jnp.int32(0), jnp.zeros((batch, slots), bool))

  # The scripted token is always drawn, but is not certain under the softmax.
  config = SamplingConfig(max_new_tokens=length, samples_per_prompt=samples, top_k=1)
  generate = make_generate(
    decode, init_cache, config, stop_ids=stop_ids, pad_id=pad_id, stop_text=stop_text
  )
  rollout = generate(
    {}, np.full((rows, 2), 7), np.ones((rows, 2), bool), np.arange(rows), jax.random.key(0)
  )
  rollout = jax.device_get(rollout)
  jax.effects_barrier()
  return rollout, len(calls)


def test_the_end_is_kept_and_nothing_follows_it():
  script = [[EOS, 5, 5, 5], [4, EOS, 5, 5], [4, 4, 4, EOS], [4, 5, 6, 7], [4, PAD, 6, EOS]]
  rollout, calls = scripted(script)
  assert rollout.tokens[:, 2:].tolist() == [
    [EOS, PAD, PAD, PAD],
    [4, EOS, PAD, PAD],
    [4, 4, 4, EOS],
    [4, 5, 6, 7],
    [4, PAD, 6, EOS],  # Padding is a token like others while it is drawn.
  ]
  lengths = np.array([1, 2, 4, 4, 4])
  expected = np.arange(4)[None] < lengths[:, None]
  np.testing.assert_array_equal(rollout.response_mask[:, 2:], expected)
  assert not rollout.response_mask[:, :2].any() and not rollout.prompt_mask[:, 2:].any()
  np.testing.assert_allclose(rollout.logprobs[expected], -np.log1p(15 * np.exp(-5.0)), rtol=1e-5)
  np.testing.assert_array_equal(rollout.logprobs[~expected], 0.0)
  np.testing.assert_array_equal(ended(rollout, [EOS]), [True, True, True, False, True])
  assert calls == 4


def test_padding_may_equal_the_stop_token():
  rollout, _ = scripted([[4, EOS, 5], [4, 5, 6]], pad_id=EOS)
  assert rollout.tokens[:, 2:].tolist() == [[4, EOS, EOS], [4, 5, 6]]
  assert rollout.response_mask[:, 2:].tolist() == [[True, True, False], [True, True, True]]
  np.testing.assert_array_equal(ended(rollout, [EOS]), [True, False])


def test_a_stop_token_in_the_prompt_ends_no_response():
  rollout, _ = scripted([[4, 5, 6], [4, EOS, 5]], pad_id=EOS)
  tokens = np.array(rollout.tokens)
  tokens[:, 1] = EOS
  np.testing.assert_array_equal(ended(rollout._replace(tokens=tokens), [EOS]), [False, True])


def test_several_stop_tokens():
  script = [[4, 5, 6, 6], [6, 4, 4, 4], [4, 4, EOS, 6]]
  rollout, calls = scripted(script, stop_ids=(EOS, 5, 6))
  assert rollout.response_mask[:, 2:].sum(1).tolist() == [2, 1, 3]
  assert rollout.tokens[:, 2:].tolist() == [[4, 5, 0, 0], [6, 0, 0, 0], [4, 4, EOS, 0]]
  np.testing.assert_array_equal(ended(rollout, (EOS, 5, 6)), [True, True, True])
  np.testing.assert_array_equal(ended(rollout, [5]), [True, False, False])
  assert calls == 3


def test_a_stop_string_ends_a_response_at_the_token_that_completes_it():
  texts = [b""] * V
  texts[4:9] = [b"a", b"b", b"ab", b"xa", b"bb"]
  stops = stop_text(["ab", "bbb"], texts)
  script = [[4, 5, 7, 7], [7, 8, 4, 4], [5, 8, 4, 4], [6, 4, 4, 4], [7, 4, EOS, 5], [7, 7, 7, 7]]
  rollout, calls = scripted(script, stop_text=stops)
  assert rollout.response_mask[:, 2:].sum(1).tolist() == [2, 2, 2, 1, 3, 4]
  assert rollout.tokens[:, 2:].tolist() == [
    [4, 5, PAD, PAD],
    [7, 8, PAD, PAD],
    [5, 8, PAD, PAD],
    [6, PAD, PAD, PAD],
    [7, 4, EOS, PAD],
    [7, 7, 7, 7],
  ]
  np.testing.assert_array_equal(ended(rollout, (EOS,), stops), [True] * 5 + [False])
  np.testing.assert_array_equal(ended(rollout, (EOS,)), [False] * 4 + [True, False])
  assert calls == 4


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("longest", [1, 2, 5, 9])
def test_decoding_stops_with_the_longest_response(longest, samples):
  script = np.full((4, 9), 5)
  script[:, 0] = EOS
  script[2, : longest - 1] = 5
  script[2, longest - 1] = EOS
  rollout, calls = scripted(script, samples=samples)
  assert calls == longest  # The prefill gives the first token.
  assert rollout.response_mask.sum(1).tolist() == np.repeat([1, 1, longest, 1], samples).tolist()


def test_without_an_end_all_tokens_are_drawn(case):
  rollout, calls = scripted(np.full((3, 7), 5))
  assert calls == 7
  assert rollout.response_mask[:, 2:].all() and (rollout.tokens[:, 2:] == 5).all()
  assert not ended(rollout, [EOS]).any()
  # A stop token in the prompt ends nothing.
  prompt = case._replace(tokens=np.where(case.mask, EOS, PAD).astype(np.int32))
  rollout = run(prompt, stop_ids=(EOS,))
  np.testing.assert_array_equal(ended(rollout, [EOS]), (responses(rollout) == EOS).any(1))
  assert rollout.response_mask[:, P].all()


def test_one_token_responses(case):
  rollout = run(case, config=dataclasses.replace(CONFIG, max_new_tokens=1))
  np.testing.assert_array_equal(responses(rollout, 1), responses(run(case))[:, :1])
  assert rollout.response_mask[:, P:].all()


def test_no_stop_token_is_refused(case):
  with pytest.raises(ValueError, match="stop_ids is empty"):
    make_generate(case.model.decode, case.model.init_cache, CONFIG, stop_ids=[], pad_id=PAD)
