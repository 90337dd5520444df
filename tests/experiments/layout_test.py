"""Every file directly in experiments/ is a script, and a page, as is a method."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path for path in ROOT.glob("experiments/*.py") if path.stem != "__init__")
METHODS = sorted(ROOT.glob("rlhf_jax/algorithms/*.py"))
PAGE = 150  # Lines.
LONGER: dict[str, str] = {}  # Path -> the reason.


@pytest.mark.parametrize(
  "path", [*SCRIPTS, *METHODS], ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_scripts_and_methods_are_pages(path):
  if path.relative_to(ROOT).as_posix() not in LONGER:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= PAGE


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_can_be_run(path):
  last = ast.parse(path.read_text(encoding="utf-8")).body[-1]
  assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"
  assert ast.unparse(last.body[-1]).startswith(("entry.run_script(", "entry.run("))
