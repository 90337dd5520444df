"""Metrics of scores and texts: win rates, groups, calibration, diversity, over-optimisation.

Everything is numpy on the host, in float64. Scores are arrays with one entry per prompt. A text is
a sequence of tokens (ids or words) without padding or end token.
"""

import collections
import math
import statistics
from collections.abc import Hashable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import scipy.special

Text = Sequence[Hashable]


class Estimate(NamedTuple):
  """An estimate and its confidence interval.

  Attributes:
    value: The estimate.
    low: Lower end of the interval.
    high: Upper end of the interval.
  """

  value: float
  low: float
  high: float


def mean(x: np.ndarray, *, confidence: float = 0.95) -> Estimate:
  """Mean of independent values with Student's t interval, which is unbounded for one value.

  Args:
    x: [B] values, one per prompt (or per seed).
    confidence: Probability that the interval covers the true mean.
  """
  x = _vector("x", x)
  centre = float(np.mean(x))
  if len(x) < 2:
    return Estimate(centre, -math.inf, math.inf)
  quantile = scipy.special.stdtrit(len(x) - 1, 0.5 + confidence / 2)
  half = float(quantile * np.std(x, ddof=1) / math.sqrt(len(x)))
  return Estimate(centre, centre - half, centre + half)


def win_rate(a: np.ndarray, b: np.ndarray, *, confidence: float = 0.95) -> Estimate:
  """Share of prompts on which `a` scores higher than `b`; a tie counts half.

  The interval inverts the score test for a difference of paired proportions (Tango, 1998,
  Statistics in Medicine 17, 891-908). Without ties it is Wilson's interval of a binomial
  proportion. With ties it is narrower, but it does not shrink to a point even if all are ties. With
  several samples per prompt, all pairs of usable scores, neither NaN nor infinitely high, are
  compared. The interval is then Student's over prompts, because the pairs of a prompt are not
  independent.

  There are three uses: comparing policies `a` and `b` on the same prompts; the accuracy of a reward
  model, with `a` the scores of the chosen and `b` those of the rejected responses; and the accuracy
  of length alone, with the lengths of the same responses.

  Args:
    a: [B] scores, or [B, N] scores of N samples per prompt.
    b: Same shape, scores for the same prompts.
    confidence: Probability that the interval covers the true rate.

  Returns:
    The rate and its interval; NaN if a prompt has no pair of usable scores.

  Raises:
    ValueError: If the shapes differ, or there are no prompts.
  """
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  if a.shape != b.shape or a.ndim not in (1, 2) or not a.size:
    raise ValueError(f"a and b must have the shape [B] or [B, N], got {a.shape} and {b.shape}")
  a, b = a.reshape(len(a), -1, 1), b.reshape(len(b), 1, -1)
  usable = (a < np.inf) & (b < np.inf)  # False for NaN.
  if not usable.any(axis=(1, 2)).all():
    return Estimate(math.nan, math.nan, math.nan)
  if a.shape[1] > 1:
    wins = np.mean((a > b) + 0.5 * (a == b), axis=(1, 2), where=usable)
    return mean(wins, confidence=confidence)
  a, b = a.ravel(), b.ravel()
  wins, losses, n = int(np.sum(a > b)), int(np.sum(a < b)), len(a)
  critical = statistics.NormalDist().inv_cdf(0.5 + confidence / 2) ** 2
  lead = (wins - losses) / n

  def rejected(d: float) -> bool:
    """True if the test rejects a true lead P(win) - P(loss) of `d`."""
    # The maximum likelihood P(loss) given d solves 2n p^2 + linear p + constant = 0.
    linear = d * (2 * n - wins + losses) - wins - losses
    constant = -losses * d * (1 - d)
    loss = (math.sqrt(max(linear**2 - 8 * n * constant, 0.0)) - linear) / (4 * n)
    return n * (lead - d) ** 2 > critical * (2 * loss + d - d**2)

  def edge(outside: float) -> float:
    inside = lead
    for _ in range(60):  # More bisections than a float64 has bits.
      middle = (inside + outside) / 2
      inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
    return (1 + inside) / 2

  return Estimate((1 + lead) / 2, edge(-1.0), edge(1.0))


