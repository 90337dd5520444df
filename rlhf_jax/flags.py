"""Command-line flags from frozen dataclasses, and back.

A script describes its options once, as a frozen dataclass with an "Attributes:" section:

  config = flags.define(Config)

  def main(argv):
    train(config())

  if __name__ == "__main__":
    entry.run(main)

Every field is a plain absl flag: `--steps` for a field of `Config`, `--dpo.beta` for a field of its
nested dataclass `dpo`. Values are checked before anything is compiled: by type here, by range in
the `__post_init__` of the dataclass, whose messages start with the name of the field.
"""

import collections
import dataclasses
import difflib
import functools
import inspect
import math
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar, cast

from absl import app, flags

from rlhf_jax import defaults as defaults_lib
from rlhf_jax import workdir as workdir_lib

# A flag belongs to the script that calls `define`, whose --help then lists it.
flags.disclaim_key_flags()

T = TypeVar("T")
_Names = tuple[str, ...]  # Field names from the outermost dataclass inwards.


class UsageError(app.UsageError):
  """The command line asks for something impossible. The message names the flag and the fix."""

  def __init__(self, message: str):
    super().__init__(message, exitcode=os.EX_USAGE)


class UnknownFlagError(UsageError):
  """The command line has a flag that the script does not have; the message names near ones."""

  def __init__(self, message: str):
    super().__init__(message)
    self.exitcode = 1


def define(
  cls: type[T],
  *,
  prefix: str = "",
  flag_values: flags.FlagValues = flags.FLAGS,
  defaults: T | None = None,
) -> Callable[[], T]:
  """Registers one flag per field of a frozen dataclass, nested dataclasses included.

  A name that repeats the one before it is written once: the field `kl_coef` of `ppo` of `ppo` is
  `--ppo.kl_coef`. Field types are int, float, bool, str, Literal, `X | None` (the word `none`) and
  `tuple[X, ...]` (comma separated). A field without a default is a required flag. A field with the
  metadata `yields` is no flag where a field of a repeated name has its flag.

  Args:
    cls: A frozen dataclass; the help of a flag is the field's text under "Attributes:".
    prefix: Written before every name: `prefix="dpo"` makes `--dpo.beta`.
    flag_values: The registry; another than the global one is for tests.
    defaults: Defaults, if not those of `cls`.

  Returns:
    A function that builds the dataclass from the parsed flags. It raises UsageError for what a
    `__post_init__` refuses.

  Raises:
    TypeError: The dataclass is not frozen, or a field has a type no flag can hold.
    ValueError: Two fields get the same name, or a default cannot be written as a flag.
  """
  taken: dict[str, _Names] = {}
  outer = tuple(prefix.split(".")) if prefix else ()
  build = _define(cls, outer, flag_values, defaults, taken)

  def read() -> T:
    config = build()
    # Defaults that depend on the model are known now: a flag file must not depend on it again.
    for name, value in flatten(to_dict(config), outer).items():
      is_number = isinstance(value, int | float)
      if name in taken and is_number and flag_values[name].value != value:
        flag_values[name].value = value
    return config

  return read


def names(*classes: type[Any]) -> list[str]:
  """Returns the flags that `define` makes, as they are typed: `--steps=`, or `--share`, a bool."""
  registry = flags.FlagValues()
  for cls in classes:
    define(cls, flag_values=registry)
  return [f"--{name}{'' if registry[name].boolean else '='}" for name in registry]


def parse(argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS) -> None:
  """Parses a command line, program name first, and refuses what absl would let pass.

  A flag after a --flagfile replaces that of the file; a flag before it is refused, because the file
  would replace it.

  Raises:
    UsageError: A flag is unknown, missing or given twice, or a word is left over.
    absl.flags.Error: An unreadable value.
  """
  line = _scan(argv[1:], flag_values)
  for name, count in line.counts.items():
    if count > 1:
      raise UsageError(f"--{name} is given {count} times; keep one")
  if line.problem:
    raise UsageError(line.problem)
  for name in line.empty:
    if name.rpartition(".")[2] in _FILES and not flag_values[name].default:
      raise UsageError(
        f"--{name}= is empty: is a shell variable in it unset? Leave the flag out to use none"
      )
  try:
    left_over = flag_values(argv)[1:]
  except flags.UnrecognizedFlagError as error:
    raise UnknownFlagError(_near(error.flagname, flag_values)) from None
  except flags.IllegalFlagValueError:
    if missing := _missing(flag_values):
      raise UsageError(missing) from None
    raise
  if left_over:
    raise UsageError(_explain(left_over[0], line.last, flag_values))


