"""Trainers of TRL, which run their own loops; what a release lacks is not imported."""

import functools

import protocol
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
  AutoModelForCausalLM,
  AutoModelForSequenceClassification,
  DataCollatorWithPadding,
  GenerationMixin,
  PreTrainedTokenizerFast,
  TrainerCallback,
)

EPOCH = 64  # Steps until the loop goes through its rows again.


class Turns(TrainerCallback):
  """Makes each step of a trainer wait for an order, and counts what it does."""

  def __init__(self, peer, **facts):
    self.steps = protocol.Steps(peer, **facts)
    self.updates = self.generated = 0
    plain = GenerationMixin.generate

    @functools.wraps(plain)
    def generate(model, *args, **kwargs):
      result = plain(model, *args, **kwargs)
      sequences = result if isinstance(result, torch.Tensor) else result.sequences
      prompts = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
      self.generated += sequences[:, prompts.shape[1] :].numel()
      return result

    GenerationMixin.generate = generate

  def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
    optimizer = getattr(optimizer, "optimizer", optimizer)
    optimizer.register_step_post_hook(self._count)

  def _count(self, *args):
    self.updates += 1

  def on_step_end(self, args, state, control, **kwargs):
    counts = {"updates": self.updates}
    if self.generated:
      counts["generated"] = self.generated
    self.updates = self.generated = 0
    self.steps.end(**counts)


def tokenizer_of(spec):
  """Tokenizer whose words are the numbers of the tokens."""
  size = spec["shape"]["vocab_size"]
  words = Tokenizer(models.WordLevel({str(n): n for n in range(size)}, unk_token="0"))
  words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  return PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token="0", bos_token="1", eos_token="2", unk_token="0"
  )


def text(tokens):
  return " ".join(map(str, tokens))


def load(spec, kind):
  auto = AutoModelForCausalLM if kind == "policy" else AutoModelForSequenceClassification
  model = auto.from_pretrained(spec[kind], dtype=torch.float32)
  model.config.pad_token_id = 0
  return model


def options(spec, rows):
  """Arguments of all trainers. Those of TRL save memory by default, at the expense of time."""
  settings = spec["optimizer"]
  return {
    "output_dir": "/tmp/unused",
    "per_device_train_batch_size": rows,
    "learning_rate": settings["learning_rate"],
    "lr_scheduler_type": "constant",
    "adam_beta2": settings["b2"],
    "max_grad_norm": settings["max_grad_norm"],
    "weight_decay": 0.0,
    "optim": "adamw_torch_fused",
    "num_train_epochs": 1000,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": not torch.cuda.is_available(),
    "bf16": False,
    "gradient_checkpointing": False,
  }


def sft(spec, turns):
  rows = [{"input_ids": row[0]} for row in spec["tokens"]]
  return trl.SFTTrainer(
    load(spec, "policy"),
    trl.SFTConfig(**options(spec, len(rows)), max_length=None),
    train_dataset=Dataset.from_list(rows * EPOCH),
    processing_class=tokenizer_of(spec),
    callbacks=[turns],
  )


def reward_model(spec, turns):
  rows = [dict(zip(("chosen_ids", "rejected_ids"), row, strict=True)) for row in spec["tokens"]]
  return trl.RewardTrainer(
    load(spec, "reward_model"),
    trl.RewardConfig(**options(spec, len(rows)), max_length=None),
    train_dataset=Dataset.from_list(rows * EPOCH),
    processing_class=tokenizer_of(spec),
    callbacks=[turns],
  )


def dpo(spec, turns):
  first = spec["prompt"]
  rows = [
    {
      "prompt": text(chosen[:first]),
      # The trainer adds the end token.
      "chosen": text(chosen[first:-1]) + " ",
      "rejected": text(rejected[first:-1]) + " ",
    }
    for chosen, rejected in spec["tokens"]
  ]
  return trl.DPOTrainer(
    load(spec, "policy"),
    args=trl.DPOConfig(**options(spec, len(rows)), max_length=None, beta=0.1),
    train_dataset=Dataset.from_list(rows * EPOCH),
    processing_class=tokenizer_of(spec),
    callbacks=[turns],
  )


