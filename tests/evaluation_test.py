import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats

from rlhf_jax import evaluation

Z = 1.959963984540054  # Two-sided 95 %.


def outcomes(wins, losses, ties):
  """Scores with so many wins, losses and ties, shuffled."""
  a = np.repeat([2.0, 0.0, 1.0], [wins, losses, ties])
  return np.random.default_rng(0).permutation(a), np.ones(wins + losses + ties)


def test_win_rate_counts_ties_half():
  assert evaluation.win_rate(*outcomes(5, 2, 3)).value == 0.65
  for b in (np.zeros(4), np.zeros(0), np.zeros((3, 1))):
    with pytest.raises(ValueError, match="must have the shape"):
      evaluation.win_rate(np.zeros(3), b)
  with pytest.raises(ValueError, match="must have the shape"):
    evaluation.win_rate(np.zeros(0), np.zeros(0))
  for bad in (np.nan, np.inf):
    assert np.isnan(evaluation.win_rate(np.array([0.0, bad]), np.zeros(2))).all()
    assert np.isnan(evaluation.win_rate(np.zeros(2), np.array([0.0, bad]))).all()


@pytest.mark.parametrize(("wins", "n"), [(0, 10), (1, 10), (7, 10), (10, 10), (410, 512)])
def test_win_rate_without_ties_is_wilsons_interval(wins, n):
  p = wins / n
  centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
  half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
  found = evaluation.win_rate(*outcomes(wins, n - wins, 0))
  np.testing.assert_allclose(found, (p, centre - half, centre + half), atol=1e-12)


def test_win_rate_of_ties_alone_keeps_a_width():
  # Under a lead d the likeliest rates are d and 0, so d is rejected once n d > z^2 (1 - d).
  edge = Z**2 / (20 + Z**2)
  found = evaluation.win_rate(*outcomes(0, 0, 20))
  np.testing.assert_allclose(found, (0.5, (1 - edge) / 2, (1 + edge) / 2), atol=1e-12)


@pytest.mark.parametrize("counts", [(5, 2, 3), (0, 3, 9), (40, 11, 49), (12, 0, 1)])
def test_win_rate_interval_ends_where_the_score_test_rejects(counts):
  """The likelihood under each end is maximised numerically, not by the formula."""
  wins, losses, n = counts[0], counts[1], sum(counts)

  def z_score(d):
    def minus_log_likelihood(loss):
      p = np.array([loss + d, loss, 1 - 2 * loss - d])
      return -np.sum(scipy.special.xlogy(counts, np.maximum(p, 1e-300)))

    bounds = (max(0.0, -d), (1 - d) / 2)
    loss = scipy.optimize.minimize_scalar(
      minus_log_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-12}
    ).x
    return ((wins - losses) - n * d) / math.sqrt(n * (2 * loss + d - d**2))

  _, low, high = evaluation.win_rate(*outcomes(*counts))
  np.testing.assert_allclose(z_score(2 * low - 1), Z, rtol=1e-4)
  np.testing.assert_allclose(z_score(2 * high - 1), -Z, rtol=1e-4)


@pytest.mark.parametrize("n", [12, 30])
@pytest.mark.parametrize("p", [(0.5, 0.5), (0.4, 0.4), (0.3, 0.1), (0.75, 0.2), (0.05, 0.05)])
def test_win_rate_interval_covers_the_truth(n, p):
  """Exact coverage: the probability of every outcome whose interval holds the true rate."""
  p_win, p_loss = p
  covered = 0.0
  for wins, losses in itertools.product(range(n + 1), repeat=2):
    ties = n - wins - losses
    if ties >= 0:
      _, low, high = evaluation.win_rate(*outcomes(wins, losses, ties))
      inside = low <= (1 + p_win - p_loss) / 2 <= high
      chances = [p_win, p_loss, max(1 - p_win - p_loss, 0.0)]
      covered += inside * scipy.stats.multinomial.pmf([wins, losses, ties], n, chances)
  assert covered > 0.94


def test_win_rate_of_the_other_side_is_the_mirror_image():
  a, b = outcomes(9, 4, 7)
  value, low, high = evaluation.win_rate(a, b)
  np.testing.assert_allclose(evaluation.win_rate(b, a), (1 - value, 1 - high, 1 - low), atol=1e-12)
  assert evaluation.win_rate(a, b, confidence=0.5).low > low


