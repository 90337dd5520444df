"""Losses on preferences: log-probabilities of whole responses in, [B] losses out.

Log-probabilities are sums over the tokens of a response. Where a variant needs means per token
(`simpo_loss`, `orpo_loss`, some uses of `ipo_loss`), the caller divides by the length.

`h = log pi(y | x) - log pi_ref(y | x)` denotes the log-ratio of a response: `h_w` for the chosen
one and `h_l` for the rejected one; `beta * h` is the implicit reward. Losses are unreduced, so a
method that adds or reweights terms needs no separate function:

- RPO and CPO: `dpo_loss` or `cpo_loss` plus the negative log-likelihood of the chosen response.
- ORPO: `orpo_loss` plus the mean negative log-likelihood of the chosen response.
- MPO: 0.8 `dpo_loss` + 0.2 `bco_pair_loss` + the negative log-likelihood of the chosen response.
- WPO: `dpo_loss` times the `wpo_weights` of both responses.
- XPO and VPO: `dpo_loss` plus `value_bonus`.
- LD-DPO: `dpo_loss` of the results of `length_desensitized_logprobs`.
- f-DPO: a loss of `h_w - h_l` with one of `DIVERGENCE_SCORES` in place of both.
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.losses import masked, reward

# Closer to 0, 1 - exp(x) loses its digits, and the odds of a probability of 1 are infinite.
_MAX_MEAN_LOGPROB = -1e-6


def _log_ratios(
  policy_chosen: jax.Array,
  policy_rejected: jax.Array,
  ref_chosen: jax.Array,
  ref_rejected: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Checks the four arrays of a pairwise loss; returns `h_w` and `h_l`."""
  arrays = [policy_chosen, policy_rejected, ref_chosen, ref_rejected]
  chex.assert_rank(arrays, 1)
  chex.assert_equal_shape(arrays)
  return policy_chosen - ref_chosen, policy_rejected - ref_rejected


@masked.elementwise
def dpo_loss(
  policy_chosen: jax.Array,
  policy_rejected: jax.Array,
  ref_chosen: jax.Array,
  ref_rejected: jax.Array,
  *,
  beta: float = 0.1,
  label_smoothing: float = 0.0,
) -> jax.Array:
  """Direct preference optimisation: `-log sigmoid(beta (h_w - h_l))`.

  Rafailov et al., 2023, https://arxiv.org/abs/2305.18290, eq. 7: the Bradley-Terry likelihood of
  implicit rewards. Label smoothing is conservative DPO (https://ericmitchell.ai/cdpo.pdf):
  the loss keeps a minimum at a finite margin. TRL ignores it for this loss.

  Args:
    policy_chosen: [B] log pi(y_w | x) of the preferred response, summed over its tokens.
    policy_rejected: [B] log pi(y_l | x) of the other one.
    ref_chosen: [B] log pi_ref(y_w | x).
    ref_rejected: [B] log pi_ref(y_l | x).
    beta: Strength of the implied KL penalty; larger stays closer to the reference.
    label_smoothing: Assumed probability that a label is flipped.

  Returns:
    [B] loss, nats; log 2 where policy and reference agree.
  """
  chosen, rejected = _log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
  return reward.bradley_terry_loss(beta * chosen, beta * rejected, label_smoothing=label_smoothing)


@masked.elementwise
def ipo_loss(
  policy_chosen: jax.Array,
  policy_rejected: jax.Array,
  ref_chosen: jax.Array,
  ref_rejected: jax.Array,
  *,
  beta: float = 0.1,
) -> jax.Array:
  """Identity preference optimisation: `(h_w - h_l - 1 / (2 beta))^2`.

  Azar et al., 2023, https://arxiv.org/abs/2310.12036, eq. 17, with `beta` for its tau. The margin
  of certain preferences stays finite. The paper's log-probabilities are sums. TRL uses means per
  token; to reproduce that, divide the arrays by the lengths.

  Args:
    policy_chosen: [B] log pi(y_w | x).
    policy_rejected: [B] log pi(y_l | x).
    ref_chosen: [B] log pi_ref(y_w | x).
    ref_rejected: [B] log pi_ref(y_l | x).
    beta: Strength of the KL penalty.

  Returns:
    [B] loss.
  """
  target = jnp.full_like(policy_chosen, 0.5 / beta)
  return pair_regression_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, target)


