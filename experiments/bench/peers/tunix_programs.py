"""Train steps of tunix, compiled for TPUs that need not be there; writes what the compiler says.

It is started with a JSON file and the names of works. For each work it writes a folder with the
text of each compiled program and its memory, or the reason why it was not compiled. It needs
libtpu, whose file TPU_LIBRARY_PATH names.
"""

import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optax_optimizer import optimizer_of
from tunix.models.llama3 import model as llama
from tunix.sft import peft_trainer
from tunix.sft.dpo import dpo_trainer

NEVER = 10**9  # Steps.


def config_of(spec):
  model = spec["model"]
  remat = {"none": llama.RematConfig.NONE, "full": llama.RematConfig.DECODER}
  return llama.ModelConfig(
    num_layers=model["layers"],
    vocab_size=model["vocab_size"],
    embed_dim=model["width"],
    hidden_dim=model["mlp_width"],
    num_heads=model["heads"],
    head_dim=model["head_dim"],
    num_kv_heads=model["kv_heads"],
    rope_theta=int(model["rope_theta"]),
    norm_eps=model["norm_eps"],
    weight_tying=model["tied"],
    remat_config=remat[spec["remat"]],
  )


def shard_activations():
  """Shards activations as on a TPU; it is left out where the first device is a CPU."""

  def shard(x, spec):
    mesh = jax.interpreters.pxla.thread_resources.env.physical_mesh
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))

  llama.shard = shard


def absent(module, mesh):
  """Puts shapes with shardings into a module of shapes, as its params say they are sharded."""
  state = nnx.state(module)
  specs = nnx.get_partition_spec(state)

  def place(x, spec):
    spec = spec if isinstance(spec, PartitionSpec) else PartitionSpec()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

  nnx.update(module, jax.tree.map(place, state, specs))
  return module


def policy_of(spec, mesh):
  """Llama with shapes for params."""

  def create():
    model = llama.Llama3(config_of(spec), rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda x: x.astype(spec["dtype"]), state))
    return model

  return absent(nnx.eval_shape(create), mesh)


def trainer_of(kind, model, spec, mesh, **settings):
  """Trainer of a model of shapes, and its optimizer."""
  made = []

  def create(model):
    made.append(kind(model, *settings.pop("between", ()), optimizer_of(spec), **settings))
    return made[0].optimizer

  optimizer = nnx.eval_shape(create, model)
  return made[0], absent(optimizer, mesh)


def batch_of(mesh, *shape, dtype=jnp.int32):
  spec = PartitionSpec("fsdp", *[None] * (len(shape) - 1))
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def sft(spec, mesh):
  rows, length = spec["batch_size"], spec["prompt"] + spec["response"]
  policy = policy_of(spec, mesh)
  config = peft_trainer.TrainingConfig(eval_every_n_steps=NEVER)
  trainer, optimizer = trainer_of(
    peft_trainer.PeftTrainer, policy, spec, mesh, training_config=config
  )

  def inputs(batch):
    mask = jnp.tril(jnp.ones((length, length), bool))
    return {
      "input_tokens": batch.input_tokens,
      "input_mask": batch.input_mask,
      "positions": jnp.broadcast_to(jnp.arange(length), (rows, length)),
      "attention_mask": jnp.broadcast_to(mask, (rows, length, length)),
    }

  trainer.with_gen_model_input_fn(inputs)
  tokens = batch_of(mesh, rows, length)
  batch = peft_trainer.TrainingInput(input_tokens=tokens, input_mask=tokens)
  step = nnx.jit(trainer.create_train_step_fn(), donate_argnames=("optimizer",))
  yield "train", lambda: step.lower(policy, optimizer, batch)


def dpo(spec, mesh):
  rows, response = 2 * spec["batch_size"], spec["response"]
  length = spec["prompt"] + response
  policy, reference = policy_of(spec, mesh), policy_of(spec, mesh)
  config = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=NEVER, beta=0.1)
  trainer, optimizer = trainer_of(
    dpo_trainer.DPOTrainer, policy, spec, mesh, between=(None,), training_config=config
  )
  tokens = batch_of(mesh, rows, length)
  mask = batch_of(mesh, rows, length, length, dtype=bool)
  completion = batch_of(mesh, rows, response)
  yield (
    "reference",
    lambda: dpo_trainer.compute_logps.lower(reference, tokens, tokens, mask, response, completion),
  )
  totals = batch_of(mesh, rows // 2, dtype=jnp.float32)
  batch = dpo_trainer.TrainExample(
    input_ids=tokens,
    positions=tokens,
    attention_mask=mask,
    ref_chosen_logps=totals,
    ref_rejected_logps=totals,
    completion_mask=completion,
    logits_to_keep=response,
  )
  step = nnx.jit(trainer.create_train_step_fn(), donate_argnames=("optimizer",))
  yield "train", lambda: step.lower(policy, optimizer, batch)


WORKS = {f.__name__: f for f in (sft, dpo)}


def write(folder, name, lower):
  start, lowered = time.monotonic(), lower()
  since = time.monotonic()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    (folder / f"{name}.refused").write_text(str(error))
    return
  memory, seconds = compiled.memory_analysis(), time.monotonic() - since
  (folder / f"{name}.hlo").write_text(compiled.as_text())
  content = {
    "arguments": memory.argument_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "peak": memory.peak_memory_in_bytes,
    "compile_seconds": seconds,
    "trace_seconds": since - start,
  }
  (folder / f"{name}.json").write_text(json.dumps(content))


def main():
  spec = json.loads(pathlib.Path(sys.argv[1]).read_text())
  shard_activations()
  devices = topologies.get_topology_desc(spec["topology"], platform="tpu").devices
  by_number = {device.id: device for device in devices}
  grid = [[by_number[number] for number in row] for row in spec["mesh"]]
  mesh = Mesh(np.array(grid), ("fsdp", "tp"))
  for work in sys.argv[2:]:
    folder = pathlib.Path(spec["folder"]) / work
    folder.mkdir()
    with mesh:
      for name, lower in WORKS[work](spec, mesh):
        write(folder, name, lower)


if __name__ == "__main__":
  main()
