"""A method's adapter from its settings, as configs and adapter files hold them.

Both go through `make_adapter`, so that they build the same thing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vera_jax.adapters.interface import Adapter
from vera_jax.adapters.labels import TRAINED
from vera_jax.adapters.lora import lora
from vera_jax.adapters.products import AUTO
from vera_jax.adapters.vera import vera
from vera_jax.errors import UserError

# The settings that make an adapter what it is; learning rates are no part.
SETTINGS: dict[str, dict[str, type]] = {
  "vera": {
    "rank": int,
    "d_init": float,
    "init": str,
    "projection_seed": int,
    "train": str,
    "sharing": str,
  },
  "lora": {"rank": int, "alpha": float},
}
MAKERS: dict[str, Callable[..., Adapter]] = {"vera": vera, "lora": lora}


def make_adapter(
  method: str,
  settings: Mapping[str, Any],
  *,
  plan: str = AUTO,
  forwards: int = 1,
) -> tuple[Adapter | None, tuple[str, ...]]:
  """The method's adapter and the patterns of its targets.

  Args:
    method: vera, lora, bitfit, head or full; the last three train leaves of the
      base itself and give (None, ()).
    settings: the method's group of a config; what else it holds is ignored.
    plan: the contraction plan, "auto" or a name in `contraction.PLANS`.
    forwards: how often a training step runs the forward pass; 2 under remat.

  Raises:
    UserError: an unknown method, or a setting that is missing or of a wrong
      type or value.
  """
  if method not in TRAINED:
    raise UserError(f"method is {method!r}; choose from {', '.join(TRAINED)}.")
  if method not in MAKERS:
    return None, ()
  types = SETTINGS[method]
  wrong = [name for name in types if not _fits(settings.get(name), types[name])]
  targets = settings.get("targets")
  if not _are_patterns(targets):
    wrong.append("targets")
  if wrong:
    given = ", ".join(f"{name}={settings.get(name)!r}" for name in wrong)
    raise UserError(f"The settings of {method} have no usable {given}.")
  chosen = {name: settings[name] for name in types}
  adapter = MAKERS[method](**chosen, plan=plan, forwards=forwards)
  return adapter, tuple(targets or ())


def _fits(value: Any, kind: type) -> bool:
  allowed = (int, float) if kind is float else kind
  return isinstance(value, allowed) and not isinstance(value, bool)


def _are_patterns(targets: Any) -> bool:
  return (
    isinstance(targets, Sequence)
    and not isinstance(targets, str)
    and bool(targets)
    and all(isinstance(pattern, str) for pattern in targets)
  )