@masked.elementwise
def hinge_loss(
  policy_chosen: jax.Array,
  policy_rejected: jax.Array,
  ref_chosen: jax.Array,
  ref_rejected: jax.Array,
  *,
  beta: float = 0.1,
) -> jax.Array:
  """Hinge on the implicit rewards: `max(0, 1 - beta (h_w - h_l))`.

  Liu et al., 2023 (RSO), https://arxiv.org/abs/2309.06657. `slic_loss` has no reference.

  Args:
    policy_chosen: [B] log pi(y_w | x).
    policy_rejected: [B] log pi(y_l | x).
    ref_chosen: [B] log pi_ref(y_w | x).
    ref_rejected: [B] log pi_ref(y_l | x).
    beta: Inverse of the required margin of log-ratios.

  Returns:
    [B] loss.
  """
  chosen, rejected = _log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
  return jax.nn.relu(1 - beta * (chosen - rejected))


def robust_dpo_loss(
  policy_chosen: jax.Array,
  policy_rejected: jax.Array,
  ref_chosen: jax.Array,
  ref_rejected: jax.Array,
  *,
  beta: float = 0.1,
  label_smoothing: float = 0.0,
) -> jax.Array:
  """DPO that is unbiased when labels are flipped at a known rate.

  Chowdhury et al., 2024, https://arxiv.org/abs/2403.00409, section 3: with `l` the DPO loss and `s`
  the rate, `((1 - s) l(w, l) - s l(l, w)) / (1 - 2 s)`. Its mean over flips is the loss of clean
  labels; a single value may be negative. Not the label smoothing of `dpo_loss`.

  Args:
    policy_chosen: [B] log pi(y_w | x).
    policy_rejected: [B] log pi(y_l | x).
    ref_chosen: [B] log pi_ref(y_w | x).
    ref_rejected: [B] log pi_ref(y_l | x).
    beta: Strength of the implied KL penalty.
    label_smoothing: Rate of flipped labels, below 1/2.

  Returns:
    [B] loss, nats.
  """
  arrays = policy_chosen, policy_rejected, ref_chosen, ref_rejected
  # Smoothing by this negative amount undoes the flips.
  undo = -label_smoothing / (1 - 2 * label_smoothing)
  return dpo_loss(*arrays, beta=beta, label_smoothing=undo)


@masked.elementwise
def exo_pair_loss(
  policy_chosen: jax.Array,
  policy_rejected: jax.Array,
  ref_chosen: jax.Array,
  ref_rejected: jax.Array,
  *,
  beta: float = 0.1,
  label_smoothing: float = 1e-3,
) -> jax.Array:
  """Exact optimisation of a pair: the reverse KL from the policy's preference to the label.

  Ji et al., 2024, https://arxiv.org/abs/2402.00856, eq. 16: `KL((p, 1 - p) || (1 - s, s))` with
  `p = sigmoid(beta (h_w - h_l))`.

  Args:
    policy_chosen: [B] log pi(y_w | x).
    policy_rejected: [B] log pi(y_l | x).
    ref_chosen: [B] log pi_ref(y_w | x).
    ref_rejected: [B] log pi_ref(y_l | x).
    beta: Strength of the implied KL penalty.
    label_smoothing: `s`, above 0 because a certain label has an infinite divergence.

  Returns:
    [B] loss, nats.
  """
  chosen, rejected = _log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
  margin = beta * (chosen - rejected)
  right = jax.nn.log_sigmoid(margin) - jnp.log1p(-label_smoothing)
  wrong = jax.nn.log_sigmoid(-margin) - jnp.log(label_smoothing)
  return jax.nn.sigmoid(margin) * right + jax.nn.sigmoid(-margin) * wrong


@masked.elementwise
def nca_pair_loss(
  policy_chosen: jax.Array,
  policy_rejected: jax.Array,
  ref_chosen: jax.Array,
  ref_rejected: jax.Array,
  *,
  beta: float = 0.1,
) -> jax.Array:
  """Noise contrastive alignment: the rewards are absolute, which keeps h_w from falling with h_l.

  Chen et al., 2024, https://arxiv.org/abs/2402.05369, for two responses with rewards 0 and
  minus infinity: `-ls(beta h_w) - ls(-beta h_w) / 2 - ls(-beta h_l) / 2`, `ls = log sigmoid`.

  Args:
    policy_chosen: [B] log pi(y_w | x).
    policy_rejected: [B] log pi(y_l | x).
    ref_chosen: [B] log pi_ref(y_w | x).
    ref_rejected: [B] log pi_ref(y_l | x).
    beta: Strength of the implied KL penalty.

  Returns:
    [B] loss, nats.
  """
  chosen, rejected = _log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
  noise = jax.nn.log_sigmoid(-beta * chosen) + jax.nn.log_sigmoid(-beta * rejected)
  return -jax.nn.log_sigmoid(beta * chosen) - 0.5 * noise


