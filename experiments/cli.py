"""What the scripts share: flags, errors for a person, the table at the end."""

import _thread
import difflib
import errno
import io
import json
import logging as standard_logging
import os
import re
import select
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser
from rich.markup import escape

from configs import common
from experiments.console import as_typed
from experiments.settings import CONFIGS, settings
from vera_jax.adapters.method import IN_CONFIG
from vera_jax.adapters.methods import METHODS, check_key, links_of, near_keys
from vera_jax.errors import EXIT_CODE, Interrupted, UserError
from vera_jax.imports import no_torch_in_transformers
from vera_jax.places import local_copy
from vera_jax.terminal import LINES, Console, printable
from vera_jax.train.start import count_from_process_start

# Nothing above imports JAX, Flax or transformers, which takes seconds: --help
# and mistakes in flags are answered without them. What needs them imports them
# where it does.

flags.disclaim_key_flags()  # what is defined here belongs to the script

EXIT_CODES = {
  0: "done; or a reader of standard output, such as `head`, has enough",
  1: "a mistake in the input or the data, which the last lines explain; or,"
  " with a traceback, one of ours",
  2: "a mistake in the flags or a config's name; nothing was begun",
  EXIT_CODE: "stopped by Ctrl-C or SIGTERM and saved, or another process of the"
  " run was lost: the same command goes on",
  130: "stopped by Ctrl-C where nothing was to be saved",
}
NO_NUMBER = re.compile(r"invalid literal for int\(\) with base 10: .*")
QUIET = "Show results, warnings and errors alone."
_result: dict[str, Any] = {}  # what --json prints at the end


def run(
  main: Callable[..., None],
  *,
  usage: str | None,
  operands: bool = False,
  others: bool = False,
  torch: bool = False,
) -> None:
  """Parse the flags, call `main` and exit by `EXIT_CODES`.

  Users' mistakes have no traceback.

  Args:
    main: the script.
    usage: what --help shows first.
    operands: whether `main` takes a list of the arguments that are no flags.
    others: whether flags that are not defined are in that list too.
    torch: whether it uses torch. Else transformers doesn't import it either.
  """
  count_from_process_start()
  sys.unraisablehook = raise_again
  if sys.stderr is None:  # closed by whoever started the process
    sys.stderr = open(os.devnull, "w", encoding="utf-8")
  if sys.stdout is None:
    print("Standard output is closed; > /dev/null drops it.", file=sys.stderr)
    sys.exit(1)
  if isinstance(sys.stdout, io.TextIOWrapper):  # of a terminal without UTF-8
    sys.stdout.reconfigure(errors="backslashreplace")
  # where absl looks for it
  sys.modules["__main__"].__doc__ = usage = usage and as_typed(usage)
  sys.argv[1:] = ["--help" if x == "-h" else x for x in sys.argv[1:]]
  # transformers' advice is about torch models, of which none is used
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
  if "quiet" not in flags.FLAGS:
    flags.DEFINE_bool("quiet", False, QUIET)

  def guarded(argv: list[str]) -> None:
    if len(argv) > 1 and not operands:
      example = re.search(r"^ +(.+?)(?: {2,}.*)?$", usage or "", re.MULTILINE)
      as_in = f". As in: {example[1]}" if example else ""
      if argv[1].startswith("config."):
        as_in = f". Is it --{argv[1]}?"
      complain(f"Not a flag: {' '.join(argv[1:])}{as_in}")
      sys.exit(2)
    logging.get_absl_handler().setFormatter(_PrintableFormatter())
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # orbax logs each save
    if find_spec("libtpu"):
      from vera_jax.train.runtime import leave_libtpu_alone

      leave_libtpu_alone()
    Console.hushed = is_set("quiet")
    work = partial(main, argv[1:]) if operands else main
    if is_set("json"):
      work = partial(_as_json, work)
    with nullcontext() if torch else no_torch_in_transformers():
      code = exit_code(work)
    if "vera_jax.train.peers" in sys.modules:
      sys.modules["vera_jax.train.peers"].leave(code)
    sys.exit(code)

  def parse(argv: list[str]) -> list[str]:
    try:
      rest = flags.FLAGS(argv, known_only=others)
      if flags.FLAGS.only_check_args:  # asked by `launch`, before a pod is paid
        set_there = "config" in flags.FLAGS and flags.FLAGS["config"].value
        config: Any = set_there or {}
        method = config.get("base", config).get("method")
        if isinstance(method, str):
          links_of(method)
      return rest
    except (flags.Error, UserError) as error:
      text = NO_NUMBER.sub("a whole number is needed", f"{error}")
      complain(f"{text}{_flag_meant(error)}\n--help shows the flags.")
      sys.exit(2)
    except (SystemExit, OSError):  # --help was shown, which is no failure
      sys.exit(
        exit_code(show_settings if "config" in flags.FLAGS else lambda: None)
      )

  app.run(guarded, flags_parser=parse)


