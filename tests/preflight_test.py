"""Collectives are counted against programs written by hand, and against ones that XLA compiles."""
# ruff: noqa: E501, one instruction is one line.

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax import preflight, sharding
from rlhf_jax.models import build
from tests.testing import FAMILY_MODELS, TINY_MODEL, compilations

# A loop of 6 around a loop of 4, as the TPU compiler spells them: layouts with tiles, an all-gather
# that starts and ends, a reduce-scatter in a fusion, and a loop whose end depends on data.
TPU = """HloModule jit_step, is_scheduled=true

%all-reduce-scatter.1 (input: f32[64,8]) -> f32[8,8] {
  %input = f32[64,8]{1,0:T(8,128)} parameter(0)
  %all-reduce.85 = f32[64,8]{1,0:T(8,128)} all-reduce(%input), channel_id=4, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %dynamic-slice.1 = f32[8,8]{1,0:T(8,128)} dynamic-slice(%all-reduce.85), dynamic_slice_sizes={8,8}
}

%inner_cond (p0: (s32[], bf16[32,16])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(4)
  %p0 = (s32[]{:T(128)}, bf16[32,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %gte.1 = s32[]{:T(128)} get-tuple-element(%p0), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%gte.1, %constant.3), direction=LT, metadata={op_name="while/cond/lt"}
}

%inner_body (p1: (s32[], bf16[32,16])) -> (s32[], bf16[32,16]) {
  %p1 = (s32[]{:T(128)}, bf16[32,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %ags = (bf16[4,16]{1,0:T(8,128)(2,1)}, bf16[32,16]{1,0:T(8,128)(2,1)S(1)}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}
  %agd = bf16[32,16]{1,0:T(8,128)(2,1)} all-gather-done(%ags)
  ROOT %t = (s32[]{:T(128)}, bf16[32,16]{1,0:T(8,128)(2,1)}) tuple(%p1)
}

%outer_cond (p2: (s32[], pred[8])) -> pred[] {
  %p2 = (s32[]{:T(128)}, pred[8]{0}) parameter(0)
  %constant.9 = s32[]{:T(128)} constant(6)
  ROOT %both = pred[] and(%a, %b)
}

%outer_body (p3: (s32[], pred[8])) -> (s32[], pred[8]) {
  %p3 = (s32[]{:T(128)}, pred[8]{0}) parameter(0)
  %while.2 = (s32[]{:T(128)}, bf16[32,16]{1,0:T(8,128)(2,1)}) while(%init), condition=%inner_cond, body=%inner_body
  %cp = (f32[16]{0}, f32[16]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%y), source_target_pairs={{0,1},{1,0}}
  ROOT %t2 = (s32[]{:T(128)}, pred[8]{0}) tuple(%p3)
}

ENTRY %main (p4: f32[64,8]) -> f32[8,8] {
  %p4 = f32[64,8]{1,0:T(8,128)} parameter(0)
  %while.3 = (s32[]{:T(128)}, /*index=1*/pred[8]{0}) while(%init), condition=%outer_cond, body=%outer_body
  %ar = (f32[16,8]{1,0}, f32[4]{0}) all-reduce(%a, %b), replica_groups=mesh['data'=1,'fsdp'=4,'tensor'=2] {'fsdp'}, to_apply=%add
  ROOT %fusion.10 = f32[8,8]{1,0:T(8,128)} fusion(%p4), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_loops_groups_and_fusions_of_the_tpu_compiler():
  gather, permute, reduce, scatter = preflight.collectives(TPU)
  assert gather == ("all-gather", "bf16[32,16]", 32 * 16 * 2 * 7 / 8, (None, 4))
  assert permute == ("collective-permute", "f32[16]", 16 * 4, (None,))
  assert reduce == ("all-reduce", "f32[16,8] f32[4]", (16 * 8 + 4) * 4 * 2 * 3 / 4, ())
  assert scatter == ("reduce-scatter", "f32[8,8]", 8 * 8 * 4 * 7, ())
  assert gather.total_bytes(10) == 10 * 4 * gather.bytes
  rows = preflight.summarize(preflight.collectives(TPU), unknown_trips=10)
  assert rows["all-gather"] == {"count": 1, "in_loops": 1, "bytes": 40 * 896}
  assert rows["all-reduce"]["in_loops"] == 0


def test_weights_that_a_loop_gathers():
  """Six layers of [16, 24] over 8 devices: known by hand, whatever else XLA does around them."""
  mesh = sharding.make_mesh("fsdp:8")
  place = lambda shape, spec: jax.ShapeDtypeStruct(  # noqa: E731
    shape, jnp.float32, sharding=NamedSharding(mesh, spec)
  )

  @jax.jit
  def layers(x, weights):
    def layer(x, w):
      w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
      return jnp.tanh(x @ w) @ w.T, None

    return jax.lax.scan(layer, x, weights)[0]

  args = place((32, 16), P("fsdp")), place((6, 16, 24), P(None, "fsdp"))
  (found,) = preflight.collectives(layers.lower(*args).compile().as_text())
  assert (found.kind, found.trips) == ("all-gather", (6,))
  assert found.bytes == 16 * 24 * 4 * 7 / 8


def test_text_without_a_program_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    preflight.collectives("HloModule empty")


def multiplied(jaxpr) -> int:
  """Operations of the matrix products of a traced function."""
  total = 0
  for equation in jaxpr.eqns:
    times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      left = equation.invars[0].aval
      inner = math.prod(left.shape[axis] for axis in contracted)
      total += 2 * inner * equation.outvars[0].aval.size
    if equation.primitive.name == "ragged_dot_general":  # Each row by the matrix of its group.
      total += 2 * equation.invars[0].aval.size * equation.outvars[0].aval.shape[-1]
    for value in equation.params.values():
      inner = getattr(value, "jaxpr", value)
      total += times * multiplied(inner) if hasattr(inner, "eqns") else 0
  return total


@pytest.mark.parametrize("name", ["tiny", "gpt2", "qwen3", "gemma2", "mixtral"])
def test_operations_are_those_of_the_products(name):
  config = TINY_MODEL if name == "tiny" else FAMILY_MODELS[name]
  for head in ("language", "scalar"):
    model = build(config, head)
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((3, 8), jnp.int32)
    traced = jax.make_jaxpr(functools.partial(model.apply, last=5))(params, tokens)
    # XLA computes the half of the scores that the mask takes away, and a scalar head is one column.
    masked = 3 * 2 * config.layers * config.heads * config.head_dim * 8**2
    scored = 5 if head == "language" else None
    column = 3 * 2 * config.width * 5 if head == "scalar" else 0
    counted = preflight.forward_flops(config, 3, 8, scored=scored) + masked + column
    assert multiplied(traced.jaxpr) == counted


def test_work_of_a_rollout():
  """Token by token: every one reads the weights and the tokens before it."""
  config, mesh = TINY_MODEL, sharding.make_mesh("fsdp:4,tensor:2")
  prompts, samples, length, new = 8, 2, 6, 100
  work = preflight.sampling(config, mesh, prompts, samples, length, new)
  one = preflight.forward_flops(config, 1, 1, scored=1) - 2 * config.layers * 16
  steps = sum(prompts * samples * (one + 4 * config.layers * 16 * (length + t)) for t in range(new))
  prefill = preflight.forward_flops(config, prompts, length, scored=1)
  assert work.flops == pytest.approx(prefill + steps, rel=0.01)
  assert work.steps == new
  weights = one / 2 * 4 / 2  # float32, half on each device.
  cache = 2 * config.layers * 8 * 4 * prompts * samples * (length + new / 2) / 8
  assert work.bytes_per_step == pytest.approx(weights + cache, rel=0.05)


def test_bytes_of_a_device():
  mesh = sharding.make_mesh("fsdp:4,tensor:2")
  tree = sharding.abstract(
    (jnp.zeros([8, 3]), jnp.zeros([4], jnp.bfloat16)),
    (sharding.batch_sharding(mesh), sharding.replicated(mesh)),
  )
  assert preflight.bytes_per_device(tree) == 2 * 3 * 4 + 4 * 2


def test_a_program_is_compiled_once_and_has_to_fit():
  mesh, chip, known = sharding.make_mesh("fsdp:8"), preflight.CHIPS["v5e"], {}
  rows, other = (
    sharding.abstract(jnp.zeros(shape), sharding.batch_sharding(mesh)) for shape in ([8, 4], [16])
  )
  double = jax.jit(lambda x: 2 * x)
  with compilations() as names:
    for _ in range(2):
      check = preflight.Preflight(mesh, chip, known)
      found = check("double", double, rows, held=(rows, other))
  assert len(names) == 1
  assert found.shape == (8, 4) and found.sharding.is_equivalent_to(rows.sharding, 2)
  (program,) = check.programs
  assert (program.arguments, program.beside) == (16, 8)
  check = preflight.Preflight(mesh, chip._replace(hbm_bytes=program.peak + 4), known)
  check("double", double, rows)
  with pytest.raises(
    preflight.TooLargeError, match="^double: .* exceed the available HBM"
  ) as error:
    check("double", double, rows, held=other)
  assert error.value.program == "double"


def test_what_a_training_step_sends():
  def sent(spec, tokens):
    mesh = sharding.make_mesh(spec, jax.devices()[: int(spec[-1])])
    return preflight.network_bytes(TINY_MODEL, mesh, tokens)

  assert sent("data:1", 64) == 0
  assert sent("fsdp:8", 64) == sent("fsdp:8", 128) == sent("data:8", 64) > 0
  assert sent("tensor:8", 128) == 2 * sent("tensor:8", 64) > 0


@pytest.mark.parametrize("name", ["v7x:2x2", "v5e:9x9", "h100"])
def test_unknown_slices_name_the_flag(name):
  with pytest.raises(ValueError, match=f"^--topology={name} "):
    preflight.topology_devices(name)
