"""Programs are read against ones written by hand, and against ones that XLA compiles."""
# ruff: noqa: E501, one instruction is one line.

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax import hlo, sharding

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
  gather, permute, reduce, scatter = hlo.collectives(TPU)
  assert gather == ("all-gather", "bf16[32,16]", 32 * 16 * 2 * 7 / 8, (None, 4))
  assert permute == ("collective-permute", "f32[16]", 16 * 4, (None,))
  assert reduce == ("all-reduce", "f32[16,8] f32[4]", (16 * 8 + 4) * 4 * 2 * 3 / 4, ())
  assert scatter == ("reduce-scatter", "f32[8,8]", 8 * 8 * 4 * 7, ())
  assert gather.total_bytes(10) == 10 * 4 * gather.bytes
  rows = hlo.summarize(hlo.collectives(TPU), unknown_trips=10)
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
  (found,) = hlo.collectives(layers.lower(*args).compile().as_text())
  assert (found.kind, found.trips) == ("all-gather", (6,))
  assert found.bytes == 16 * 24 * 4 * 7 / 8


def test_text_without_a_program_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.collectives("HloModule empty")


def counted(function, *args):
  return hlo.count(jax.jit(function).lower(*args).compile().as_text())


def test_operations_and_bytes_of_compiled_programs():
  """A loop reads one matrix of its stack at each trip, not the stack."""
  x, weights = jnp.ones((16, 16)), jnp.ones((20, 16, 16))
  one = counted(lambda x: x @ x.T, x)
  assert one.flops == 2 * 16**3
  assert 2 * x.nbytes <= one.bytes <= 5 * x.nbytes
  loop = lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]  # noqa: E731
  few, many = counted(loop, x, weights[:5]), counted(loop, x, weights)
  assert (few.flops, many.flops) == (5 * one.flops, 20 * one.flops)
  assert 20 * 3 * x.nbytes <= many.bytes
  assert many.bytes / few.bytes == pytest.approx(4, rel=0.1)


# Two products as the TPU compiler spells them: a plain one, from a prefetched operand on the chip,
# and one of 4 heads, whose batch dimension is a dilated window. A kernel states its operations, another is known.
TPU_PRODUCTS = """HloModule jit_f, is_scheduled=true

%fused (param_0.1: bf16[8,64], param_1.2: bf16[3,64,32]) -> f32[8,32] {
  %param_0.1 = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %param_1.2 = bf16[3,64,32]{2,1,0:T(8,128)(2,1)} parameter(1)
  %slice.1 = bf16[1,64,32]{2,1,0:T(8,128)(2,1)} slice(%param_1.2), slice={[1:2], [0:64], [0:32]}
  %bitcast.1 = bf16[64,32]{1,0:T(8,128)(2,1)} bitcast(%slice.1)
  ROOT %convolution.1 = f32[8,32]{1,0:T(8,128)} convolution(%param_0.1, %bitcast.1), dim_labels=bf_io->bf
}

%update (param_0.3: f32[6,8,32], param_1.4: f32[8,32]) -> f32[6,8,32] {
  %param_0.3 = f32[6,8,32]{2,1,0:T(8,128)} parameter(0)
  %param_1.4 = f32[8,32]{1,0:T(8,128)} parameter(1)
  %constant.1 = s32[]{:T(128)} constant(0)
  %bitcast.2 = f32[1,8,32]{2,1,0:T(8,128)} bitcast(%param_1.4)
  ROOT %dynamic-update-slice.1 = f32[6,8,32]{2,1,0:T(8,128)} dynamic-update-slice(%param_0.3, %bitcast.2, %constant.1, %constant.1, %constant.1)
}

ENTRY %main (a: bf16[8,64], b: bf16[3,64,32], c: f32[6,8,32], q: bf16[4,16,8], k: bf16[4,16,8], mask: s8[1,1,1]) -> f32[6,8,32] {
  %a = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[3,64,32]{2,1,0:T(8,128)(2,1)} parameter(1)
  %c = f32[6,8,32]{2,1,0:T(8,128)} parameter(2)
  %q = bf16[4,16,8]{2,1,0:T(8,128)(2,1)} parameter(3)
  %k = bf16[4,16,8]{2,1,0:T(8,128)(2,1)} parameter(4)
  %mask = s8[1,1,1]{2,1,0:T(8,128)} parameter(5)
  %copy-start.1 = (bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, bf16[8,64]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%a)
  %copy-done.1 = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start.1)
  %fusion.1 = f32[8,32]{1,0:T(8,128)} fusion(%copy-done.1, %b), kind=kOutput, calls=%fused
  %convolution.2 = bf16[4,16,16]{2,1,0:T(8,128)(2,1)} convolution(%q, %k), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0oi->0bf
  %kernel.1 = bf16[4,16,8]{2,1,0:T(8,128)(2,1)} custom-call(%convolution.2), custom_call_target="tpu_custom_call", backend_config={"custom_call_config": {"cost_estimate": {"flops": "4096", "bytes_accessed": "8"}}}
  %splash_mha_dq.1 = bf16[4,16,8]{2,1,0:T(8,128)(2,1)} custom-call(%mask, %q, %k), custom_call_target="tpu_custom_call"
  %buffer = bf16[4,16,8]{2,1,0:T(8,128)(2,1)} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %fusion.2 = f32[6,8,32]{2,1,0:T(8,128)} fusion(%c, %fusion.1), kind=kLoop, calls=%update
}
"""


