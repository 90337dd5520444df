"""Agreement and kappa of answers, and the position bias of a judge."""

import numpy as np
import pytest

from experiments.annotation import agreement
from experiments.annotation.items import Item, answer_row, read_item, shown_order
from rlhf_jax import data


def test_kappa_and_agreement_of_two_annotators():
  items = [Item(str(i), f"p{i}", ("x", f"y{i}")) for i in range(40)]
  rng = np.random.default_rng(0)
  rows = []
  for name in ("ada", "bob", "eve"):
    for item in items:
      left, _ = shown_order(item.prompt, item.responses)
      better = rng.integers(2) if name == "eve" else left
      rows.append(answer_row(item, name, [int(i != better) for i in range(2)]))
  summary = agreement.summarize(items, rows)
  assert (summary["answers"], summary["ties"], summary["skipped"]) == (120, 0, 0)
  # Ada and Bob always take the left one: they agree, and nothing can be said beyond chance.
  assert summary["agreement/ada/bob"] == 1.0
  assert np.isnan(summary["kappa/ada/bob"])
  assert abs(summary["kappa/ada/eve"]) < 0.3


def test_agreement_counts_the_pairs_of_rankings_and_labels():
  items = [
    Item("0", "p", ("x", "y", "z"), ((0, 1, 1.0), (0, 2, 1.0), (1, 2, 0.5))),
    Item("1", "q", ("x", "y")),
  ]
  rows = [
    answer_row(items[0], "ada", (0, 1, 2)),
    answer_row(items[1], "ada", (0, 0)),
    answer_row(items[0], "bob", (2, 1, 0)),
    answer_row(items[1], "bob", None),
  ]
  found = {(a.one, a.other): a for a in agreement.agreements(items, rows)}
  assert found.keys() == {("ada", "bob"), ("ada", "label"), ("bob", "label")}
  assert (found["ada", "bob"].count, found["ada", "bob"].share) == (3, 0.0)
  assert found["ada", "label"].share == pytest.approx(2 / 3)
  assert found["bob", "label"].share == 0.0
  summary = agreement.summarize(items, rows)
  assert (summary["answers"], summary["ties"], summary["skipped"]) == (3, 1, 1)


def test_agreement_on_chats_whose_rows_keep_their_turns():
  row = {"messages": [{"role": role, "content": role} for role in ("system", "user")]}
  sides = {"responses": ["x", "y"], "annotations": [{"preferred": 1}]}
  item = read_item(data.Row("r", row | sides), 0)
  rows = [answer_row(item, "ada", (1, 0)), answer_row(item, "bob", (0, 1))]
  found = {(a.one, a.other): a.share for a in agreement.agreements([item], rows)}
  assert found == {("ada", "bob"): 0.0, ("ada", "label"): 1.0, ("bob", "label"): 0.0}


def test_position_bias_and_agreement_without_swapping():
  items = [Item(str(i), "p", ("x", "y"), ((0, 1, 1.0 - i % 2),)) for i in range(4)]
  items.append(Item("4", "p", ("x", "y")))  # Nobody has judged it.
  # A judge that always takes the first place, whatever stands there.
  rows = [{"id": item.id, "first": [0.75, 1.0], "second": [0.25, 0.0]} for item in items]
  found = agreement.position_metrics(items, rows)
  assert found["first_wins_before_swapping"] == 1.0 and found["consistency"] == 0.0
  assert found["position_bias"] == 0.75
  assert found["agreement/as_first"] == 0.5 and found["agreement/as_second"] == 0.5
  assert "agreement/as_first" not in agreement.position_metrics(items[4:], rows[4:])
