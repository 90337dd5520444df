"""Our side of a piece of work that is run by order; see `peers/protocol.py`.

Other benchmarks start it as python -m experiments.bench.ours FILE WORK.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax import entry
from rlhf_jax.losses.logprobs import next_token_logprobs
from rlhf_jax.models import count_params
from rlhf_jax.types import Rollout
from . import measure, works
from .peers import protocol
from .shapes import Setup, Shape, set_up

WORKS = {
  **{name: works.TRAIN_STEPS[name] for name in ("sft", "reward_model", "dpo")},
  **works.SAMPLING,
  **works.ITERATIONS,
}


def serve(peer: protocol.Peer) -> None:
  """Sets up the work and runs it by order."""
  since = peer.spec.get("started", time.time())
  setup = set_up(Shape(**peer.spec["shape"]))
  run = WORKS[peer.work](setup).run
  ready, first, taken = time.time() - since, 0.0, 0

  def once() -> dict[str, Any]:
    nonlocal first, taken
    with measure.compilations() as compiled:
      result = jax.block_until_ready(run())
    first = first or time.time() - since
    counts: dict[str, Any] = {"compiles": len(compiled)}
    if isinstance(result, Rollout):
      return counts | {"generated": int(result.response_mask.sum())}
    state, metrics = result
    before, taken = taken, _updates(state)
    counts |= {"loss": float(metrics["loss"]), "updates": taken - before}
    if peer.work in works.ITERATIONS:
      # Responses of the policy; the opponent of Nash-MD samples as many.
      sampled = 2 if peer.work == "nash_md" else 1
      counts["generated"] = sampled * int(metrics["tokens"])
    return counts

  def facts() -> dict[str, Any]:
    largest = measure.largest_program()
    return {
      "params": count_params(setup.params),
      "nll": _nll(setup),
      "set_up_seconds": ready,
      "first_seconds": first,
      "largest_program": largest,
    }

  peer.serve(once, facts)


def _nll(setup: Setup) -> float:
  """Mean negative log-likelihood of the first rows of the pairs."""
  whole, tokens = functools.partial(setup.policy.apply, scored=0), setup.tokens[:, 0]
  logprobs = jax.jit(lambda params: next_token_logprobs(whole(params, tokens), tokens))
  return -float(jnp.mean(logprobs(setup.params)[:, 1:]))


def _updates(state: Any) -> int:
  """Number of optimizer steps taken, from the count of the learning rate schedule."""
  leaves = jax.tree_util.tree_leaves_with_path(getattr(state, "train", state).opt_state)
  return max(int(leaf) for path, leaf in leaves if str(path[-1]) == ".count")


if __name__ == "__main__":
  entry.tune()
  serve(protocol.Peer())
