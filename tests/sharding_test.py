import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rlhf_jax import sharding
from rlhf_jax.models import build
from tests.testing import FAMILY_MODELS


def decoder(width=16, layers=2, vocab=32, hidden=24):
  def kernel(*shape):
    return {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}

  return {
    "embed": {"embedding": jax.ShapeDtypeStruct((vocab, width), jnp.float32)},
    "layers": {
      "attention": {name: kernel(layers, width, width) for name in "qkvo"},
      "mlp": {
        "gate": kernel(layers, width, hidden),
        "up": kernel(layers, width, hidden),
        "down": kernel(layers, hidden, width),
      },
      "norm": {"scale": jax.ShapeDtypeStruct((layers, width), jnp.float32)},
    },
    "lm_head": kernel(width, vocab),
    "score_head": kernel(width, 1),
  }


@pytest.mark.parametrize(
  "spec, shape",
  [
    ("", (8, 1, 1)),
    ("data:8", (8, 1, 1)),
    ("fsdp:8", (1, 8, 1)),
    ("tensor:2,fsdp:-1", (1, 4, 2)),
    (" data:2, fsdp:2 ,tensor:2", (2, 2, 2)),
    ("data:-1,fsdp:8", (1, 8, 1)),
  ],
)
def test_mesh(spec, shape):
  mesh = sharding.make_mesh(spec)
  assert mesh.axis_names == ("data", "fsdp", "tensor")
  assert mesh.devices.shape == shape
  assert mesh.axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize(
  "spec, words",
  [
    ("model:8", "unknown axis 'model'; the axes are data, fsdp, tensor"),
    ("fsdp:4", "needs 4 devices, there are 8; --mesh=fsdp:4,data:-1 takes the rest"),
    ("data:2,fsdp:2,tensor:1", "use -1 for one axis"),
    ("data:16", "needs 16 devices, there are 8; make an axis smaller"),
    ("data:-1,fsdp:3", "3 does not divide the 8 devices"),
    ("data:-1,fsdp:-1", "only one axis can be -1"),
    ("data:8,data:1", "given twice"),
    ("data", "is not AXIS:SIZE"),
    ("data:0", "is not AXIS:SIZE"),
    ("data:8,", "is not AXIS:SIZE"),
    ("data:2.0", "is not AXIS:SIZE"),
  ],
)
def test_bad_mesh_names_the_flag(spec, words):
  with pytest.raises(ValueError) as e:
    sharding.make_mesh(spec)
  assert str(e.value).startswith(f"--mesh={spec}")
  assert words in str(e.value)


def test_decoder_rules_reach_every_matrix():
  mesh = sharding.make_mesh("fsdp:4,tensor:2")
  placed = sharding.named_shardings(decoder(), mesh, sharding.DECODER_RULES)
  specs = jax.tree.map(lambda s: s.spec, placed)
  attention, mlp = specs["layers"]["attention"], specs["layers"]["mlp"]
  assert specs["embed"]["embedding"] == P("fsdp", "tensor")
  assert {attention[n]["kernel"] for n in "qkv"} == {P(None, "fsdp", "tensor")}
  assert attention["o"]["kernel"] == mlp["down"]["kernel"] == P(None, "tensor", "fsdp")
  assert mlp["gate"]["kernel"] == mlp["up"]["kernel"] == P(None, "fsdp", "tensor")
  assert specs["lm_head"]["kernel"] == P("fsdp", "tensor")
  assert specs["layers"]["norm"]["scale"] == specs["score_head"]["kernel"] == P()


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_decoder_rules_reach_every_matrix_of_every_family(name):
  shapes = jax.eval_shape(build(FAMILY_MODELS[name]).init, jax.random.key(0))
  mesh = sharding.make_mesh("fsdp:2,data:-1")
  placed = sharding.named_shardings(shapes, mesh, sharding.DECODER_RULES)
  leaves = zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(placed), strict=True)
  for (path, leaf), where in leaves:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    is_matrix = not name.endswith(("scale", "bias"))
    assert ("fsdp" in where.spec) == is_matrix, (name, leaf.shape)


