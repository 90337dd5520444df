"""Supervised losses on given tokens.

Weighted per response, `nll` is the loss of iterated fine-tuning: ReST keeps the responses that pass
a threshold, RAFT keeps the best of N (`shaping.selection_weights`), and SuperHF adds
`kappa * kl.full_kl(ref_logits, logits)`. PPO-ptx adds `nll` to the loss of PPO.
"""

import jax

from rlhf_jax.losses import logprobs as logprobs_lib


def nll(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """Negative log-likelihood of each token given the ones before it.

  Args:
    logits: [B, T, V] float, `logits[:, t]` predicts `tokens[:, t + 1]`.
    tokens: [B, T] int.

  Returns:
    [B, T] float32, nats. Column 0 has no prediction and is 0; exclude it from the mask.
  """
  return -logprobs_lib.next_token_logprobs(logits, tokens)
