"""Trainers and sampler of tunix, which run their own loops."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import protocol
from flax import nnx
from optax_optimizer import optimizer_of
from tunix.generate import sampler as sampler_lib
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params
from tunix.rl import rl_cluster as clusters
from tunix.rl import utils as rl_utils
from tunix.rl.grpo import grpo_learner
from tunix.rl.ppo import ppo_learner
from tunix.rl.rollout import base_rollout
from tunix.sft import peft_trainer
from tunix.sft.dpo import dpo_trainer

NEVER = 10**9  # Steps.


class Tokenizer:
  """Tokenizer whose words are the numbers of the tokens; no token ends a response."""

  def encode(self, text, **kwargs):
    return [int(word) for word in text.split()]

  def decode(self, ids, **kwargs):
    return " ".join(map(str, ids))

  def bos_id(self):
    return 0

  def eos_id(self):
    return -1

  def pad_id(self):
    return 0


class Counter:
  """Counts sampled tokens."""

  def __init__(self):
    self.generated = 0
    plain = sampler_lib.Sampler.__call__

    @functools.wraps(plain)
    def sample(*args, **kwargs):
      output = plain(*args, **kwargs)
      self.generated += sum(len(tokens) for tokens in output.tokens)
      return output

    sampler_lib.Sampler.__call__ = sample


def accept_segments():
  """Lets Llama take the segment ids that scoring passes beside the mask that holds the same."""
  plain = llama.Llama3.__call__

  def call(model, tokens, positions, cache, attention_mask, segment_ids=None):
    return plain(model, tokens, positions, cache, attention_mask)

  llama.Llama3.__call__ = call


def text(tokens):
  return " ".join(map(str, tokens))


def mesh():
  return jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))


def config_of(spec):
  shape = spec["shape"]
  return llama.ModelConfig(
    num_layers=shape["layers"],
    vocab_size=shape["vocab_size"],
    embed_dim=shape["width"],
    hidden_dim=shape["mlp_width"],
    num_heads=shape["heads"],
    head_dim=shape["width"] // shape["heads"],
    num_kv_heads=shape["kv_heads"] or shape["heads"],
    rope_theta=10_000,
    norm_eps=1e-5,
    weight_tying=False,
  )


def load(spec):
  folder = str(pathlib.Path(spec["policy"]))
  return llama_params.create_model_from_safe_tensors(
    folder, config_of(spec), mesh(), dtype=jnp.float32
  )


def whole_rows(tokens):
  """Positions and causal mask of rows without padding."""
  rows, length = tokens.shape
  positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
  return positions, jnp.broadcast_to(
    jnp.tril(jnp.ones((length, length), bool)), (rows, length, length)
  )


def orders(peer, batch, trained, count, **facts):
  """Yields the batch of each step after the order for it, once the step before is done."""
  # The first batches are asked for ahead of the first step by some of the loops.
  steps = protocol.Steps(peer, warm_up=4, **facts)
  while True:
    jax.block_until_ready([nnx.state(model) for model in trained])
    steps.end(**count())
    yield batch


def sft(peer, facts):
  policy, tokens = load(peer.spec), jnp.array(peer.spec["tokens"])[:, 0]
  trainer = peft_trainer.PeftTrainer(
    policy, optimizer_of(peer.spec), peft_trainer.TrainingConfig(eval_every_n_steps=NEVER)
  )

  def inputs(batch):
    positions, mask = whole_rows(batch.input_tokens)
    return {
      "input_tokens": batch.input_tokens,
      "input_mask": batch.input_mask,
      "positions": positions,
      "attention_mask": mask,
    }

  trainer.with_gen_model_input_fn(inputs)
  batch = peft_trainer.TrainingInput(input_tokens=tokens, input_mask=jnp.ones_like(tokens))
  trainer.train(orders(peer, batch, [policy], lambda: {"updates": 1}, **facts))


def dpo(peer, facts):
  spec, first = peer.spec, peer.spec["prompt"]
  policy, tokens = load(spec), np.array(spec["tokens"], np.int32)
  trainer = dpo_trainer.DPOTrainer(
    policy,
    load(spec),
    optimizer_of(spec),
    dpo_trainer.DPOTrainingConfig(eval_every_n_steps=NEVER, beta=0.1),
  )
  parts = {
    "prompt": tokens[:, 0, :first],
    "chosen": tokens[:, 0, first:],
    "rejected": tokens[:, 1, first:],
  }
  ids = {f"{name}_ids": jnp.array(part) for name, part in parts.items()}
  masks = {f"{name}_mask": jnp.ones(part.shape, jnp.int32) for name, part in parts.items()}
  batch = dpo_trainer.TrainingInput(**ids, **masks)
  trainer.train(orders(peer, batch, [policy], lambda: {"updates": 1}, **facts))


def cache_size(spec):
  return spec["prompt"] + spec["response"] + 1


def generate(peer, facts):
  spec = peer.spec
  counter, config = Counter(), config_of(spec)
  sample = sampler_lib.Sampler(
    load(spec),
    Tokenizer(),
    sampler_lib.CacheConfig(
      cache_size=cache_size(spec),
      num_layers=config.num_layers,
      num_kv_heads=config.num_kv_heads,
      head_dim=config.head_dim,
    ),
  )
  prompts = [text(row[0][: spec["prompt"]]) for row in spec["tokens"]]

  def run():
    counter.generated = 0
    sample(
      prompts,
      max_generation_steps=spec["response"],
      max_prompt_length=spec["prompt"],
      temperature=1.0,
      top_p=1.0,
      seed=0,
    )
    return {"generated": counter.generated}

  peer.serve(run, lambda: facts)


def cluster_of(spec, rows, **models):
  roles = clusters.Role
  used = (roles.ACTOR, roles.REFERENCE, roles.ROLLOUT, roles.CRITIC, roles.REWARD)
  return clusters.RLCluster(
    actor=load(spec),
    reference=load(spec),
    **models,
    tokenizer=Tokenizer(),
    cluster_config=clusters.ClusterConfig(
      role_to_mesh=dict.fromkeys(used, mesh()),
      rollout_engine="vanilla",
      training_config=clusters.RLTrainingConfig(
        actor_optimizer=optimizer_of(spec),
        critic_optimizer=optimizer_of(spec) if "critic" in models else None,
        eval_every_n_steps=NEVER,
        max_steps=NEVER,
        mini_batch_size=rows // spec["minibatches"],
        train_micro_batch_size=rows // spec["minibatches"],
      ),
      rollout_config=base_rollout.RolloutConfig(
        max_tokens_to_generate=spec["response"],
        max_prompt_length=spec["prompt"],
        kv_cache_size=cache_size(spec),
        temperature=1.0,
        top_p=1.0,
      ),
    ),
  )


def rounds(peer, cluster, prompts, facts):
  """Batches of a learner, with counts of what each of its steps does."""
  counter, trainer, before = Counter(), cluster.actor_trainer, 0

  def count():
    nonlocal before
    counts = {"updates": trainer.train_steps - before, "generated": counter.generated}
    before, counter.generated = trainer.train_steps, 0
    return counts

  return orders(peer, {"prompts": np.array(prompts)}, [trainer.model], count, **facts)


def even_tokens(prompts, completions, **kwargs):
  ids = [list(map(int, words.split())) for words in completions]
  return [sum(token % 2 == 0 for token in row) / len(row) for row in ids]


def grpo(peer, facts):
  spec = peer.spec | {"minibatches": 1}
  samples = spec["samples_per_prompt"]
  rows = spec["tokens"][: len(spec["tokens"]) // samples]
  cluster = cluster_of(spec, len(rows))
  learner = grpo_learner.GRPOLearner(
    cluster, grpo_learner.GRPOConfig(num_generations=samples, beta=0.04), even_tokens
  )
  prompts = [text(row[0][: spec["prompt"]]) for row in rows]
  learner.train(rounds(peer, cluster, prompts, facts))


def ppo(peer, facts):
  spec = peer.spec
  prompts = [text(row[0][: spec["prompt"]]) for row in spec["tokens"]]
  scorers = {
    name: rl_utils.create_critic_model(load(spec), seed)
    for seed, name in enumerate(("critic", "reward"))
  }
  cluster = cluster_of(spec, len(prompts), **scorers)
  learner = ppo_learner.PPOLearner(
    cluster, ppo_learner.PPOConfig(num_iterations=spec["epochs"], beta=0.1)
  )
  learner.train(rounds(peer, cluster, prompts, facts))


WORKS = {f.__name__: f for f in (sft, dpo, generate, ppo, grpo)}


def facts_of(spec):
  """Numbers that other programs with the same weights and tokens have too."""
  policy, tokens = load(spec), jnp.array(spec["tokens"])[:, 0]
  positions, mask = whole_rows(tokens)
  logits = jax.nn.log_softmax(policy(tokens, positions, None, mask)[0][:, :-1])
  nll = -jnp.take_along_axis(logits, tokens[:, 1:, None], axis=2).mean()
  return {
    "params": sum(leaf.size for leaf in jax.tree.leaves(nnx.state(policy, nnx.Param))),
    "nll": float(nll),
  }


def main():
  peer = protocol.Peer()
  accept_segments()
  facts = facts_of(peer.spec)
  with mesh():
    WORKS[peer.work](peer, facts)


if __name__ == "__main__":
  main()