@pytest.mark.parametrize(
  "tx", [optax.adamw(1e-3), optax.chain(optax.clip(1.0), optax.masked(optax.adamw(1e-3), True))]
)
def test_optimizer_moments_follow_their_parameters(tx):
  mesh = sharding.make_mesh("fsdp:4,tensor:2")
  params = decoder()
  expected = sharding.named_shardings(params, mesh, sharding.DECODER_RULES)
  state = jax.eval_shape(tx.init, params)
  placed = sharding.named_shardings({"opt_state": state}, mesh, sharding.DECODER_RULES)["opt_state"]
  moments = optax.tree.get(placed, "mu"), optax.tree.get(placed, "nu")
  assert moments == (expected, expected)
  assert optax.tree.get(placed, "count").spec == P()


def test_factored_moments_are_replicated():
  mesh = sharding.make_mesh("fsdp:4,tensor:2")
  state = jax.eval_shape(optax.adafactor(1e-3, min_dim_size_to_factor=8).init, decoder())
  placed = sharding.named_shardings(state, mesh, sharding.DECODER_RULES)
  for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
    place.shard_shape(leaf.shape)  # Raises if it does not fit.


def test_first_matching_rule_wins():
  mesh = sharding.make_mesh("fsdp:8")
  rules = [("a/b$", P("fsdp")), ("b$", P())]
  tree = {"a": {"b": np.ones(8)}, "b": np.ones(8), "c": np.ones(8)}
  placed = sharding.named_shardings(tree, mesh, rules)
  assert jax.tree.map(lambda s: s.spec, placed) == {"a": {"b": P("fsdp")}, "b": P(), "c": P()}


@pytest.mark.parametrize("vocab, rows, columns", [(33, None, None), (34, None, "tensor")])
def test_any_number_of_ids_has_its_place(vocab, rows, columns):
  mesh = sharding.make_mesh("fsdp:4,tensor:2")
  placed = sharding.named_shardings(decoder(vocab=vocab), mesh, sharding.DECODER_RULES)
  assert placed["embed"]["embedding"].spec == P(rows, "tensor")
  assert placed["lm_head"]["kernel"].spec == P("fsdp", columns)


def test_uneven_split_names_leaf_axes_and_flag():
  mesh = sharding.make_mesh("fsdp:4,tensor:2")
  with pytest.raises(ValueError) as e:
    sharding.named_shardings(decoder(width=6), mesh, sharding.DECODER_RULES)
  message = str(e.value)
  assert message.startswith("--mesh: ")  # A script then refuses it without a traceback.
  assert "of layers/attention/k/kernel has size 6, which is not divisible by fsdp:4;" in message
  with pytest.raises(ValueError, match=r"of x has size 4, .* fsdp:4 \* tensor:2"):
    sharding.named_shardings({"x": np.ones(4)}, mesh, [("x", P(("fsdp", "tensor")))])


def test_embedding_gather_does_not_rebuild_the_table(capfd):
  mesh = sharding.make_mesh("fsdp:4,tensor:2")
  table = decoder(width=64, vocab=256)["embed"]["embedding"]
  place = sharding.named_shardings({"embed": {"embedding": table}}, mesh, sharding.DECODER_RULES)
  tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32)

  def loss(table, tokens):
    return jnp.sum(table[tokens] ** 2)

  step = jax.jit(
    jax.value_and_grad(loss),
    in_shardings=(place["embed"]["embedding"], sharding.batch_sharding(mesh)),
    out_shardings=(sharding.replicated(mesh), place["embed"]["embedding"]),
  )
  step.lower(table, tokens).compile()
  assert "rematerialization" not in capfd.readouterr().err


class Batch(NamedTuple):
  tokens: np.ndarray
  mask: np.ndarray | None


