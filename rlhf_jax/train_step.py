"""Turns a loss into an update: jitted, donated, micro-batched, guarded."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from rlhf_jax import nonfinite, ranges
from rlhf_jax.types import LossFn, Metrics, Params, TrainState, TrainStep


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """Optimizer.

  Attributes:
    learning_rate: Peak learning rate.
    name: Optimizer: a key of rlhf_jax.train_step.OPTIMIZERS. `adamw` holds two moments per param.
      `adafactor` holds a row and a column per matrix. `lion` holds one moment, and takes a tenth of
      the learning rate. `muon` holds one moment of the matrices of layers and orthogonalises it;
      all else gets AdamW. `schedule_free` is AdamW at a constant rate, whose params are an average
      of those that it steps with: nothing decays, so that a run can end at any step. Responses are
      sampled from the average, but the gradient is taken elsewhere, for which methods without a
      probability ratio, such as RLOO, CGPO and Nash-MD, do not correct.
    schedule: Learning rate schedule after the warm-up. `constant` keeps the peak; `linear` and
      `cosine` decay to 0 at the last step.
    warmup: Fraction of all optimizer steps over which the learning rate rises from 0.
    weight_decay: Decoupled weight decay, on matrices and embeddings only.
    b1: Decay of the first moment of AdamW; of `schedule_free` the weight of the averaged params in
      those that the gradient is of.
    b2: Decay of the second moment of AdamW.
    eps: Constant added to the root of the second moment of AdamW.
    max_grad_norm: Maximum global norm of gradients, which are scaled down to it; 0 does not clip.
    mu_dtype: Dtype of the first moment; bfloat16 saves 2 bytes per parameter.
    max_spike: Maximum norm of a gradient, in medians of the last 128 norms. An optimizer step
      beyond it is skipped and counted by the metric `spikes`; 0 skips none.
  """

  learning_rate: float = 1e-5
  name: str = "adamw"
  schedule: Literal["constant", "linear", "cosine"] = "cosine"
  warmup: float = 0.05
  weight_decay: float = 0.0
  b1: float = ranges.rare(0.9)
  b2: float = ranges.rare(0.95)
  eps: float = ranges.rare(1e-8)
  max_grad_norm: float = 1.0
  mu_dtype: Literal["float32", "bfloat16"] = ranges.rare("float32")
  max_spike: float = ranges.rare(0.0)

  def __post_init__(self):
    ranges.check(
      self,
      positive=("learning_rate", "eps"),
      below_one=("warmup", "b1", "b2"),
      non_negative=("weight_decay", "max_grad_norm", "max_spike"),
      one_of={"name": OPTIMIZERS},
    )
    if self.name == "schedule_free":
      ranges.check(self, positive=("b1",))
    if 0 < self.max_spike <= 1:
      raise ValueError(f"max_spike must be 0 or above 1, got {self.max_spike}")

  def require_read(self, default: "OptimConfig") -> None:
    """Refuses settings that differ from a default and that the optimizer does not read."""
    for name in ("schedule", "b1", "b2", "eps", "mu_dtype"):
      if name not in OPTIMIZERS[self.name].reads and getattr(self, name) != getattr(default, name):
        readers = [other for other, of in OPTIMIZERS.items() if name in of.reads]
        raise ValueError(f"{name} is not read by {self.name}, only by {', '.join(readers)}")


def make_schedule(config: OptimConfig, updates: int) -> optax.Schedule:
  """Learning rate as a function of the number of optimizer steps taken."""
  warmup = max(1, round(config.warmup * updates)) if config.warmup else 0
  rest = max(1, updates - warmup)
  shape = config.schedule if "schedule" in OPTIMIZERS[config.name].reads else "constant"
  after = {
    "constant": optax.constant_schedule(config.learning_rate),
    "linear": optax.linear_schedule(config.learning_rate, 0.0, rest),
    "cosine": optax.cosine_decay_schedule(config.learning_rate, rest),
  }[shape]
  if not warmup:
    return after
  rise = optax.linear_schedule(0.0, config.learning_rate, warmup)
  # Joined one step early: the first update is not at rate 0.
  return optax.join_schedules([lambda count: rise(count + 1), after], [warmup])


def make_optimizer(
  config: OptimConfig, updates: int, *, schedule: optax.Schedule | None = None
) -> optax.GradientTransformation:
  """Builds the optimizer of `config.name` after a clip by global norm.

  Args:
    config: Settings of the optimizer.
    updates: Number of optimizer steps in the run, over which the schedule decays.
    schedule: Learning rate schedule; that of `make_schedule` by default.
  """
  optimizer = OPTIMIZERS[config.name].make(config, schedule or make_schedule(config, updates))
  clipped = optax.chain(clip_by_norm(config.max_grad_norm or _MAX_NORM), optimizer)
  return skip_spikes(clipped, config.max_spike) if config.max_spike else clipped


# Last names of params with weight decay: matrices and embeddings, learned positions among them.
_DECAYED = ("kernel", "embedding", "positions", "lora_a", "lora_b")


def _decayed(params: Params) -> Params:
  # Stacked norms and biases are [L, D], so rank does not identify matrices; the last name does.
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in _DECAYED, params)


def _adamw(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
  return optax.adamw(
    schedule,
    b1=config.b1,
    b2=config.b2,
    eps=config.eps,
    mu_dtype=config.mu_dtype,
    weight_decay=config.weight_decay,
    mask=_decayed,
  )


def _adafactor(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
  # Not optax.adafactor, whose weight decay is not multiplied by the learning rate. Updates are not
  # multiplied by the norm of the params, so that the learning rates of AdamW fit.
  return optax.chain(
    optax.scale_by_factored_rms(),
    optax.clip_by_block_rms(1.0),
    optax.add_decayed_weights(config.weight_decay, _decayed),
    optax.scale_by_learning_rate(schedule),
  )


def _lion(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
  # The decays of https://arxiv.org/abs/2302.06675, which are not those of AdamW.
  return optax.lion(
    schedule, mu_dtype=config.mu_dtype, weight_decay=config.weight_decay, mask=_decayed
  )


def _muon(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
  def stacked(path: Any, param: jax.Array) -> Any:
    """Axes of the matrices [..., in, out] of layers; None is left to AdamW."""
    if path[-1].key != "kernel" or not any(key.key == "layers" for key in path):
      return None
    return optax.contrib.MuonDimensionNumbers(param.ndim - 2, param.ndim - 1)

  return optax.contrib.muon(
    schedule,
    weight_decay=config.weight_decay,
    weight_decay_mask=_decayed,
    mu_dtype=config.mu_dtype,
    adam_b1=config.b1,
    adam_b2=config.b2,
    adam_weight_decay=config.weight_decay,
    muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(stacked, params),
    consistent_rms=0.2,  # That of AdamW, so that its learning rates fit: arXiv 2502.16982.
  )


class ScheduleFreeState(NamedTuple):
  """State of `_schedule_free`.

  Attributes:
    count: Number of updates.
    total: Sum of the weights of the average.
    largest: Largest learning rate.
    b1: Weight of the averaged params in those that the gradient is of.
    z: Params that the steps are taken with.
    inner: State of the second moment.
  """

  count: jax.Array
  total: jax.Array
  largest: jax.Array
  b1: jax.Array
  z: Params
  inner: optax.OptState


def _schedule_free(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
  """Builds schedule-free AdamW, https://arxiv.org/abs/2405.15682, Algorithm 1.

  Unlike those of optax.contrib its params are the average x, which is what a run evaluates, samples
  from and exports. The gradient is that of `gradient_params`.
  """
  base = optax.chain(
    optax.scale_by_rms(config.b2, config.eps, eps_in_sqrt=False, bias_correction=True),
    optax.add_decayed_weights(config.weight_decay, _decayed),
  )

  def init(params: Params) -> ScheduleFreeState:
    z = jax.tree.map(jnp.copy, params)  # Both are donated.
    count, total, largest = jnp.zeros((), jnp.int32), jnp.zeros(()), jnp.zeros(())
    return ScheduleFreeState(count, total, largest, jnp.float32(config.b1), z, base.init(params))

  def update(updates: Params, state: Any, params: Params | None = None):
    point = gradient_params(state, params)
    steps, inner = base.update(updates, state.inner, point)
    rate = jnp.float32(schedule(state.count))
    largest = jnp.maximum(state.largest, rate)
    total = state.total + largest**2
    share = jnp.where(total > 0, largest**2 / jnp.maximum(total, 1e-30), 0.0)
    z = jax.tree.map(lambda z, u: z - (rate * u).astype(z.dtype), state.z, steps)
    moved = jax.tree.map(lambda x, z: (share * (z - x)).astype(x.dtype), params, z)
    return moved, ScheduleFreeState(state.count + 1, total, largest, state.b1, z, inner)

  return optax.GradientTransformation(init, update)


def gradient_params(opt_state: optax.OptState, params: Params) -> Params:
  """Returns the params that an optimizer needs the gradient of, which are mostly `params`."""
  is_state = lambda node: isinstance(node, ScheduleFreeState)  # noqa: E731
  is_other = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
  for state in filter(is_state, jax.tree.leaves(opt_state, is_leaf=is_state)):
    # z + b1 (x - z), so that where both are equal it is bitwise their value.
    between = lambda z, x, b1=state.b1: x if is_other(z) else z + (b1 * (x - z)).astype(x.dtype)  # noqa: E731
    params = jax.tree.map(between, state.z, params, is_leaf=is_other)
  return params


class _Kind(NamedTuple):
  """Optimizer: `(config, schedule) -> optax transformation`, and the settings it alone may read."""

  make: Callable[[OptimConfig, optax.Schedule], optax.GradientTransformation]
  reads: tuple[str, ...]


OPTIMIZERS = {
  "adamw": _Kind(_adamw, ("schedule", "b1", "b2", "eps", "mu_dtype")),
  "adafactor": _Kind(_adafactor, ("schedule",)),
  "lion": _Kind(_lion, ("schedule", "mu_dtype")),
  "muon": _Kind(_muon, ("schedule", "b1", "b2", "mu_dtype")),
  "schedule_free": _Kind(_schedule_free, ("b1", "b2", "eps")),
}
_MAX_NORM = 1e18  # The squares of larger gradients overflow the second moment in float32.


def global_norm(tree: Params) -> jax.Array:
  """Norm of all entries together, finite if they are: their squares may overflow float32."""
  norm = optax.tree.norm(tree)

  def scaled() -> jax.Array:
    largest = optax.tree.norm(tree, ord=jnp.inf)
    shares = jax.tree.map(lambda x: x / largest.astype(x.dtype), tree)
    return largest.astype(norm.dtype) * optax.tree.norm(shares)

  return jax.lax.cond(jnp.isinf(norm), scaled, lambda: norm)


def clip_by_norm(max_norm: float) -> optax.GradientTransformation:
  """Builds `optax.clip_by_global_norm` for gradients of any finite norm."""

  def clip(updates: Params, state: optax.OptState, params: Params | None = None):
    del params
    norm = global_norm(updates)
    clipped = lambda x: jnp.where(norm < max_norm, x, x / norm.astype(x.dtype) * max_norm)  # noqa: E731
    return jax.tree.map(clipped, updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), clip)


_NORMS = 128  # A median of so many follows a drift and does not notice a spike.
_FEWEST_NORMS = 16


class SpikeState(NamedTuple):
  """State of `skip_spikes`: last norms [128], their number, the last verdict, the inner state."""

  norms: jax.Array
  count: jax.Array
  spiked: jax.Array
  inner: optax.OptState


def skip_spikes(inner: optax.GradientTransformation, factor: float) -> optax.GradientTransformation:
  """Skips the updates of gradients whose norm is above `factor` medians of the last 128 norms.

  Such an update changes neither params nor the inner state. Its norm counts from then on, so that a
  run whose gradients have grown for good learns on after 64 of them.
  """

  def init(params: Params) -> SpikeState:
    zero = jnp.zeros((), jnp.int32)
    return SpikeState(jnp.zeros(_NORMS), zero, jnp.zeros((), bool), inner.init(params))

  def update(updates: Params, state: Any, params: Params | None = None):
    norm = global_norm(updates).astype(jnp.float32)
    kept = jnp.where(jnp.arange(_NORMS) < state.count, state.norms, jnp.nan)
    spiked = (state.count >= _FEWEST_NORMS) & (norm > factor * jnp.nanmedian(kept))
    found, after = inner.update(updates, state.inner, params)
    found = jax.tree.map(lambda x: jnp.where(spiked, jnp.zeros_like(x), x), found)
    after = jax.tree.map(lambda new, old: jnp.where(spiked, old, new), after, state.inner)
    norms = state.norms.at[state.count % _NORMS].set(norm)
    return found, SpikeState(norms, state.count + 1, spiked, after)

  return optax.GradientTransformation(init, update)


def init_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
  """State before the first step. Steps donate their state: do not use `params` afterwards."""
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def _units(metrics: Metrics, name: str) -> jax.Array:
  """Number of units that a metric averages, stacked over parts."""
  default = metrics.get("weight", jnp.ones_like(metrics["loss"]))
  return metrics.get(f"weight/{name.removeprefix('term/')}", default)


def _average(values: jax.Array, weights: jax.Array) -> jax.Array:
  # A part without a unit counts for nothing, even if its value is undefined.
  total = jnp.sum(jnp.where(weights > 0, values * weights, 0.0))
  weight = jnp.sum(weights)
  return jnp.where(weight > 0, total / jnp.maximum(weight, 1e-9), jnp.mean(values))


def merge_metrics(metrics: Metrics) -> Metrics:
  """Reduces metrics stacked over parts: sums counts, keeps extremes, averages the rest.

  Averages are over the units of each metric; `types.LossFn` lists the names.
  """
  terms = [name for name in metrics if name.startswith("term/")]
  rest = metrics["loss"] - sum(metrics[name] for name in terms) if terms else metrics["loss"]
  merged = {}
  for name, values in (metrics | {"loss": rest}).items():
    if name in ("weight", "tokens") or name.startswith("weight/"):
      merged[name] = jnp.sum(values)
    elif name.endswith("/max"):
      merged[name] = jnp.max(values)
    elif name.endswith("/min"):
      merged[name] = jnp.min(values)
    elif name == "skipped_steps":  # A step that was skipped for want of units has no weight.
      merged[name] = jnp.mean(values)
    else:
      merged[name] = _average(values, _units(metrics, name))
  for name in terms:
    merged["loss"] += merged[name]
  return merged


def reported(metrics: Metrics) -> Metrics:
  """Returns the metrics without the entries that only serve to merge micro-batches."""
  return {n: x for n, x in metrics.items() if not n.startswith(("weight/", "term/", "whole_batch"))}


def _split_rows(batch, parts: int):
  """Splits every leaf [B, ...] into [parts, B / parts, ...]."""

  def split(x: jax.Array) -> jax.Array:
    if x.shape[0] % parts:
      raise ValueError(f"batch of {x.shape[0]} rows cannot be cut into {parts} equal parts")
    # Strided, so that each part keeps an equal share of every device's rows.
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

  return jax.tree.map(split, batch)


def gradients(
  loss_fn: LossFn, params: Params, batch, key: jax.Array, microbatches: int = 1
) -> tuple[Params, Metrics]:
  """Gradient and metrics of `loss_fn` over a batch, accumulated over `microbatches`.

  The result is exact even if the loss has terms that are means over different units, if it reports
  their numbers as `types.LossFn` says: micro-batches are then weighted by them, each term on its
  own.

  Args:
    loss_fn: `(params, batch, key) -> (loss, metrics)`.
    params: Tree to differentiate with respect to.
    batch: Tree of arrays with a common leading axis B, divisible by `microbatches`.
    key: Random key, folded with the index of the micro-batch if there are several.
    microbatches: Number of micro-batches; more of them need less memory.

  Returns:
    Gradient and metrics, including `loss`.

  Raises:
    ValueError: The rows do not split, or the loss compares the rows of a batch.
  """
  if microbatches == 1:
    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key)
    return grads, metrics | {"loss": loss}

  parts, order = _split_rows(batch, microbatches), jnp.arange(microbatches)
  params = jax.tree.map(jnp.asarray, params)

  def evaluate(index: jax.Array, part: Any, params: Params = params) -> Metrics:
    loss, metrics = loss_fn(params, part, jax.random.fold_in(key, index))
    return metrics | {"loss": loss}

  names = jax.eval_shape(lambda: evaluate(order[0], jax.tree.map(lambda x: x[0], parts)))
  if "whole_batch" in names:
    raise ValueError(
      f"this loss compares the rows of a batch, which {microbatches} micro-batches would cut; set"
      " microbatches to 1"
    )
  terms = [name for name in names if name.startswith("term/")]
  shares = {}
  if terms:
    # The numbers of units depend on masks alone, so the compiler removes the model from this pass.
    def count(xs: Any) -> Metrics:
      metrics = evaluate(*xs)
      return {name: _units(metrics, name) for name in ("loss", *terms)}

    units = jax.lax.map(count, (order, parts))
    shares = {name: x / jnp.maximum(jnp.sum(x), 1e-9) for name, x in units.items()}

  def scaled(params: Params, index: jax.Array, part: Any, share: Metrics):
    metrics = evaluate(index, part, params)
    if not terms:
      return metrics["loss"], metrics
    rest = metrics["loss"] - sum(metrics[name] for name in terms)
    return share["loss"] * rest + sum(share[name] * metrics[name] for name in terms), metrics

  def accumulate(total: Params, xs: Any):
    (_, metrics), grads = jax.value_and_grad(scaled, has_aux=True)(params, *xs)
    weight = jnp.ones(()) if terms else metrics.get("weight", jnp.ones(()))
    return jax.tree.map(lambda t, g: t + weight * g, total, grads), metrics

  # Summed in float32: params may be bfloat16.
  zero = jax.tree.map(
    lambda p: jnp.zeros_like(p, dtype=jnp.promote_types(p.dtype, jnp.float32)), params
  )
  total, metrics = jax.lax.scan(accumulate, zero, (order, parts, shares))
  scale = jnp.ones(())
  if not terms:
    weight = jnp.sum(metrics["weight"]) if "weight" in metrics else jnp.float32(microbatches)
    scale = 1 / jnp.maximum(weight, 1e-9)
  grads = jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), total, params)
  return grads, merge_metrics(metrics)


def update(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  state: TrainState,
  batch,
  key: jax.Array,
  *,
  microbatches: int = 1,
) -> tuple[TrainState, Metrics]:
  """One optimizer step, not jitted. A step without a finite gradient or a unit changes no params.

  Such a step leaves params and optimizer state bitwise unchanged, advances `state.step` and sets
  the metric `skipped_steps` to 1. A batch has no unit if the metric `weight` is 0.
  """
  point = gradient_params(state.opt_state, state.params)
  grads, metrics = gradients(loss_fn, point, batch, key, microbatches)
  grad_norm = global_norm(grads)
  ok = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["loss"])
  if "weight" in metrics:
    ok &= metrics["weight"] > 0
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  # Chosen by value: multiplying a NaN update by zero would still be NaN.
  params, opt_state = jax.tree.map(
    lambda new, old: jnp.where(ok, new, old), (params, opt_state), (state.params, state.opt_state)
  )
  metrics |= {"grad_norm": grad_norm, "skipped_steps": 1.0 - ok}
  if spikes := optax.tree.get_all_with_path(opt_state, "spiked"):
    spiked = jnp.stack([spike for _, spike in spikes]).any()
    metrics["spikes"] = jnp.where(ok & spiked, 1.0, 0.0)
  return TrainState(state.step + 1, params, opt_state), metrics


def jit_step(step: Callable[..., Any], state_shardings: Any = None) -> Callable[..., Any]:
  """Jits a step with a donated state.

  Args:
    step: `(state, ...) -> (state, metrics)`.
    state_shardings: Tree of shardings that fixes the layout of the state. Without it, the compiler
      may change the layout on a mesh, and the second call recompiles.
  """
  if state_shardings is None:
    jitted = jax.jit(step, donate_argnums=0)
  else:
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, None))
  return nonfinite.watched(jitted, step)


def join(left: Params, right: Params) -> Params:
  """Merges two nested dicts that have no leaves in common."""
  joined = dict(left)
  for name, value in right.items():
    joined[name] = join(left[name], value) if name in left else value
  return joined


class _FrozenStep(NamedTuple):
  step: Any  # Jitted.
  frozen: Params

  def __call__(self, state: TrainState, *inputs):
    return self.step(state, self.frozen, *inputs)

  def lower(self, state: TrainState, *inputs):
    return self.step.lower(state, self.frozen, *inputs)


def freeze(
  make_step: Callable[..., Callable[..., Any]],
  apply_fn: Callable[..., Any],
  frozen: Params,
  *,
  state_shardings: Any = None,
) -> Callable[..., Any]:
  """Builds a step whose state holds only some of the params; the others are frozen.

  Frozen params have no gradient and no moments, and are not saved in checkpoints. They are passed
  to the compiled step as an argument; closing over them would store a second copy.

  Args:
    make_step: `(apply_fn, *, state_shardings) -> step`, a `make_x_step` with all else bound.
    apply_fn: Function of the full params.
    frozen: Params that `state.params` lacks; empty if none are frozen.
    state_shardings: See `jit_step`.

  Returns:
    `step(state, ...) -> (state, metrics)` with a donated state.
  """
  if not frozen:
    return make_step(apply_fn, state_shardings=state_shardings)

  def step(state: TrainState, frozen: Params, *inputs):
    def apply_joined(params: Params, *args, **kwargs):
      return apply_fn(join(frozen, params), *args, **kwargs)

    return make_step(apply_joined, state_shardings=state_shardings)(state, *inputs)

  return _FrozenStep(jit_step(step, state_shardings), frozen)


def make_train_step(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  *,
  microbatches: int = 1,
  state_shardings: Any = None,
) -> TrainStep:
  """Builds the jitted `step(state, batch, key) -> (state, metrics)` with a donated state.

  Args:
    loss_fn: `(params, batch, key) -> (loss, metrics)`; see `rlhf_jax.types.LossFn`.
    tx: Optimizer.
    microbatches: Number of micro-batches; the result does not depend on it.
    state_shardings: See `jit_step`; recommended on a mesh.

  Returns:
    The step. `key` is folded with `state.step`, so one key serves a whole run.
  """

  def step(state: TrainState, batch, key: jax.Array) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(key, state.step)
    state, metrics = update(loss_fn, tx, state, batch, key, microbatches=microbatches)
    return state, reported(metrics)

  return jit_step(step, state_shardings)


def _shuffle(batch, epoch_key: jax.Array, minibatches: int) -> tuple[Any, jax.Array]:
  """Shuffles a batch; returns its parts [minibatches, B / minibatches, ...] and a loss key."""
  order_key, loss_key = jax.random.split(epoch_key)
  order = jax.random.permutation(order_key, jax.tree.leaves(batch)[0].shape[0])
  return _split_rows(jax.tree.map(lambda x: x[order], batch), minibatches), loss_key


def split_epochs(
  batch, key: jax.Array, *, epochs: int, minibatches: int, microbatches: int = 1
) -> Any:
  """Stacks the micro-batches that `update_epochs` passes to the loss, in order.

  Args:
    batch: Tree of arrays with a common leading axis B.
    key: The key passed to `update_epochs`.
    epochs: Passes over the batch.
    minibatches: Optimizer steps per pass.
    microbatches: Micro-batches per minibatch.

  Returns:
    The tree with [epochs * minibatches * microbatches, B / (minibatches * microbatches), ...].
  """

  def epoch(epoch_key: jax.Array) -> Any:
    parts, _ = _shuffle(batch, epoch_key, minibatches)
    return jax.vmap(lambda part: _split_rows(part, microbatches))(parts)

  parts = jax.lax.map(epoch, jax.random.split(key, epochs))
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), parts)


def update_epochs(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  state: TrainState,
  batch,
  key: jax.Array,
  *,
  epochs: int,
  minibatches: int,
  microbatches: int = 1,
) -> tuple[TrainState, Metrics]:
  """Several epochs of shuffled minibatches over one batch as one scan, not jitted.

  Args:
    loss_fn: `(params, batch, key) -> (loss, metrics)`.
    tx: Optimizer.
    state: State before; its step is advanced by one, regardless of the number of minibatches.
    batch: Tree of arrays with a common leading axis, divisible by `minibatches`.
    key: Random key of the shuffles and the losses.
    epochs: Passes over the batch, each in a new order.
    minibatches: Optimizer steps per pass.
    microbatches: Micro-batches per minibatch.

  Returns:
    New state, and metrics with one entry per optimizer step, [epochs * minibatches] each.
  """

  def epoch(state: TrainState, epoch_key: jax.Array):
    parts, loss_key = _shuffle(batch, epoch_key, minibatches)

    def minibatch(state: TrainState, xs):
      index, part = xs
      part_key = jax.random.fold_in(loss_key, index)
      return update(loss_fn, tx, state, part, part_key, microbatches=microbatches)

    return jax.lax.scan(minibatch, state, (jnp.arange(minibatches), parts))

  end, metrics = jax.lax.scan(epoch, state, jax.random.split(key, epochs))
  return end._replace(step=state.step + 1), jax.tree.map(lambda x: x.reshape(-1), metrics)