def _flag_meant(error: Exception) -> str:
  """Behind an unknown flag: the setting that has its name, where one has."""
  if not isinstance(error, flags.UnrecognizedFlagError):
    return ""
  if error.flagname == "json" and "format" in flags.FLAGS:
    kinds = getattr(flags.FLAGS["format"].parser, "enum_values", ())
    return "".join(f". Is it --format={x}?" for x in kinds if "json" in x)
  if "config" not in flags.FLAGS:
    return ""
  parser: Any = flags.FLAGS["config"].parser
  config = parser.default or common.get_config()
  near = near_keys(config, error.flagname)
  return (
    f". Is it {' or '.join(f'--config.{x}' for x in near)}?" if near else ""
  )


def _as_json(work: Callable[[], None]) -> None:
  """Call `work`, and print its result alone on standard output, as JSON."""
  output = sys.stdout
  try:
    with redirect_stdout(sys.stderr):
      work()
  finally:
    if _result:
      print(json.dumps(_result), file=output)


def define_json() -> None:
  """--json, of a script whose `main` calls `give`."""
  flags.DEFINE_bool(
    "json",
    False,
    "The result as one JSON object on standard output, all else on standard"
    " error.",
  )


def give(result: Mapping[str, Any]) -> None:
  """The result that --json prints when the script has ended."""
  _result.update(result)


class Answered(Exception):
  """What was asked for has been shown, and there is nothing more to do."""


# Why the system refuses to write; it doesn't say into which file.
UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def exit_code(main: Callable[[], None]) -> int:
  """Call `main`; print an error of the user's, and return the exit code."""
  text, code, of_system = "", 0, None
  try:
    main()
  except Answered:
    pass
  except UserError as error:
    text, code = str(error), 1
  except Interrupted as error:
    text, code = str(error), EXIT_CODE
  except KeyboardInterrupt:
    text, code = "Stopped.", 130
  except OSError as error:
    text, code, of_system = f"{error}.", 1, error
    if error.filename is not None:
      text = f"{error.filename} can't be used: {error.strerror}."
    elif error.errno in UNWRITTEN:
      text = f"A file, or standard output, can't be written: {error.strerror}."
      if error.errno in (errno.ENOSPC, errno.EDQUOT):
        text += " Once its disk has space, the same command goes on."
  except Exception as error:
    peers = sys.modules.get("vera_jax.train.peers")
    if peers is None or not peers.hold(error):
      raise
    text = "This process failed, or another one did: that is looked into now."
    code = 1
  refusal = _finish_output()
  if isinstance(refusal, BrokenPipeError):
    if isinstance(of_system, BrokenPipeError):  # its reader has enough
      return 0
  elif refusal is not None:
    reason = f"Standard output can't be written: {refusal.strerror}."
    text, code = reason if of_system else f"{text}\n{reason}".strip(), code or 1
  if text:
    complain(text)
  return code


def raise_again(lost: Any) -> None:
  """Python's hook for errors that nobody can catch.

  A Ctrl-C may come while a callback runs, as the garbage collector's; there
  Python drops it and goes on. It is raised again, outside of the callback.
  """
  if lost.exc_type is KeyboardInterrupt:
    threading.Timer(0.05, _thread.interrupt_main).start()
  else:
    sys.__unraisablehook__(lost)


def _finish_output() -> OSError | None:
  """Write what is still held back, or return why that can't be done.

  Python itself would do it at its end, and print a traceback.
  """
  try:
    sys.stdout.flush()
    if _reader_is_gone():
      raise BrokenPipeError
  except OSError as error:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return error
  return None


def _reader_is_gone() -> bool:
  """Whether standard output is a pipe that nobody reads any more."""
  poll = select.poll()
  with suppress(OSError, ValueError):  # in a notebook it is no file
    poll.register(sys.stdout.fileno(), 0)
  return any(event & select.POLLERR for _, event in poll.poll(0))