def by_group(
  values: np.ndarray, groups: Sequence[Hashable], *, confidence: float = 0.95
) -> dict[Hashable, Estimate]:
  """Means of the values of each group, with the intervals of `mean`.

  Args:
    values: [B] values, one per prompt.
    groups: [B] group of each prompt, such as its language.
    confidence: Probability that an interval covers the true mean of its group.

  Returns:
    Group -> mean, in the order in which the groups first occur.

  Raises:
    ValueError: If there is not one group for each value.
  """
  values, parts = _vector("values", values), _places(values, groups)
  return {name: mean(values[at], confidence=confidence) for name, at in parts.items()}


def group_spread(
  values: np.ndarray, groups: Sequence[Hashable], *, confidence: float = 0.95
) -> Estimate:
  """Mean of the best group minus mean of the worst one, with Welch's interval for the two.

  The interval is that of the two groups that were chosen: with many groups of equal means, the
  largest difference is above 0 by chance.

  Args:
    values: [B] values, one per prompt.
    groups: [B] group of each prompt.
    confidence: Probability that the interval covers the true difference of the two groups.

  Returns:
    The difference; its interval is unbounded if one of the two groups has a single value.

  Raises:
    ValueError: If there are fewer than two groups, or not one for each value.
  """
  values, parts = _vector("values", values), _places(values, groups)
  if len(parts) < 2:
    raise ValueError(f"a spread needs at least 2 groups, got {len(parts)}")
  ordered = sorted(parts.values(), key=lambda at: float(np.mean(values[at])))
  worst, best = (values[at] for at in (ordered[0], ordered[-1]))
  gap = float(np.mean(best) - np.mean(worst))
  if min(len(best), len(worst)) < 2:
    return Estimate(gap, -math.inf, math.inf)
  errors = [float(np.var(x, ddof=1)) / len(x) for x in (best, worst)]
  if not sum(errors):
    return Estimate(gap, gap, gap)
  freedom = sum(errors) ** 2 / sum(
    e**2 / (len(x) - 1) for e, x in zip(errors, (best, worst), strict=True)
  )
  half = float(scipy.special.stdtrit(freedom, 0.5 + confidence / 2)) * math.sqrt(sum(errors))
  return Estimate(gap, gap - half, gap + half)


def representativeness(values: np.ndarray, groups: Sequence[Hashable]) -> float:
  """Largest distance of the mean of a group from the mean of all values.

  It is 0 if all groups are served alike. The RLHF trilemma, 2025, https://arxiv.org/abs/2511.19504,
  calls a procedure representative up to epsilon if this is at most epsilon.

  Args:
    values: [B] values, one per prompt.
    groups: [B] group of each prompt.

  Raises:
    ValueError: If there is not one group for each value.
  """
  values, parts = _vector("values", values), _places(values, groups)
  centre = np.mean(values)
  return float(max(abs(np.mean(values[at]) - centre) for at in parts.values()))


def _places(values: np.ndarray, groups: Sequence[Hashable]) -> dict[Hashable, list[int]]:
  if len(values) != len(groups):
    raise ValueError(f"{len(values)} values need as many groups, got {len(groups)}")
  parts: dict[Hashable, list[int]] = {}
  for i, group in enumerate(groups):
    parts.setdefault(group, []).append(i)
  return parts


class Calibration(NamedTuple):
  """Agreement between predicted probabilities of preferences and their frequencies.

  Attributes:
    ece: Expected calibration error: mean distance of predicted from observed over the pairs, by
      bin (Guo et al., 2017, https://arxiv.org/abs/1706.04599, equation 3).
    brier: Mean squared error of the probabilities; 0.25 for a constant prediction of 1/2.
    log_loss: Mean negative log-likelihood, nats; 0.693 for a constant prediction of 1/2.
    count: [bins] int, pairs in each bin.
    predicted: [bins] mean probability that the model gives to the response it prefers, NaN in an
      empty bin.
    observed: [bins] frequency with which that response was the chosen one, NaN in an empty bin.
  """

  ece: float
  brier: float
  log_loss: float
  count: np.ndarray
  predicted: np.ndarray
  observed: np.ndarray


