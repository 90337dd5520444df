"""Work is counted against the products of traced programs; what fits is decided by compiling."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax import preflight, sharding
from rlhf_jax.models import build
from tests.testing import FAMILY_MODELS, TINY_MODEL, compilations


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