def test_win_rate_of_several_samples_compares_all_pairs():
  a, b = np.random.default_rng(0).integers(0, 4, size=(2, 30, 3))
  shares = [
    np.mean([1.0 if x > y else 0.5 if x == y else 0.0 for x in of_a for y in of_b])
    for of_a, of_b in zip(a, b, strict=True)
  ]
  assert evaluation.win_rate(a, b) == pytest.approx(evaluation.mean(np.array(shares)))
  single = evaluation.win_rate(a[:, 0], b[:, 0])
  assert evaluation.win_rate(a[:, :1], b[:, :1]) == single


def test_win_rate_of_several_samples_leaves_out_the_unusable():
  a, b = np.random.default_rng(0).integers(0, 4, size=(2, 30, 3)).astype(float)
  a[:9, 1], b[5:20, 2], b[::3, 0] = np.nan, np.inf, np.nan
  usable = [[x[x < np.inf] for x in rows] for rows in (a, b)]
  shares = [
    np.mean([1.0 if x > y else 0.5 if x == y else 0.0 for x in of_a for y in of_b])
    for of_a, of_b in zip(*usable, strict=True)
  ]
  assert evaluation.win_rate(a, b) == pytest.approx(evaluation.mean(np.array(shares)))
  a[4] = np.nan
  assert np.isnan(evaluation.win_rate(a, b)).all()


def test_mean_is_students_interval():
  x = np.random.default_rng(0).normal(3, 2, size=7)
  reference = scipy.stats.ttest_1samp(x, 0).confidence_interval(0.9)
  found = evaluation.mean(x, confidence=0.9)
  np.testing.assert_allclose(found, (np.mean(x), reference.low, reference.high), rtol=1e-12)
  assert evaluation.mean(np.ones(1)) == (1, -math.inf, math.inf)


def preferences(n, *, sharpness, seed=0):
  """Scores whose difference is `sharpness` times the true log odds, chosen by those odds."""
  rng = np.random.default_rng(seed)
  a, b = rng.normal(size=(2, n))
  prefers_a = rng.random(n) < scipy.special.expit(a - b)
  chosen, rejected = np.where(prefers_a, (a, b), (b, a))
  return sharpness * chosen, sharpness * rejected


def test_calibration_against_a_loop():
  chosen, rejected = preferences(300, sharpness=2.0)
  chosen[:5] = rejected[:5]  # Ties.
  bins = 7
  found = evaluation.calibration(chosen, rejected, bins=bins)
  rows = [[] for _ in range(bins)]
  brier = log_loss = 0.0
  for c, r in zip(chosen, rejected, strict=True):
    p = 1 / (1 + math.exp(r - c))
    brier += (1 - p) ** 2 / 300
    log_loss -= math.log(p) / 300
    top = max(p, 1 - p)
    right = 1.0 if c > r else 0.5 if c == r else 0.0
    rows[min(int((top - 0.5) / (0.5 / bins)), bins - 1)].append((top, right))
  ece = sum(abs(np.mean(row, axis=0) @ [1, -1]) * len(row) / 300 for row in rows if row)
  np.testing.assert_allclose((found.ece, found.brier, found.log_loss), (ece, brier, log_loss))
  np.testing.assert_array_equal(found.count, [len(row) for row in rows])
  means = np.array([np.mean(row, axis=0) for row in rows])
  np.testing.assert_allclose(np.stack([found.predicted, found.observed], axis=1), means)


def test_calibration_tells_an_overconfident_model_from_an_honest_one():
  n = 200_000
  honest = evaluation.calibration(*preferences(n, sharpness=1.0))
  boastful = evaluation.calibration(*preferences(n, sharpness=4.0))
  assert honest.ece < 0.005
  # Both get the same pairs right, so the error is the mean gap between the two confidences.
  margin = np.abs(np.random.default_rng(1).normal(0, math.sqrt(2), size=n))
  gap = np.mean(scipy.special.expit(4 * margin) - scipy.special.expit(margin))
  np.testing.assert_allclose(boastful.ece, gap, atol=0.005)
  assert honest.brier < boastful.brier and honest.log_loss < boastful.log_loss


def test_calibration_of_extreme_and_of_equal_scores():
  sure = evaluation.calibration(np.array([1e4, 0.0]), np.array([0.0, 1e4]))
  assert (sure.ece, sure.brier, sure.log_loss) == (0.5, 0.5, 5000.0)
  assert np.isnan(sure.predicted[:-1]).all() and sure.count[-1] == 2
  blind = evaluation.calibration(np.zeros(4), np.zeros(4))
  np.testing.assert_allclose((blind.ece, blind.brier, blind.log_loss), (0, 0.25, math.log(2)))