def calibration(chosen: np.ndarray, rejected: np.ndarray, *, bins: int = 10) -> Calibration:
  """Calibration of a reward model as a Bradley-Terry model.

  Pairs are binned by the probability of the response with the higher score, `sigmoid(|difference|)`
  between 1/2 and 1, in bins of equal width. (Binned by the probability of the chosen response, the
  observed frequency would be 1 in every bin.)

  Args:
    chosen: [B] scores of the chosen responses.
    rejected: [B] scores of the rejected responses.
    bins: Number of bins.
  """
  margin = _vector("chosen", chosen) - _vector("rejected", rejected)
  probability = scipy.special.expit(np.abs(margin))
  right = 0.5 * (1 + np.sign(margin))
  which = np.minimum(((2 * probability - 1) * bins).astype(int), bins - 1)
  count = np.bincount(which, minlength=bins)
  with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin.
    predicted = np.bincount(which, probability, bins) / count
    observed = np.bincount(which, right, bins) / count
  gaps = np.where(count > 0, np.abs(predicted - observed), 0.0)
  return Calibration(
    ece=float(np.sum(gaps * count) / len(margin)),
    brier=float(np.mean(scipy.special.expit(-margin) ** 2)),
    log_loss=float(np.mean(np.logaddexp(0.0, -margin))),
    count=count,
    predicted=predicted,
    observed=observed,
  )


def _ngrams(text: Text, n: int) -> Iterator[tuple[Hashable, ...]]:
  return (tuple(text[i : i + n]) for i in range(len(text) - n + 1))


def distinct(texts: Sequence[Text], n: int) -> float:
  """Number of distinct n-grams over the number of n-grams in all texts; NaN if there are none.

  Li et al., 2016, https://arxiv.org/abs/1510.03055, section 5. It falls with the amount of text:
  compare sets of equal size, or use `expectation_adjusted_distinct`.
  """
  grams = [gram for text in texts for gram in _ngrams(text, n)]
  return len(set(grams)) / len(grams) if grams else math.nan


def expectation_adjusted_distinct(texts: Sequence[Text], n: int, vocab_size: int) -> float:
  """Number of distinct n-grams over its expectation in uniformly random text of equal length.

  Liu et al., 2022, https://arxiv.org/abs/2202.13587: `N / (V (1 - ((V - 1) / V)^C))` for N
  distinct ones among C n-grams. Here V = vocab_size ** n, the number of possible n-grams, so random
  text has 1 for any n and any amount of text.

  Args:
    texts: The texts, taken together.
    n: Tokens per n-gram.
    vocab_size: Size of the vocabulary.

  Returns:
    The ratio, 0 or higher; NaN if no text has n tokens.
  """
  grams = [gram for text in texts for gram in _ngrams(text, n)]
  if not grams:
    return math.nan
  possible = float(vocab_size) ** n
  # log1p and expm1: possible is up to 1e23, whose (V - 1) / V would round to 1.
  expected = -possible * math.expm1(len(grams) * math.log1p(-1 / possible))
  return len(set(grams)) / expected


def self_similarity(texts: Sequence[Text], *, max_n: int = 4) -> float:
  """Mean cosine similarity of pairs of texts, as bags of n-grams of 1 to `max_n` tokens.

  It is 1 for copies of one text and 0 for texts without a common token. It is a symmetric
  counterpart of self-BLEU (Zhu et al., 2018, https://arxiv.org/abs/1802.01886). The time is linear
  in the number of texts.

  Raises:
    ValueError: If there are fewer than two texts.
  """
  if len(texts) < 2:
    raise ValueError(f"similarity needs at least 2 texts, got {len(texts)}")
  total: dict[tuple[Hashable, ...], float] = collections.defaultdict(float)
  for text in texts:
    bag = collections.Counter(gram for n in range(1, max_n + 1) for gram in _ngrams(text, n))
    bag = bag or collections.Counter([()])  # Empty texts equal each other and no other text.
    norm = math.sqrt(sum(count**2 for count in bag.values()))
    for gram, count in bag.items():
      total[gram] += count / norm
  # The squared norm of a sum of unit vectors is their number plus the cosines of all pairs.
  pairs = len(texts) * (len(texts) - 1)
  return (sum(value**2 for value in total.values()) - len(texts)) / pairs


