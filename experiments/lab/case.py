"""Workbench of a script on absent devices, and checks of the programs that scripts share.

Every training script ends with `programs(case)`, which hands each of its programs to `case.check`
with abstract arguments, in the order of an iteration.
"""

import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax import data, flags, loop, preflight, rewards, sharding, writers
from rlhf_jax.algorithms import terms
from rlhf_jax.models import Model
from rlhf_jax.models.families import Head
from rlhf_jax.types import PairBatch, Params, Rollout, SharedBatch, TokenBatch, UnpairedBatch
from . import costs, models, responses, training, workbench
from .workbench import Workbench

Shapes = Any  # Shapes and shardings instead of arrays.
TRAINING = ("train", "update", "improve")  # Names of the programs that compute gradients.


class Case(NamedTuple):
  """Script on absent devices.

  Attributes:
    check: Compiler of programs; see `preflight.Preflight`.
    bench: Workbench of the script, with empty data sets.
    key: Shape of a random key.
  """

  check: preflight.Preflight
  bench: Workbench
  key: jax.ShapeDtypeStruct

  @property
  def config(self) -> Any:
    """Config of the script."""
    return self.bench.config

  @property
  def prompt_length(self) -> int:
    """Length P of a prompt."""
    return self.config.data.max_prompt_length

  @property
  def length(self) -> int:
    """Length T of a prompt with one response."""
    return self.prompt_length + self.config.data.max_response_length

  @property
  def samples(self) -> bool:
    """True if the script trains on samples of the policy."""
    return any(hasattr(self.config, name) for name in ("preference", "shaping", "teacher"))

  @property
  def scored(self) -> int:
    """Maximum number of tokens of a response; a packed row is taken to hold nothing else."""
    return longest_response(self.config)

  def place(self, batch: Any) -> Any:
    """Places a batch of numpy arrays on the mesh."""
    return sharding.place_batch(batch, self.bench.run.mesh)

  def placed(self, function: Callable[..., Any], *args: Any) -> Any:
    """Returns the shapes of `function(*args)`, sharded as batches, without compiling it."""
    shapes = jax.eval_shape(function, *args)
    return sharding.abstract(shapes, sharding.batch_sharding(self.bench.run.mesh))

  def column(self, *shape: int, dtype: Any = np.float32) -> Shapes:
    """Returns a column [batch_size, ...] of numbers."""
    shape = (self.config.batch_size, *shape)
    return self.place({"column": np.zeros(shape, dtype)})["column"]

  def tokens(self, *shape: int, rows: int | None = None) -> TokenBatch:
    """Returns token sequences [rows, ...] with their mask; `batch_size` rows by default."""
    shape = (self.config.batch_size if rows is None else rows, *shape)
    batch = {"tokens": np.zeros(shape, np.int32), "mask": np.zeros(shape, bool)}
    return TokenBatch(**self.place(batch))

  def pairs(self) -> PairBatch:
    """Returns pairs of responses, which share the row of their prompt if the config says so."""
    pairs, given = self.tokens(2, self.length), self.config.data
    shared = data.shared_length(self.length, self.length + given.max_response_length)
    if not shared or not given.share_prompts or given.packed_length:
      return pairs
    return SharedBatch(self.tokens(shared).tokens, pairs.mask, pairs.tokens)

  def prompts(self) -> data.PromptBatch:
    """Returns the prompts of an iteration."""
    return data.PromptBatch(*self.tokens(self.prompt_length), self.column(dtype=np.int32))

  def carried(self, carry: Any) -> Any:
    """Returns the shapes of the state that an iteration carries, replicated on all devices."""
    return sharding.abstract(carry, sharding.replicated(self.bench.run.mesh))

  def bools(self, rollout: Rollout) -> Shapes:
    """Returns one bool per response of a rollout."""
    return self.place({"flags": np.zeros(rollout.tokens.shape[0], bool)})["flags"]

  def open_judge(self, options: Any) -> tuple[Model | None, Params]:
    """Opens a model that judges responses, unless the options name other judges."""
    bench = self.bench
    if options.is_given and not options.path:
      return None, ()
    opened = bench.run, self.config.model, bench.folder, bench.tokenizer
    return models.open_model(*opened, "scalar", frozen=True)

  def forward(self, model: Model, rows: int, length: int, *, scored: int | None = None) -> float:
    """Returns the FLOPs of a forward pass."""
    return preflight.forward_flops(model.config, rows, length, scored=scored)

  def forward_rows(self, rows: Any, scored: int | None) -> float:
    """Returns the FLOPs of a forward pass of a batch of rows of data."""
    if isinstance(rows, UnpairedBatch):
      return 2 * self.forward_rows(rows.mismatched, scored)
    *shape, length = rows.mask.shape
    model, count = self.bench.model, math.prod(shape)
    flops = self.forward(model, count, length, scored=scored)
    if isinstance(rows, SharedBatch):
      flops -= costs.shared_flops(model.config, costs.shared_tokens(rows))
    return flops

  def training_work(self, flops: float) -> preflight.Work:
    """Returns the work of a train step whose forward passes take `flops`."""
    frozen = bool(self.config.lora.rank)
    return preflight.training(self.bench.model.config, flops, frozen=frozen)

  def sampling_work(self, samples: int) -> preflight.Work:
    """Returns the work of a rollout with `samples` per prompt."""
    new, rows = self.config.sampling.max_new_tokens, self.config.batch_size
    mesh = self.bench.run.mesh
    return preflight.sampling(self.bench.model.config, mesh, rows, samples, self.prompt_length, new)

  def offline(
    self, trainer: training.Trainer, batch: Any, *, scored: bool, rows: Any = None, held: Any = None
  ) -> None:
    """Checks the step of a model that is trained on rows of data, without sampling.

    Args:
      trainer: State and step of the model.
      batch: Batch of the step.
      scored: True if logits are computed.
      rows: Rows of data in the batch; None if it has nothing else.
      held: Further arrays in memory during the step.
    """
    rows = batch if rows is None else rows
    flops, constant = self.forward_rows(rows, self.scored if scored else None), 0.0
    if isinstance(rows, UnpairedBatch):  # No gradient flows through the mismatched half.
      constant = flops / 2
    work = preflight.Work(self.training_work(flops - constant).flops + constant)
    self.check("train", trainer.step, trainer.state, batch, self.key, work=work, held=held)

  def against_reference(
    self,
    trainer: training.Trainer,
    ref_logprobs: Callable[..., Any],
    rows: Any,
    make_batch: Callable[[Any, Any], Any],
  ) -> None:
    """Checks a policy that is trained on pairs, with precomputed reference log-probabilities.

    Args:
      trainer: State and step of the policy.
      ref_logprobs: `(params, rows) -> ref_logprobs`.
      rows: Rows of pairs.
      make_batch: `(rows, ref_logprobs) -> batch` of the step.
    """
    start = self.bench.start
    held, flops = (trainer.state, start), self.forward_rows(rows, self.scored)
    refs = self.check("reference", ref_logprobs, start, rows, work=preflight.Work(flops), held=held)
    batch = make_batch(rows, self.placed(lambda x: x, refs))
    self.offline(trainer, batch, rows=rows, scored=True, held=held)

  def rollout(
    self,
    name: str,
    generate: Any,
    params: Params,
    held: Any,
    samples: int,
    reshard: str = "reshard",
  ) -> Rollout:
    """Checks the resharding and a rollout of one policy."""
    policy = self.check(reshard, self.bench.reshard(), params, held=held)
    work, inputs = self.sampling_work(samples), (*self.prompts(), self.key)
    return self.check(name, generate, policy, *inputs, work=work, held=(held, policy))

  def scores(self, rollout: Rollout, judge: Model | None, held: Any) -> Shapes:
    """Checks the scoring of a rollout, if a reward model does it, and returns the scores."""
    rows, length = rollout.tokens.shape
    if judge is not None:
      work = preflight.Work(self.forward(judge, rows, length))
      scorer = rewards.make_scorer(judge.apply)
      self.check("reward", scorer, held["reward"], rollout, work=work, held=held)
    return self.place({"scores": np.zeros(rows, np.float32)})["scores"]

  def policy_gradient(
    self,
    trainer: training.Trainer,
    experience: responses.Experience,
    carry: Any,
    *,
    critic: bool = False,
    ptx: bool = False,
    keyed: bool = False,
    dense: rewards.DenseScorer | None = None,
  ) -> None:
    """Checks an iteration: rollout, reward, experience, update.

    Args:
      trainer: State and step of the policy, and of the critic if there is one.
      experience: `(params, ref_params, carry, responses) -> (batch, carry, metrics)`.
      carry: State of the experience.
      critic: True if there is a critic with a model of its own.
      ptx: True if the update also takes a demonstration per response.
      keyed: True if the experience also takes a random key.
      dense: Scorer of tokens by a policy of the same architecture; None without one.
    """
    bench, config = self.bench, self.config
    if config.rollout.devices:
      raise flags.UsageError("--rollout.devices is not compiled for; leave it at 0")
    held = {"state": trainer.state, "reference": bench.start}
    judge, held["reward"] = self.open_judge(getattr(config, "judge", config.reward))
    params, samples = trainer.params(trainer.state), config.sampling.samples_per_prompt
    policy = params.get("policy", params)
    rollout = self.rollout("rollout", bench.sampler(), policy, held, samples)
    rows, length = rollout.tokens.shape
    scores, ref_scores = self.scores(rollout, judge, held), None
    if config.shaping.function:
      shape = (rows, config.shaping.reference_samples)
      ref_scores = self.place({"ref_scores": np.zeros(shape, np.float32)})["ref_scores"]
    token_rewards = None
    if dense is not None:
      held["dense"] = bench.start
      work = preflight.Work(2 * self.forward(bench.model, rows, length, scored=self.scored + 1))
      args = held["dense"], bench.start, rollout
      token_rewards = self.check("dense", dense, *args, work=work, held=held)
    scored = responses.Responses(rollout, scores, self.bools(rollout), ref_scores, token_rewards)
    inputs = [params, bench.start, self.carried(carry), scored]
    if keyed:
      inputs.append(self.key)
    forward = self.forward(bench.model, rows, length, scored=config.sampling.max_new_tokens + 1)
    values = self.forward(bench.model, rows, length) if critic else 0.0
    work = preflight.Work(2 * forward + values)
    batch, _, _ = self.check("experience", experience, *inputs, work=work, held=held)
    trained = batch.rollout.tokens.size / rollout.tokens.size * (forward + values)
    if ptx:
      batch = terms.WithSequences(batch, self.tokens(self.length, rows=rows))
      trained += self.forward_rows(batch.sequences, self.scored)
    settings = next(x for x in vars(config).values() if hasattr(x, "epochs"))
    work = self.training_work(settings.epochs * trained)
    self.check("update", trainer.step, trainer.state, batch, self.key, work=work, held=held)


