"""The built-in task: short reviews on demand, with a known gold reward and simulated annotators."""

from rlhf_jax.simulation.annotators import ANNOTATORS, preference_probability, value
from rlhf_jax.simulation.demands import parse_prompt
from rlhf_jax.simulation.gold import gold_of_sentences, gold_parts, gold_reward, has_filler
from rlhf_jax.simulation.tasks import demonstrations, preferences, prompts, votes
from rlhf_jax.simulation.world import WORDS

__all__ = [
  "ANNOTATORS",
  "WORDS",
  "demonstrations",
  "gold_of_sentences",
  "gold_parts",
  "gold_reward",
  "has_filler",
  "parse_prompt",
  "preference_probability",
  "preferences",
  "prompts",
  "value",
  "votes",
]
