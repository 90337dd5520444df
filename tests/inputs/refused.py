"""Exit code and message of an input that is refused."""

from rlhf_jax import entry


def refusal(function, *args, **options):
  """Returns the exit code and the message with which a script would end; fails for a traceback."""
  try:
    value = function(*args, **options)
  except Exception as error:
    known = entry.verdict(error)
    if known is None:
      raise
    return known
  raise AssertionError(f"it is accepted, and gives {value!r:.300}")