def diversity(texts: Sequence[Text], vocab_size: int) -> dict[str, float]:
  """Computes the diversity metrics above.

  For one sample per prompt this is diversity across inputs, for N samples of one prompt it is
  diversity per input (Kirk et al., 2023, https://arxiv.org/abs/2310.06452, with bags of n-grams in
  place of sentence embeddings).

  Args:
    texts: Two or more texts.
    vocab_size: Size of the vocabulary.

  Returns:
    `distinct_1`, `distinct_2`, `ead` (mean over n = 1 to 5) and `self_similarity`.
  """
  adjusted = [expectation_adjusted_distinct(texts, n, vocab_size) for n in range(1, 6)]
  adjusted = [value for value in adjusted if not math.isnan(value)]
  return {
    "distinct_1": distinct(texts, 1),
    "distinct_2": distinct(texts, 2),
    "ead": statistics.fmean(adjusted) if adjusted else math.nan,
    "self_similarity": self_similarity(texts),
  }


def best_of_n(proxy: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
  """Expected value of the response that the proxy picks among n, estimated without bias from N.

  It is the mean over all draws of n from the pool without replacement: Nakano et al., 2021,
  https://arxiv.org/abs/2112.09332, appendix I.

  Responses of equal proxy are equally likely to be picked. One whose proxy is not finite is picked
  only if no other one is drawn.

  Args:
    proxy: [..., N] scores that pick the response.
    values: [..., N] values to average: the gold reward, or the proxy itself.
    n: Responses to pick from, 1 to N.

  Returns:
    [...]; for n = 1 the mean of `values`, for n = N the value of the best response in the pool.
  """
  proxy, values = np.asarray(proxy, np.float64), np.asarray(values, np.float64)
  size = proxy.shape[-1]
  if proxy.shape != values.shape or not 1 <= n <= size:
    raise ValueError(
      f"n must be between 1 and the size of the pools, got n={n}, shapes {proxy.shape} and"
      f" {values.shape}"
    )
  # The k-th best is picked if it is drawn with n - 1 of the N - k below it, with probability
  # C(N - k, n - 1) / C(N, n): n / N for the best, times (N - k - n + 1) / (N - k) for each next.
  below = np.arange(size - 1, 0, -1)
  chances = n / size * np.cumprod(np.append(1, np.maximum(below - n + 1, 0) / below))
  proxy = np.where(np.isfinite(proxy), proxy, -np.inf)
  order = np.argsort(-proxy, axis=-1, kind="stable")
  proxy, values = (np.take_along_axis(x, order, axis=-1) for x in (proxy, values))
  # Equals share the mean chance of their places, from the first of them to the last.
  place, edge = np.arange(size), np.ones((*proxy.shape[:-1], 1), bool)
  changes = proxy[..., 1:] != proxy[..., :-1]
  first = np.maximum.accumulate(np.where(np.append(edge, changes, axis=-1), place, 0), axis=-1)
  last = np.where(np.append(changes, edge, axis=-1), place, size)
  last = np.minimum.accumulate(last[..., ::-1], axis=-1)[..., ::-1]
  total = np.append(0.0, np.cumsum(chances))
  chances = (total[last + 1] - total[first]) / (last + 1 - first)
  return np.sum(np.where(chances > 0, chances * values, 0.0), axis=-1)


def best_of_n_kl(n: int) -> float:
  """KL(best of n || one sample) = log n - (n - 1) / n, nats.

  Stiennon et al., 2020, https://arxiv.org/abs/2009.01325, appendix G.3. Exact if no two responses
  tie, an upper bound otherwise (Beirami et al., 2024, https://arxiv.org/abs/2401.01879).
  """
  return math.log(n) - (n - 1) / n


class OverOptimization(NamedTuple):
  """A fitted law of the gold reward as a function of the distance d = sqrt(KL).

  Attributes:
    alpha: Slope at the start (reward / d at d = 1 for the form "rl").
    beta: Rate at which the slope falls.
    peak: Distance d of the highest gold reward: 0 if no checkpoint is above the initial policy,
      infinite if the fit never falls.
  """

  alpha: float
  beta: float
  peak: float


def fit_overoptimization(
  distance: np.ndarray, gold: np.ndarray, form: Literal["best_of_n", "rl"]
) -> OverOptimization:
  """Fits the gold reward over the distance from the initial policy by least squares.

  Gao et al., 2022, https://arxiv.org/abs/2210.10760, section 1: `d (alpha - beta d)` for best of n
  and `d (alpha - beta log d)` for reinforcement learning.

  Args:
    distance: [C] sqrt of the KL to the initial policy, for C checkpoints. Those at 0 are ignored.
    gold: [C] gold reward minus that of the initial policy.
    form: Law to fit.
  """
  falls = {"best_of_n": lambda d: d, "rl": np.log}[form]
  d, gold = _vector("distance", distance), _vector("gold", gold)
  d, gold = d[d > 0], gold[d > 0]
  columns = np.stack([d, -d * falls(d)], axis=1)
  if np.linalg.matrix_rank(columns) < 2:
    raise ValueError("a fit needs checkpoints at two or more different distances above 0")
  alpha, beta = np.linalg.lstsq(columns, gold)[0].tolist()
  if np.max(gold) <= 0:
    return OverOptimization(alpha, beta, 0.0)
  if beta > 0:
    with np.errstate(over="ignore"):
      peak = alpha / (2 * beta) if form == "best_of_n" else float(np.exp(alpha / beta - 1))
    return OverOptimization(alpha, beta, max(peak, 0.0))
  return OverOptimization(alpha, beta, math.inf)


def spearman(x: np.ndarray, y: np.ndarray) -> float:
  """Rank correlation; ties share their mean rank. NaN if one of the two is constant."""
  x, y = _ranks(_vector("x", x)), _ranks(_vector("y", y))
  x, y = x - np.mean(x), y - np.mean(y)
  scale = math.sqrt(np.sum(x**2) * np.sum(y**2))
  return float(np.sum(x * y) / scale) if scale else math.nan


def first_divergence(
  proxy: np.ndarray, gold: np.ndarray, *, window: int, z: float = 2.5
) -> int | None:
  """Finds the checkpoint from which training on a proxy costs gold reward.

  Slides a window over the checkpoints, and looks for a rank correlation of proxy and gold below
  `-z / sqrt(window - 1)`, which is unlikely for unrelated noise.

  Args:
    proxy: [C] proxy reward of each checkpoint, in the order of training.
    gold: [C] gold reward.
    window: Number of checkpoints in a window.
    z: Threshold, in standard deviations of the correlation of unrelated noise.

  Returns:
    Index of the first checkpoint of the first such window; None if there is none.
  """
  limit = -z / math.sqrt(window - 1)
  for start in range(len(proxy) - window + 1):
    part = slice(start, start + window)
    if spearman(proxy[part], gold[part]) < limit:
      return start
  return None


def _ranks(x: np.ndarray) -> np.ndarray:
  _, which, count = np.unique(x, return_inverse=True, return_counts=True)
  return (np.cumsum(count) - (count - 1) / 2)[which]


def _vector(name: str, x: np.ndarray) -> np.ndarray:
  x = np.asarray(x, np.float64)
  if x.ndim != 1 or not len(x):
    raise ValueError(f"{name} must be a vector of one or more numbers, got shape {x.shape}")
  return x


def cohen_kappa(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
  """Agreement of two annotators beyond chance: 1 is complete, 0 is chance agreement.

  Cohen, 1960, https://doi.org/10.1177/001316446002000104.

  Args:
    a: Verdicts of the first annotator on B items.
    b: Verdicts of the second annotator on the same items.

  Returns:
    `(observed - expected) / (1 - expected)`; NaN if all verdicts of both are the same.

  Raises:
    ValueError: If the lengths differ, or there are no items.
  """
  if len(a) != len(b) or not a:
    raise ValueError(f"two lists of the same items are needed, got {len(a)} and {len(b)}")
  observed = np.mean([x == y for x, y in zip(a, b, strict=True)])
  first, second = collections.Counter(a), collections.Counter(b)
  expected = sum(first[name] * second[name] for name in first) / len(a) ** 2
  return float((observed - expected) / (1 - expected)) if expected < 1 else math.nan
