"""Adds to the site the pages of the repository, and those of its docstrings.

Links between pages stay. Those to a module lead to its page, and those to files that are not on the
site become plain text.
"""

import ast
import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("experiments", "experiments/bench", "launch", "rlhf_jax")
PAGES = [
  "README.md",
  "CONTRIBUTING.md",
  "CHANGELOG.md",
  *(page.relative_to(ROOT).as_posix() for each in FOLDERS for page in (ROOT / each).glob("*.md")),
]
STUBS = ("rlhf_jax/experiments", "rlhf_jax/launch")
# File of a module -> its page.
MODULES = {
  name: f"reference/{name.removeprefix('rlhf_jax/').removesuffix('.py')}.md"
  for name in sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("rlhf_jax/**/*.py"))
  if not name.startswith(STUBS) and not posixpath.basename(name).startswith("__")
}
SCRIPTS = "experiments/scripts.md"
NAV = [
  {"Home": "README.md"},
  {
    "Scripts": [
      "experiments/README.md",
      {"By name": SCRIPTS},
      "experiments/EXTENDING.md",
      "experiments/PYTHON.md",
      "experiments/METHODS.md",
      "experiments/bench/README.md",
    ]
  },
  {"Clusters": ["launch/README.md", "launch/SWEEPS.md"]},
  {"Library": ["rlhf_jax/README.md"]},
  {"Development": ["CONTRIBUTING.md", "CHANGELOG.md"]},
]


def on_config(config):
  """Sets the navigation: the pages, and the modules by package."""
  packages = {}
  for file, page in MODULES.items():
    outer, _, name = file.removesuffix(".py").rpartition("/")
    packages.setdefault(outer.replace("/", "."), []).append({name: page})
  first = ["rlhf_jax.losses", "rlhf_jax.algorithms"]
  names = [*first, *sorted(set(packages) - set(first))]
  reference = ["reference.md", *({name: packages[name]} for name in names)]
  config.nav = [*NAV[:-1], {"Reference": reference}, NAV[-1]]
  return config


def on_files(files, config):
  """Adds the pages, the pictures and the modules."""
  for page in [*PAGES, "experiments/rlhf.png"]:
    files.append(File.generated(config, page, abs_src_path=str(ROOT / page)))
  for file, page in MODULES.items():
    module = file.removesuffix(".py").replace("/", ".")
    files.append(File.generated(config, page, content=f"# {module}\n\n::: {module}\n"))
  files.append(File.generated(config, SCRIPTS, content=_scripts()))
  return files


def on_page_markdown(markdown, page, config, files):
  """Leads links to where their targets are on the site."""
  folder = posixpath.dirname(page.file.src_uri)

  def lead(found):
    text, target, anchor = found["text"], found["target"], found["anchor"] or ""
    path = posixpath.normpath(posixpath.join(folder, target))
    inside = [path, f"{path}/README.md", MODULES.get(path), _first_module(path)]
    for place in filter(None, inside):
      if files.get_file_from_path(place) is not None:
        return f"[{text}]({posixpath.relpath(place, folder or '.')}{anchor})"
    return text

  link = r"(?<!!)\[(?P<text>[^\]]+)\]\((?!https?:|#)(?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)"
  return re.sub(link, lead, markdown)


def _first_module(folder):
  """Page of the first module of a package."""
  return next((page for file, page in MODULES.items() if file.startswith(f"{folder}/")), None)


def _scripts():
  """Page of the docstrings of the scripts."""
  parts = ["# Scripts by name"]
  for path in sorted((ROOT / "experiments").glob("*.py")):
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if text:
      parts.append(f"## {path.stem}\n\n```text\n{text}\n```")
  return "\n\n".join(parts) + "\n"
