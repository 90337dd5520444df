import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import flags
from rlhf_jax.generation import SamplingConfig, ended, stop_text
from rlhf_jax.types import Rollout
from tests.testing import read_configs


def first_end(tokens, strings, texts):
  """Number of tokens up to the one that completes a string, by searching the text."""
  for count in range(1, len(tokens) + 1):
    text = b"".join(texts[t] for t in tokens[:count])
    if any(string.encode() in text for string in strings):
      return count
  return None


@pytest.mark.parametrize("seed", range(3))
def test_automaton_finds_what_a_search_of_the_text_finds(seed):
  rng = np.random.default_rng(seed)
  texts = [b"", *(bytes(rng.choice([97, 98, 99], rng.integers(1, 4)).tolist()) for _ in range(30))]
  texts += ["é".encode()[:1], "é".encode()[1:], b"aab", b"\n\nHuman:", b"x\n\nHum"]
  strings = {0: ["aacab", "ccb"], 1: ["abcab", "bca", "cccc"], 2: ["é", "\n\nHuman:", "aaa"]}[seed]
  automaton = stop_text(strings, texts)
  assert automaton.next.shape[1] <= len(texts)
  found = 0
  for _ in range(200):
    tokens = rng.integers(0, len(texts), 12)
    state, at = 0, None
    for n, token in enumerate(tokens):
      state = automaton.next[state, automaton.classes[token]]
      if at is None and automaton.is_complete(state):
        at = n + 1
    assert at == first_end(tokens, strings, texts)
    found += at is not None
  assert 5 < found < 195


def test_ended_by_a_stop_string():
  texts = [b"", b"a", b"b", b"ba", b"c"]
  automaton = stop_text(["ab"], texts)
  rows = [[1, 2, 0, 0], [1, 3, 0, 0], [2, 2, 1, 4], [4, 1, 0, 2], [1, 4, 2, 0]]
  mask = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], bool)
  prompt = np.full([5, 2], 1, np.int32)  # The prompt ends in an "a", which is not the response's.
  rollout = Rollout(
    jnp.asarray(np.concatenate([prompt, rows], axis=1)),
    jnp.asarray(np.pad(np.ones([5, 2], bool), ((0, 0), (0, 4)))),
    jnp.asarray(np.pad(mask, ((0, 0), (2, 0)))),
    jnp.zeros([5, 4]),
  )
  got = jax.device_get(ended(rollout, (9,), automaton))
  np.testing.assert_array_equal(got, [True, True, False, False, False])
  np.testing.assert_array_equal(ended(rollout, (4,), automaton), [True, True, True, True, True])


@pytest.mark.parametrize(
  ("given", "kept", "strings"),
  [
    (("END",), ("END",), ("END",)),
    (("\n\nHuman:",), (r"\n\nHuman:",), ("\n\nHuman:",)),
    ((r"\n\nHuman:", "###"), (r"\n\nHuman:", "###"), ("\n\nHuman:", "###")),
    ((" a, b ",), (r"\x20a\x2c b\x20",), (" a, b ",)),
    (("  ", "\t"), (r"\x20\x20", r"\t"), ("  ", "\t")),
    (("\x0b",), (r"\x0b",), ("\x0b",)),
    (("\xa0", "\u3000\u200b"), (r"\xa0", r"\u3000\u200b"), ("\xa0", "\u3000\u200b")),
    (
      ("\U0001f468\u200d\U0001f4bb",),
      ("\U0001f468\\u200d\U0001f4bb",),
      ("\U0001f468\u200d\U0001f4bb",),
    ),
    (("a\U000e0001",), (r"a\U000e0001",), ("a\U000e0001",)),
    ((), (), ()),
  ],
)
def test_stop_strings_are_kept_in_a_form_that_a_flag_can_hold(given, kept, strings):
  config = SamplingConfig(stop=given)
  assert (config.stop, config.stop_strings) == (kept, strings)
  assert SamplingConfig(stop=config.stop) == config


def test_empty_stop_strings_are_refused():
  with pytest.raises(ValueError, match="stop has an empty string"):
    SamplingConfig(stop=("a", ""))
  with pytest.raises(ValueError, match="every response would end at once"):
    stop_text([""], [b"a"])


def test_stop_strings_on_the_command_line():
  words = ["--workdir=w", "--init_from=m", r"--sampling.stop=\n\nHuman:,END"]
  _, config = read_configs("experiments.generate", words)
  assert config.sampling.stop_strings == ("\n\nHuman:", "END")
  assert flags.as_line("sampling.stop", list(config.sampling.stop)) == words[-1]