def longest_response(config: Any) -> int:
  """Returns the most response tokens of a row, as far as the config tells."""
  sampling = getattr(config, "sampling", None)
  given = config.data.packed_length or config.data.max_response_length
  return given if sampling is None else max(given, sampling.max_new_tokens)


def open_case(
  config: Any,
  mesh_spec: str,
  devices: Any,
  check: Callable[[Any], preflight.Preflight],
  head: Head,
) -> Case:
  """Opens a script on absent devices.

  Args:
    config: Config of the script.
    mesh_spec: Devices per mesh axis.
    devices: The absent devices.
    check: `(mesh) -> preflight`, the compiler of programs.
    head: Head of the model.
  """
  mesh = sharding.make_mesh(mesh_spec, devices)
  folder = models.source_folder(config.model, config.init_from)
  tokenizer = models.open_tokenizer(folder, config.data)
  nowhere, session = pathlib.Path(), loop.Session(workdir="absent", mesh=mesh_spec)
  run = loop.Run(nowhere, session, mesh, jax.random.key(0), writers.RunWriter(nowhere))
  shape = jax.eval_shape(lambda: jax.random.key(0))
  placed = run, config, folder, tokenizer, head, longest_response(config)
  model, start, initial = workbench.place(*placed)
  empty = data.from_examples("prompts", [], [])
  bench = Workbench(run, config, tokenizer, empty, empty, model, start, folder, initial=initial)
  return Case(check(mesh), bench, sharding.abstract(shape, sharding.replicated(mesh)))
