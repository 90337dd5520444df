"""The site of the pages and docstrings is built without a warning and without network."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.testing import full


@full
@pytest.mark.slow
def test_the_site_builds(repository, tmp_path):
  for name in ("material", "mkdocstrings_handlers.python"):
    pytest.importorskip(name)
  text = (repository / ".docs" / "mkdocs.yml").read_text()
  (command,) = re.findall(r"&& (mkdocs build .*)", text)
  # A proxy that is not there: nothing can be fetched.
  env = os.environ | {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
  env["NO_MKDOCS_2_WARNING"] = "1"
  words = [sys.executable, "-m", *command.split(), "-d", str(tmp_path)]
  done = subprocess.run(words, cwd=repository, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert "WARNING" not in done.stderr

  def read(page: str) -> str:
    return (tmp_path / page).read_text(encoding="utf-8")

  assert "Reinforcement learning from human feedback in JAX" in read("index.html")
  assert "dpo_loss" in read("reference/losses/preference.html")
  assert "rlhf-jax ppo --workdir=runs/brief" in re.sub(
    "<[^>]+>", "", read("experiments/EXTENDING.html")
  )
  assert "Improves a policy against a reward by PPO" in read("experiments/scripts.html")
  # A link to a module leads to its page, and one to a file that is not on the site is text.
  assert 'href="../reference/data/schema.html"' in read("experiments/index.html")
  pages = sorted(tmp_path.rglob("*.html"))
  modules = [path.stem for path in (repository / "rlhf_jax").rglob("*.py") if path.stem[0] != "_"]
  assert {path.stem for path in pages} >= set(modules)
  for page in pages:
    content = page.read_text(encoding="utf-8")
    loaded = re.findall(r"<(?:script|img)[^>]* src=.?(http[^\s>]*)", content)
    loaded += re.findall(r"<link[^>]* rel=.?(?:style|preconnect)[^>]*href=.?(http[^\s>]*)", content)
    assert not loaded, page
    for target in re.findall(r'<a[^>]* href="([^"#:]+\.html)', content):
      assert (page.parent / target).exists() or target.startswith("/"), (page, target)


def test_every_page_is_on_the_site(repository):
  hook = (repository / ".docs" / "pages.py").read_text()
  folders = re.search(r"^FOLDERS = \((.*)\)", hook, re.MULTILINE)
  assert folders is not None
  listed = {".", *re.findall(r'"([^"]+)"', folders[1])}
  command = ["git", "ls-files", "*.md"]
  named = subprocess.run(command, cwd=repository, capture_output=True, text=True)
  if named.returncode:
    pytest.skip("not a clone")
  pages = [pathlib.PurePosixPath(line) for line in named.stdout.split()]
  assert {str(page.parent) for page in pages if page.parts[0] != ".docs"} == listed
