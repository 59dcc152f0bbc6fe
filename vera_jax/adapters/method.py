"""What a method is beside its arithmetic: its settings and their defaults.

A method's settings are a frozen dataclass in `table.py`. The config's group,
--help, all checks, the model card and the tables in docs/methods.md and
docs/settings.md are made from it. They say what the adapter is. A config has
two things beside them, which layers it is put on and how fast it learns; the
`Method` has the defaults of these.
"""

import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Generic, ParamSpec

from vera_jax.errors import UserError

if TYPE_CHECKING:  # a method's settings are known without arrays
  from vera_jax.adapters.interface import Adapter

P = ParamSpec("P")
# Settings and trained numbers beyond it are a mistake or damage: float32 ends
# near 3e38, and norms square what a product of d, b, A, B and x gives.
LARGEST = 1e9
SEEDS = 2**32  # a seed is below it: a generator would cut off the rest
QUERY_VALUE = ("query", "value")
# What a config's group may have beside a method's settings.
IN_CONFIG = {
  "targets": "patterns of the layers that it is put on, over the ends of paths",
  "lr": "the adapter's learning rate, unless optim.adapter_lr is set",
  "head_lr": "the head's learning rate, unless optim.head_lr is set",
}


def setting(
  default: Any,
  text: str,
  *,
  least: int | None = None,
  choices: Sequence[str] = (),
) -> Any:
  """A field of a method's settings.

  Args:
    default: its value where nothing else is said.
    text: what it is, in a few words.
    least: the smallest value that is allowed.
    choices: the values that are allowed, if they are named.
  """
  about = {"text": text, "least": least, "choices": tuple(choices)}
  return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass(frozen=True)
class NoSettings:
  """Of a method that has nothing to choose."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Method(Generic[P]):
  """A method as configs, adapter files and notebooks know it.

  Calling it with its settings returns the adapter: `vera(rank=256)`.

  Attributes:
    name: in configs and adapter files.
    make: FILE:FUNCTION of this folder, settings -> the adapter.
    settings: their dataclass.
    config: what its group in a config has beside the settings, of `IN_CONFIG`:
      targets, unless it trains leaves of the base, and learning rates, None for
      one that each task has to set. A setting may have another default there.
    title: the name that tables and figures have for it.
    weights: those of an adapted layer, as a formula of W0.
    trained: how many numbers are trained per layer, or in all: a formula of the
      settings, of i and o, the layer's widths, and of min, the smaller one.
    paper: its number on arXiv.
    starts: settings -> the names of those that only the first values of leaves
      and matrices come from: trained adapters that differ in them run by one
      program.
    per_run: settings -> the names of those that only leaves' first values come
      from: the runs of an ensemble may each have their own.
    distance: (settings, inputs of each adapted layer) -> how far each trained
      number is to go (docs/rates.md); None where no rule is known.
    group: the config's group that holds its settings. A variant of a method
      takes the method's; for all others it is the name.
  """

  name: str
  make: str
  settings: Callable[P, Any]
  config: Mapping[str, Any]
  title: str
  weights: str
  trained: str = ""
  paper: str = ""
  starts: Callable[[Any], tuple[str, ...]] = lambda settings: ()
  per_run: Callable[[Any], tuple[str, ...]] = lambda settings: ()
  distance: Callable[[Any, Sequence[int]], float] | None = None
  group: str = ""

  def __post_init__(self) -> None:
    paper = f" (arXiv {self.paper})" if self.paper else ""
    summary = f"{self.title}{paper}: {self.weights}."
    arguments = [
      textwrap.fill(
        f"{field.name}: {explained(field)}",
        80,
        initial_indent="  ",
        subsequent_indent="    ",
      )
      for field in self.fields
    ]
    signature = inspect.signature(self.settings)
    for name, value in {
      "group": self.group or self.name,
      "__doc__": "\n".join([summary, "", "Args:", *arguments]),
      "__signature__": signature.replace(return_annotation="Adapter"),
    }.items():
      object.__setattr__(self, name, value)

  def __repr__(self) -> str:
    return f"<the method {self.name}>"

  @property
  def fields(self) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(self.settings)  # type: ignore[arg-type]

  def described(self) -> list[tuple[str, Any, str]]:
    """Name, default and meaning of everything in its group of a config."""
    texts = {f.name: explained(f) for f in self.fields} | IN_CONFIG
    defaults = {f.name: f.default for f in self.fields} | dict(self.config)
    return [(name, x, texts[name]) for name, x in defaults.items()]

  @property
  def on_sites(self) -> bool:
    """Whether it is put on layers, rather than training the base's leaves."""
    return "targets" in self.config

  def __call__(self, *args: P.args, **settings: P.kwargs) -> "Adapter":
    bound = inspect.signature(self.settings).bind(*args, **settings)
    bound.apply_defaults()
    return self.adapter(bound.arguments)

  def adapter(self, values: Mapping[str, Any]) -> "Adapter":
    """The adapter, which tells its method and settings, from such values as
    `read` takes."""
    settings = self.read(values)
    file, _, function = self.make.partition(":")
    make = getattr(import_module(f"vera_jax.adapters.{file}"), function)
    adapter: Adapter = make(settings)
    return adapter._replace(method=self.name, settings=settings)

  def read(self, values: Mapping[str, Any]) -> Any:
    """The settings, from a config's group or an adapter's file.

    Args:
      values: by name; what else is among them is not looked at.

    Raises:
      UserError: one is missing, or has a wrong type or value.
    """
    # a text that is empty unless it is set need not be there
    empty = {field.name: "" for field in self.fields if field.default == ""}
    chosen = {
      f.name: values.get(f.name, empty.get(f.name)) for f in self.fields
    }
    unusable = [f.name for f in self.fields if not _fits(chosen[f.name], f)]
    if unusable:
      named = ", ".join(f"{name}={chosen[name]!r}" for name in unusable)
      raise UserError(f"The settings of {self.name} have no usable {named}.")
    for field in self.fields:
      value: Any = chosen[field.name]
      least, choices = field.metadata["least"], field.metadata["choices"]
      if least is not None and value < least:
        raise UserError(
          f"{self.name}'s {field.name} is {value}; it must be {least} or above."
        )
      if choices and value not in choices:
        raise UserError(
          f"{self.name}'s {field.name} is {value!r}; choose from"
          f" {', '.join(choices)}."
        )
      if isinstance(value, list):  # as JSON has tuples
        chosen[field.name] = tuple(value)
    make: Callable[..., Any] = self.settings
    return make(**chosen)


def explained(field: dataclasses.Field) -> str:
  """What a setting is, with the values that it may have."""
  text, choices = field.metadata["text"], field.metadata["choices"]
  return f"{text} ({', '.join(choices)})" if choices else text


def _fits(value: Any, field: dataclasses.Field) -> bool:
  """Whether a value has the field's type, and can be computed with."""
  if field.type is str:
    return isinstance(value, str)
  if field.type not in (int, float):
    return are_texts(value)
  if isinstance(value, bool):
    return False
  number: Any = value
  if field.type is int:
    return isinstance(value, Integral) and bool(-SEEDS < number < SEEDS)
  is_number = isinstance(value, Real)  # numpy's are, too
  return is_number and bool(-LARGEST <= number <= LARGEST)  # which NaN is not


def are_texts(value: Any) -> bool:
  """Whether it is a tuple or list of texts, as patterns of layers are."""
  listed = isinstance(value, tuple | list)
  return listed and all(isinstance(entry, str) for entry in value)