def refuse_both(name: str, other: str, flag_values: flags.FlagValues = flags.FLAGS) -> None:
  """Refuses two flags that say the same; a value of 0 is that of a flag that is not given.

  Raises:
    UsageError: Both are given.
  """
  both = [flag_values[flag] for flag in (name, other) if flag in flag_values]
  if len(both) == 2 and both[0].value and all(flag.present for flag in both):
    raise UsageError(f"--{name} is another way to say --{other}; give one of the two")


def save_flags(path: str | os.PathLike[str], flag_values: flags.FlagValues = flags.FLAGS) -> None:
  """Writes the value of every flag of the script, so that `--flagfile=path` repeats the run.

  Written are the flags made by `define` and those the main script defines itself, defaults
  included: a later change of a default does not change the repetition. One process writes.
  """
  own = {flag.name for flag in flag_values.get_flags_for_module(sys.argv[0])}
  lines = []
  for name in sorted(flag_values):
    flag = flag_values[name]
    if name != flag.name:  # A short name.
      continue
    if isinstance(flag.parser, _Parser):
      lines.append(f"--{name}={flag.parser.write(flag.value)}")
    elif name in own and flag.value is not None:
      lines.append(flag.serialize())
  workdir_lib.atomic_write(path, "".join(line + "\n" for line in lines))


def save_configs(path: str | os.PathLike[str], *configs: Any) -> None:
  """Writes what `save_flags` would, had a script been started with these dataclasses."""
  settings = {name: value for config in configs for name, value in to_dict(config).items()}
  lines = [as_line(name, value) for name, value in sorted(flatten(settings).items())]
  workdir_lib.atomic_write(path, "".join(line + "\n" for line in lines))


def to_dict(config: Any) -> dict[str, Any]:
  """Returns a dataclass as nested plain dicts and lists, ready for JSON."""
  return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
  if dataclasses.is_dataclass(value):
    return to_dict(value)
  return [_plain(v) for v in value] if isinstance(value, tuple) else value


def flatten(settings: Mapping[str, Any], outer: _Names = ()) -> dict[str, Any]:
  """Nested settings, as `to_dict` gives them, by the names of their flags."""
  flat = {}
  for field, value in settings.items():
    names = (*outer, field)
    flat |= flatten(value, names) if isinstance(value, Mapping) else {_flag_name(names): value}
  return flat


def changed(config: Any) -> dict[str, Any]:
  """The flags of a dataclass that have another value than its default, or no default."""
  defaults = {
    field.name: default
    for field in dataclasses.fields(config)
    if (default := _default(field, None)) is not dataclasses.MISSING
  }
  kind = defaults_lib.kind_of(config)
  plain = {name: _plain(defaults_lib.settled(x, kind)) for name, x in defaults.items()}
  usual = flatten(plain)
  return {
    name: value
    for name, value in flatten(to_dict(config)).items()
    if name not in usual or usual[name] != value
  }


def as_line(name: str, value: Any) -> str:
  """A line of a flag file, from a value that `flatten` gave."""
  if isinstance(value, list):
    text = ",".join(map(str, value))
  elif isinstance(value, bool) or value is None:
    text = str(value).lower()
  else:
    text = str(value)
  return f"--{name}={text}"


class _Flag(flags.Flag):
  """A flag with its place in `--help`: the title of a group, None for flags that are rarely set."""

  title: str | None = None
  order: int = 0
  needed: bool = False  # Has no default.