@masked.elementwise
def bco_pair_loss(
  policy_chosen: jax.Array,
  policy_rejected: jax.Array,
  ref_chosen: jax.Array,
  ref_rejected: jax.Array,
  *,
  beta: float = 0.1,
  shift: float | jax.Array = 0.0,
) -> jax.Array:
  """Binary classifier optimisation: `-ls(beta h_w - shift) - ls(-(beta h_l - shift))`.

  Jung et al., 2024, https://arxiv.org/abs/2404.04656. The shift is the mean implicit reward seen
  so far, constant in the gradient: the `mean` of `reward.update_moments` over `beta * h_w` and
  `beta * h_l`. TRL's loss of this name has no shift, like the default here.

  Args:
    policy_chosen: [B] log pi(y_w | x).
    policy_rejected: [B] log pi(y_l | x).
    ref_chosen: [B] log pi_ref(y_w | x).
    ref_rejected: [B] log pi_ref(y_l | x).
    beta: Strength of the implied KL penalty.
    shift: Scalar, in units of the implicit reward.

  Returns:
    [B] loss, nats.
  """
  chosen, rejected = _log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
  shift = jax.lax.stop_gradient(shift)
  above = jax.nn.log_sigmoid(beta * chosen - shift)
  return -above - jax.nn.log_sigmoid(shift - beta * rejected)


@masked.elementwise
def sppo_loss(
  policy: jax.Array, ref: jax.Array, win_probability: jax.Array, *, beta: float = 0.1
) -> jax.Array:
  """Self-play preference optimisation: `(h - (P - 1/2) / beta)^2`.

  Wu et al., 2024, https://arxiv.org/abs/2405.00675, eq. 4.7, with `beta` for its 1 / eta. The
  log-ratio to the sampling policy is fitted to the probability of beating that policy.

  Args:
    policy: [B] log pi(y | x) of one response, summed over its tokens.
    ref: [B] log-probability under the policy that sampled it.
    win_probability: [B] in [0, 1] against that policy, constant in the gradient.
    beta: Inverse step size of the multiplicative update.

  Returns:
    [B] loss.
  """
  chex.assert_rank([policy, ref, win_probability], 1)
  chex.assert_equal_shape([policy, ref, win_probability])
  target = (jax.lax.stop_gradient(win_probability) - 0.5) / beta
  return jnp.square(policy - ref - target)


def sppo_hard_loss(
  policy_chosen: jax.Array,
  policy_rejected: jax.Array,
  ref_chosen: jax.Array,
  ref_rejected: jax.Array,
  *,
  beta: float = 0.1,
) -> jax.Array:
  """`sppo_loss` of both responses, where the chosen one always wins and the other one never does.

  Args:
    policy_chosen: [B] log pi(y_w | x).
    policy_rejected: [B] log pi(y_l | x).
    ref_chosen: [B] log pi_ref(y_w | x).
    ref_rejected: [B] log pi_ref(y_l | x).
    beta: Inverse step size of the multiplicative update.

  Returns:
    [B] loss, `(h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2`.
  """
  won = sppo_loss(policy_chosen, ref_chosen, jnp.ones_like(policy_chosen), beta=beta)
  lost = sppo_loss(policy_rejected, ref_rejected, jnp.zeros_like(policy_rejected), beta=beta)
  return won + lost


def _everywhere(x: jax.Array) -> jax.Array:
  """Replicates `x` [B]: on an explicit mesh, rows of one axis cannot be compared to each other."""
  sharding = jax.typeof(x).sharding
  if sharding.spec[0] is None:
    return x
  return jax.sharding.reshard(x, sharding.update(spec=jax.P(None)))