def say_importing() -> None:
  """To whoever waits at a terminal: call it where the flags have been checked.

  A file, a pipe or --quiet wants no such line.
  """
  if sys.stderr.isatty() and "jax" not in sys.modules and not is_set("quiet"):
    print("importing JAX, Flax and transformers ...", file=sys.stderr)


def is_set(flag: str) -> bool:
  """Whether a flag that not every script has is set."""
  return flag in flags.FLAGS and bool(flags.FLAGS[flag].value)


def complain(text: str) -> None:
  """Lines on standard error; what files put into them commands no terminal."""
  with suppress(OSError):  # then nobody is there to read them
    print(printable(text, keep=LINES), file=sys.stderr)


class _PrintableFormatter(logging.PythonFormatter):
  """absl's, of lines that name files and quote what stands in them."""

  def format(self, record: standard_logging.LogRecord) -> str:
    return printable(super().format(record), keep=LINES)


CHANGES = (
  "Settings: the name of a config, such as rte, rte:large or superglue/boolq,"
  " or a file's path. Any of them can be changed: --config.optim.epochs=3."
)


def define_config(text: str = CHANGES) -> flags.FlagHolder:
  """--config=FILE and --config.KEY=VALUE, with errors that say what there is.

  `text` is what --help says of it, before the names of the methods.

  The config isn't locked, for that would ask for the required settings before
  those of the command line are in.
  """
  holder = config_flags.DEFINE_config_file(
    "config",
    None,
    f"{text} config.method is one of the methods below, or several joined by"
    " +, as vera+bitfit.",
    lock_config=False,
  )
  flags.FLAGS["config"].parser = _ConfigParser("config", lock_config=False)
  flags.DEFINE_bool(
    "print_config",
    False,
    "Show every setting with its value, its default if that is another, and"
    " what it is; do nothing else.",
  )
  return holder


def show_settings() -> None:
  """Print settings below the flags of --help: the config's, and the methods'.

  Without a config before --help, those that all have.
  """
  parser: Any = flags.FLAGS["config"].parser
  config, file = parser.default, parser.file
  if config is None:
    config, file = common.get_config(), str(CONFIGS / "common.py")
  print("\nsettings:")
  for setting in settings(config, config, file):
    if setting.key.split(".")[0] not in METHODS:
      print(f"  {setting.line()}")

  def show(text: str, indent: int) -> None:
    before = " " * indent
    print(
      textwrap.fill(
        text,
        80,
        initial_indent=before,
        subsequent_indent=before + " " * 4,
        break_on_hyphens=False,
      )
    )

  print(
    "\nconfig.method, and its settings with defaults that a file may change:"
  )
  for name, text in IN_CONFIG.items():
    show(f"--config.METHOD.{name}  {text}", 2)
  for line in METHODS.values():
    show(f"{line.name}: {line.title}, {line.weights}", 2)
    if line.group != line.name:
      show(f"takes the settings of {line.group}", 4)
      continue
    for name, default, text in line.described():
      value = "" if default is None else str(default).replace(" ", "")
      meaning = "" if name in IN_CONFIG else f"  {text}"
      show(f"--config.{line.name}.{name}={value}{meaning}", 4)


def define_optional_integer(
  name: str, alone: int, text: str
) -> flags.FlagHolder:
  """--NAME=N; --NAME without a number is `alone`, and left out it is None."""

  class Parser(flags.IntegerParser):
    def parse(self, argument: Any) -> int:
      # absl gives "true" to a flag that stands alone
      return super().parse(alone if argument == "true" else argument)

  flag = flags.Flag(
    Parser(), flags.ArgumentSerializer(), name, None, text, boolean=True
  )
  return flags.DEFINE_flag(flag)


class ModelFlags(NamedTuple):
  """--adapter, --model and --base: what a command answers with."""

  adapter: flags.FlagHolder
  model: flags.FlagHolder
  base: flags.FlagHolder

  def named(self) -> str:
    """The adapter or the model, as it is named.

    Raises:
      UserError: neither is, or both are.
    """
    if bool(self.adapter.value) == bool(self.model.value):
      raise UserError("Give either --adapter=DIR or --model=DIR.")
    return self.adapter.value or self.model.value

  def load(self, **options: Any) -> Any:
    """The adapter on its base, or the whole model, as a `Classifier`."""
    # Imported only now: a mistake in the flags is reported without the wait.
    say_importing()
    from vera_jax.pretrained.classifier import load_classifier, restore_adapter
    from vera_jax.progress import show_stage

    show_stage("loading the weights")

    if self.model.value:
      return load_classifier(self.model.value, **options)
    saved = load_any_adapter(self.adapter.value, self.base.value)
    return restore_adapter(saved, self.base.value, **options)


