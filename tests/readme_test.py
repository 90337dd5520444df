"""Python on the pages runs as printed, their links lead somewhere, and README is short."""

import math
import pathlib
import re
import tomllib

import jax
import numpy as np
import pytest

from rlhf_jax.losses import preference

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = (".", "experiments", "rlhf_jax", "launch")
PAGES = {
  page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
  for folder in FOLDERS
  for page in sorted((ROOT / folder).glob("*.md"))
}


def anchors(text: str) -> set[str]:
  """Names of the headings of a page, as GitHub makes them."""
  headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# Pages whose code is files and whole runs, which tests of their own execute.
FILES = ("experiments/EXTENDING.md", "experiments/PYTHON.md", "rlhf_jax/README.md")


@pytest.mark.parametrize("page", [page for page in PAGES if page not in FILES])
def test_python_blocks_run(page, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for block in re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL):
    exec(compile(block, page, "exec"), {"print": lambda *args: None})


def test_losses_are_those_of_the_formulas(capsys):
  (block,) = re.findall(r"```python\n(.*?)```", PAGES["README.md"], re.DOTALL)
  exec(compile(block, "README.md", "exec"), {})
  # Both pairs have a margin of 0.15, and the reward is 0.7 less 0.1 times the log-ratio of -0.2.
  dpo, ppo = map(float, capsys.readouterr().out.split())
  assert dpo == round(math.log1p(math.exp(-0.15)), 4)
  rewards = [-0.1 * 0.1, -0.1 * 0.2, 0.7 + 0.1 * 0.5]
  to_go = [sum(0.95 ** (s - t) * rewards[s] for s in range(t, 3)) for t in range(3)]
  assert abs(ppo + math.exp(0.1) * sum(to_go) / 3) < 1e-4


def test_a_run_among_others_is_the_run_alone():
  (block,) = re.findall(r"```python\n(.*?)```", PAGES["rlhf_jax/README.md"], re.DOTALL)
  names = {"print": lambda *args: None}
  exec(compile(block, "rlhf_jax/README.md", "exec"), names)
  train, seeds, rates, losses = (names[name] for name in ("train", "seeds", "rates", "losses"))
  assert losses.shape == (4, 10)
  np.testing.assert_allclose(losses[2], jax.jit(train)(seeds[2], rates[2]), rtol=1e-5)
  assert len({float(loss) for loss in losses[:, -1]}) == 4


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
  for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
    if target.startswith("https://"):
      continue
    name, _, anchor = target.partition("#")
    path = (ROOT / page).parent / name if name else ROOT / page
    assert path.exists(), target
    if anchor:
      assert anchor in anchors(path.read_text(encoding="utf-8")), target


def test_readme_is_an_entrance():
  readme = PAGES["README.md"]
  assert len(readme.splitlines()) <= 200
  (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", readme)
  assert (ROOT / picture).read_bytes().startswith(b"\x89PNG")
  assert (ROOT / picture).stat().st_size < 200_000
  assert readme.index("```python") < readme.index("## Methods")


def test_the_layout_is_that_of_the_contract():
  text = PAGES["rlhf_jax/README.md"]
  shown: dict[str, list[str]] = {}
  for layer, names in re.findall(r"^\| (\d) \| ([^|]*) \|", text, re.MULTILINE):
    shown.setdefault(layer, []).extend(re.findall(r"`(\w+)`", names))
  settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
  (contract,) = [of for of in settings["tool"]["importlinter"]["contracts"] if of["id"] == "layers"]
  layers = [sorted(layer.split(" : ")) for layer in reversed(contract["layers"])]
  assert {layer: sorted(names) for layer, names in shown.items()} == {
    str(number): names for number, names in enumerate(layers, 1)
  }


def test_every_loss_of_pairs_is_on_the_page():
  for name in preference.PAIRWISE_LOSSES:
    assert f"`{name}`" in PAGES["experiments/METHODS.md"]


def test_nothing_is_written_on_two_pages():
  seen: dict[str, str] = {}
  for page, text in PAGES.items():
    prose = re.sub(r"```.*?```|^\|.*?$", "", text, flags=re.DOTALL | re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n", prose):
      words = " ".join(paragraph.split())
      if len(words) > 80:
        assert words not in seen, f"{page} and {seen[words]}: {words[:80]}"
        seen[words] = page
