"""Our side of `compare`: one piece of work, run by order; see `peers/protocol.py`.

`compare` starts it as python -m experiments.bench.ours FILE WORK.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench import measure, works
from experiments.bench.peers import protocol
from experiments.bench.shapes import Shape, set_up
from rlhf_jax import entry
from rlhf_jax.losses.logprobs import next_token_logprobs
from rlhf_jax.models import count_params
from rlhf_jax.types import Rollout

WORKS = {
  **{name: works.TRAIN_STEPS[name] for name in ("sft", "reward_model", "dpo")},
  **works.SAMPLING,
  **works.ITERATIONS,
}


def main() -> None:
  entry.tune()
  peer = protocol.Peer()
  setup = set_up(Shape(**peer.spec["shape"]))
  run = WORKS[peer.work](setup).run
  whole = functools.partial(setup.policy.apply, scored=0)
  tokens = setup.tokens[:, 0]
  logprobs = jax.jit(lambda params: next_token_logprobs(whole(params, tokens), tokens))
  nll = -float(jnp.mean(logprobs(setup.params)[:, 1:]))

  taken = 0

  def once() -> dict[str, Any]:
    nonlocal taken
    with measure.compilations() as compiled:
      result = jax.block_until_ready(run())
    counts: dict[str, Any] = {"compiles": len(compiled)}
    if isinstance(result, Rollout):
      return counts | {"generated": int(result.response_mask.sum())}
    state, metrics = result
    before, taken = taken, _updates(state)
    generated = {}
    if peer.work in works.ITERATIONS:
      # Responses of the policy; the opponent of Nash-MD samples as many.
      sampled = 2 if peer.work == "nash_md" else 1
      generated["generated"] = sampled * int(metrics["tokens"])
    return counts | generated | {"loss": float(metrics["loss"]), "updates": taken - before}

  peer.serve(once, params=count_params(setup.params), nll=nll)


def _updates(state: Any) -> int:
  """Number of optimizer steps taken, from the count of the learning rate schedule."""
  leaves = jax.tree_util.tree_leaves_with_path(getattr(state, "train", state).opt_state)
  return max(int(leaf) for path, leaf in leaves if str(path[-1]) == ".count")


if __name__ == "__main__":
  main()