def test_place_batch():
  mesh = sharding.make_mesh("data:2,fsdp:2,tensor:2")
  batch = Batch(np.arange(24, dtype=np.int32).reshape(8, 3), np.ones(8, bool))
  placed = sharding.place_batch(batch, mesh)
  np.testing.assert_array_equal(placed.tokens, batch.tokens)
  assert placed.tokens.sharding == sharding.batch_sharding(mesh)
  assert {s.data.shape for s in placed.tokens.addressable_shards} == {(2, 3)}
  assert placed.mask.dtype == bool
  assert sharding.place_batch(Batch(batch.tokens, None), mesh).mask is None


def test_what_is_put_comes_back():
  mesh = sharding.make_mesh("data:2,fsdp:2,tensor:2")
  batch = Batch(np.arange(24, dtype=np.int32).reshape(8, 3), np.ones(8, bool))
  back = sharding.to_host(sharding.place_batch(batch, mesh))
  scalar = sharding.put(jnp.float32(0.1), sharding.replicated(mesh))
  assert scalar.committed and sharding.to_host(scalar) == np.float32(0.1)
  for x, y in zip(back, batch, strict=True):
    assert isinstance(x, np.ndarray) and x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


def test_bad_batches_name_the_flag():
  mesh = sharding.make_mesh("data:4,fsdp:2")
  with pytest.raises(
    ValueError, match=r"--batch_size=6 .* data:4 \* fsdp:2 = 8 .*--mesh.*'tokens'"
  ):
    sharding.place_batch(Batch(np.ones((6, 2)), None), mesh)
  with pytest.raises(ValueError, match="'tokens' is a scalar"):
    sharding.place_batch(Batch(np.float32(1), None), mesh)


def test_heads_spec_splits_what_divides():
  mesh = sharding.make_mesh("data:2,fsdp:2,tensor:2")
  assert sharding.heads_spec(mesh, 8, 2) == P(("data", "fsdp"), ("tensor",))
  assert sharding.heads_spec(mesh, 6, 2) == P(None, ("tensor",))
  assert sharding.heads_spec(mesh, 4, 1) == P(("data", "fsdp"), None)


def test_copies_of_params_for_the_rows():
  """Each part of the rows has the rounded params; gradients are summed as they are."""
  mesh, rng = sharding.make_mesh("data:2,fsdp:2,tensor:2"), np.random.default_rng(0)
  kernel, factors = (rng.normal(size=n).astype(np.float32) for n in ((8, 6), (4, 8, 6)))
  params = {"lm_head": {"kernel": kernel}}
  params = jax.device_put(params, sharding.named_shardings(params, mesh, sharding.DECODER_RULES))

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(params):
    copies = sharding.rows_copies(params, mesh, jnp.bfloat16)["lm_head"]["kernel"]
    return jnp.sum(copies * factors), copies

  (_, copies), grads = run(params)
  assert copies.dtype == jnp.float32 and copies.shape == (4, 8, 6)
  assert copies.sharding.is_equivalent_to(
    jax.NamedSharding(mesh, P(("data", "fsdp"), None, "tensor")), 3
  )
  np.testing.assert_array_equal(copies, np.tile(kernel.astype(jnp.bfloat16), (4, 1, 1)))
  gradient = grads["lm_head"]["kernel"]
  np.testing.assert_allclose(gradient, factors.sum(axis=0), rtol=1e-5, atol=1e-6)
  assert gradient.sharding.is_equivalent_to(params["lm_head"]["kernel"].sharding, 2)


def test_one_layout_is_compiled_once():
  mesh = sharding.make_mesh("data:2,fsdp:4")
  reshard = sharding.make_reshard(mesh, jnp.bfloat16)
  assert sharding.make_reshard(mesh, jnp.bfloat16) is reshard
  assert sharding.make_reshard(mesh, jnp.float32) is not reshard
