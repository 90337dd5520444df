"""Repositories of a model hub by name, `hf://ORG/NAME[@REVISION]`, downloaded at one commit.

A model is its safetensors, JSON, template and vocabulary files; a data set is the named files of
`hf://datasets/ORG/NAME[@REVISION]/FILE`. Nothing that may hold code is downloaded. The address of
the hub, the cache and the token are those of huggingface_hub: HF_ENDPOINT, HF_HOME, HF_TOKEN and
HF_HUB_OFFLINE.
"""

import contextlib
import glob
import json
import os
import pathlib
import re
import urllib.parse
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from rlhf_jax import processes, workdir

PREFIX = "hf://"
_NAME = re.compile(
  r"hf://(?P<datasets>datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/@]+))?(/(?P<file>.+))?"
)
_IN_TEXT = re.compile(r"hf://[^,:\s]+")
_OF_MODELS = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt")
COPIES = "consolidated*"  # The weights once more, in a format of their maker, which nothing reads.
_OF_DATA = re.compile(r".+\.(jsonl|json|csv|tsv|parquet)(\.(gz|bz2|xz))?", re.IGNORECASE)
_REVISION = re.compile(r"[\w.-]+(/[\w.-]+)*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_KEY = "commit of "  # Start of the name of a commit in the identity of a run.

# Repository and revision -> commit, of the run that this process works on.
_COMMITS: dict[str, str] = {}
_SETTLED: dict[str, set[str]] = {}  # Its workdir -> names whose commits are known.


class HubError(ValueError):
  """A repository that cannot be read."""

  exit_code = os.EX_UNAVAILABLE


class HubNameError(HubError):
  """A name of nothing that can be read."""

  exit_code = os.EX_DATAERR


class Place(NamedTuple):
  """Parts of a name.

  Attributes:
    kind: Type of the repository: model or dataset.
    repo: ORG/NAME.
    revision: Branch, tag or commit; empty is the default branch.
    file: File or pattern in a data set.
  """

  kind: str
  repo: str
  revision: str
  file: str

  @property
  def address(self) -> str:
    """Name of the repository at its revision, without a file."""
    revision = f"@{self.revision}" if self.revision else ""
    return f"{PREFIX}{'datasets/' if self.kind == 'dataset' else ''}{self.repo}{revision}"


def is_name(text: str) -> bool:
  """Returns whether a path names a repository."""
  return text.startswith(PREFIX)


def parse(text: str) -> Place:
  """Splits a name.

  Raises:
    HubNameError: The name is malformed.
  """
  match = _NAME.fullmatch(text)
  kind = "dataset" if match and match["datasets"] else "model"
  revision = urllib.parse.unquote((match and match["revision"]) or "")
  plain = not revision or _REVISION.fullmatch(revision)
  if not match or not plain or (match["file"] and kind == "model") or ".." in text + revision:
    raise HubNameError(
      f"{text}: write hf://ORG/NAME[@REVISION] for a model, and"
      " hf://datasets/ORG/NAME[@REVISION]/FILE for data"
    )
  return Place(kind, match["repo"], revision, match["file"] or "")


def settle(run_folder: str | os.PathLike[str], values: Iterable[Any]) -> None:
  """Finds the commits of all names in the settings of a run, the same ones for all processes.

  A run that is resumed takes those that its workdir has recorded, whatever the hub has now.

  Args:
    run_folder: Workdir of the run.
    values: Values of its settings; names may be in lists, with weights.
  """
  names = {name for value in values for name in _names(value)}
  if not names:
    return
  folder = os.fspath(workdir.local_path(run_folder))
  if _SETTLED.get(folder, set()) >= names:
    return

  def find() -> dict[str, str]:
    _COMMITS.clear()
    _COMMITS.update(_recorded(pathlib.Path(folder)))
    return {place.address: commit_of(place) for place in map(parse, sorted(names))}

  found = processes.agree(find)
  _COMMITS.clear()
  _COMMITS.update(found)
  _SETTLED.clear()
  _SETTLED[folder] = names


@contextlib.contextmanager
def settled(run_folder: str | os.PathLike[str], values: Iterable[Any]) -> Iterator[None]:
  """Settles the names of another run while its files are read; then those of before count again."""
  commits, names = dict(_COMMITS), dict(_SETTLED)
  try:
    settle(run_folder, values)
    yield
  finally:
    _COMMITS.clear()
    _COMMITS.update(commits)
    _SETTLED.clear()
    _SETTLED.update(names)


def commits(values: Iterable[Any]) -> dict[str, str]:
  """Returns the commits of the names in settings, for the identity of a run."""
  places = [parse(name) for value in values for name in _names(value)]
  return {f"{_KEY}{place.address}": commit_of(place) for place in places}


def pinned(text: str) -> str:
  """Returns a name with its commit as the revision, if the commit is known."""
  place = parse(text)
  return place._replace(revision=_COMMITS.get(place.address, place.revision)).address


def commit_of(place: Place) -> str:
  """Returns the commit of a revision.

  Raises:
    HubError: There is none, or it cannot be looked up.
  """
  if _COMMIT.fullmatch(place.revision):
    return place.revision
  if place.address not in _COMMITS:
    _COMMITS[place.address] = _look_up(place)
  return _COMMITS[place.address]


def model_folder(text: str) -> pathlib.Path:
  """Downloads a model, if it is not in the cache, and returns its folder.

  Raises:
    HubError: The name is malformed, or the model cannot be downloaded.
  """
  place = parse(text)
  if place.kind != "model":
    raise HubNameError(f"{text}: a data set; give a model, hf://ORG/NAME")
  return _snapshot(place, list(_OF_MODELS), ["*/*", COPIES])


def data_files(text: str) -> list[str]:
  """Downloads the files of a data set, if they are not in the cache, and returns their paths.

  Raises:
    HubError: The name is malformed, there is no such file, or it cannot be downloaded.
  """
  place = parse(text)
  if place.kind != "dataset" or not place.file:
    raise HubNameError(f"{text}: names no file; write hf://datasets/ORG/NAME[@REVISION]/FILE")
  if not _OF_DATA.fullmatch(place.file):
    raise HubNameError(f"{text}: not a file of JSON Lines, JSON, CSV, TSV or Parquet")
  folder = _snapshot(place, [place.file], [])
  pattern = os.path.join(glob.escape(str(folder)), place.file)
  paths = sorted(path for path in glob.glob(pattern) if _OF_DATA.fullmatch(path))
  if not paths:
    raise HubError(f"{text}: the data set has no such file; look at {_page(place)}/tree/main")
  return paths


def _names(value: Any) -> list[str]:
  if isinstance(value, str):
    return _IN_TEXT.findall(value)
  if isinstance(value, list | tuple):
    return [name for item in value for name in _names(item)]
  return []


def _recorded(folder: pathlib.Path) -> dict[str, str]:
  """Returns the commits in the identity of a run."""
  try:
    identity = json.loads((folder / "identity.json").read_text(encoding="utf-8"))
    entries = identity.items()
  except (OSError, ValueError, AttributeError):
    return {}
  return {
    name.removeprefix(_KEY): commit
    for name, commit in entries
    if name.startswith(_KEY + PREFIX) and isinstance(commit, str) and _COMMIT.fullmatch(commit)
  }


def _endpoint() -> str:
  return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def _page(place: Place) -> str:
  return f"{_endpoint()}/{'datasets/' if place.kind == 'dataset' else ''}{place.repo}"


def _options(place: Place) -> dict[str, Any]:
  return {"repo_id": place.repo, "repo_type": place.kind, "revision": place.revision or None}


def _look_up(place: Place) -> str:
  """Asks the hub for a commit, and without a network the cache."""
  import huggingface_hub

  try:
    commit = huggingface_hub.HfApi(endpoint=_endpoint()).repo_info(**_options(place)).sha or ""
    if not _COMMIT.fullmatch(commit):
      raise ValueError(f"the hub names the commit {commit!r:.60}")
    with contextlib.suppress(OSError):  # The cache may be read-only.
      workdir.atomic_write(_reference(place), commit)  # A download by a commit writes none.
    return commit
  except Exception as error:
    if known := _known(place, error):
      raise known from error
    try:
      commit = _reference(place).read_text(encoding="utf-8").strip()
    except OSError:
      raise _unreachable(place, error) from error
    return commit


def _snapshot(place: Place, allow: list[str], ignore: list[str]) -> pathlib.Path:
  import huggingface_hub

  options = _options(place) | {"revision": commit_of(place)}
  options |= {"allow_patterns": allow, "ignore_patterns": ignore, "cache_dir": _cache()}
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(**options, endpoint=_endpoint()))
  except Exception as error:
    raise (_known(place, error) or _unreachable(place, error)) from error


