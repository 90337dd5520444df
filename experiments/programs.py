"""The programs of every algorithm, as its script runs them, named one after the other.

`ALGORITHMS[name]` is the script and a function that hands each of its programs, with arguments that
need not be there, to a `preflight.Preflight`. It mirrors the script: what an iteration runs, in its
order, and what else is in memory while it does.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from experiments import (
  dpo,
  kto,
  nash_md,
  online_dpo,
  ppo,
  preference_model,
  rest,
  reward_model,
  sft,
)
from experiments.lab import models, training
from rlhf_jax import data, flags, generation, loop, preflight, rewards, sharding
from rlhf_jax.algorithms import dpo as dpo_lib
from rlhf_jax.algorithms import kto as kto_lib
from rlhf_jax.algorithms import nash_md as nash_md_lib
from rlhf_jax.algorithms import preference_model as preference_model_lib
from rlhf_jax.algorithms import rest as rest_lib
from rlhf_jax.algorithms import reward_model as reward_model_lib
from rlhf_jax.algorithms import sft as sft_lib
from rlhf_jax.models import Model
from rlhf_jax.types import ComparisonBatch, Params, Rollout, TokenBatch, UnpairedBatch


class Case(NamedTuple):
  """What every algorithm needs to name its programs.

  Attributes:
    check: Compiles a program.
    run: A run on the absent devices.
    config: Of the script.
    tokenizer: Of the model.
    folder: Of the model, or None.
    key: Shape of a random key.
  """

  check: preflight.Preflight
  run: loop.Run
  config: Any
  tokenizer: data.Tokenizer
  folder: pathlib.Path | None
  key: jax.ShapeDtypeStruct

  @property
  def prompt_length(self) -> int:
    """P."""
    return self.config.data.max_prompt_length

  @property
  def length(self) -> int:
    """T of a prompt with one response."""
    return self.prompt_length + self.config.data.max_response_length

  def place(self, batch: Any) -> Any:
    """A batch of numpy arrays on the mesh."""
    return sharding.place_batch(batch, self.run.mesh)

  def placed(self, function: Callable[..., Any], *args: Any) -> Any:
    """What `function` makes of batches without being compiled."""
    shapes = jax.eval_shape(function, *args)
    return sharding.abstract(shapes, sharding.batch_sharding(self.run.mesh))

  def rows(self, *shape: int) -> TokenBatch:
    """Token sequences of the batch."""
    shape = (self.config.batch_size, *shape)
    return self.place(TokenBatch(np.zeros(shape, np.int32), np.zeros(shape, bool)))

  def open(self, head: Literal["language", "scalar"] = "language") -> tuple[Model, Params]:
    """A model with another head, or another copy of the policy."""
    return models.open_model(self.run, self.config.model, self.folder, self.tokenizer, head)

  def open_judge(self, options: Any) -> tuple[Model | None, Params]:
    """A model that judges responses, if the options name no function that does."""
    return (None, ()) if options.name else self.open("scalar")

  def prompts(self) -> data.PromptBatch:
    """The prompts of an iteration."""
    tokens, mask = self.rows(self.prompt_length)
    ids = self.place({"prompt_id": np.zeros(self.config.batch_size, np.int32)})["prompt_id"]
    return data.PromptBatch(tokens, mask, ids)

  def forward(self, model: Model, rows: int, length: int, *, scored: int | None = None) -> float:
    """Operations of a forward pass."""
    return preflight.forward_flops(model.config, rows, length, scored=scored)

  def training(self, model: Model, flops: float) -> preflight.Work:
    """The work of a step whose forward passes take `flops`."""
    return preflight.training(model.config, flops, frozen=bool(self.config.lora.rank))

  def sampling(self, model: Model, samples: int) -> preflight.Work:
    """The work of a rollout."""
    new = self.config.sampling.max_new_tokens
    rows = self.config.batch_size
    return preflight.sampling(model.config, self.run.mesh, rows, samples, self.prompt_length, new)


def offline(
  case: Case, make_step: Callable[..., Any], settings: Any, batch: Any, *, head: Any, rows: int
) -> None:
  """A model that is trained on rows alone."""
  model, params = case.open(head)
  trainer = training.make_trainer(case.run, case.config, model, params, make_step, settings)
  length = jax.tree.leaves(batch)[0].shape[-1]
  scored = length if head == "language" else None
  work = case.training(model, case.forward(model, rows, length, scored=scored))
  case.check("train", trainer.step, trainer.state, batch, case.key, work=work)


def compile_sft(case: Case) -> None:
  """Supervised fine-tuning."""
  rows = case.config.batch_size
  batch = case.rows(case.length)
  offline(case, sft_lib.make_sft_step, case.config.sft, batch, head="language", rows=rows)


def compile_reward_model(case: Case) -> None:
  """A reward model, on pairs."""
  batch, rows = case.rows(2, case.length), 2 * case.config.batch_size
  make_step = reward_model_lib.make_reward_model_step
  offline(case, make_step, case.config.reward_model, batch, head="scalar", rows=rows)


def compile_preference_model(case: Case) -> None:
  """A preference model."""
  rows = case.config.batch_size
  tokens, mask = case.rows(2, case.length + case.config.data.max_response_length)
  preference = case.place({"preference": np.zeros(rows, np.float32)})["preference"]
  batch = ComparisonBatch(tokens, mask, preference)
  make_step = preference_model_lib.make_preference_model_step
  offline(case, make_step, case.config.preference_model, batch, head="scalar", rows=2 * rows)


def against_reference(case: Case, lib: Any, make_step: Any, settings: Any, batch: Any, make: Any):
  """A policy that is trained on fixed log-probabilities of its start."""
  model, start = case.open()
  trainer = training.make_trainer(case.run, case.config, model, start, make_step, settings)
  held = (trainer.state, start)
  rows, length = 2 * case.config.batch_size, case.length
  flops = case.forward(model, rows, length, scored=length)
  refer = training.make_refer(model, lib.reference_logprobs, settings)
  work = preflight.Work(flops)
  found = case.check("reference", refer, start, batch, work=work, held=held)
  refs = case.placed(lambda x: x, found["ref"])
  work = case.training(model, flops)
  inputs = (trainer.state, make(batch, refs), case.key)
  case.check("train", trainer.step, *inputs, work=work, held=held)


def compile_dpo(case: Case) -> None:
  """DPO and its relatives."""
  batch, settings = case.rows(2, case.length), case.config.dpo
  against_reference(case, dpo_lib, dpo_lib.make_dpo_step, settings, batch, dpo_lib.DPOBatch)


def compile_kto(case: Case) -> None:
  """KTO."""
  rows = case.config.batch_size
  desirable = case.place({"desirable": np.zeros(rows, bool)})["desirable"]
  batch = UnpairedBatch(*case.rows(case.length), desirable, case.rows(case.length))
  settings = case.config.kto
  against_reference(case, kto_lib, kto_lib.make_kto_step, settings, batch, kto_lib.KTOBatch)


def score(case: Case, rollout: Rollout, judge: Model | None, held: Any) -> jax.ShapeDtypeStruct:
  """Scores of a rollout: of a reward model, unless a Python function gives them."""
  rows, length = rollout.tokens.shape
  if judge is not None:
    work = preflight.Work(case.forward(judge, rows, length))
    scorer = rewards.make_scorer(judge.apply)
    case.check("reward", scorer, held["reward"], rollout, work=work, held=held)
  return case.place({"scores": np.zeros(rows, np.float32)})["scores"]


def rollout_of(
  case: Case, name: str, model: Model, reshard: Any, generate: Any, params: Params, held: Any
) -> Rollout:
  """Resharding and a rollout of one policy."""
  samples = case.config.sampling.samples_per_prompt
  policy = case.check("reshard", reshard, params, held=held)
  work = case.sampling(model, samples)
  prompts = case.prompts()
  held = (held, policy)
  return case.check(name, generate, policy, *prompts, case.key, work=work, held=held)


def compile_ppo(case: Case) -> None:
  """PPO and its relatives."""
  config = case.config
  if config.rollout.devices:
    raise flags.UsageError("--rollout.devices is not compiled for; leave it at 0")
  model, ref_params = case.open()
  state, programs = ppo.open_programs(
    case.run, config, case.folder, model, ref_params, case.tokenizer
  )
  held = {"state": state, "reference": ref_params}
  judge, held["reward"] = case.open_judge(config.reward)
  params = programs.trainer.params(state.train)
  rollout = rollout_of(
    case, "rollout", model, programs.reshard, programs.generate, params["policy"], held
  )
  scores = score(case, rollout, judge, held)
  rows, length = rollout.tokens.shape
  new = config.sampling.max_new_tokens
  forward = case.forward(model, rows, length, scored=new + 1)
  has_own = config.ppo.has_critic and not config.share_trunk
  critic = case.forward(model, rows, length) if has_own else 0.0
  ended = case.place({"ended": np.zeros(rows, bool)})["ended"]
  more = {}
  if config.ppo.reads_reference_scores:
    shape = (rows, config.reference_samples)
    more["ref_scores"] = case.place({"ref_scores": np.zeros(shape, np.float32)})["ref_scores"]
  if config.ppo.ptx_coef:
    wide = (rows, case.length)
    texts = TokenBatch(np.zeros(wide, np.int32), np.zeros(wide, bool))
    more["demonstrations"] = case.place(texts)
  batch, _, _ = case.check(
    "experience",
    programs.experience,
    params,
    ref_params,
    state.control,
    rollout,
    scores,
    ended,
    work=preflight.Work(2 * forward + critic),
    held=held,
    **more,
  )
  work = case.training(model, config.ppo.epochs * (forward + critic))
  case.check("update", programs.trainer.step, state.train, batch, case.key, work=work, held=held)


def compile_nash_md(case: Case) -> None:
  """Nash-MD and its relatives."""
  config = case.config
  model, ref_params = case.open()
  state, programs = nash_md.open_programs(case.run, config, model, ref_params, case.tokenizer)
  held = {"state": state, "reference": ref_params}
  judge, held["preference"] = case.open_judge(config.preference)
  params = programs.trainer.params(state.train)
  policy, ref = (
    case.check(f"reshard{name}", programs.reshard, whole, held=held)
    for name, whole in (("", params), (" reference", ref_params))
  )
  mix = sharding.put(np.float32(config.nash_md.mix), sharding.replicated(case.run.mesh))
  mixture = generation.MixtureParams(policy, ref, mix)
  count = config.nash_md.responses
  source = policy if config.nash_md.objective == "policy_gradient" else mixture
  inputs, copies = (*case.prompts(), case.key), (held, policy, ref)
  own = case.check(
    "rollout",
    programs.sample,
    source,
    *inputs,
    work=case.sampling(model, count),
    held=copies,
  )
  alone = case.sampling(model, 1)
  both = preflight.Work(2 * alone.flops, alone.steps, 2 * alone.bytes_per_step)
  case.check("opponent", programs.oppose, mixture, *inputs, work=both, held=(copies, own))
  rows, length = own.tokens.shape
  if judge is not None:
    prefer = rewards.make_preferrer(judge.apply, case.tokenizer.eos_id)
    joined = length + config.sampling.max_new_tokens
    work = preflight.Work(case.forward(judge, 2 * rows, joined))
    case.check("preference", prefer, held["preference"], own, own, work=work, held=held)
  forward = case.forward(model, rows, length, scored=config.sampling.max_new_tokens + 1)
  work = preflight.Work(forward)
  refs = case.check("reference", programs.refer, ref_params, own, work=work, held=held)
  shape = (config.batch_size, count)
  split = lambda x: x.reshape(*shape, *x.shape[1:])  # noqa: E731
  batch = nash_md_lib.NashMDBatch(
    rollout=case.placed(lambda rollout: jax.tree.map(split, rollout), own),
    ref_logprobs=case.placed(split, refs),
    **case.place(
      {
        "preference": np.zeros(shape, np.float32),
        "tau": np.zeros(config.batch_size, np.float32),
      }
    ),
  )
  work = case.training(model, forward)
  case.check("train", programs.trainer.step, state.train, batch, case.key, work=work, held=held)


def compile_online_dpo(case: Case) -> None:
  """Online DPO, judged by a reward model."""
  config = case.config
  model, ref_params = case.open()
  state, programs = online_dpo.open_programs(case.run, config, model, ref_params, case.tokenizer)
  held = {"state": state, "reference": ref_params}
  judge, held["reward"] = case.open_judge(config.reward)
  policy = programs.trainer.params(state.train)
  rollout = rollout_of(case, "rollout", model, programs.reshard, programs.generate, policy, held)
  free = None
  if config.dpo.bonus_coef:
    free = rollout_of(case, "bonus", model, programs.reshard, programs.alone, ref_params, held)
  scores = score(case, rollout, judge, held)
  length = rollout.tokens.shape[1]
  forward = case.forward(model, 2 * config.batch_size, length, scored=length)
  batch, _ = case.check(
    "pairs",
    programs.make_batch,
    ref_params,
    rollout,
    scores,
    free,
    case.key,
    work=preflight.Work(forward),
    held=held,
  )
  work = case.training(model, forward)
  case.check("train", programs.trainer.step, state.train, batch, case.key, work=work, held=held)


def compile_rest(case: Case) -> None:
  """ReST: a Grow step, then an Improve step with nothing of the former in memory."""
  config = case.config
  model, params = case.open()
  held = {"policy": params}
  judge, held["reward"] = case.open_judge(config.reward)
  reshard = sharding.make_reshard(case.run.mesh, model.config.dtype)
  generate = models.make_sampler(model, case.tokenizer, config.sampling)
  rollout = rollout_of(case, "grow", model, reshard, generate, params, held)
  score(case, rollout, judge, held)
  make_step = functools.partial(rest_lib.make_rest_step, ref_apply_fn=model.apply)
  settings = config.rest
  trainer = training.make_trainer(case.run, config, model, params, make_step, settings)
  weights = case.place({"weights": np.zeros(config.batch_size, np.float32)})["weights"]
  length = case.prompt_length + config.sampling.max_new_tokens
  batch = rest_lib.RestBatch(case.rows(length), weights)
  forward = case.forward(model, config.batch_size, length, scored=length)
  work = case.training(model, forward)
  inputs = (trainer.state, batch, params, case.key)
  case.check("improve", trainer.step, *inputs, work=work)


ALGORITHMS: dict[str, tuple[Any, Callable[[Case], None]]] = {
  "sft": (sft, compile_sft),
  "reward_model": (reward_model, compile_reward_model),
  "preference_model": (preference_model, compile_preference_model),
  "dpo": (dpo, compile_dpo),
  "kto": (kto, compile_kto),
  "ppo": (ppo, compile_ppo),
  "nash_md": (nash_md, compile_nash_md),
  "online_dpo": (online_dpo, compile_online_dpo),
  "rest": (rest, compile_rest),
}
SAMPLES = ("ppo", "nash_md", "online_dpo", "rest")  # Those that train on responses of their own.
TRAINING = ("train", "update", "improve")  # The last program of each.