def _ranks(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Number of unmasked rows that come before each row when `x` is sorted; the sort is stable."""
  other, place = _everywhere(x)[None, :], jnp.arange(x.shape[0])
  earlier = place[None, :] < place[:, None]
  before = (other < x[:, None]) | ((other == x[:, None]) & earlier)
  return jnp.sum(before & _everywhere(mask)[None, :], axis=1)


def _transport_loss(
  high: jax.Array,
  low: jax.Array,
  mask: jax.Array | None,
  beta: float,
  label_smoothing: float,
) -> jax.Array:
  """Bradley-Terry loss of each row of `high` against the row of `low` with the same rank.

  Ranks are counted instead of sorted: this partitions over a mesh and ignores masked rows.
  """
  mask = jnp.ones_like(high, bool) if mask is None else mask
  chex.assert_equal_shape([high, mask])
  high, low = (jnp.where(mask, x, 0.0) for x in (high, low))
  same_rank = _ranks(high, mask)[:, None] == _everywhere(_ranks(low, mask))[None, :]
  partner = jnp.where(same_rank & _everywhere(mask)[None, :], _everywhere(low)[None, :], 0.0)
  loss = reward.bradley_terry_loss(
    beta * high, beta * jnp.sum(partner, axis=1), label_smoothing=label_smoothing
  )
  return jnp.where(mask, loss, 0.0)


def aot_loss(
  policy_chosen: jax.Array,
  policy_rejected: jax.Array,
  ref_chosen: jax.Array,
  ref_rejected: jax.Array,
  *,
  beta: float = 0.1,
  label_smoothing: float = 0.0,
  mask: jax.Array | None = None,
) -> jax.Array:
  """Alignment by optimal transport, paired: the policy's margins should dominate the reference's.

  Melnyk et al., 2024, https://arxiv.org/abs/2406.05882. The margins `log pi(y_w) - log pi(y_l)` of
  policy and reference are each sorted over the batch. Margins of equal rank enter the DPO loss as a
  pair.

  Args:
    policy_chosen: [B] log pi(y_w | x).
    policy_rejected: [B] log pi(y_l | x).
    ref_chosen: [B] log pi_ref(y_w | x).
    ref_rejected: [B] log pi_ref(y_l | x).
    beta: Strength of the implied KL penalty.
    label_smoothing: Assumed probability that a label is flipped.
    mask: [B] bool, False on rows to ignore; all count when None.

  Returns:
    [B] loss, nats, 0 where masked. Rows are not reordered: a row's loss is that of its policy
    margin and the reference margin of the same rank.
  """
  arrays = [masked.widen(x) for x in (policy_chosen, policy_rejected, ref_chosen, ref_rejected)]
  chex.assert_rank(arrays, 1)
  chex.assert_equal_shape(arrays)
  policy_chosen, policy_rejected, ref_chosen, ref_rejected = arrays
  policy_margin, ref_margin = policy_chosen - policy_rejected, ref_chosen - ref_rejected
  return _transport_loss(policy_margin, ref_margin, mask, beta, label_smoothing)


def aot_unpaired_loss(
  policy_chosen: jax.Array,
  policy_rejected: jax.Array,
  ref_chosen: jax.Array,
  ref_rejected: jax.Array,
  *,
  beta: float = 0.1,
  label_smoothing: float = 0.0,
  mask: jax.Array | None = None,
) -> jax.Array:
  """Alignment by optimal transport, unpaired: chosen log-ratios should dominate rejected ones.

  Like `aot_loss` (https://arxiv.org/abs/2406.05882), but for the sorted `h_w` and `h_l`. The
  pairing of chosen and rejected responses has no effect.

  Args:
    policy_chosen: [B] log pi(y_w | x).
    policy_rejected: [B] log pi(y_l | x).
    ref_chosen: [B] log pi_ref(y_w | x).
    ref_rejected: [B] log pi_ref(y_l | x).
    beta: Strength of the implied KL penalty.
    label_smoothing: Assumed probability that a label is flipped.
    mask: [B] bool, False on rows to ignore; all count when None.

  Returns:
    [B] loss, nats, 0 where masked. A row's loss is that of its chosen response and the rejected
    one of the same rank.
  """
  arrays = [masked.widen(x) for x in (policy_chosen, policy_rejected, ref_chosen, ref_rejected)]
  return _transport_loss(*_log_ratios(*arrays), mask, beta, label_smoothing)


@masked.elementwise
def apo_zero_loss(
  policy_chosen: jax.Array,
  policy_rejected: jax.Array,
  ref_chosen: jax.Array,
  ref_rejected: jax.Array,
  *,
  beta: float = 0.1,
) -> jax.Array:
  """Anchored preference optimisation, for chosen responses better than the model's own.

  D'Oosterlinck et al., 2024, https://arxiv.org/abs/2408.06266, eq. 7:
  `sigmoid(-beta h_w) + sigmoid(beta h_l)`: one goes up, the other down.

  Args:
    policy_chosen: [B] log pi(y_w | x).
    policy_rejected: [B] log pi(y_l | x).
    ref_chosen: [B] log pi_ref(y_w | x).
    ref_rejected: [B] log pi_ref(y_l | x).
    beta: Strength of the implied KL penalty.

  Returns:
    [B] loss in [0, 2].
  """
  chosen, rejected = _log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
  return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)


@masked.elementwise
def apo_down_loss(
  policy_chosen: jax.Array,
  policy_rejected: jax.Array,
  ref_chosen: jax.Array,
  ref_rejected: jax.Array,
  *,
  beta: float = 0.1,
) -> jax.Array:
  """Anchored preference optimisation, for chosen responses worse than the model's own.

  D'Oosterlinck et al., 2024, https://arxiv.org/abs/2408.06266, eq. 8:
  `sigmoid(beta h_w) + sigmoid(-beta (h_w - h_l))`: both go down, the rejected one further.

  Args:
    policy_chosen: [B] log pi(y_w | x).
    policy_rejected: [B] log pi(y_l | x).
    ref_chosen: [B] log pi_ref(y_w | x).
    ref_rejected: [B] log pi_ref(y_l | x).
    beta: Strength of the implied KL penalty.

  Returns:
    [B] loss in [0, 2].
  """
  chosen, rejected = _log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
  return jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(-beta * (chosen - rejected))


@masked.elementwise
def discopop_loss(
  policy_chosen: jax.Array,
  policy_rejected: jax.Array,
  ref_chosen: jax.Array,
  ref_rejected: jax.Array,
  *,
  beta: float = 0.1,
  tau: float = 0.05,
) -> jax.Array:
  """Log-ratio modulated loss: logistic for small margins, exponential for large ones.

  Lu et al., 2024, https://arxiv.org/abs/2406.08414, eq. 5: with `m = beta (h_w - h_l)` and
  `s = sigmoid(m / tau)`, `-(1 - s) log sigmoid(m) + s exp(-m)`.

  Args:
    policy_chosen: [B] log pi(y_w | x).
    policy_rejected: [B] log pi(y_l | x).
    ref_chosen: [B] log pi_ref(y_w | x).
    ref_rejected: [B] log pi_ref(y_l | x).
    beta: Strength of the implied KL penalty.
    tau: Width of the transition from one to the other, at most 1.

  Returns:
    [B] loss.
  """
  chosen, rejected = _log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
  margin = beta * (chosen - rejected)
  logistic = -jax.nn.sigmoid(-margin / tau) * jax.nn.log_sigmoid(margin)
  # One exponent: the two factors are 0 and infinite where the margin is far below 0.
  return logistic + jnp.exp(jax.nn.log_sigmoid(margin / tau) - margin)


@masked.elementwise
def cpl_loss(
  policy_chosen: jax.Array,
  policy_rejected: jax.Array,
  ref_chosen: jax.Array,
  ref_rejected: jax.Array,
  *,
  beta: float = 0.1,
  bias: float = 0.5,
) -> jax.Array:
  """Contrastive preference learning: `-log sigmoid(beta (h_w - bias h_l))`.

  Hejna et al., 2023, https://arxiv.org/abs/2310.13639, section 3: preferences over segments follow
  the regret, and `beta * log pi(a | s)` is the advantage of an action. The paper's main variant
  has no reference; pass zeros. With a reference (its CPL-KL) and a bias of 1 this is `dpo_loss`. To
  discount, scale the tokens' log-probabilities before summing them.

  Args:
    policy_chosen: [B] log pi(y_w | x), of a segment.
    policy_rejected: [B] log pi(y_l | x).
    ref_chosen: [B] log pi_ref(y_w | x).
    ref_rejected: [B] log pi_ref(y_l | x).
    beta: The paper's alpha.
    bias: The paper's lambda, in (0, 1]. Below 1 the loss grows when both log-ratios fall, which
      keeps the policy near the data.

  Returns:
    [B] loss, nats.
  """
  chosen, rejected = _log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
  return reward.bradley_terry_loss(beta * chosen, beta * bias * rejected)


PAIRWISE_LOSSES: dict[str, Callable[..., jax.Array]] = {
  "dpo": dpo_loss,
  "ipo": ipo_loss,
  "hinge": hinge_loss,
  "robust_dpo": robust_dpo_loss,
  "exo_pair": exo_pair_loss,
  "nca_pair": nca_pair_loss,
  "bco_pair": bco_pair_loss,
  "sppo_hard": sppo_hard_loss,
  "aot": aot_loss,
  "aot_unpaired": aot_unpaired_loss,
  "apo_zero": apo_zero_loss,
  "apo_down": apo_down_loss,
  "discopop": discopop_loss,
  "cpl": cpl_loss,
}
# Losses that take `label_smoothing`.
SMOOTHED = ("dpo", "robust_dpo", "exo_pair", "aot", "aot_unpaired")
# Losses that compare the pairs of a batch to each other and therefore take a `mask`.
OF_BATCHES = ("aot", "aot_unpaired")
# Losses of the difference of two log-ratios, which the scores of another divergence can replace.
OF_MARGINS = ("dpo", "ipo", "hinge", "robust_dpo", "exo_pair", "discopop")


def cpo_loss(
  policy_chosen: jax.Array,
  policy_rejected: jax.Array,
  *,
  beta: float = 0.1,
  label_smoothing: float = 0.0,
) -> jax.Array:
  """Contrastive preference optimisation: DPO with a uniform reference.

  Xu et al., 2024, https://arxiv.org/abs/2401.08417, eq. 3. This is the preference term; the method
  adds the negative log-likelihood of the chosen response.

  Args:
    policy_chosen: [B] log pi(y_w | x), summed over tokens.
    policy_rejected: [B] log pi(y_l | x).
    beta: Scale of the margin.
    label_smoothing: Assumed probability that a label is flipped.

  Returns:
    [B] loss, nats.
  """
  return simpo_loss(
    policy_chosen, policy_rejected, beta=beta, gamma=0.0, label_smoothing=label_smoothing
  )


@masked.elementwise
def simpo_loss(
  policy_chosen: jax.Array,
  policy_rejected: jax.Array,
  *,
  beta: float = 2.0,
  gamma: float = 0.5,
  label_smoothing: float = 0.0,
) -> jax.Array:
  """Simple preference optimisation: `-log sigmoid(beta (p_w - p_l) - gamma)`.

  Meng et al., 2024, https://arxiv.org/abs/2405.14734, eq. 6.

  Args:
    policy_chosen: [B] **mean** log-probability per token of the preferred response, p_w.
    policy_rejected: [B] mean log-probability per token of the other one, p_l.
    beta: Scale of the margin.
    gamma: Required margin, in units of the reward `beta * p`.
    label_smoothing: Assumed probability that a label is flipped.

  Returns:
    [B] loss, nats.
  """
  return reward.bradley_terry_loss(
    beta * policy_chosen, beta * policy_rejected, margin=gamma, label_smoothing=label_smoothing
  )


@masked.elementwise
def orpo_loss(
  policy_chosen: jax.Array, policy_rejected: jax.Array, *, beta: float = 0.1
) -> jax.Array:
  """Odds-ratio preference optimisation: `-beta log sigmoid(log odds(y_w) - log odds(y_l))`.

  Hong et al., 2024, https://arxiv.org/abs/2403.07691, eq. 7, with `beta` for its lambda and
  `odds(y) = p / (1 - p)`, where `log p` is the mean log-probability per token. This is the
  preference term; the method (eq. 6) adds the mean negative log-likelihood of the chosen response.

  Args:
    policy_chosen: [B] **mean** log-probability per token of the preferred response, below 0.
    policy_rejected: [B] mean log-probability per token of the other one.
    beta: Weight of the term.

  Returns:
    [B] loss, nats.
  """

  def log_odds(logprob: jax.Array) -> jax.Array:
    logprob = jnp.minimum(logprob, _MAX_MEAN_LOGPROB)
    return logprob - jnp.log(-jnp.expm1(logprob))

  return beta * reward.bradley_terry_loss(log_odds(policy_chosen), log_odds(policy_rejected))


@masked.elementwise
def slic_loss(
  policy_chosen: jax.Array,
  policy_rejected: jax.Array,
  policy_target: jax.Array,
  *,
  margin: float = 1.0,
  sft_weight: float = 0.1,
) -> jax.Array:
  """Likelihood calibration: `max(0, margin - log pi(y_w) + log pi(y_l)) - w log pi(y_target)`.

  Zhao et al., 2023 (SLiC-HF), https://arxiv.org/abs/2305.10425.

  Args:
    policy_chosen: [B] log pi(y_w | x).
    policy_rejected: [B] log pi(y_l | x).
    policy_target: [B] log pi of the supervised target, whose likelihood regularises.
    margin: Required difference, nats.
    sft_weight: Weight of the regulariser.

  Returns:
    [B] loss, nats.
  """
  chex.assert_rank([policy_chosen, policy_rejected, policy_target], 1)
  chex.assert_equal_shape([policy_chosen, policy_rejected, policy_target])
  return jax.nn.relu(margin - policy_chosen + policy_rejected) - sft_weight * policy_target


def kto_loss(
  policy: jax.Array,
  ref: jax.Array,
  desirable: jax.Array,
  policy_mismatched: jax.Array,
  ref_mismatched: jax.Array,
  *,
  beta: float = 0.1,
  desirable_weight: float = 1.0,
  undesirable_weight: float = 1.0,
  mask: jax.Array | None = None,
) -> jax.Array:
  """Kahneman-Tversky optimisation of single responses with a thumb up or down.

  Ethayarajh et al., 2024, https://arxiv.org/abs/2402.01306, eq. 7: `w sigmoid(-beta (h - z))` for
  a desirable response and `w sigmoid(beta (h - z))` for an undesirable one. The reference point `z`
  is `max(0, mean h')` over prompts with the response of another row. It estimates
  KL(policy || ref) and is constant in the gradient. If both mismatched arrays are equal, `z` is 0,
  and this is unpaired APO-zero (https://arxiv.org/abs/2408.06266).

  Args:
    policy: [B] log pi(y | x), summed over tokens.
    ref: [B] log pi_ref(y | x).
    desirable: [B] bool.
    policy_mismatched: [B] log pi(y' | x) with y' the response of another row.
    ref_mismatched: [B] log pi_ref(y' | x).
    beta: Strength of the implied KL penalty.
    desirable_weight: Weight of desirable rows, to balance unequal numbers.
    undesirable_weight: Weight of undesirable rows.
    mask: [B] bool, False on rows to ignore; all count when None.

  Returns:
    [B] loss in [0, weight], 0 where masked.
  """
  arrays = [masked.widen(x) for x in (policy, ref, policy_mismatched, ref_mismatched)]
  policy, ref, policy_mismatched, ref_mismatched = arrays
  mask = jnp.ones_like(policy, bool) if mask is None else mask
  chex.assert_rank(arrays, 1)
  chex.assert_equal_shape([*arrays, desirable, mask])
  kl = jax.nn.relu(masked.masked_mean(policy_mismatched - ref_mismatched, mask))
  gain = beta * (jnp.where(mask, policy - ref, 0.0) - jax.lax.stop_gradient(kl))
  up = desirable_weight * jax.nn.sigmoid(-gain)
  down = undesirable_weight * jax.nn.sigmoid(gain)
  return jnp.where(mask, jnp.where(desirable, up, down), 0.0)


@masked.elementwise
def pair_regression_loss(
  policy_first: jax.Array,
  policy_second: jax.Array,
  ref_first: jax.Array,
  ref_second: jax.Array,
  target: jax.Array,
) -> jax.Array:
  """Squared error of a difference of log-ratios: `(h_1 - h_2 - target)^2`.

  The target determines the method; it is constant in the gradient:

  | method     | target                          | reference             | source               |
  |------------|---------------------------------|-----------------------|----------------------|
  | IPO        | `1 / (2 tau)`, first is chosen  | fixed                 | arXiv 2310.12036     |
  | online IPO | `(P(y_1 > y_2) - 1/2) / tau`    | fixed                 | arXiv 2403.08635     |
  | EGPO       | `(P(y_1 > y') - P(y_2 > y')) / beta` | fixed            | arXiv 2503.08942     |
  | REBEL      | `eta (r_1 - r_2)`               | the policy that sampled | arXiv 2404.16767   |
  | REFUEL     | `eta (G_1 - G_2)`, rewards to go | the policy that sampled | arXiv 2410.04612  |

  Args:
    policy_first: [B] log pi(y_1 | x); for REFUEL, summed over the tokens of one turn.
    policy_second: [B] log pi(y_2 | x).
    ref_first: [B] log-probability of y_1 under the reference.
    ref_second: [B] log-probability of y_2 under the reference.
    target: [B].

  Returns:
    [B] loss; it does not change if the responses are swapped and the target's sign is flipped.
  """
  chex.assert_equal_shape([policy_first, target])
  first, second = _log_ratios(policy_first, policy_second, ref_first, ref_second)
  return jnp.square(first - second - jax.lax.stop_gradient(target))


@masked.elementwise
def value_bonus(policy: jax.Array, *, coef: float | jax.Array) -> jax.Array:
  """`coef log pi(y)` of calibration responses, a term to add to `dpo_loss`.

  It changes the value of the best policy that fits the preferences. For rewards with mean 0 over
  these responses that value is `-beta E_y[log pi(y) - log pi_ref(y)]`.
  XPO (Xie et al., 2024, https://arxiv.org/abs/2405.21046, algorithm 1) is optimistic: `alpha`, with
  samples of the reference. VPO (Cen et al., 2024, https://arxiv.org/abs/2405.19320) is optimistic
  online with `alpha beta`, and pessimistic offline with `-alpha beta` and responses of the data.

  Args:
    policy: [B] log pi(y | x) of the calibration response.
    coef: Weight of the term. Above 0 it explores away from these responses, below 0 it stays near.

  Returns:
    [B] term of the loss.
  """
  return coef * policy


@masked.elementwise
def alpha_divergence_score(
  policy: jax.Array, ref: jax.Array, *, alpha: float | jax.Array = 0.5
) -> jax.Array:
  """`f'(pi / pi_ref)` of the alpha-divergence: `(1 - exp(-alpha h)) / alpha`.

  Wang et al., 2023 (f-DPO), https://arxiv.org/abs/2309.16240. It replaces `h` when this divergence
  regularises the policy towards the reference. Call a loss of `h_w - h_l` (dpo, ipo, hinge,
  robust_dpo, exo_pair or discopop) with the scores as the policy's arrays and zeros as the
  reference's. TRL's coefficient is 1 - alpha. The exponent is clipped at 80, where
  float32 ends.

  Args:
    policy: [B] log pi(y | x), summed over tokens.
    ref: [B] log pi_ref(y | x).
    alpha: 0 is the reverse KL, where the score is `h`, and 1 the forward KL.

  Returns:
    [B] score.
  """
  chex.assert_equal_shape([policy, ref])
  log_ratio = policy - ref
  nonzero = jnp.where(alpha == 0, 1.0, alpha)
  curved = -jnp.expm1(jnp.minimum(-nonzero * log_ratio, masked.MAX_EXPONENT)) / nonzero
  return jnp.where(alpha == 0, log_ratio, curved)


@masked.elementwise
def jensen_shannon_score(policy: jax.Array, ref: jax.Array) -> jax.Array:
  """`f'(pi / pi_ref)` of the Jensen-Shannon divergence: `log 2 + log sigmoid(h)`.

  It is used like `alpha_divergence_score` (https://arxiv.org/abs/2309.16240).

  Args:
    policy: [B] log pi(y | x), summed over tokens.
    ref: [B] log pi_ref(y | x).

  Returns:
    [B] score, below log 2.
  """
  chex.assert_equal_shape([policy, ref])
  return jnp.log(2.0) + jax.nn.log_sigmoid(policy - ref)


DIVERGENCE_SCORES: dict[str, Callable[..., jax.Array]] = {
  "reverse_kl": functools.partial(alpha_divergence_score, alpha=0.0),
  "forward_kl": functools.partial(alpha_divergence_score, alpha=1.0),
  "jensen_shannon": jensen_shannon_score,
  "alpha": alpha_divergence_score,
}


def wpo_weights(logprobs: jax.Array, log_collision: jax.Array, mask: jax.Array) -> jax.Array:
  """Importance weights that make off-policy preference data look on-policy.

  Zhou et al., 2024 (WPO), https://arxiv.org/abs/2406.11827, eq. 2 with the alignment by samples:
  `exp(mean_t [log pi(y_t) - log sum_v pi(v)^2])`, so that a response sampled by the policy has a
  weight of about 1. The loss of a pair is multiplied by the weights of both responses.

  Args:
    logprobs: [B, T] log-probabilities of the response's tokens under the policy.
    log_collision: [B, T] log-probability that two samples at the position are equal,
      `logsumexp(2 * log_softmax(logits))`; zeros give weights without alignment.
    mask: [B, T] bool, True on response tokens.

  Returns:
    [B] weights, no gradient; 1 for a row without tokens.
  """
  chex.assert_rank([logprobs, log_collision, mask], 2)
  chex.assert_equal_shape([logprobs, log_collision, mask])
  surprise = masked.widen(logprobs) - masked.widen(log_collision)
  surprise = masked.masked_mean(jax.lax.stop_gradient(surprise), mask, axis=1)
  return jnp.exp(jnp.minimum(surprise, masked.MAX_EXPONENT))


def length_desensitized_logprobs(
  chosen: jax.Array,
  rejected: jax.Array,
  chosen_mask: jax.Array,
  rejected_mask: jax.Array,
  *,
  alpha: float = 0.5,
) -> tuple[jax.Array, jax.Array]:
  """Sequence log-probabilities with less weight beyond the shorter response's length (LD-DPO).

  Liu et al., 2024, https://arxiv.org/abs/2409.06411. Apply it to both policy and reference.

  Args:
    chosen: [B, T] log-probabilities of the preferred response's tokens.
    rejected: [B, S] log-probabilities of the other response's tokens.
    chosen_mask: [B, T] bool, True on response tokens.
    rejected_mask: [B, S] bool.
    alpha: Weight of the tokens beyond that length. 1 gives plain sums, 0 ignores those tokens.

  Returns:
    Log-probabilities of the chosen and of the rejected response, [B] each.
  """
  chex.assert_rank([chosen, rejected], 2)
  chex.assert_equal_shape([chosen, chosen_mask])
  chex.assert_equal_shape([rejected, rejected_mask])
  shared = jnp.minimum(jnp.sum(chosen_mask, axis=1), jnp.sum(rejected_mask, axis=1))

  def total(logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    logprobs = jnp.where(mask, masked.widen(logprobs), 0.0)
    beyond = jnp.cumsum(mask, axis=1) > shared[:, None]
    return jnp.sum(jnp.where(beyond, alpha * logprobs, logprobs), axis=1)

  return total(chosen, chosen_mask), total(rejected, rejected_mask)