def test_distinct_counts_ngrams_within_texts():
  texts = [list("abab"), list("ab"), [], list("c")]
  assert evaluation.distinct(texts, 1) == 3 / 7
  assert evaluation.distinct(texts, 2) == 2 / 4  # ab, ba, ab and ab: none across texts.
  assert math.isnan(evaluation.distinct(texts, 5))


@pytest.mark.parametrize(
  ("length", "share"), [(10, 1.0), (100, 0.91), (1000, 0.43), (10_000, 0.05)]
)
def test_random_text_is_fully_diverse_at_any_length(length, share):
  text = np.random.default_rng(0).integers(0, 500, size=length).tolist()
  np.testing.assert_allclose(evaluation.distinct([text], 1), share, atol=0.02)
  for n in (1, 2, 5):
    found = evaluation.expectation_adjusted_distinct([text], n, 500)
    np.testing.assert_allclose(found, 1, atol=0.03)


def test_expectation_adjusted_distinct_is_the_formula():
  texts, vocab = [[0, 1, 1, 2], [3, 1]], 5
  expected = 4 / (vocab * (1 - ((vocab - 1) / vocab) ** 6))
  found = evaluation.expectation_adjusted_distinct(texts, 1, vocab)
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  assert evaluation.expectation_adjusted_distinct([[7] * 50], 1, 10**6) < 0.021
  assert math.isnan(evaluation.expectation_adjusted_distinct([[1]], 2, vocab))


def test_self_similarity_is_the_mean_over_pairs():
  rng = np.random.default_rng(0)
  texts = [rng.integers(0, 4, size=rng.integers(0, 9)).tolist() for _ in range(6)] + [[], []]

  def cosine(a, b):
    if not a and not b:
      return 1.0
    grams = [
      [tuple(t[i : i + n]) for n in (1, 2, 3) for i in range(len(t) - n + 1)] for t in (a, b)
    ]
    every = sorted(set(grams[0]) | set(grams[1]))
    x, y = ([found.count(g) for g in every] for found in grams)
    return np.dot(x, y) / max(np.linalg.norm(x) * np.linalg.norm(y), 1e-9)

  pairs = list(itertools.combinations(texts, 2))
  expected = np.mean([cosine(a, b) for a, b in pairs])
  np.testing.assert_allclose(evaluation.self_similarity(texts, max_n=3), expected, rtol=1e-12)


def test_self_similarity_of_copies_and_of_strangers():
  np.testing.assert_allclose(evaluation.self_similarity([list("abc")] * 4), 1)
  assert evaluation.self_similarity([list("abc"), list("def"), []]) == pytest.approx(0)
  with pytest.raises(ValueError, match="at least 2"):
    evaluation.self_similarity([list("abc")])


def test_diversity_falls_when_texts_repeat():
  rng = np.random.default_rng(0)
  varied = [rng.integers(0, 50, size=12).tolist() for _ in range(40)]
  collapsed = [varied[i % 3] for i in range(40)]
  high, low = (evaluation.diversity(texts, 50) for texts in (varied, collapsed))
  assert high.keys() == {"distinct_1", "distinct_2", "ead", "self_similarity"}
  for name in ("distinct_1", "distinct_2", "ead"):
    assert low[name] < 0.5 * high[name]
  assert low["self_similarity"] > 0.3 > high["self_similarity"]
  silent = evaluation.diversity([[], []], 50)
  assert math.isnan(silent["ead"]) and silent["self_similarity"] == 1


def test_best_of_n_is_the_mean_over_all_draws():
  rng = np.random.default_rng(0)
  proxy, gold = rng.normal(size=(2, 3, 7))
  for n in (1, 2, 5, 7):
    draws = [list(draw) for draw in itertools.combinations(range(7), n)]
    for row in range(3):
      expected = np.mean([gold[row, draw][np.argmax(proxy[row, draw])] for draw in draws])
      np.testing.assert_allclose(evaluation.best_of_n(proxy, gold, n)[row], expected, rtol=1e-12)
  with pytest.raises(ValueError, match="between 1 and the size"):
    evaluation.best_of_n(proxy, gold, 8)


