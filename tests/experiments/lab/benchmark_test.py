"""Accuracy of rewards on pairs by category and subset."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lab import benchmark, models
from rlhf_jax import data, flags
from tests.experiments.lab.rendered_test import folder_of, ids_by_hand
from tests.testing import start

PAIRS = [  # Chosen, rejected, subset; the reward is the length.
  ("longer", "long", "math-prm"),
  ("long", "longer", "math-prm"),
  ("longest", "long", "hep-cpp"),
  ("same", "size", "hep-cpp"),
  ("longer", "long", "donotanswer"),
  ("longer", "long", "other"),
]


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def rows_of(pairs):
  names = ("chosen", "rejected", "subset")
  return [
    {"prompt": "write", "id": i, **dict(zip(names, p, strict=True))} for i, p in enumerate(pairs)
  ]


def length(prompts, responses, rows):
  return [float(len(response)) for response in responses]


def measured(tmp_path, *words):
  return start("evaluate", f"--workdir={tmp_path / 'run'}", *words)


def test_accuracy_by_category_and_subset(tmp_path, monkeypatch):
  monkeypatch.setitem(benchmark.rewards.REWARDS, "length", length)
  rows = [{**row, "context": "left out"} for row in rows_of(PAIRS)]
  turns = [("user", "sum"), ("assistant", "call"), ("tool", "result")]
  rows[0]["prompt"] = [{"role": role, "content": text} for role, text in turns]
  file = write(tmp_path / "bench.jsonl", rows)
  words = (f"--rewardbench={file}", "--reward.name=length", "--batch_size=5")
  with pytest.raises(data.DataError, match="data.ignore=context"):
    measured(tmp_path, *words)
  words += ("--data.ignore=context",)
  summary = measured(tmp_path, *words)
  assert summary["accuracy"] == pytest.approx(4.5 / 6) and summary["rows"] == 6
  assert summary["accuracy_low"] < 4.5 / 6 < summary["accuracy_high"]
  shares = {name: (of["rows"], of["accuracy"]) for name, of in summary["categories"].items()}
  assert shares == {"Reasoning": (4, 0.625), "Safety": (1, 1.0), "(none)": (1, 1.0)}
  assert {"accuracy_low", "accuracy_high"} <= summary["subsets"]["math-prm"].keys()
  assert summary["subsets"]["math-prm"]["accuracy"] == 0.5
  assert summary["subsets"]["hep-cpp"]["accuracy"] == 0.75
  assert json.loads((tmp_path / "run" / "summary.json").read_text())["rows"] == 6


class OfTexts:
  """Reward model of a group, with a score of its own of each text."""

  def __init__(self, path):
    self.scores = np.random.default_rng(len(path)).normal(size=2 * len(PAIRS)).astype(np.float32)

  def apply(self, params, tokens, *, segment_ids):
    return jnp.asarray(self.scores)[tokens]


@pytest.mark.parametrize("batch_size", [2, 5, 12])
def test_both_responses_are_judged_by_the_group_that_is_the_worst_in_all(
  batch_size, tmp_path, monkeypatch
):
  opened = lambda run, path, *_: models.Scorer(OfTexts(path), {}, "", None)  # noqa: E731
  monkeypatch.setattr(models, "open_reward_model", opened)
  file = write(tmp_path / "bench.jsonl", rows_of(PAIRS))
  words = ("--reward.path=a,bb,ccc", "--reward.ensemble=worst_group", f"--batch_size={batch_size}")
  summary = measured(tmp_path, f"--rewardbench={file}", *words)
  worst = min((OfTexts(path).scores for path in ("a", "bb", "ccc")), key=np.mean)
  assert summary["accuracy"] == pytest.approx(np.mean(worst[::2] > worst[1::2]))


def test_a_classifier_is_asked_as_by_hand(tmp_path):
  model, params, own = folder_of(tmp_path / "judge", "chat")
  file = write(tmp_path / "bench.jsonl", rows_of(PAIRS))
  summary = measured(tmp_path, f"--rewardbench={file}", f"--reward.path={tmp_path / 'judge'}")
  right, apply = [], jax.jit(model.apply)
  for chosen, rejected, _ in PAIRS:
    tokens = np.zeros([2, 64], np.int32)
    ids = [ids_by_hand(own, "write", text) for text in (chosen, rejected)]
    for row, of in zip(tokens, ids, strict=True):
      row[: len(of)] = of
    a, b = (apply(params, tokens)[i, len(of) - 1] for i, of in enumerate(ids))
    right.append(float(a > b))
  assert summary["accuracy"] == pytest.approx(np.mean(right))


def test_what_is_refused(tmp_path):
  with pytest.raises(flags.UsageError, match="--policy=... and --baseline=... are needed, or"):
    measured(tmp_path)
  file = write(tmp_path / "bench.jsonl", rows_of(PAIRS))
  with pytest.raises(flags.UsageError, match="no reward: give"):
    measured(tmp_path, f"--rewardbench={file}")
  for unread in ("policy=x", "baseline=x", "demonstrations=x", "data.group=subset", "data.path=x"):
    name = unread.partition("=")[0]
    with pytest.raises(flags.UsageError, match=f"does not read --{name}; leave out"):
      measured(tmp_path, f"--rewardbench={file}", "--reward.name=gold", f"--{unread}")
  with pytest.raises(flags.UsageError, match="--policy and --preference"):
    measured(tmp_path, f"--rewardbench={file}", "--policy=x", "--preference.name=panel")
  file = write(tmp_path / "other.jsonl", [{"prompt": "write", "subset": "a"}])
  with pytest.raises(data.DataError, match="other.jsonl:1"):
    measured(tmp_path, f"--rewardbench={file}", "--reward.name=gold")
  several = write(tmp_path / "lists.jsonl", rows_of([(["a"], ["b", "c"], "Ties")]))
  with pytest.raises(data.DataError, match=r"lists.jsonl:1: 2 pairs .* one rejected response"):
    measured(tmp_path, f"--rewardbench={several}", "--reward.name=gold")
