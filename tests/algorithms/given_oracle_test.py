"""Methods that learn from given responses: loss and gradient with each term, against loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms import (
  dpo,
  kto,
  pairs,
  preference_model,
  rest,
  reward_model,
  sft,
  simpo,
  terms,
)
from rlhf_jax.train_step import make_train_step
from rlhf_jax.types import ComparisonBatch, RankingBatch, TokenBatch, UnpairedBatch
from tests.algorithms import bigrams
from tests.algorithms.bigrams import RECORD, ROWS, log_sigmoid, logprob, scored_pairs, sigmoid
from tests.testing import pack

PARAMS, START = bigrams.tables(0), bigrams.tables(1)
DATA = bigrams.sequences(ROWS, 2)
# Tokens of both responses of every pair, each behind the one before it.
BOTH = [[scored_pairs(DATA.tokens[i, j], DATA.mask[i, j]) for j in range(2)] for i in range(ROWS)]
LAYOUT = [[3, 0], [5], [1, 2, 7], [4, 6]]


def total(params, tokens, short=None, alpha=1.0):
  """Log-probability of a response; tokens past the length `short` have the weight `alpha`."""
  weights = [1.0 if short is None or t < short else alpha for t in range(len(tokens))]
  return sum(w * logprob(params, pair) for w, pair in zip(weights, tokens, strict=True))


def nll(params, tokens):
  return -total(params, tokens) / len(tokens)


def wpo(held, tokens):
  """Weight of a response in WPO: its probability over that of drawing the same tokens twice."""
  surprise = []
  for pair in tokens:
    table = bigrams.log_softmax(np.float64(held["policy"][pair[0]]))
    surprise.append(table[pair[1]] - np.log(np.sum(np.exp(table) ** 2)))
  return np.exp(np.mean(surprise))


# Losses of the log-ratios of a pair, from their papers.
def dpo_(w, l, beta, s):
  return -(1 - s) * log_sigmoid(beta * (w - l)) - s * log_sigmoid(beta * (l - w))


def robust(w, l, beta, s):
  return ((1 - s) * dpo_(w, l, beta, 0) - s * dpo_(l, w, beta, 0)) / (1 - 2 * s)


def exo(w, l, beta, s):
  p = sigmoid(beta * (w - l))
  return p * np.log(p / (1 - s)) + (1 - p) * np.log((1 - p) / s)


def nca(w, l, beta, s):
  noise = log_sigmoid(-beta * w) + log_sigmoid(-beta * l)
  return -log_sigmoid(beta * w) - noise / 2


def discopop(w, l, beta, s):
  margin = beta * (w - l)
  share = sigmoid(margin / 0.05)
  return -(1 - share) * log_sigmoid(margin) + share * np.exp(-margin)


PAIRWISE = {
  "dpo": dpo_,
  "ipo": lambda w, l, beta, s: (w - l - 1 / (2 * beta)) ** 2,
  "hinge": lambda w, l, beta, s: max(0.0, 1 - beta * (w - l)),
  "robust_dpo": robust,
  "exo_pair": exo,
  "nca_pair": nca,
  "bco_pair": lambda w, l, beta, s: -log_sigmoid(beta * w) - log_sigmoid(-beta * l),
  "sppo_hard": lambda w, l, beta, s: (w - 1 / (2 * beta)) ** 2 + (l + 1 / (2 * beta)) ** 2,
  "apo_zero": lambda w, l, beta, s: 1 - sigmoid(beta * w) + sigmoid(beta * l),
  "apo_down": lambda w, l, beta, s: sigmoid(beta * w) + 1 - sigmoid(beta * (w - l)),
  "discopop": discopop,
  "cpl": lambda w, l, beta, s: -log_sigmoid(beta * (w - 0.5 * l)),
}
# The derivative of f at the ratio u of the policy to the reference, up to a constant.
DIVERGENCES = {
  "reverse_kl": lambda h: h,
  "forward_kl": lambda h: -np.exp(-h),
  "jensen_shannon": lambda h: np.log(2 * np.exp(h) / (1 + np.exp(h))),
  "alpha": lambda h: -np.exp(-0.5 * h) / 0.5,
}
DPO_CASES = {
  **{name: {"loss": name} for name in PAIRWISE if name != "exo_pair"},
  "exo_pair": {"loss": "exo_pair", "label_smoothing": 0.2},
  "dpo/smoothed": {"label_smoothing": 0.2},
  "robust_dpo/smoothed": {"loss": "robust_dpo", "label_smoothing": 0.2},
  "dpo/sft": {"sft_coef": 0.7},
  "dpo/bonus": {"bonus_coef": -0.3},
  "aot": {"loss": "aot"},
  "aot_unpaired": {"loss": "aot_unpaired", "label_smoothing": 0.2},
  **{f"dpo/{name}": {"divergence": name} for name in DIVERGENCES},
  "ipo/divergence": {"loss": "ipo", "divergence": "jensen_shannon"},
}
WEIGHTINGS = {
  "dpo/ld": pairs.PairConfig(length_alpha=0.3),
  "dpo/wpo": pairs.PairConfig(reweight=True),
  "dpo/both": pairs.PairConfig(length_alpha=0.6, reweight=True),
}


def ranked(first, second):
  """Pairs each of the first numbers with the second one of the same rank."""
  order = np.argsort(first), np.argsort(second)
  partners = np.empty(len(first))
  partners[order[0]] = np.asarray(second)[order[1]]
  return list(zip(first, partners, strict=True))


def dpo_oracle(config, weighting):
  def totals(params):
    rows = []
    for sides in BOTH:
      short = min(map(len, sides))
      rows.append([total(params, tokens, short, weighting.length_alpha) for tokens in sides])
    return np.array(rows)

  def oracle(params, held):
    policy, ref = totals(params), totals(START)
    score = DIVERGENCES[config.divergence]
    numbers = [[score(h) for h in row] for row in policy - ref]
    loss = PAIRWISE.get(config.loss, dpo_)
    if config.loss == "aot":
      numbers = ranked(policy[:, 0] - policy[:, 1], ref[:, 0] - ref[:, 1])
    if config.loss == "aot_unpaired":
      numbers = ranked(*np.transpose(numbers))
    losses = [loss(w, l, config.beta, config.label_smoothing) for w, l in numbers]
    if weighting.reweight:
      losses = [wpo(held, a) * wpo(held, b) * x for (a, b), x in zip(BOTH, losses, strict=True)]
    added = [
      config.sft_coef * nll(params, sides[0]) + config.bonus_coef * total(params, sides[0])
      for sides in BOTH
    ]
    return np.mean(np.add(losses, added))

  return oracle, totals(START).astype(np.float32), totals


def check_metrics(metrics, logprobs, rewards):
  """Compares the metrics of pairs with log-probabilities [B, 2] and implicit rewards [B, 2]."""
  margins = rewards[:, 0] - rewards[:, 1]
  want = {
    "logprobs/chosen": logprobs[:, 0],
    "logprobs/rejected": logprobs[:, 1],
    "reward/chosen": rewards[:, 0],
    "reward/rejected": rewards[:, 1],
    "reward/margin": margins,
    "reward/accuracy": margins > 0,
    "nll/chosen": [nll(PARAMS, sides[0]) for sides in BOTH],
  }
  for name, values in want.items():
    np.testing.assert_allclose(metrics[name], np.mean(values), rtol=1e-4, err_msg=name)
  assert metrics["weight"] == ROWS
  assert metrics["tokens"] == sum(len(tokens) for sides in BOTH for tokens in sides)


@pytest.mark.parametrize("name", [*DPO_CASES, *WEIGHTINGS])
def test_dpo(name):
  config = dpo.DPOConfig(**{"beta": 0.4} | DPO_CASES.get(name, {}))
  weighting = WEIGHTINGS.get(name, pairs.PairConfig())
  oracle, ref, totals = dpo_oracle(config, weighting)
  step = dpo.make_dpo_step(bigrams.language, RECORD, config, weighting=weighting)
  metrics = bigrams.check(step, PARAMS, dpo.DPOBatch(DATA, ref), oracle)
  policy = totals(PARAMS)
  check_metrics(metrics, policy, config.beta * (policy - ref))


@pytest.mark.parametrize("name", ["dpo/both", "dpo/sft", "aot_unpaired"])
def test_dpo_of_packed_pairs(name):
  config = dpo.DPOConfig(**{"beta": 0.4} | DPO_CASES.get(name, {}))
  weighting = WEIGHTINGS.get(name, pairs.PairConfig())
  oracle, ref, _ = dpo_oracle(config, weighting)
  packed = pack(DATA, LAYOUT, 21)
  by_place = np.zeros((*packed.real.shape, 2), np.float32)
  for row, members in enumerate(LAYOUT):
    by_place[row, : len(members)] = ref[members]
  step = dpo.make_dpo_step(bigrams.language, RECORD, config, weighting=weighting)
  tokens = packed.tokens % bigrams.V
  bigrams.check(step, PARAMS, dpo.DPOBatch(packed._replace(tokens=tokens), by_place), oracle)


def log_odds(mean):
  return mean - np.log(1 - np.exp(mean))


SIMPO = {
  "simpo": lambda w, l, config: -log_sigmoid(config.beta * (w - l - config.margin)),
  "orpo": lambda w, l, config: -config.beta * log_sigmoid(log_odds(w) - log_odds(l)),
  "cpo": lambda w, l, config: -log_sigmoid(config.beta * (w - l)),
}
SIMPO_CASES = {
  "simpo": {"loss": "simpo", "margin": 1.3, "beta": 0.7},
  "orpo": {"loss": "orpo", "beta": 0.4},
  "cpo": {"loss": "cpo", "beta": 0.3},
}


@pytest.mark.parametrize("name, sft_coef", [("simpo", 0.0), *((name, 0.7) for name in SIMPO)])
def test_simpo(name, sft_coef):
  config = simpo.SimPOConfig(**SIMPO_CASES[name], sft_coef=sft_coef)

  def oracle(params, held):
    losses = []
    for sides in BOTH:
      w, l = (total(params, tokens) / (1 if name == "cpo" else len(tokens)) for tokens in sides)
      losses.append(SIMPO[name](w, l, config) + sft_coef * nll(params, sides[0]))
    return np.mean(losses)

  step = simpo.make_simpo_step(bigrams.language, RECORD, config)
  metrics = bigrams.check(step, PARAMS, DATA, oracle)
  compared = np.array(
    [
      [total(PARAMS, tokens) / (1 if name == "cpo" else len(tokens)) for tokens in sides]
      for sides in BOTH
    ]
  )
  check_metrics(metrics, compared, config.beta * compared)


def test_simpo_weighs_pairs():
  config = simpo.SimPOConfig(beta=0.7, margin=0.4)

  def oracle(params, held):
    losses = []
    for sides in BOTH:
      w, l = (total(params, tokens) / len(tokens) for tokens in sides)
      weight = wpo(held, sides[0]) * wpo(held, sides[1])
      losses.append(weight * SIMPO["simpo"](w, l, config))
    return np.mean(losses)

  weighting = pairs.PairConfig(reweight=True)
  step = simpo.make_simpo_step(bigrams.language, RECORD, config, weighting=weighting)
  bigrams.check(step, PARAMS, DATA, oracle)


@pytest.mark.parametrize(
  "settings, near",
  [({}, False), ({}, True), ({"desirable_weight": 1.7, "undesirable_weight": 0.4}, False)],
  ids=["far", "near", "weights"],
)
def test_kto(settings, near):
  """Near the reference the estimate of the KL is negative, and 0 stands in its place."""
  config = kto.KTOConfig(beta=0.4, **settings)
  desirable = np.arange(ROWS) % 3 == 0
  matched, mismatched = (TokenBatch(DATA.tokens[:, j], DATA.mask[:, j]) for j in range(2))
  sides = BOTH
  start = np.array([[total(START, tokens) for tokens in row] for row in sides])
  start[:, 1] += 5.0 if near else -5.0  # The mismatched one.

  def oracle(params, held):
    kl = max(
      0.0, np.mean([total(held, row[1]) - s[1] for row, s in zip(sides, start, strict=True)])
    )
    assert (kl == 0) == near
    losses = []
    for row, s, good in zip(sides, start, desirable, strict=True):
      gain = config.beta * (total(params, row[0]) - s[0] - kl)
      if good:
        losses.append(config.desirable_weight * (1 - sigmoid(gain)))
      else:
        losses.append(config.undesirable_weight * (1 - sigmoid(-gain)))
    return np.mean(losses)

  batch = kto.KTOBatch(UnpairedBatch(*matched, desirable, mismatched), start.astype(np.float32))
  step = kto.make_kto_step(bigrams.language, RECORD, config)
  bigrams.check(step, PARAMS, batch, oracle)


# Models with a scalar head: the score is that of the last token of a response.


def score(params, tokens):
  return params["value"][tokens[-1][1]]


REWARD_MODELS = {
  "plain": {},
  "margin": {"margin": 0.8},
  "smoothed": {"label_smoothing": 0.2},
  "centred": {"centering_coef": 0.6},
}


@pytest.mark.parametrize(
  "name, packed", [*((name, False) for name in REWARD_MODELS), ("centred", True)]
)
def test_reward_model(name, packed):
  config = reward_model.RewardModelConfig(**REWARD_MODELS[name])

  def oracle(params, held):
    losses = []
    for sides in BOTH:
      w, l = (score(params, tokens) for tokens in sides)
      margin, s = w - l - config.margin, config.label_smoothing
      loss = -(1 - s) * log_sigmoid(margin) - s * log_sigmoid(-margin)
      losses.append(loss + config.centering_coef * (w + l) ** 2)
    return np.mean(losses)

  step = reward_model.make_reward_model_step(bigrams.scores, RECORD, config)
  batch = DATA
  if packed:
    batch = pack(DATA, LAYOUT, 21)
    batch = batch._replace(tokens=batch.tokens % bigrams.V)
  bigrams.check(step, PARAMS, batch, oracle, moved=("value",))


def test_reward_model_of_rankings():
  """A mean over the pairs of a prompt, and then over prompts that have one.

  Neither ties nor empty places form pairs.
  """
  data = bigrams.sequences(ROWS, 4, seed=3)
  rng = np.random.default_rng(4)
  ranks = rng.integers(0, 3, (ROWS, 4)).astype(np.int32)
  ranks[0] = 1  # No pair at all.
  real = np.arange(4) < rng.integers(2, 5, (ROWS, 1))
  mask = data.mask & real[..., None]

  def oracle(params, held):
    losses = []
    for i in range(ROWS):
      scores = [score(params, scored_pairs(data.tokens[i, j], data.mask[i, j])) for j in range(4)]
      found = [
        -log_sigmoid(scores[a] - scores[b])
        for a in range(4)
        for b in range(4)
        if real[i, a] and real[i, b] and ranks[i, a] < ranks[i, b]
      ]
      if found:
        losses.append(np.mean(found))
    return np.mean(losses)

  step = reward_model.make_reward_model_step(
    bigrams.scores, RECORD, reward_model.RewardModelConfig()
  )
  batch = RankingBatch(data.tokens, mask, ranks, real)
  bigrams.check(step, PARAMS, batch, oracle, moved=("value",))


def test_preference_model():
  data = bigrams.sequences(ROWS, 2, seed=5)
  preference = np.random.default_rng(6).random(ROWS).astype(np.float32)

  def oracle(params, held):
    losses = []
    for i in range(ROWS):
      first, second = (
        score(params, scored_pairs(data.tokens[i, j], data.mask[i, j])) for j in range(2)
      )
      p = sigmoid(first - second)
      losses.append(-preference[i] * np.log(p) - (1 - preference[i]) * np.log(1 - p))
    return np.mean(losses)

  config = preference_model.PreferenceModelConfig()
  step = preference_model.make_preference_model_step(bigrams.scores, RECORD, config)
  bigrams.check(step, PARAMS, ComparisonBatch(*data, preference), oracle, moved=("value",))


# Likelihoods.
ROWS_OF_TEXT = bigrams.sequences(ROWS, seed=7)
TEXT = [scored_pairs(*row) for row in zip(*ROWS_OF_TEXT, strict=True)]


@pytest.mark.parametrize("packed", [False, True])
def test_sft(packed):
  def oracle(params, held):
    return np.mean([-logprob(params, pair) for tokens in TEXT for pair in tokens])

  batch = ROWS_OF_TEXT
  if packed:
    batch = pack(ROWS_OF_TEXT, LAYOUT, 21)
    batch = batch._replace(tokens=batch.tokens % bigrams.V)
  step = sft.make_sft_step(bigrams.language, RECORD, sft.SFTConfig())
  bigrams.check(step, PARAMS, batch, oracle)


@pytest.mark.parametrize(
  "settings",
  [{}, {"trust": True}, {"trust": True, "kappa": 0.6}],
  ids=["plain", "trust", "both"],
)
def test_rest(settings):
  config = rest.RestConfig(**settings)
  weights = np.random.default_rng(8).random(ROWS).astype(np.float32)
  weights[1] = 0.0

  def oracle(params, held):
    top = bottom = 0.0
    for weight, tokens in zip(weights, TEXT, strict=True):
      for pair in tokens:
        trust = np.exp(logprob(held, pair)) if config.trust else 1.0
        tables = (bigrams.log_softmax(np.float64(p["policy"][pair[0]])) for p in (START, params))
        start, policy = tables
        forward = np.sum(np.exp(start) * (start - policy))
        top += weight * (-trust * policy[pair[1]] + config.kappa * forward)
        bottom += weight
    return top / bottom

  step = rest.make_rest_step(bigrams.language, RECORD, config)
  start = jax.tree.map(jnp.asarray, START)
  batch = rest.RestBatch(ROWS_OF_TEXT, weights)
  bigrams.check(lambda state, batch, key: step(state, batch, start, key), PARAMS, batch, oracle)


@pytest.mark.parametrize("coef", [0.3, -0.3], ids=["optimistic", "pessimistic"])
def test_value_bonus(coef):
  """The term of XPO and VPO: its weight times the mean log-probability of other responses."""
  config = dpo.DPOConfig(beta=0.4)
  alone, ref, _ = dpo_oracle(config, pairs.PairConfig())

  def oracle(params, held):
    return alone(params, held) + coef * np.mean([total(params, tokens) for tokens in TEXT])

  loss = functools.partial(dpo.loss_fn, read=pairs.make_read_pairs(bigrams.language), config=config)
  bonus = terms.make_value_bonus(bigrams.language)
  step = make_train_step(terms.with_term(loss, bonus, coef, "loss/bonus"), RECORD)
  batch = terms.WithSequences(dpo.DPOBatch(DATA, ref), ROWS_OF_TEXT)
  bigrams.check(step, PARAMS, batch, oracle)
