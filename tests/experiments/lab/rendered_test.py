"""Reward models from elsewhere, most with another tokenizer or chat template than the policy's."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import models as tokenizer_models
from tokenizers import pre_tokenizers, processors

from experiments.lab import critics, judges, models
from rlhf_jax import data, simulation
from rlhf_jax.models import build, hf
from tests.experiments.lab.rollouts import rollout_of
from tests.testing import FAMILY_MODELS, full

CHAT = (
  "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BRACKETS = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} [/]{% endfor %}"


def tokenizer_of(kind):
  """Tokenizer of characters, or of the policy, as it is or with another template."""
  if kind in ("same vocabulary", "same tokenizer"):
    own = data.word_level_tokenizer(simulation.WORDS).hf
    if kind == "same tokenizer":
      return own
    own.chat_template = "<bos> {% for m in messages %}{{ m['content'] }} <eos> {% endfor %}"
    return own
  letters = sorted({*"".join(simulation.WORDS), *" \n|<>[]/_:", *"abcdefghijklmnopqrstuvwxyz"})
  specials = ["<pad>", "<s>", "</s>", "<unk>"]
  vocabulary = {text: i for i, text in enumerate([*specials, *letters])}
  backend = tokenizers.Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="<unk>"))
  backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
  if kind == "plain":
    backend.post_processor = processors.TemplateProcessing(
      single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
  pad, bos, eos, unk = specials
  names = {"pad_token": pad, "unk_token": unk}
  names |= {} if kind == "nameless" else {"bos_token": bos, "eos_token": eos}
  own = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
  if kind == "chat":
    markers = ["<|user|>", "<|assistant|>", "<|end|>"]
    own.add_special_tokens({"additional_special_tokens": markers})
  own.chat_template = {"chat": CHAT, "brackets": BRACKETS}.get(kind)
  return own


def folder_of(path, kind, family="qwen3", **changes):
  """Folder of a random classifier; returns its model, params and tokenizer too."""
  own = tokenizer_of(kind)
  config = dataclasses.replace(FAMILY_MODELS[family], vocab_size=len(own), max_length=2048)
  config = dataclasses.replace(config, **changes)
  model = build(config, "scalar")
  params = jax.jit(model.init)(jax.random.key(3))
  own.save_pretrained(path)
  hf.save_folder(path, params, config, token_ids={}, label="LABEL_0")
  return model, params, own


def ids_by_hand(own, prompt, response):
  """Ids as the page of a published reward model computes them."""
  if own.chat_template is None:
    return own(prompt + ("" if prompt.endswith("\n") else " ") + response)["input_ids"]
  turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
  return own(own.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]


def opened(open_bench, folder, *flags):
  bench = open_bench("ppo", "prompts", "--reward.name=gold", *flags)
  options = judges.RewardOptions(path=str(folder))
  return bench, judges.open_reward(bench.run, options, bench.config.model, bench.tokenizer)


ANSWERS = ["i do not know .", "i do not know what else to write .", "what to write"]


@pytest.mark.parametrize("kind", ["chat", "brackets", "plain", "nameless", "same vocabulary"])
def test_texts_are_encoded_as_by_hand(kind, tmp_path):
  own = tokenizer_of(kind)
  own.save_pretrained(tmp_path)
  for prompt, answer in itertools.product(["write about <cats>", "is it so ?\n"], ANSWERS):
    (ids,) = data.load_tokenizer(tmp_path).encode_texts([prompt], [answer])
    assert ids == ids_by_hand(own, prompt, answer)


def test_a_reward_model_of_this_package_reads_what_it_was_trained_on(tmp_path):
  data.word_level_tokenizer(["yes", "no"]).save(tmp_path)
  saved = data.load_tokenizer(tmp_path)
  assert saved.encode_texts(["no yes"], ["yes"]) == [[1, 5, 4, 4, saved.eos_id]]


@pytest.mark.parametrize(
  "kind, family",
  [("chat", "qwen3"), ("same vocabulary", "gemma3"), ("same tokenizer", "qwen2")],
)
def test_scores_are_those_of_the_model_by_hand(kind, family, open_bench, tmp_path):
  model, params, own = folder_of(tmp_path / "judge", kind, family)
  bench, reward_of = opened(open_bench, tmp_path / "judge")
  rows = bench.train_set.rows
  rollout = rollout_of(bench.tokenizer.encode_responses(ANSWERS))
  with_context = [{**row, "context": "left out"} for row in rows]
  prompts = bench.train_set._replace(rows=with_context, ignored=("context",))
  scores = reward_of(prompts)(rollout, np.array([4, 0, 1]))
  by_hand = jax.jit(model.apply)
  for i, (row, answer) in enumerate(zip((4, 0, 1), ANSWERS, strict=True)):
    ids = ids_by_hand(own, rows[row]["prompt"], answer)
    # A causal model does not see what follows; one shape is compiled.
    tokens = jnp.zeros([1, 300], int).at[0, : len(ids)].set(jnp.array(ids))
    np.testing.assert_allclose(scores[i], by_hand(params, tokens)[0, len(ids) - 1], atol=1e-5)
  assert len({float(x) for x in scores}) == 3


def test_only_a_model_of_this_package_reads_the_tokens_of_the_policy(open_bench, tmp_path):
  folder_of(tmp_path / "judge", "same tokenizer")
  bench = open_bench("ppo", "prompts", "--reward.name=gold")

  def read_by():
    folder = str(tmp_path / "judge")
    assert models.reads_tokens_of(folder, bench.tokenizer)
    return models.open_reward_model(
      bench.run, folder, bench.config.model, bench.tokenizer
    ).tokenizer

  assert read_by() is not None
  bench.tokenizer.save(tmp_path / "judge")
  assert read_by() is None


def test_the_critic_starts_from_the_policy(open_bench, tmp_path):
  folder_of(tmp_path / "judge", "chat")
  bench = open_bench("ppo", "prompts", f"--reward.path={tmp_path / 'judge'}")
  value = critics.open_actor(bench).params["value"]
  trunk = {name: of for name, of in value.items() if name != "score"}
  jax.tree.map(np.testing.assert_array_equal, trunk, {name: bench.start[name] for name in trunk})
  assert not np.any(value["score"]["kernel"])


def test_a_preference_is_that_of_its_scores(open_bench, tmp_path):
  folder_of(tmp_path / "judge", "chat")
  bench, reward_of = opened(open_bench, tmp_path / "judge")
  options = judges.PreferenceOptions(path=str(tmp_path / "judge"))
  prefer_of = judges.open_preference(bench.run, options, bench.config.model, bench.tokenizer)
  a, b = (rollout_of(bench.tokenizer.encode_responses([text])) for text in ANSWERS[:2])
  ids, prompts = np.array([0]), bench.train_set
  x, y = (reward_of(prompts)(side, ids) for side in (a, b))
  np.testing.assert_allclose(prefer_of(prompts)(a, b, ids), jax.nn.sigmoid(x - y), atol=1e-6)


def test_texts_beyond_the_positions(open_bench, tmp_path):
  folder_of(tmp_path / "judge", "chat", max_length=150)
  bench, reward_of = opened(open_bench, tmp_path / "judge")
  long, short = " ".join(["write"] * 40), "i do ."
  rollout = rollout_of(bench.tokenizer.encode_responses([long, short]))
  scores = np.asarray(reward_of(bench.train_set)(rollout, np.array([0, 1])))
  assert list(np.isfinite(scores)) == [False, True]
  folder_of(tmp_path / "narrow", "chat", max_length=20)
  options = judges.RewardOptions(path=str(tmp_path / "narrow"))
  narrow = judges.open_reward(bench.run, options, bench.config.model, bench.tokenizer)
  with pytest.raises(data.DataError, match="--reward.path=.*longest prompt has .* made for 20"):
    narrow(bench.train_set)


REFUSED = [  # File, fields to change (None removes it), message.
  ("tokenizer.json", None, "no tokenizer.json"),
  ("config.json", {"id2label": {"0": "a", "1": "b"}}, "one label, this one has 2"),
  ("config.json", {"id2label": {"0": "preference"}}, "its tokenizer is not that of the policy"),
  ("tokenizer_config.json", {"chat_template": "{% for"}, "not valid Jinja"),
  (
    "tokenizer_config.json",
    {"chat_template": "{{ raise_exception('no one') }}"},
    "--reward.path=.*the chat template refused the turns",
  ),
]


@pytest.mark.parametrize("name, fields, message", REFUSED, ids=lambda x: str(x)[:20])
def test_what_is_refused(name, fields, message, open_bench, tmp_path):
  folder = tmp_path / "judge"
  folder_of(folder, "plain")
  if fields is None:
    (folder / name).unlink()
  else:
    found = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(found | fields))
  with pytest.raises((hf.ModelFolderError, data.DataError), match=message):
    bench, reward_of = opened(open_bench, folder)
    reward_of(bench.train_set)


@pytest.mark.parametrize("template", [None, "chat", "silent"])
def test_turns_of_tools_reach_it_or_are_refused(template, open_bench, tmp_path):
  silent = CHAT.replace("%}<|{{", "if m['role'] != 'tool' %}<|{{", 1)
  own = folder_of(tmp_path / "judge", "chat" if template else "plain")[2]
  if template == "silent":
    own.chat_template = silent
    own.save_pretrained(tmp_path / "judge")
  bench, reward_of = opened(open_bench, tmp_path / "judge")
  turns = [("user", "write"), ("assistant", "call"), ("tool", "ten")]
  asked = [{"role": role, "content": text} for role, text in turns]
  prompts = bench.train_set._replace(rows=[{"messages": asked}])
  rollout = rollout_of(bench.tokenizer.encode_responses(["i do ."]))
  if template != "chat":
    with pytest.raises(data.DataError, match="--reward.path=.*turns of the role 'tool'"):
      reward_of(prompts)
    return
  other = [*asked[:2], {"role": "tool", "content": "two"}]
  scores = [
    reward_of(prompts._replace(rows=[{"messages": of}]))(rollout, np.array([0]))
    for of in (asked, other)
  ]
  assert scores[0] != scores[1]


@full
def test_it_drives_ppo(start_here, sft_run, tmp_path):
  folder_of(tmp_path / "judge", "chat")
  summary = start_here(
    "ppo",
    tmp_path / "run",
    f"--init_from={sft_run}",
    f"--reward.path={tmp_path / 'judge'}",
    "--steps=40",
    "--batch_size=64",
    "--shaping.normalize",
    "--ppo.kl_coef=0",
    "--data.eval_rows=64",
    "--data.rows=256",
    "--optim.learning_rate=1e-2",
    "--critic.learning_rate=1e-2",
  )
  assert summary["reward/win_rate_low"] > 0.5
  assert summary["reward/mean"] > summary["reward/mean_before"]