def load_any_adapter(name: str | Path, base: str | None) -> Any:
  """An adapter of ours or PEFT's, by its folder or hub id.

  Args:
    name: the folder or id.
    base: of PEFT's; None: what it names.
  """
  from vera_jax.adapters.files import adapter_folder, is_pefts, load_adapter

  folder = adapter_folder(name)
  if is_pefts(folder):
    return _imported(folder, str(name), base)
  return load_adapter(folder)


def _imported(folder: Path, name: str, base: str | None) -> Any:
  """A PEFT adapter, by its name, as one of ours, for this command alone."""
  from vera_jax.adapters.files import load_adapter
  from vera_jax.peft_io import import_adapter

  with tempfile.TemporaryDirectory() as temporary:
    ours = Path(temporary) / "adapter"
    import_adapter(folder, ours, base=base)
    saved = load_adapter(ours)
  complain(
    f"{name} is PEFT's, and was imported for this command. `vera-jax peft"
    f" import --adapter={name} --out=FOLDER` keeps the import; with --task it"
    " knows the labels' names."
  )
  return saved


def define_model(model: str) -> ModelFlags:
  """The flags; `model` is what --help says of --model."""
  return ModelFlags(
    flags.DEFINE_string(
      "adapter",
      None,
      "An adapter: a folder, or a hub id (owner/name[@revision]).",
    ),
    flags.DEFINE_string("model", None, model),
    flags.DEFINE_string(
      "base", None, "The adapter's base. Unset: what adapter.json names."
    ),
  )


def define_processes() -> Callable[[], None]:
  """--coordinator, --num_processes, --process_id, --processes_timeout.

  Returns a function that joins the processes by these flags; call it before any
  device is used.
  """
  coordinator = flags.DEFINE_string(
    "coordinator",
    None,
    "Several processes, by hand: HOST:PORT of process 0. A TPU pod and SLURM"
    " need none of these flags.",
  )
  count = flags.DEFINE_integer(
    "num_processes",
    None,
    "How many processes the run has; 1 alone: no others, whatever a launcher"
    " says.",
    lower_bound=1,
  )
  number = flags.DEFINE_integer(
    "process_id", None, "This one's number, from 0.", lower_bound=0
  )
  patience = flags.DEFINE_float(
    "processes_timeout",
    300.0,
    "Seconds to wait for the other processes.",
  )

  def join() -> None:
    from vera_jax.train import distributed

    distributed.initialize(
      coordinator.value, count.value, number.value, patience=patience.value
    )

  return join


def chosen(holder: flags.FlagHolder, *, sweep: bool = False) -> ConfigDict:
  """The config that --config names.

  Args:
    holder: of the flag.
    sweep: whether the script trains a sweep, and not a single run.

  Raises:
    UserError: there is none, it is of the other kind, or names no method.
  """
  config = holder.value
  if config is not None and is_set("print_config"):
    parser: Any = flags.FLAGS["config"].parser
    for setting in settings(config, parser.default, parser.file):
      print(setting.line())
    raise Answered
  if config is None:
    study = "sweeps/rank" if sweep else "rte"
    raise UserError(f"Say which settings: --config={study}")
  if sweep and "overrides" not in config:
    raise UserError(
      "--config names a single run's settings, which `vera-jax train` trains."
      " Sweeps are sweeps/NAME."
    )
  if not sweep and "overrides" in config:
    raise UserError(
      "--config names a sweep, which is many runs: `vera-jax sweep` trains it."
      " Single runs have other names, such as rte."
    )
  if not sweep and isinstance(config.get("method"), str):
    links_of(config.method)
  return config


class _ConfigParser(ConfigFileFlagParser):
  file = ""  # of the config
  default: ConfigDict | None = None  # the config as its file has it

  def parse(self, path: str) -> ConfigDict:
    file = config_file(path)
    works = "a get_config() that works, as configs/rte.py is"
    try:
      config = super().parse(file)
    except UserError:
      raise
    except (TypeError, ValueError) as error:  # its text is a traceback
      raise UserError(f"--config={path}: {error.__context__}") from error
    except (Exception, SystemExit) as error:  # whatever the file does
      reason = f"{type(error).__name__}: {error}"
      raise UserError(
        f"--config={path} is no file with {works}: {reason}."
      ) from error
    if not isinstance(config, ConfigDict):
      reason = f"it returns {config!r}, and no ConfigDict"
      # after an OSError the parser returns what raises it again later on
      reason = getattr(config, "__dict__", {}).get("_error", reason)
      raise UserError(f"--config={path} is no file with {works}: {reason}.")
    check_keys(config, sys.argv[1:])
    self.file = file.partition(":")[0]
    self.default = config.copy_and_resolve_references()
    return config