def help_text(script: str, flag_values: flags.FlagValues = flags.FLAGS, width: int = 80) -> str:
  """Text of `--help`: the docstring of a script, then its flags in titled groups.

  The groups and the flags in them are in the order of the dataclasses. Left out are flags that are
  rarely set (`ranges.rare`), and those of a nested dataclass that are not among the names that the
  metadata of its field call `listed`.

  Args:
    script: Docstring of the script.
    flag_values: The registry.
    width: Columns of the terminal.
  """
  groups: dict[str, list[str]] = {}
  rare = 0
  direct = [f for f in flag_values.get_flags_for_module(sys.argv[0]) if not isinstance(f, _Flag)]
  for flag in direct:
    text = textwrap.fill(flag.help or "", width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    shown = f"  --{flag.name}={'' if flag.default is None else flag.default}\n{text}"
    groups.setdefault("Flags of the script", []).append(shown.rstrip())
  for flag in _in_order(flag_values):
    if flag.title is None:
      rare += 1
      continue
    write = cast(_Parser, flag.parser).write
    default = "" if flag.default is None else write(flag.default)
    choices = flag.parser.syntactic_help if flag.parser.syntactic_help.startswith("<") else ""
    name = f"[no]{flag.name} ({default})" if flag.boolean else f"{flag.name}={default}"
    words = " ".join(filter(None, [flag.help, choices]))
    lines = textwrap.wrap(words, width, initial_indent="      ", subsequent_indent="      ")
    groups.setdefault(flag.title, []).append("\n".join([f"  --{name}", *lines]))
  parts = [
    _reflow(script.strip(), width),
    *("\n".join([textwrap.fill(title, width), *texts]) for title, texts in groups.items()),
  ]
  if rare:
    parts.append(f"{rare} more flags are rarely set; --helpfull lists them.")
  return "\n\n".join(parts) + "\n"


def _reflow(text: str, width: int) -> str:
  """Wraps a text: sentences are filled, indented commands are continued by backslashes."""
  lines, sentences = [], []
  for command in [*re.split(r"(?<! \\)\n", text), ""]:
    if command and not command.startswith(" "):
      sentences.append(command)
      continue
    lines += textwrap.wrap(" ".join(sentences), width, break_on_hyphens=False)
    sentences = []
    if all(len(line) <= width for line in command.split("\n")):
      lines.append(command)
      continue
    line = re.sub(r" \\\n *", " ", command)
    indent = " " * (len(line) - len(line.lstrip()))
    pieces = textwrap.wrap(line, width - 2, subsequent_indent=f"{indent}  ", break_on_hyphens=False)
    lines += [f"{piece} \\" for piece in pieces[:-1]] + pieces[-1:]
  return "\n".join(lines).rstrip()


def _in_order(flag_values: flags.FlagValues) -> list[_Flag]:
  """Flags that `define` made, in its order."""
  by_id = {id(flag_values[name]): flag_values[name] for name in flag_values}
  return sorted(
    (flag for flag in by_id.values() if isinstance(flag, _Flag)), key=lambda flag: flag.order
  )


def _define(
  cls: type[Any],
  outer: _Names,
  flag_values: flags.FlagValues,
  defaults: Any,
  taken: dict[str, _Names],
  listed: Collection[str] | None = None,
  title: str = "",
) -> Callable[[], Any]:
  if not dataclasses.is_dataclass(cls) or not getattr(cls, "__dataclass_params__").frozen:  # noqa: B009
    raise TypeError(f"{cls.__name__} must be a frozen dataclass")
  hints = typing.get_type_hints(cls)
  docs = _field_docs(cls)
  title = title or _title(cls, outer)
  readers: dict[str, Callable[[], Any]] = {}
  for field in dataclasses.fields(cls):
    if not field.init:
      continue
    names = (*outer, field.name)
    default = _default(field, defaults)
    if dataclasses.is_dataclass(hints[field.name]):
      inner = field.metadata.get("listed") if listed is None else _below(listed, field.name)
      group = "" if listed is None else title
      readers[field.name] = _define(
        hints[field.name], names, flag_values, default, taken, inner, group
      )
      continue
    name = _flag_name(names)
    if field.metadata.get("yields") and field.name in _repeated(hints, outer):
      readers[field.name] = functools.partial(lambda value: value, default)
      continue
    if name in taken:
      raise ValueError(
        f"{'.'.join(taken[name])} and {'.'.join(names)} would both be --{name}; rename one field"
      )
    taken[name] = names
    rare = field.metadata.get("rare", False) if listed is None else field.name not in listed
    shown = None if rare else title
    _register(name, hints[field.name], default, docs.get(field.name), flag_values, shown)
    readers[field.name] = _reader(name, default, flag_values)

  def build() -> Any:
    values = {name: read() for name, read in readers.items()}
    try:
      return cls(**values)
    except ValueError as error:
      raise UsageError(_name_flag(str(error), readers, outer)) from error

  return build


def _repeated(hints: dict[str, Any], outer: _Names) -> set[str]:
  """Names of the fields of a nested dataclass whose name repeats the one before it."""
  inner = hints.get(outer[-1]) if outer else None
  return {field.name for field in dataclasses.fields(inner)} if inner else set()


def _title(cls: type[Any], outer: _Names) -> str:
  """Title of the flags of a dataclass: the first sentence of its docstring."""
  text = inspect.getdoc(cls) or ""
  if text.startswith((f"{cls.__name__}(", "Attributes:")):  # Made by dataclass, or no summary.
    text = ""
  summary = (text or cls.__name__).partition("\n\n")[0]
  sentence = " ".join(re.split(r"(?<=\.)\s", summary.strip(), maxsplit=1)[0].split()).rstrip(".")
  return f"{sentence} (--{'.'.join(outer)}.*)" if outer else sentence


def _below(listed: Collection[str], name: str) -> list[str]:
  """Names below `name` among names with dots."""
  return [rest for first, _, rest in (x.partition(".") for x in listed) if first == name and rest]


def _default(field: dataclasses.Field, defaults: Any) -> Any:
  """Returns the default value of a field, MISSING if it has none."""
  if defaults is not None and defaults is not dataclasses.MISSING:
    return getattr(defaults, field.name)
  if field.default_factory is not dataclasses.MISSING:
    return field.default_factory()
  return field.default


def _reader(name: str, default: Any, flag_values: flags.FlagValues) -> Callable[[], Any]:
  def read() -> Any:
    value = getattr(flag_values, name)  # Unlike [name].value, refuses before parsing.
    return default if flag_values[name].using_default_value else value

  if isinstance(default, defaults_lib.Rate | defaults_lib.Weight | defaults_lib.Count):
    return read
  return lambda: getattr(flag_values, name)


def _flag_name(names: _Names) -> str:
  """Joins names with dots, leaving out every one that repeats the one before it."""
  return ".".join(n for i, n in enumerate(names) if i == 0 or n != names[i - 1])


def _name_flag(message: str, fields: typing.Container[str], outer: _Names) -> str:
  """Turns "beta must be positive" into "--dpo.beta must be positive"."""
  match = re.match(r"\w+(\.\w+)*", message)
  if match and match[0].split(".")[0] in fields:
    return f"--{_flag_name((*outer, *match[0].split('.')))}{message[match.end() :]}"
  return f"--{_flag_name(outer)}: {message}" if outer else message


def _field_docs(cls: type) -> dict[str, str]:
  """Returns the text of each field under "Attributes:", base classes included."""
  docs: dict[str, str] = {}
  for base in reversed(cls.__mro__):
    text = inspect.cleandoc(base.__dict__.get("__doc__") or "")
    if text.startswith("Attributes:"):  # Without a summary, cleandoc takes the indent away.
      text = text.replace("\n", "\n  ")
    section = re.search(r"^Attributes:[ \t]*\n((?:[ \t]+\S.*(?:\n|$)|[ \t]*\n)+)", text, re.M)
    if not section or not dataclasses.is_dataclass(base):
      continue
    lines = section[1].expandtabs().splitlines()
    indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    name = ""
    for line in lines:
      entry = re.match(r"(\w+)(?: \(.*?\))?:\s*(.*)", line[indent:])
      if entry:
        name = entry[1]
        docs[name] = entry[2]
      elif name and line.strip():
        docs[name] = f"{docs[name]} {line.strip()}".strip()
  return docs


class _Parser(flags.ArgumentParser):
  """Reads a flag's text with `read`; `write` is its inverse."""

  def __init__(self, read: Callable[[str], Any], write: Callable[[Any], str], syntactic_help: str):
    super().__init__()
    self.read = read
    self.write = write
    self.syntactic_help = syntactic_help

  def parse(self, argument: Any) -> Any:
    return self.read(argument if isinstance(argument, str) else self.write(argument))

  def flag_type(self) -> str:
    return self.syntactic_help


class _Serializer(flags.ArgumentSerializer):
  def __init__(self, write: Callable[[Any], str]):
    super().__init__()
    self._write = write

  def serialize(self, value: Any) -> str:
    return self._write(value)


def _register(
  name: str,
  hint: Any,
  default: Any,
  help_text: str | None,
  flag_values: flags.FlagValues,
  title: str | None,
) -> None:
  try:
    parser = _parser(hint)
  except TypeError as error:
    raise TypeError(f"--{name}: {error}") from None
  required = default is dataclasses.MISSING
  if isinstance(default, defaults_lib.Rate | defaults_lib.Weight | defaults_lib.Count):
    numbers = default.by_kind
    other = f"Default for a pretrained model: {numbers['pretrained']:g}"
    if numbers["adapters"] != numbers["pretrained"]:
      other += f", for adapters {numbers['adapters']:g}"
    help_text = f"{help_text or ''} {other}.".strip()
  if required:
    help_text = f"{help_text or ''} Required.".strip()
  value = None if required else default
  try:
    flag = _Flag(parser, _Serializer(parser.write), name, value, help_text, boolean=_is_bool(hint))
  except flags.IllegalFlagValueError as error:
    raise ValueError(f"the default of {error}") from None
  if flag.value != value:
    raise ValueError(f"--{name}: the default {value!r} would be read back as {flag.value!r}")
  flag.title, flag.order, flag.needed = title, len(flag_values), required
  flags.DEFINE_flag(flag, flag_values, required=required)


def _is_bool(hint: Any) -> bool:
  return hint is bool or set(typing.get_args(hint)) == {bool, types.NoneType}


def _parser(hint: Any) -> _Parser:
  """Returns the parser of a field type; TypeError if there is none."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if hint is bool:
    return _Parser(flags.BooleanParser().parse, lambda v: str(v).lower(), "true or false")
  if hint is int:
    return _Parser(flags.IntegerParser().parse, str, "an integer")
  if hint is float:
    return _Parser(_read_float, str, "a number")
  if hint is str:
    return _Parser(_read_line, str, "")
  if origin is typing.Literal:
    return _choice_parser(args)
  if origin in (typing.Union, types.UnionType) and types.NoneType in args and len(args) == 2:
    return _optional_parser(_parser(next(a for a in args if a is not types.NoneType)))
  if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
    return _tuple_parser(_parser(args[0]))
  raise TypeError(f"a flag cannot hold {hint}")


def _read_float(text: str) -> float:
  value = float(text)
  if not math.isfinite(value):
    raise ValueError("must be a finite number")
  return value


def _read_line(text: str) -> str:
  # A flag file holds one value per line and strips it; other control characters break terminals.
  if text != text.strip() or not text.isprintable():
    raise ValueError("must be printable and without spaces at its ends")
  return text


def _choice_parser(choices: tuple[Any, ...]) -> _Parser:
  words = {str(choice): choice for choice in choices}

  def read(text: str) -> Any:
    if text not in words:
      raise ValueError(f"must be one of {', '.join(words)}")
    return words[text]

  return _Parser(read, str, f"<{'|'.join(words)}>")


def _optional_parser(inner: _Parser) -> _Parser:
  return _Parser(
    lambda text: None if text.lower() == "none" else inner.read(text),
    lambda value: "none" if value is None else inner.write(value),
    f"{inner.syntactic_help} or none".strip(),
  )


def _tuple_parser(inner: _Parser) -> _Parser:
  return _Parser(
    lambda text: tuple(inner.read(part.strip()) for part in text.split(",")) if text else (),
    lambda values: ",".join(map(inner.write, values)),
    f"{inner.syntactic_help}, comma separated".lstrip(", "),
  )


class _Line(typing.NamedTuple):
  """The words of a command line, up to the first stray word.

  Attributes:
    counts: Flag name -> number of times that it is given.
    last: Flag right before the stray word.
    problem: Reason to refuse the line; empty if there is none.
    empty: Names of flags without a value after "=", unless they replace one of a --flagfile.
  """

  counts: Mapping[str, int]
  last: flags.Flag | None
  problem: str
  empty: Sequence[str] = ()


# Last parts of the names of flags that name files or folders.
_FILES = ("path", "eval_path", "ptx_path", "init_from", "opponent", "tfds")


def _scan(args: Sequence[str], flag_values: flags.FlagValues) -> _Line:
  """Counts the known flags on the command line itself."""
  counts: dict[str, int] = collections.Counter()
  from_files: dict[str, str] = {}
  last: flags.Flag | None = None
  problem = ""
  empty: list[str] = []
  rest = collections.deque(args)
  while rest and rest[0].startswith("-") and rest[0] != "--":
    arg, last = rest.popleft(), None
    name, has_value, value = arg.lstrip("-").partition("=")
    negated = name.removeprefix("no")
    if name not in flag_values and negated in flag_values and flag_values[negated].boolean:
      name = negated
    following = rest[0] if rest else ""
    if name == "flagfile":
      path = value if has_value else (rest.popleft() if rest else "")
      problem = problem or _merge_file(path, counts, from_files, flag_values)
    elif name in flag_values:
      flag = flag_values[name]
      if has_value and not value and name not in from_files:
        empty.append(name)
      spaced = following.startswith("=") if not has_value else not value and following[:1] != "-"
      if spaced and following:
        values = [following.lstrip("="), *list(rest)[1:2]]
        shown = next(filter(None, values), "VALUE")
        problem = problem or f"--{name} = {shown}: write --{name}={shown}, without spaces"
      if not flag.boolean and not has_value and rest:
        if following.startswith("--"):
          problem = problem or f"--{name} has no value: {following} follows; is a variable unset?"
        rest.popleft()
      last = flag
      if not isinstance(flag, flags.MultiFlag):
        counts[flag.name] += 1
    elif name == "undefok" and not has_value and rest:
      rest.popleft()
  return _Line(counts, last if rest else None, problem, empty)


def _merge_file(
  path: str,
  counts: Mapping[str, int],
  from_files: dict[str, str],
  flag_values: flags.FlagValues,
) -> str:
  """Adds the flags of a file to `from_files`; returns a reason to refuse it, if there is one."""
  if (kind := workdir_lib.kind_of(path)) not in ("", "a folder"):
    return f"--flagfile={path} is {kind}, not a file of one --name=value per line"
  try:
    lines = flag_values.read_flags_from_files([f"--flagfile={path}"])
  except flags.CantOpenFlagFileError as error:
    reason = getattr(error.__cause__ or error.__context__, "strerror", None) or error
    return f"--flagfile={path} cannot be read: {reason}"
  except UnicodeDecodeError:
    return f"--flagfile={path} is not a text file of one --name=value per line"
  inner = _scan(lines, flag_values)
  for name, count in inner.counts.items():
    if count > 1:
      return f"--flagfile={path} has --{name} {count} times; keep one"
    if name in from_files:
      return f"--flagfile={path} and --flagfile={from_files[name]} both have --{name}; keep one"
    if name in counts:
      return (
        f"--{name} is given, and --flagfile={path} after it has another one; write --flagfile"
        " first, and the flags that replace its own after it"
      )
    from_files[name] = path
  return inner.problem


# Names that other libraries have for a flag, and the end of its name here.
_ELSEWHERE = {
  "bf16": "dtype",
  "bs": "batch_size",
  "data": "data.path",
  "dataset": "data.path",
  "dataset_name": "data.path",
  "eval_steps": "eval_every",
  "eval_file": "eval_path",
  "gradient_accumulation_steps": "microbatches",
  "gradient_checkpointing": "remat",
  "iterations": "steps",
  "kl": "kl_coef",
  "logging_steps": "log_every",
  "loss_type": "loss",
  "lora_r": "lora.rank",
  "lora_rank": "lora.rank",
  "lr": "learning_rate",
  "lr_scheduler_type": "schedule",
  "max_length": "max_response_length",
  "max_seq_len": "max_response_length",
  "max_steps": "steps",
  "model": "model.path",
  "model_name": "model.path",
  "model_name_or_path": "model.path",
  "num_epochs": "epochs",
  "num_generations": "samples_per_prompt",
  "num_steps": "steps",
  "num_train_epochs": "epochs",
  "num_gpus": "mesh",
  "output": "workdir",
  "output_dir": "workdir",
  "packing": "packed_length",
  "per_device_train_batch_size": "batch_size",
  "report_to": "trackers",
  "reward_model": "reward.path",
  "reward_model_path": "reward.path",
  "save_steps": "checkpoint_every",
  "train_batch_size": "batch_size",
  "train_file": "data.path",
  "use_lora": "lora.rank",
  "use_peft": "lora.rank",
  "validation_file": "eval_path",
  "wandb": "trackers",
  "warmup_ratio": "warmup",
  "warmup_steps": "warmup",
}
_MOST_NAMES = 4


def _near(name: str, flag_values: flags.FlagValues) -> str:
  """Message about an unknown flag: flags that end in its name, else those spelled like it."""
  known = [flag.name for flag in _in_order(flag_values)]
  wanted = name.replace("-", "_")
  last = wanted.rpartition(".")[2]
  for ending in (wanted, last, _ELSEWHERE.get(last, "")):
    found = [other for other in known if f".{other}".endswith(f".{ending}")] if ending else []
    if found:
      break
  else:
    found = difflib.get_close_matches(wanted, known, n=3)
    found += [o for o in known if difflib.get_close_matches(last, [o.rpartition(".")[2]], 1, 0.8)]
    found = list(dict.fromkeys(found))[:3]
  if not found:
    return f"unknown flag --{name}; --help lists the flags"
  shown = [f"--{other}" for other in found[:_MOST_NAMES]]
  more = f" or {len(found) - len(shown)} more" if len(found) > len(shown) else ""
  if not more and len(shown) > 1:
    more = f" or {shown.pop()}"
  return f"unknown flag --{name}; did you mean {', '.join(shown)}{more}?"


def _missing(flag_values: flags.FlagValues) -> str:
  """Message about the flags without a default that are not given; empty if all are."""
  unset = [flag for flag in _in_order(flag_values) if flag.needed and flag.value is None]
  if not unset:
    return ""
  names = " and ".join(f"--{flag.name}=..." for flag in unset)
  about = (unset[0].help or "").removesuffix("Required.").partition(". ")[0].strip(" .")
  return f"{names} {'is' if len(unset) == 1 else 'are'} needed; --{unset[0].name}: {about}"


def _explain(word: str, last_flag: flags.Flag | None, flag_values: flags.FlagValues) -> str:
  name, has_value, _ = word.partition("=")
  if last_flag is not None and last_flag.boolean:
    if word.lower() in ("true", "t", "1"):
      return f"stray word {word!r}: write --{last_flag.name}"
    if word.lower() in ("false", "f", "0"):
      return f"stray word {word!r}: write --no{last_flag.name} or --{last_flag.name}=false"
  if name in flag_values:
    return f"stray word {word!r}: write --{word if has_value else name + '=VALUE'}"
  return f"stray word {word!r}: flags are written --name=value (quote values with spaces)"