def test_best_of_n_picks_among_equals_at_random():
  rng = np.random.default_rng(0)
  proxy, gold = rng.integers(0, 3, size=(4, 6)).astype(float), rng.normal(size=(4, 6))
  proxy[1, 2:4], proxy[2, 0], proxy[3] = np.nan, np.inf, np.nan  # None of them is ever the best.
  usable = np.where(np.isfinite(proxy), proxy, -1.0)
  shuffles = [rng.permutation(6) for _ in range(5)]
  for n in range(1, 7):
    expected = []
    for row in range(4):
      picks = []
      for draw in map(list, itertools.combinations(range(6), n)):
        best = usable[row, draw].max()
        picks.append(np.mean([gold[row, i] for i in draw if usable[row, i] == best]))
      expected.append(np.mean(picks))
    for order in shuffles:
      found = evaluation.best_of_n(proxy[:, order], gold[:, order], n)
      np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_best_of_n_finds_the_turn_of_the_gold_reward():
  """Scores y from N(0, 1), gold y - y^2 / 4; the figures are integrals over the maximum's law."""
  proxy = np.random.default_rng(0).normal(size=200_000)
  gold = proxy - proxy**2 / 4
  ns = (1, 4, 16, 64, 256, 1024)
  y = np.linspace(-8, 8, 16001)
  for n, rough in zip(ns, (-0.26, 0.64, 0.91, 0.92, 0.79, 0.58), strict=True):
    density = n * scipy.stats.norm.pdf(y) * scipy.stats.norm.cdf(y) ** (n - 1)
    exact = np.trapezoid((y - y**2 / 4) * density, y)
    found = evaluation.best_of_n(proxy, gold, n)
    np.testing.assert_allclose(found, exact, atol=0.02)
    np.testing.assert_allclose(found, rough, atol=0.03)
  picked = [float(evaluation.best_of_n(proxy, proxy, n)) for n in ns]
  assert picked == sorted(picked) and picked[-1] == pytest.approx(3.24, abs=0.03)


@pytest.mark.parametrize("n", [1, 2, 16])
def test_best_of_n_kl_is_that_of_the_maximum(n):
  # The rank u of the best of n has density n u^(n - 1) on [0, 1].
  u = np.linspace(1e-9, 1, 2_000_001)
  density = n * u ** (n - 1)
  integral = np.trapezoid(density * np.log(density), u)
  np.testing.assert_allclose(evaluation.best_of_n_kl(n), integral, atol=1e-5)


def test_fit_recovers_the_law_of_a_tilted_gaussian():
  # Tilting N(0, 1) by l gives N(l, 1): KL l^2 / 2, gold l - (l^2 + 1) / 4, from -1/4 at the start.
  tilt = np.linspace(0, 6, 30)
  gold = tilt - (tilt**2 + 1) / 4 + 1 / 4
  alpha, beta, peak = evaluation.fit_overoptimization(np.sqrt(tilt**2 / 2), gold, "best_of_n")
  np.testing.assert_allclose((alpha, beta, peak), (math.sqrt(2), 0.5, math.sqrt(2)), rtol=1e-9)


def test_fit_of_reinforcement_learning():
  d = np.linspace(0, 9, 40)
  gold = 1.2 * d - 0.7 * scipy.special.xlogy(d, d)
  alpha, beta, peak = evaluation.fit_overoptimization(d, gold, "rl")
  np.testing.assert_allclose((alpha, beta), (1.2, 0.7), rtol=1e-9)
  curve = scipy.optimize.minimize_scalar(lambda d: -(1.2 - 0.7 * math.log(d)) * d, (1, 3))
  np.testing.assert_allclose(peak, curve.x, rtol=1e-6)
  assert evaluation.fit_overoptimization(d, d**2, "rl").peak == math.inf
  with pytest.raises(ValueError, match="two or more"):
    evaluation.fit_overoptimization(np.ones(3), np.ones(3), "rl")


@pytest.mark.parametrize("form", ["best_of_n", "rl"])
def test_the_peak_of_a_gold_reward_that_only_falls_is_the_start(form):
  d = np.linspace(0, 4, 20)
  for gold in (-d, -(d**2), -0.3 * d - 0.01 * d**2, -d * np.log1p(d), -np.sqrt(d)):
    assert evaluation.fit_overoptimization(d, gold, form).peak == 0
  for gold in (d, d**2, d + 0.1 * d**2):
    assert evaluation.fit_overoptimization(d, gold, form).peak > 1e3


def test_spearman_against_scipy():
  rng = np.random.default_rng(0)
  x, y = rng.integers(0, 6, size=(2, 40))  # With ties.
  expected = scipy.stats.spearmanr(x, y).statistic
  np.testing.assert_allclose(evaluation.spearman(x, y), expected, rtol=1e-12)
  assert evaluation.spearman(np.arange(5), -np.exp(np.arange(5))) == -1
  assert math.isnan(evaluation.spearman(np.ones(4), np.arange(4)))


