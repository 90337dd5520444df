"""Every file directly in experiments/ is a script, and a page."""

import ast
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "experiments"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path.stem != "__init__")
PAGE = 150  # Lines.


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_a_page_that_can_be_run(path):
  source = path.read_text(encoding="utf-8")
  assert len(source.splitlines()) <= PAGE
  last = ast.parse(source).body[-1]
  assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"
  assert ast.unparse(last.body[-1]).startswith(("entry.run_script(", "entry.run("))