def _cache() -> str | None:
  return os.environ.get("HF_HUB_CACHE") or None


def _reference(place: Place) -> pathlib.Path:
  """Returns the file of the cache that has the commit of a revision."""
  from huggingface_hub import constants

  folder = f"{place.kind}s--{place.repo.replace('/', '--')}"
  cache = pathlib.Path(_cache() or constants.HF_HUB_CACHE).expanduser()
  return cache / folder / "refs" / (place.revision or constants.DEFAULT_REVISION)


def _known(place: Place, error: Exception) -> HubError | None:
  """Returns what the hub has said, in words; None for an error of the network or the disk."""
  from huggingface_hub import errors

  page, name = _page(place), place.address
  if isinstance(error, errors.GatedRepoError):
    return HubError(
      f"{name}: the repository is gated; accept its terms at {page}, and log in with `hf auth"
      " login` or set HF_TOKEN"
    )
  if isinstance(error, errors.RevisionNotFoundError):
    return HubError(f"{name}: the repository has no revision {place.revision}; look at {page}")
  if isinstance(error, errors.RepositoryNotFoundError):
    return HubError(
      f"{name}: there is no such repository at {page}, or it is private; check the name, or log in"
      " with `hf auth login`"
    )
  if isinstance(error, errors.HFValidationError):
    return HubError(f"{name}: {str(error).splitlines()[0]}")
  return None


def _unreachable(place: Place, error: Exception) -> Exception:
  if reason := workdir.no_room(error):
    return OSError(reason)
  reason = (str(error).strip() or type(error).__name__).splitlines()[0]
  return HubError(
    f"{place.address}: not in the cache, and {_endpoint()} cannot be read ({reason}); connect this"
    " machine, or download it elsewhere and give the folder or file"
  )