def test_divergence_is_found_after_the_peak():
  rng = np.random.default_rng(0)
  step = np.arange(60)
  proxy = step / 10 + 0.1 * rng.normal(size=60)
  gold = -((step - 25) ** 2) / 300 + 0.1 * rng.normal(size=60)
  assert 12 <= evaluation.first_divergence(proxy, gold, window=15) <= 25
  assert evaluation.first_divergence(proxy, step + gold, window=15) is None
  assert evaluation.first_divergence(proxy[:10], gold[:10], window=15) is None


def test_divergence_is_seldom_seen_in_noise():
  rng = np.random.default_rng(0)
  noise = rng.normal(size=(200, 2, 60))
  alarms = [evaluation.first_divergence(*pair, window=20) is not None for pair in noise]
  assert np.mean(alarms) < 0.1


def test_cohen_kappa():
  """By its definition from a table of counts, and at its ends."""
  table = np.array([[88, 14, 18], [10, 40, 10], [2, 6, 12]])
  a = [i for i in range(3) for j in range(3) for _ in range(table[i, j])]
  b = [j for i in range(3) for j in range(3) for _ in range(table[i, j])]
  observed = np.trace(table) / table.sum()
  expected = (table.sum(axis=0) @ table.sum(axis=1)) / table.sum() ** 2
  want = (observed - expected) / (1 - expected)
  assert evaluation.cohen_kappa(a, b) == pytest.approx(want)
  assert evaluation.cohen_kappa("abba", "abba") == 1.0
  assert evaluation.cohen_kappa("aabb", "abab") == 0.0
  assert evaluation.cohen_kappa("aabb", "bbaa") == -1.0
  assert math.isnan(evaluation.cohen_kappa("aa", "aa"))
  with pytest.raises(ValueError, match="same items"):
    evaluation.cohen_kappa("ab", "a")


def test_groups_match_loops():
  rng = np.random.default_rng(0)
  groups = [("en", "de", "fr")[i] for i in rng.integers(0, 3, 60)]
  values = rng.normal(size=60) + np.array([{"en": 1.0, "de": 0.0, "fr": -2.0}[g] for g in groups])
  parts = {name: [v for v, g in zip(values, groups, strict=True) if g == name] for name in groups}
  found = evaluation.by_group(values, groups)
  assert list(found) == list(dict.fromkeys(groups))
  for name, part in parts.items():
    np.testing.assert_allclose(found[name], evaluation.mean(np.array(part)))
  gaps = [abs(sum(part) / len(part) - sum(values) / 60) for part in parts.values()]
  np.testing.assert_allclose(evaluation.representativeness(values, groups), max(gaps))
  welch = scipy.stats.ttest_ind(parts["en"], parts["fr"], equal_var=False).confidence_interval()
  spread = evaluation.group_spread(values, groups)
  gap = np.mean(parts["en"]) - np.mean(parts["fr"])
  np.testing.assert_allclose(spread, (gap, welch.low, welch.high))


@pytest.mark.parametrize("groups", [2, 5])
def test_the_spread_of_two_groups_covers_the_truth_as_often_as_it_says(groups):
  rng = np.random.default_rng(1)
  covered = 0
  for _ in range(400):
    values = np.concatenate([rng.normal(3.0, 1, 20), rng.normal(0, 2, 9), rng.normal(1, 1, 40)])
    names = ["a"] * 20 + ["b"] * 9 + [f"c{i % (groups - 1)}" for i in range(40)]
    spread = evaluation.group_spread(values, names)
    covered += spread.low <= 3.0 <= spread.high
  assert 0.92 < covered / 400 < 0.98


def test_groups_of_one_value_have_no_interval():
  values, groups = np.array([1.0, 3.0, 7.0]), ["a", "a", "b"]
  assert evaluation.by_group(values, groups)["b"] == (7.0, -math.inf, math.inf)
  assert evaluation.group_spread(values, groups) == (5.0, -math.inf, math.inf)
  np.testing.assert_allclose(evaluation.representativeness(values, groups), 7 - 11 / 3)
  assert evaluation.representativeness(np.ones(3), groups) == 0
  assert evaluation.group_spread(np.ones(4), [0, 0, 1, 1]) == (0.0, 0.0, 0.0)
  with pytest.raises(ValueError, match="at least 2 groups, got 1"):
    evaluation.group_spread(values, ["a"] * 3)
  for function in (evaluation.by_group, evaluation.group_spread, evaluation.representativeness):
    with pytest.raises(ValueError, match="3 values need as many groups, got 2"):
      function(values, ["a", "b"])