def even_tokens(completion_ids, **kwargs):
  return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def grpo(spec, turns):
  rows = [{"prompt": text(row[0][: spec["prompt"]])} for row in spec["tokens"]]
  args = trl.GRPOConfig(
    **options(spec, len(rows)),
    num_generations=spec["samples_per_prompt"],
    max_completion_length=spec["response"],
    generation_kwargs={"min_new_tokens": spec["response"]},
    temperature=1.0,
    top_k=0,
    beta=0.04,
  )
  return trl.GRPOTrainer(
    load(spec, "policy"),
    even_tokens,
    args,
    train_dataset=Dataset.from_list(rows * EPOCH),
    processing_class=tokenizer_of(spec),
    callbacks=[turns],
  )


def endless(model):
  """Model that samples responses of full length."""
  model.generation_config.eos_token_id = None
  return model


def ppo(spec, turns):
  from trl.experimental.ppo import PPOConfig, PPOTrainer

  rows = [{"input_ids": row[0][: spec["prompt"]]} for row in spec["tokens"]]
  args = PPOConfig(
    **options(spec, len(rows) // spec["minibatches"])
    | {"gradient_accumulation_steps": 1, "num_train_epochs": 1},
    num_ppo_epochs=spec["epochs"],
    num_mini_batches=spec["minibatches"],
    total_episodes=1000 * len(rows),
    local_rollout_forward_batch_size=len(rows),
    response_length=spec["response"],
    temperature=1.0,
    num_sample_generations=0,
    kl_coef=0.1,
    vf_coef=0.5,
  )
  tokenizer = tokenizer_of(spec)
  tokenizer.padding_side = "left"
  policy, reference = endless(load(spec, "policy")), load(spec, "policy")
  return PPOTrainer(
    args,
    tokenizer,
    policy,
    reference,
    load(spec, "reward_model"),
    Dataset.from_list(rows * EPOCH),
    load(spec, "reward_model"),
    data_collator=DataCollatorWithPadding(tokenizer),
    eval_dataset=Dataset.from_list(rows),
    callbacks=[turns],
  )


def nash_md(spec, turns):
  from trl.experimental.nash_md import NashMDConfig, NashMDTrainer

  rows = [{"prompt": text(row[0][: spec["prompt"]])} for row in spec["tokens"]]
  args = NashMDConfig(
    **options(spec, len(rows)),
    max_new_tokens=spec["response"],
    max_length=spec["prompt"] + spec["response"],
    temperature=1.0,
    mixture_coef=0.25,
    beta=0.01,
  )
  tokenizer = tokenizer_of(spec)
  tokenizer.padding_side = "left"
  return NashMDTrainer(
    endless(load(spec, "policy")),
    endless(load(spec, "policy")),
    reward_funcs=load(spec, "reward_model"),
    args=args,
    train_dataset=Dataset.from_list(rows * EPOCH),
    processing_class=tokenizer,
    callbacks=[turns],
  )


WORKS = {f.__name__: f for f in (sft, reward_model, dpo, grpo, ppo, nash_md)}


def facts(spec):
  """Numbers that other programs with the same weights and tokens have too."""
  policy, tokens = load(spec, "policy"), torch.tensor(spec["tokens"])[:, 0]
  with torch.no_grad():
    nll = policy(tokens, labels=tokens).loss.item()
  return {"params": sum(p.numel() for p in policy.parameters()), "nll": nll}


def main():
  peer = protocol.Peer()
  torch.set_num_threads(peer.spec["cores"])
  torch.manual_seed(0)
  turns = Turns(peer, **facts(peer.spec))
  WORKS[peer.work](peer.spec, turns).train()


if __name__ == "__main__":
  main()