def config_file(name: str) -> str:
  """The path of a config that is named as --config does, its variant behind it.

  Raises:
    UserError: there is no such file, and no config of ours with that name.
  """
  name, colon, variant = name.partition(":")
  short = name.removeprefix("configs/").removesuffix(".py")
  for file in (Path(name), CONFIGS / f"{short}.py"):
    if file.is_file():
      return f"{file}{colon}{variant}"
  near = difflib.get_close_matches(short, config_names(), n=5, cutoff=0.5)
  near = near or [x for x in config_names() if "/" not in x]
  what = "file" if name != short else "config"
  raise UserError(
    f"--config: there is no {what} {name}. Is it {', '.join(near)}? A name of"
    " ours or a file's path is needed."
  )


def config_names() -> list[str]:
  """The names of the package's configs, as rte, superglue/cb, sweeps/rank."""
  return [
    file.relative_to(CONFIGS).with_suffix("").as_posix()
    for file in sorted(CONFIGS.glob("**/*.py"))
    if "\ndef get_config(" in file.read_text(encoding="utf-8")
  ]


def given_keys(arguments: Iterable[str]) -> list[str]:
  """The keys of --config.KEY among the arguments."""
  matches = (re.match(r"--?(?:no)?config\.([\w.]+)", a) for a in arguments)
  return [match[1] for match in matches if match]


def check_keys(config: ConfigDict, arguments: Iterable[str]) -> None:
  """Refuse --config.KEY for keys that are not there, by `check_key`."""
  for key in given_keys(arguments):
    check_key(config, key)


def remark_idle(config: ConfigDict, arguments: Iterable[str]) -> None:
  """A line for each --config.KEY that changes nothing of the run.

  No error, since one command line may serve several methods in turn.
  """
  from vera_jax.train.config import check_settings, without_effect

  check_settings(config)
  idle = without_effect(config)
  for key in given_keys(arguments):
    if key in idle:
      complain(
        f"--config.{key} has no effect with config.method={config.method}."
      )


@contextmanager
def opened(name: str) -> Iterator[Iterable[bytes]]:
  """A file's lines, or for "-" those of standard input.

  What the shell has opened already, as in --input=<(sort texts.tsv), is read by
  its number; anything else must be a regular file. There is a progress bar if
  standard output is not shown.
  """
  if name in ("-", "/dev/stdin"):
    if sys.stdin is None:
      raise UserError("Standard input is closed: name a file.")
    yield sys.stdin.buffer
    return
  if is_open := re.fullmatch(r"/dev/fd/(\d{1,6})", name):
    try:
      stream = open(os.dup(int(is_open[1])), "rb")
    except OSError as error:
      raise UserError(f"{name} can't be read: {error.strerror}.") from error
    with stream:
      yield stream
    return
  from rich.progress import Progress

  from vera_jax.files import DATA, open_file

  shown = sys.stderr.isatty() and not sys.stdout.isatty()
  bar = Progress(
    console=Console(stderr=True), disable=not shown, redirect_stdout=False
  )
  path = local_copy(name)
  with open_file(path, inside=None, limit=DATA) as file, bar:
    size = os.fstat(file.fileno()).st_size
    title = escape(printable(path.name))
    yield bar.wrap_file(file, total=size, description=title)


def with_seeds(config: ConfigDict, seeds: Iterable[int]) -> list[ConfigDict]:
  """The config with each of the seeds."""
  configs = []
  for seed in seeds:
    configs.append(config.copy_and_resolve_references())
    configs[-1].seed = seed
  return configs


def default_workdir(config: ConfigDict) -> Path:
  """A folder per config: the same settings find the same run again."""
  from vera_jax.train.config import check_settings
  from vera_jax.train.workdir import identity_code

  check_settings(config)
  name = f"{config.method}-seed{config.seed}-{identity_code(config.to_dict())}"
  return Path("runs") / str(config.task) / name
