"""No matrix product of a float32 model is left to the device."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import sharding
from rlhf_jax.models import build, precision
from tests.testing import FAMILY_MODELS, TINY_MODEL, tiny_params

MODELS = {"tiny": TINY_MODEL, "untied": dataclasses.replace(TINY_MODEL, tied=False)} | FAMILY_MODELS
TOKENS = jax.ShapeDtypeStruct((2, 8), jnp.int32)


def products(jaxpr):
  """Operand dtypes and precision of all matrix products of a jaxpr, inner ones included."""
  for equation in jaxpr.eqns:
    if "dot" in equation.primitive.name:
      yield {v.aval.dtype.name for v in equation.invars[:2]}, equation.params["precision"]
    inner = lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")  # noqa: E731
    for leaf in jax.tree.leaves(list(equation.params.values()), is_leaf=inner):
      if inner(leaf):
        yield from products(getattr(leaf, "jaxpr", leaf))


def products_of(config, mesh=None):
  """Products of both heads with their gradients, and of a decoded token."""
  model = build(config, "both", mesh=mesh, logit_chunk=3 * config.vocab_size)
  decoder = build(config, mesh=mesh)
  params = jax.eval_shape(model.init, jax.random.key(0))
  cache = jax.eval_shape(lambda: decoder.init_cache(2, 16))

  def loss(params, tokens):
    logits, scores = model.apply(params, tokens)
    return jnp.sum(logits.read_out(logits.params, logits.hidden)) + jnp.sum(scores)

  def decode(params, tokens, cache):
    return decoder.decode(params, tokens, cache, mask=jnp.ones(tokens.shape, bool))

  yield from products(jax.make_jaxpr(jax.grad(loss))(params, TOKENS).jaxpr)
  yield from products(jax.make_jaxpr(decode)(params, TOKENS, cache).jaxpr)


@pytest.mark.parametrize("spec", [None, "data:2"])
@pytest.mark.parametrize(
  "name, attention", [*((name, "xla") for name in MODELS), ("tiny", "splash"), ("gemma2", "splash")]
)
def test_every_product_says_its_precision(name, attention, spec):
  mesh = spec and sharding.make_mesh(spec, jax.devices()[:2])
  found = list(products_of(dataclasses.replace(MODELS[name], attention=attention), mesh))
  assert len(found) > 30
  exact = (jax.lax.Precision.HIGHEST,) * 2
  assert all(given == exact for _, given in found), found


@pytest.mark.parametrize("name", ["tiny", "qwen3_moe"])
def test_a_bfloat16_model_rounds_all_but_its_scores(name):
  found = list(products_of(dataclasses.replace(MODELS[name], dtype="bfloat16")))
  wide = [given for dtypes, given in found if dtypes == {"float32"}]
  assert len(wide) >= 3  # The scalar head and its two gradients.
  assert all(given == (jax.lax.Precision.HIGHEST,) * 2 for given in wide)


@pytest.mark.parametrize(
  "setting, platform, expected",
  [
    ("default", "tpu", None),
    ("default", "gpu", None),
    ("high", "tpu", "high"),
    ("high", "gpu", "highest"),  # HIGH is TF32 there.
    ("high", "cpu", "highest"),
    ("highest", "tpu", "highest"),
    ("highest", "gpu", "highest"),
  ],
)
def test_precision_of_a_device(setting, platform, expected):
  device = types.SimpleNamespace(platform=platform)
  mesh = types.SimpleNamespace(devices=np.array([device]))
  assert precision.of_device(setting, mesh) == expected


@pytest.mark.parametrize("setting, most", [("default", 1.0), ("high", 0.0), ("highest", 0.0)])
def test_a_device_that_rounds_changes_nothing_unless_it_may(setting, most, monkeypatch):
  """Emulates a TPU: products without a precision get operands in bfloat16."""
  config = dataclasses.replace(TINY_MODEL, precision=setting)
  tokens = np.arange(16).reshape(2, 8) % config.vocab_size
  params = tiny_params() | {"score": tiny_params("scalar")["score"]}

  def outputs():
    with jax.disable_jit():  # Nothing that is traced here is kept for other tests.
      return jax.tree.map(np.asarray, build(config, "both").apply(params, tokens))

  exact, bind = outputs(), jax.lax.dot_general_p.bind

  def rounded(*operands, **params):
    if params["precision"] is None:
      operands = [x.astype(jnp.bfloat16).astype(x.dtype) for x in operands]
    return bind(*operands, **params)

  monkeypatch.setattr(jax.lax.dot_general_p, "bind", rounded)
  for given, expected in zip(outputs(), exact, strict=True):
    difference = np.max(np.abs(given - expected))
    assert difference <= most
    assert bool(difference) == bool(most)
