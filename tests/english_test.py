"""Docstrings start with a verb or a noun, and a line about an argument names what it is."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
# A summary that starts with one of these is a clause without its noun: "What a model says."
_CLAUSES = {"what", "how", "where", "whether", "which", "when", "who", "why", "if", "that"}
# An argument line that starts with one of these lacks its noun: "Of the script.", "Its start."
_ELLIPSES = _CLAUSES - {"if"} | {
  *("of", "under", "as", "by", "to", "at", "is", "such", "its", "their", "theirs", "those"),
  *("added", "called", "divides", "made", "taken"),
}
_SHAPE = re.compile(r"(\[[^\]]*\]( each)?|Same shape|Scalar)( (float|int|uint|bool)\d*)?,? *")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _first_word(text: str) -> str:
  return re.match(r"\W*(\w*)", text)[1].lower()


def findings(source: str) -> list[tuple[int, str]]:
  """Lists (line number, line) of the summaries and argument lines that lack a verb or a noun."""
  found = []
  for node in ast.walk(ast.parse(source)):
    docstring = ast.get_docstring(node) if isinstance(node, _DOCUMENTED) else None
    if not docstring:
      continue
    section = ""
    for number, line in enumerate(docstring.split("\n"), node.body[0].lineno):
      if number == node.body[0].lineno:
        wrong = _first_word(line) in _CLAUSES
      elif heading := re.fullmatch(r"(\w+):", line):
        section, wrong = heading[1], False
      elif section in ("Args", "Attributes"):
        text = re.match(r"  [\w*][\w*, ]*: +(.*)", line)  # "  name: text", not what continues it.
        wrong = bool(text) and _first_word(_SHAPE.sub("", text[1], count=1)) in _ELLIPSES
      else:
        text = re.match(r"  (\S.*)", line) if section in ("Returns", "Yields") else None
        wrong = bool(text) and _first_word(line) in _CLAUSES
      if wrong:
        found.append((number, line.strip()))
  return found


def test_docstrings_read_as_english():
  wrong = []
  for folder in ("rlhf_jax", "experiments", "launch", "tests"):
    for path in sorted((ROOT / folder).rglob("*.py")):
      name = path.relative_to(ROOT).as_posix()
      lines = findings(path.read_text(encoding="utf-8"))
      wrong += [f"{name}:{number}: {line}" for number, line in lines]
  assert not wrong, "\n".join(wrong)


def test_a_bad_docstring_is_reported():
  source = '''"""Whether it rains."""

def predict(config, params, tokens, mask, model):
  """Predicts the next token.

  Args:
    config: Of the script.
    params: Params of the model, which
      what: this line only continues the one above.
    tokens, mask: [B, T] int32, of the batch.
    model: Its architecture.

  Returns:
    What the model says.
  """
'''
  assert [number for number, _ in findings(source)] == [1, 7, 10, 11, 14]
