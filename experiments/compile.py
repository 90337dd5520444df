r"""Compiles every program of an algorithm for a TPU slice that is not there, and says if it fits.

  python -m experiments.compile --algorithm=ppo --topology=v5p:4x4x8 --mesh=fsdp:32,tensor:4 \
    --model.preset=llama3_8b --model.dtype=bfloat16 --model.remat=full --batch_size=128

It needs libtpu (pip install 'rlhf_jax[tpu]') and no TPU, and takes one to ten minutes for 8B
parameters. The programs are those that the script of the algorithm runs, from the same flags, with
rows as long as the flags allow: --data.max_prompt_length, --data.max_response_length and
--sampling.max_new_tokens. A reward model, where the algorithm takes one and --reward.name is not
given, is of the policy's architecture.

The table has the memory of one chip, what the chips send each other (and how many collectives
stand in loops), and a roofline: seconds that a perfect program would still take. The exit code is 0
if all programs fit, and 69 with the words of the compiler if one does not.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from experiments import (
  common,
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
from rlhf_jax import data, flags, generation, loop, preflight, reporting, rewards, sharding
from rlhf_jax.algorithms import dpo as dpo_lib
from rlhf_jax.algorithms import kto as kto_lib
from rlhf_jax.algorithms import nash_md as nash_md_lib
from rlhf_jax.algorithms import preference_model as preference_model_lib
from rlhf_jax.algorithms import rest as rest_lib
from rlhf_jax.algorithms import reward_model as reward_model_lib
from rlhf_jax.algorithms import sft as sft_lib
from rlhf_jax.models import Model
from rlhf_jax.types import ComparisonBatch, Params, Rollout, TokenBatch, UnpairedBatch

_EX_UNAVAILABLE = 69  # sysexits.h


@dataclasses.dataclass(frozen=True)
class Options:
  """What to compile for. All other flags are those of the script of the algorithm.

  Attributes:
    algorithm: Name of the script.
    topology: Slice of TPUs, such as v5e:4x4, v5p:4x4x8, v6e:16x16 or tpu7x:4x4x4.
    mesh: Devices per mesh axis, as in every script.
    json: File to write the figures to.
  """

  algorithm: Literal[
    "sft", "reward_model", "preference_model", "dpo", "kto", "ppo", "nash_md", "online_dpo", "rest"
  ]
  topology: str
  mesh: str = ""
  json: str = ""


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
    return common.open_model(self.run, self.config.model, self.folder, self.tokenizer, head)

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
  state, step, _ = common.make_trainer(case.run, case.config, model, params, make_step, settings)
  length = jax.tree.leaves(batch)[0].shape[-1]
  scored = length if head == "language" else None
  work = preflight.training(model.config, case.forward(model, rows, length, scored=scored))
  case.check("train", step, state, batch, case.key, work=work)


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
  state, step, _ = common.make_trainer(case.run, case.config, model, start, make_step, settings)
  rows, length = 2 * case.config.batch_size, case.length
  flops = case.forward(model, rows, length, scored=length)
  refer = common.make_refer(model, lib.reference_logprobs, settings)
  work = preflight.Work(flops)
  found = case.check("reference", refer, start, batch, work=work, held=(state, start))
  refs = case.placed(lambda x: x, found["ref"])
  work = preflight.training(model.config, flops)
  case.check("train", step, state, make(batch, refs), case.key, work=work, held=(state, start))


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
  model, ref_params = case.open()
  state, programs = ppo.open_programs(
    case.run, config, case.folder, model, ref_params, case.tokenizer
  )
  held = {"state": state, "reference": ref_params}
  judge, held["reward"] = case.open_judge(config.reward)
  policy = state.train.params["policy"]
  rollout = rollout_of(case, "rollout", model, programs.reshard, programs.generate, policy, held)
  scores = score(case, rollout, judge, held)
  rows, length = rollout.tokens.shape
  new = config.sampling.max_new_tokens
  forward = case.forward(model, rows, length, scored=new + 1)
  critic = case.forward(model, rows, length) if config.ppo.has_critic else 0.0
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
    state.train.params,
    ref_params,
    state.control,
    rollout,
    scores,
    ended,
    work=preflight.Work(2 * forward + critic),
    held=held,
    **more,
  )
  work = preflight.training(model.config, config.ppo.epochs * (forward + critic))
  case.check("update", programs.update, state.train, batch, case.key, work=work, held=held)


def compile_nash_md(case: Case) -> None:
  """Nash-MD and its relatives."""
  config = case.config
  model, ref_params = case.open()
  state, programs = nash_md.open_programs(case.run, config, model, ref_params, case.tokenizer)
  held = {"state": state, "reference": ref_params}
  judge, held["preference"] = case.open_judge(config.preference)
  policy = case.check("reshard", programs.reshard, state.train.params, held=held)
  ref = ref_params
  if policy is not state.train.params:  # Another copy, that would be compiled alike.
    ref = sharding.abstract(policy, common.shardings_of(policy))
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
  work = preflight.training(model.config, forward)
  case.check("train", programs.step, state.train, batch, case.key, work=work, held=held)


def compile_online_dpo(case: Case) -> None:
  """Online DPO, judged by a reward model."""
  config = case.config
  model, ref_params = case.open()
  state, programs = online_dpo.open_programs(case.run, config, model, ref_params, case.tokenizer)
  held = {"state": state, "reference": ref_params}
  judge, held["reward"] = case.open_judge(config.reward)
  policy = state.train.params
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
  work = preflight.training(model.config, forward)
  case.check("train", programs.step, state.train, batch, case.key, work=work, held=held)


def compile_rest(case: Case) -> None:
  """ReST: a Grow step, then an Improve step with nothing of the former in memory."""
  config = case.config
  model, params = case.open()
  held = {"policy": params}
  judge, held["reward"] = case.open_judge(config.reward)
  reshard = sharding.make_reshard(case.run.mesh, model.config.dtype)
  generate = common.make_sampler(model, case.tokenizer, config.sampling)
  rollout = rollout_of(case, "grow", model, reshard, generate, params, held)
  score(case, rollout, judge, held)
  state, step, _ = common.make_trainer(
    case.run, config, model, params, rest_lib.make_rest_step, config.rest
  )
  weights = case.place({"weights": np.zeros(config.batch_size, np.float32)})["weights"]
  length = case.prompt_length + config.sampling.max_new_tokens
  batch = rest_lib.RestBatch(case.rows(length), weights)
  forward = case.forward(model, config.batch_size, length, scored=length)
  work = preflight.training(model.config, forward)
  held = (state, params)
  case.check("improve", step, state, batch, params, case.key, work=work, held=held)


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


def compile_all(options: Options, config: Any) -> tuple[list[preflight.Program], str]:
  """The figures of all programs that fit, and why the next one does not: empty if all do."""
  jax.config.update("jax_platforms", "cpu")  # Else it looks for the TPU.
  jax.config.update("jax_enable_compilation_cache", False)  # Of no use without the devices.
  devices, chip = preflight.topology_devices(options.topology)
  mesh = sharding.make_mesh(options.mesh, devices)
  folder = common.source_folder(config.model, config.init_from)
  tokenizer = common.open_tokenizer(folder, config.data.end_token)
  session = loop.Session(workdir="", mesh=options.mesh)
  run = loop.Run(pathlib.Path(), session, mesh, jax.random.key(0))
  shape = jax.eval_shape(lambda: jax.random.key(0))
  key = sharding.abstract(shape, sharding.replicated(mesh))
  check = preflight.Preflight(mesh, chip)
  try:
    ALGORITHMS[options.algorithm][1](Case(check, run, config, tokenizer, folder, key))
  except preflight.TooLargeError as error:
    return check.programs, str(error)
  return check.programs, ""


def show(options: Options, programs: Sequence[preflight.Program], refused: str) -> None:
  """The table."""
  chip = preflight.CHIPS[options.topology.split(":")[0]]
  rows = {}
  for program in programs:
    slowest = max(program.seconds, key=program.seconds.__getitem__)
    sent = [
      f"{kind} {row['count']:.0f} ({row['in_loops']:.0f}), {reporting.human_bytes(row['bytes'])}"
      for kind, row in sorted(program.collectives.items())
    ]
    rows[program.name] = {
      "peak, GiB": program.peak / 2**30,
      "beside, GiB": program.beside / 2**30,
      "arguments, GiB": program.arguments / 2**30,
      "temporaries, GiB": program.temporaries / 2**30,
      "collectives (in loops)": "; ".join(sent),
      "operations": f"{program.flops:.3g}",
      "roofline, s": f"{program.seconds[slowest]:.3g} ({slowest})",
      "compiled in, s": f"{program.compile_seconds:.0f}",
    }
  if rows:
    reporting.show_summary(
      f"{options.algorithm} on {options.topology}, {chip.hbm_bytes / 2**30:.2f} GiB a chip", rows
    )
  total = sum(max(program.seconds.values()) for program in programs)
  reporting.note(f"does not fit: {refused}" if refused else f"fits; roofline {total:.3g} s")


def main(options: Options, config: Any) -> int:
  """Compiles, shows and writes; returns the exit code."""
  programs, refused = compile_all(options, config)
  show(options, programs, refused)
  if options.json:
    figures = {
      "options": flags.to_dict(options),
      "config": flags.to_dict(config),
      "fits": not refused,
      "refused": refused,
      "programs": [program._asdict() for program in programs],
    }
    pathlib.Path(options.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
  return _EX_UNAVAILABLE if refused else 0


def algorithm_of(argv: Sequence[str]) -> str:
  """The flag that decides which other flags there are, read before they are defined."""
  prefix = "--algorithm="
  given = [word.removeprefix(prefix) for word in argv if word.startswith(prefix)]
  return given[0] if given and given[0] in ALGORITHMS else ""


if __name__ == "__main__":
  read_options = flags.define(Options)
  name = algorithm_of(sys.argv)
  read_config = flags.define(ALGORITHMS[name][0].Config) if name else lambda: None
  flags.run(lambda argv: main(read_options(), read_config()))
