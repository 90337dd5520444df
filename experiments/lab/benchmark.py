"""Accuracy of a judge of responses on pairs whose better response is known, as in RewardBench."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rlhf_jax import data, evaluation, flags, loop, reporting, rewards, sharding
from rlhf_jax.types import Rollout
from . import grouping, judges

# Category of each subset of RewardBench, https://arxiv.org/abs/2403.13787.
CATEGORIES = {
  "Chat": (
    *("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
  ),
  "Chat Hard": (
    *("mt-bench-hard", "llmbar-natural", "llmbar-adver-neighbor", "llmbar-adver-GPTInst"),
    *("llmbar-adver-GPTOut", "llmbar-adver-manual"),
  ),
  "Safety": (
    *("refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond"),
    "donotanswer",
  ),
  "Reasoning": (
    *("math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"),
  ),
}
_CATEGORY_OF = {subset: name for name, subsets in CATEGORIES.items() for subset in subsets}


class _Texts:
  """Texts in place of a tokenizer: an id stands for a whole text, which a judge reads."""

  digest = "texts"

  def __init__(self, texts: Sequence[str]):
    self._texts = texts

  def batch_decode(self, rows: Iterable[Iterable[int]]) -> list[str]:
    return ["".join(self._texts[i] for i in row) for row in rows]


def measure(session: loop.Session, config: Any) -> dict[str, Any]:
  """Scores both responses of each row; shows and returns the accuracy by category and subset.

  Args:
    session: Workdir, seed, devices and dashboards.
    config: Config with `rewardbench`, `reward`, `model`, `data` and `batch_size`.
  """
  config.reward.require()
  rows, answers = _read(config.rewardbench, config.data.ignore)
  texts = [text for pair in answers for text in pair]
  tokenizer: Any = _Texts(texts)
  with loop.open_run(session) as run:
    prompts = data.from_examples("prompts", [{"prompt": np.zeros(1, np.int32)}] * len(rows), rows)
    prompts = prompts._replace(ignored=config.data.ignore)
    reward_of = judges.open_reward(run, config.reward, config.model, tokenizer)
    reward = reward_of(prompts)
    size = min(config.batch_size, len(texts))
    size += -size % sharding.row_parts(run.mesh)
    parts = [
      _scores(reward, np.arange(start, start + size) % len(texts))
      for start in range(0, len(texts), size)
    ]
    scores = {of: np.concatenate([part[of] for part in parts])[: len(texts)] for of in parts[0]}
    total = scores.pop("")
    worst = judges.worst_of(reward, scores)
    pairs = (total if worst is None else worst).reshape(-1, 2)
    rewards.require(judges.name_of(reward), pairs)
    summary = _summary(rows, pairs)
    reporting.write_summary(run.workdir, summary)
  return summary


def _read(path: str, ignore: Sequence[str]) -> tuple[list[dict[str, Any]], list[tuple[str, ...]]]:
  """Reads rows of pairs: their columns with the prompt as text, and both answers, better first."""
  rows, answers = [], []
  for row in data.read_file(path, ignore=ignore):
    examples = data.parse_row("preferences", row.without(ignore), prefer_messages=True)
    if len(examples) != 1 or examples[0].skip:
      raise data.DataError(
        f"{row.where}: {len(examples)} pairs of responses, or ties; --rewardbench takes one chosen"
        " and one rejected response in each row"
      )
    (prompt, pair, *_) = examples[0]
    rows.append({**row.fields, "prompt_text": data.readable(prompt)})
    answers.append(pair)
  if not rows:
    raise data.DataError(f"{path}: no rows")
  return rows, answers


def _scores(reward: rewards.RewardFn, ids: np.ndarray) -> dict[str, np.ndarray]:
  """Scores of the responses of some ids, two of each row, and under their names those in them."""
  tokens = np.stack([np.zeros_like(ids), ids], axis=1).astype(np.int32)
  response = np.broadcast_to(np.array([False, True]), tokens.shape)
  fields: Any = tokens, ~response, response, np.zeros((len(ids), 1), np.float32)
  given = rewards.parts_of(reward(Rollout(*fields), ids // 2))
  scores = sharding.to_host({"": rewards.total(given), **(given.named or {})})
  return {name: np.asarray(values) for name, values in scores.items()}


def _summary(rows: Sequence[dict[str, Any]], pairs: np.ndarray) -> dict[str, Any]:
  """Shows and returns the accuracies of scores [rows, 2], the better response first."""
  kept = np.isfinite(pairs).all(axis=1)
  rows, pairs = [rows[int(i)] for i in np.flatnonzero(kept)], pairs[kept]
  right = grouping.judged_right(pairs)
  value, low, high = evaluation.mean(right)
  summary: dict[str, Any] = {"rows": len(right), "unusable": int(np.sum(~kept))}
  summary |= {"accuracy": value, "accuracy_low": low, "accuracy_high": high}
  subsets = [row.get("subset") for row in rows]
  given = [row.get("category") or _CATEGORY_OF.get(str(row.get("subset"))) for row in rows]
  for name, groups in (("categories", given), ("subsets", subsets)):
    if any(groups):
      summary[name] = grouping.accuracies(right, [str(of or "(none)") for of in groups])
      grouping.show(f"Pairs by {name}", summary[name], {})
  reporting.show_summary(f"{len(right)} pairs", {"accuracy": {"judge": value}})
  return summary


def is_asked(config: Any) -> bool:
  """Returns whether pairs are to be scored; refuses a config with neither or both of the two."""
  missing = [f"--{name}=..." for name in ("policy", "baseline") if not getattr(config, name)]
  if missing and not config.rewardbench:
    are = "is" if len(missing) == 1 else "are"
    raise flags.UsageError(f"{' and '.join(missing)} {are} needed, or --rewardbench=FILE")
  if not config.rewardbench:
    return False
  given = {name: getattr(config, name) for name in ("policy", "baseline", "demonstrations")}
  given["preference.*"] = config.preference != judges.PreferenceOptions()
  given |= {f"data.{name}": getattr(config.data, name) for name in ("path", "eval_path", "group")}
  if unread := [f"--{name}" for name, value in given.items() if value]:
    raise flags.UsageError(
      f"--rewardbench measures a reward, and does not read {' and '.join(unread)}; leave out one or"
      " the other"
    )
  return True