def test_products_slices_and_prefetches_of_the_tpu_compiler():
  flops, moved = hlo.count(TPU_PRODUCTS)
  heads = 4 * 2 * 16 * 16 * 8
  splash = 3 * 4 * 16 * 16 * 8
  assert flops == 2 * 8 * 64 * 32 + heads + 4096 + splash
  prefetch, product = 2 * 8 * 64, 2 * 64 * 32 + 4 * 8 * 32
  attention = 2 * 2 * 4 * 16 * 8 + 2 * 4 * 16 * 16
  kernel = 2 * 4 * 16 * 16 + 2 * 4 * 16 * 8
  update = 2 * 4 * 8 * 32
  splash = 1 + 3 * 2 * 4 * 16 * 8
  assert moved == prefetch + product + attention + kernel + splash + update


# The compiler unrolls a loop of 8 once, and counts by 2.
UNROLLED = """HloModule jit_f, is_scheduled=true

%condition (p: (f32[4], u32[])) -> pred[] {
  %bound = u32[]{:T(128)} constant(8)
  %p = (f32[4]{0}, u32[]{:T(128)}) parameter(0)
  %counter = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %less = pred[]{:T(512)} compare(%counter, %bound), direction=LT
}

%body (q: (f32[4], u32[])) -> (f32[4], u32[]) {
  %q = (f32[4]{0}, u32[]{:T(128)}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%q), index=0
  %counter.1 = u32[]{:T(128)} get-tuple-element(%q), index=1
  %step = u32[]{:T(128)} constant(STEP)
  %collective-permute.1 = f32[4]{0} collective-permute(%x), source_target_pairs={{0,1}}
  %next = u32[]{:T(128)} add(%counter.1, %step)
  ROOT %result = (f32[4]{0}, u32[]{:T(128)}) tuple(%collective-permute.1, %next)
}

ENTRY %main (init: (f32[4], u32[])) -> (f32[4], u32[]) {
  %init = (f32[4]{0}, u32[]{:T(128)}) parameter(0)
  ROOT %while.1 = (f32[4]{0}, u32[]{:T(128)}) while(%init), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize("step, trips", [(1, 8), (2, 4), (3, 3)])
def test_trips_of_a_loop_that_counts_by_steps(step, trips):
  (permute,) = hlo.collectives(UNROLLED.replace("STEP", str(step)))
  assert permute.trips == (trips,)


# A gather of weights is spread over a product that does not need them, as the compiler spells it.
SPREAD = """HloModule jit_f, is_scheduled=true

%start (s: bf16[16,32]) -> (bf16[16,32], bf16[128,32]) {
  %s = bf16[16,32]{1,0} parameter(0)
  %all-gather.1 = bf16[128,32]{1,0} all-gather(%s), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %tuple.1 = (bf16[16,32]{1,0}, bf16[128,32]{1,0}) tuple(%s, %all-gather.1)
}

%async_collective_fusion.1 (x: bf16[16,32], y: bf16[128,32], a: bf16[8,64], b: bf16[64,32]) -> (bf16[8,32], bf16[16,32], bf16[128,32]) {
  %x = bf16[16,32]{1,0} parameter(0)
  %y = bf16[128,32]{1,0} parameter(1)
  %a = bf16[8,64]{1,0} parameter(2)
  %b = bf16[64,32]{1,0} parameter(3)
  %convolution.1 = bf16[8,32]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
  %all-gather.2 = bf16[128,32]{1,0} all-gather(%x), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %tuple.2 = (bf16[8,32]{1,0}, bf16[16,32]{1,0}, bf16[128,32]{1,0}) tuple(%convolution.1, %x, %all-gather.2)
}

%done (z: bf16[16,32], w: bf16[128,32]) -> bf16[128,32] {
  %z = bf16[16,32]{1,0} parameter(0)
  %w = bf16[128,32]{1,0} parameter(1)
  ROOT %all-gather.3 = bf16[128,32]{1,0} all-gather(%z), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}

ENTRY %main (p: bf16[16,32], q: bf16[8,64], r: bf16[64,32]) -> bf16[128,32] {
  %p = bf16[16,32]{1,0} parameter(0)
  %q = bf16[8,64]{1,0} parameter(1)
  %r = bf16[64,32]{1,0} parameter(2)
  %async-collective-start = (bf16[16,32]{1,0}, bf16[128,32]{1,0}) fusion(%p), kind=kCustom, calls=%start
  %shard = bf16[16,32]{1,0} get-tuple-element(%async-collective-start), index=0
  %rows = bf16[128,32]{1,0} get-tuple-element(%async-collective-start), index=1
  %fusion.1 = (bf16[8,32]{1,0}, bf16[16,32]{1,0}, bf16[128,32]{1,0}) fusion(%shard, %rows, %q, %r), kind=kOutput, calls=%async_collective_fusion.1
  %shard.1 = bf16[16,32]{1,0} get-tuple-element(%fusion.1), index=1
  %rows.1 = bf16[128,32]{1,0} get-tuple-element(%fusion.1), index=2
  ROOT %async-collective-done = bf16[128,32]{1,0} fusion(%shard.1, %rows.1), kind=kCustom, calls=%done
}
"""


def test_a_collective_that_is_spread_over_fusions_is_one():
  (gather,) = hlo.collectives(SPREAD)
  assert gather == ("all-gather", "bf16[128,32]", 2 * 128 * 32 * 7 / 8, ())
  flops, moved = hlo.count(SPREAD)
  assert flops == 2 * 8 * 64 * 32
  assert moved == 2 * (16 * 32 + 128 * 32) + 2 * (8 * 64 + 64 * 32 + 8 * 32)
