"""Adapters on models by others: adapted, merged and by definition.

  python -m benchmarks.others

For each model of tests/adapters/others and each method, on every layer that
isn't refused: the adapted model's first output is the base's; with its leaves
moved at random it is the merged model's, and that of the model's own code on
parameters that are adapted here, by each method's formula and not by the code
of vera_jax; so are the gradients of its leaves, by every plan. What can't be
adapted must be refused by its name. Writes others.json, and ends with an error
where one of this doesn't hold.
"""

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks.report import environment, write
from experiments import cli
from experiments.markdown import markdown_table
from tests.adapters.others.models import MODELS
from tests.adapters.others.other import Other
from vera_jax.adapters.apply import Adapted, adapt
from vera_jax.adapters.ia3 import ia3
from vera_jax.adapters.interface import EMPTY, PLANS, Adapter, Target
from vera_jax.adapters.interface import Path as Place
from vera_jax.adapters.lora import lora
from vera_jax.adapters.magnitude import dora
from vera_jax.adapters.merge import merge
from vera_jax.adapters.pvera import pvera
from vera_jax.adapters.randlora import randlora
from vera_jax.adapters.sites import EVERY, count_layers, layer_path, matches
from vera_jax.adapters.unilora import unilora
from vera_jax.adapters.vera import vera
from vera_jax.errors import UserError
from vera_jax.files import read_json

RANK = 3
METHODS: dict[str, Adapter] = {
  "vera": vera(RANK),
  "lora": lora(RANK, alpha=2.0 * RANK),
  "dora": dora(RANK, alpha=2.0 * RANK),
  "ia3": ia3(),
  "ia3 on inputs": ia3(feedforward=(".*",)),
  "vera, a pair each": vera(RANK, sharing="unique"),
  "pvera": pvera(RANK),
  "randlora": randlora(RANK, alpha=1.0 * RANK),
  "unilora": unilora(RANK, size=60),
}
FORMULAS = ("vera", "lora", "dora", "ia3", "ia3 on inputs")
SHOWN = ("vera", "lora", "dora", "ia3")  # with a column each in the table
# By which plans gradients are taken.
GRADIENTS = {"vera": (*PLANS, "auto"), "lora": ("auto",), "dora": ("auto",)}
BAR = 1e-5  # of the largest output
GRADIENT_BAR = 1e-4  # of the method's largest gradient
# Moved less than this the adapter does nothing, and nothing is examined.
EFFECT = 1e-3


def define_flags() -> None:
  flags.DEFINE_string(
    "models",
    "",
    "A pattern: only these models' rows are made anew in the file.",
  )
  flags.DEFINE_string("out", "results/benchmarks", "Where the file goes.")


def main() -> None:
  options = flags.FLAGS
  made = environment("others")
  made["models"] = {}
  path, wrong = Path(options.out) / "others.json", []
  older = read_json(path)["models"] if path.exists() else {}
  for name, other in MODELS.items():
    if not re.search(options.models, name):
      if name in older:
        made["models"][name] = older[name]
      continue
    start = time.perf_counter()
    row = made["models"][name] = examine(other)
    wrong += [f"{name}: {fault}" for fault in faults(row)]
    print(f"{name}: {row['layers']}, {time.perf_counter() - start:.0f} s")
  write("others", made, folder=options.out)
  if wrong:
    raise UserError("What should hold does not:\n  " + "\n  ".join(wrong))


def examine(
  other: Other,
  methods: Iterable[str] = METHODS,
  *,
  plans: Mapping[str, Sequence[str]] = GRADIENTS,
) -> dict[str, Any]:
  """What holds for a model: its layers, what is refused, and by method how far
  the adapted model is from what it should be.

  Args:
    other: the model.
    methods: names in `METHODS`.
    plans: by which gradients are taken, by method, of those in `FORMULAS`.
  """
  ready = Ready(other)
  targets, refused = ready.sites()
  return {
    "origin": other.origin,
    "layers": count_layers(targets) if targets else "none",
    "refused": {"/".join(path): why for path, why in refused.items()},
    "methods": {
      name: ready.adapted(METHODS[name], targets, plans.get(name, ()))
      for name in methods
    },
  }


def faults(examined: Mapping[str, Any]) -> list[str]:
  """What does not hold, a sentence each; [] where all does."""
  wrong = [f"{path}: {why}" for path, why in silent(examined["refused"])]
  for method, row in examined["methods"].items():
    if "error" in row:
      wrong.append(f"{method}: {row['error']}")
      continue
    for path, why in silent(row["refused"]):
      wrong.append(f"{method}: {path}: {why}")
    for name in ("start", "merged", "defined"):
      if name in row and not row[name] <= BAR:
        wrong.append(f"{method}: {name} {row[name]:.2g}")
    if "effect" in row and not row["effect"] >= EFFECT:
      wrong.append(f"{method}: an effect of {row['effect']:.2g}")
    for plan, value in row.get("gradients", {}).items():
      if isinstance(value, str):
        if "no " + plan + " plan" not in value:
          wrong.append(f"{method}, {plan}: {value}")
      elif not value <= GRADIENT_BAR:
        wrong.append(f"{method}, {plan}: gradients {value:.2g}")
  return wrong


def silent(refused: Mapping[str, str]) -> list[tuple[str, str]]:
  """Refusals that don't name what is refused, or say nothing of it."""
  return [
    (path, why) for path, why in refused.items() if why.startswith(UNNAMED)
  ]


UNNAMED = "not refused by its name"


class Ready:
  """A model with its variables, all of them moved away from special values."""

  def __init__(self, other: Other) -> None:
    self.other, self.model = other, other.model
    self.args = jax.tree.map(jnp.asarray, other.args)
    streams = ("params", *other.streams)
    keys = {name: jax.random.key(i) for i, name in enumerate(streams)}
    self.rngs = {name: keys[name] for name in other.streams}
    init = jax.jit(partial(self.model.init, **other.kwargs))
    variables = meta.unbox(init(keys, *self.args))
    rng = np.random.default_rng(1)

    def move(leaf: Any) -> Any:
      moved = np.asarray(leaf) + 0.1 * rng.normal(size=leaf.shape)
      return jnp.asarray(moved, leaf.dtype)

    self.base = jax.tree.map(move, variables.pop("params"))
    self.flat = flatten_dict(self.base)
    self.others = variables
    self.every: dict[Place, Target] | None = None
    self.plain = jax.jit(partial(self.run, self.model))

  def run(self, module: nn.Module, params: Any, others: Any = EMPTY) -> Any:
    """All numbers that a module returns, one after the other."""
    variables = {**self.others, **others, "params": params}
    y = module.apply(variables, *self.args, rngs=self.rngs, **self.other.kwargs)
    return numbers(y)

  def module(self, adapter: Adapter, patterns: Any, **options: Any) -> Adapted:
    return adapt(self.model, adapter, targets=patterns, **options)

  def find(self, patterns: Any) -> dict[Place, Target]:
    module = self.module(METHODS["vera"], patterns)
    return module.find_targets(*self.args, **self.other.kwargs)

  def sites(self) -> tuple[dict[Place, Target], dict[Place, str]]:
    """The layers that can be adapted, and why each other matrix can't be."""
    try:
      targets = self.every = self.find([EVERY])
    except UserError:  # one for all
      targets, self.every = {}, None
      for path in dict.fromkeys(path[:-1] for path in self.flat):
        with suppress(UserError):
          targets |= self.find([re.escape("/".join(path))])
    kernels = {
      (*layer_path(path, target), target.view.kernel)
      for path, target in targets.items()
    }
    refused = {}
    for path, leaf in self.flat.items():
      is_matrix = leaf.ndim > 1 and path[-1] not in ("bias", "scale")
      if is_matrix and path not in kernels:
        why = self.refusal(path)
        refused[path] = (
          self.refusal(path[:-1]) if why.startswith(UNNAMED) else why
        )
    return targets, refused

  def refusal(self, path: Place) -> str:
    """Why nothing at this path can be adapted."""
    name = "/".join(path)
    try:
      self.find([re.escape(name)])
    except UserError as error:
      text, _, _ = str(error).partition("\nThe layers that can be adapted")
      for line in text.splitlines():
        if line.strip().startswith(f"{name}: "):
          return line.strip().removeprefix(f"{name}: ")
      return text if f" {name} " in text else f"{UNNAMED}: {text}"
    return f"{UNNAMED}: it counts as adapted"

  def adapted(
    self, adapter: Adapter, targets: Mapping[Place, Target], plans: Any
  ) -> dict[str, Any]:
    """A method on all of these layers but those that it refuses."""
    targets, refused = dict(targets), dict[str, str]()
    while targets:
      try:
        row = self._adapted(adapter, targets, plans)
      except UserError as error:
        named = [p for p in targets if "/".join(p) in str(error)]
        if not named:
          return {"error": f"refused without a layer's name: {error}"}
        path = max(named, key=len)
        del targets[path]
        refused["/".join(path)] = str(error)
      except Exception as error:
        first = str(error).splitlines() or [""]
        return {"error": f"{type(error).__name__}: {first[0]}"}
      else:
        return {"layers": len(targets), "refused": refused, **row}
    return {"layers": 0, "refused": refused}

  def _adapted(
    self, adapter: Adapter, targets: dict[Place, Target], plans: Any
  ) -> dict[str, Any]:
    patterns = [re.escape("/".join(path)) for path in targets]
    if self.every == targets:
      patterns = [EVERY]
    module = self.module(adapter, patterns)
    init = jax.jit(partial(module.init_on, **self.other.kwargs))
    variables = init(
      {**self.others, "params": self.base}, jax.random.key(2), *self.args
    )
    params = flatten_dict(variables.pop("params"))
    start = {p: x for p, x in params.items() if adapter.owns(p[-1])}
    rng = np.random.default_rng(5)
    moved = {
      p: x + jnp.asarray(rng.uniform(-0.5, 0.5, x.shape), x.dtype)
      for p, x in sorted(start.items())
    }
    shared = variables.get("projections", {})

    def joined(leaves: Any, base: Any) -> Any:
      return unflatten_dict({**base, **leaves})

    def adapted(module: nn.Module, leaves: Any, base: Any) -> Any:
      return self.run(module, joined(leaves, base), variables)

    def merged(leaves: Any, base: Any) -> Any:
      params = joined(leaves, base)
      return merge(params, shared, adapter=adapter, targets=targets)

    def defined(leaves: Any, base: Any) -> Any:
      return self.by_definition(adapter, targets, leaves, base, shared)

    def slopes(outputs: Callable[..., Any]) -> Any:
      """(gradients of the summed sines of the outputs, the outputs)."""

      def loss(leaves: Any, base: Any) -> tuple[Any, Any]:
        y = outputs(leaves, base)
        return jnp.sum(jnp.sin(y)), y

      return jax.jit(jax.grad(loss, has_aux=True))(moved, self.flat)

    run = jax.jit(partial(adapted, module))
    base, y = self.plain(self.base), run(moved, self.flat)
    expected = self.plain(jax.jit(merged)(moved, self.flat))
    row: dict[str, Any] = {"merged": distance(y, expected)}
    row["effect"] = distance(y, base)
    if adapter.name != "unilora":  # whose theta starts away from 0
      row["start"] = distance(run(start, self.flat), base)
    known = formula(adapter)
    if known:
      right = self.plain(jax.jit(defined)(moved, self.flat))
      row["defined"] = distance(y, right)
    if not plans:
      return row
    wanted, _ = slopes(
      lambda leaves, base: self.run(self.model, defined(leaves, base))
    )
    largest = max(float(jnp.abs(x).max()) for x in wanted.values())
    row["gradients"] = {}
    for plan in plans:
      try:
        gradients, y = slopes(partial(adapted, module.clone(plan=plan)))
      except UserError as error:
        row["gradients"][plan] = str(error)
        continue
      apart = max(
        float(jnp.abs(gradients[p] - wanted[p]).max()) for p in wanted
      )
      row["gradients"][plan] = apart / largest
      row["merged"] = max(row["merged"], distance(y, expected))
    return row

  def by_definition(
    self,
    adapter: Adapter,
    targets: Mapping[Place, Target],
    trained: Mapping[Place, Any],
    base: Mapping[Place, Any],
    shared: Mapping[str, Any],
  ) -> Any:
    """The base's parameters, each layer's replaced by the method's formula."""
    flat, method = dict(base), formula(adapter)
    assert method is not None
    for path, target in targets.items():
      layer = layer_path(path, target)
      leaves = {p[-1]: x for p, x in trained.items() if p[:-1] == path}
      kernel_path, stacked = (*layer, target.view.kernel), len(target.stack)
      kernel, bias = flat[kernel_path], None
      if not target.view.in_scope:
        bias = flat.get((*layer, "bias"))
      axes = [n for x, n in self.other.axes.items() if matches(x, path)]
      adapt_one = partial(
        adapted_kernel,
        method,
        shared,
        axes[0] if axes else kernel.ndim - stacked - 1,
      )
      for _ in range(stacked):
        adapt_one = jax.vmap(adapt_one)
      flat[kernel_path], changed = adapt_one(leaves, kernel, bias)
      if bias is not None:
        flat[*layer, "bias"] = changed
    return unflatten_dict(flat)


def formula(adapter: Adapter) -> str | None:
  """The name of a method whose formula is in `adapted_kernel`."""
  return next((x for x in FORMULAS if METHODS[x] is adapter), None)


def adapted_kernel(
  method: str,
  shared: Mapping[str, Any],
  axes: int | tuple[int, ...],
  leaves: Mapping[str, Any],
  kernel: Any,
  bias: Any,
) -> tuple[Any, Any]:
  """A layer's adapted parameters by the papers' formulas.

  Args:
    method: a name in `FORMULAS`.
    shared: VeRA's A and B.
    axes: of the kernel that are inputs, or how many of the first.
    leaves: the layer's.
    kernel, bias: of the base.
  """
  inputs = tuple(range(axes)) if isinstance(axes, int) else axes
  outputs = tuple(i for i in range(kernel.ndim) if i not in inputs)
  turned = kernel.transpose(*inputs, *outputs)
  rows = int(np.prod([kernel.shape[i] for i in inputs]))
  W = turned.reshape(rows, -1)
  if method == "vera":
    A, B = shared["A"][:, :rows], shared["B"][: W.shape[1]]
    d, b = leaves["vera_d"], leaves["vera_b"]
    W = W + jnp.einsum("ri,r,or,o->io", A, d, B, b)
  elif method in ("lora", "dora"):  # alpha is twice the rank
    W = W + 2 * jnp.einsum("ri,or->io", leaves["lora_A"], leaves["lora_B"])
    if method == "dora":
      length = jnp.sqrt(jnp.square(W).sum(0, keepdims=True))
      W = leaves["magnitude_m"][None] * W / jax.lax.stop_gradient(length)
  elif method == "ia3":
    W = W * leaves["ia3_out"][None]
    if bias is not None:
      bias = bias * leaves["ia3_out"].reshape(bias.shape)
  else:
    W = W * leaves["ia3_in"][:, None]
  back = np.argsort((*inputs, *outputs))
  return W.reshape(turned.shape).transpose(*back), bias


def markdown(result: Mapping[str, Any]) -> str:
  """The table, the reasons that it names by letters, and how it was made."""
  reasons: dict[str, str] = {}  # letters by reason

  def letters(refused: Mapping[str, str]) -> str:
    """What is refused, by the names at the ends of paths, and why."""
    named: dict[str, dict[str, None]] = {}
    for path, why in refused.items():
      names = path.split("/")
      leaf = names.pop() if names[-1] == "kernel" else names[-1]
      why = re.sub(rf"^its {re.escape(leaf)} ", "its parameter ", why)
      why = why.replace(path.removesuffix("/kernel"), "…")
      named.setdefault(why, {})[f"`{names[-1]}`"] = None
    return "; ".join(
      f"{', '.join(paths)} ({reasons.setdefault(why, _letter(len(reasons)))})"
      for why, paths in named.items()
    )

  def cell(row: Mapping[str, Any]) -> str:
    if not row["layers"]:
      return "refused"
    left = letters({p: w.partition(":")[0] for p, w in row["refused"].items()})
    return f"{row['merged']:.0e}" + (f", without {left}" if left else "")

  rows = []
  for name, examined in result["models"].items():
    methods = examined["methods"]
    others = [x for method, x in methods.items() if method not in SHOWN]
    slopes = [
      value
      for row in methods.values()
      for value in row.get("gradients", {}).values()
      if not isinstance(value, str)
    ]
    rows.append(
      (
        f"{name} ({examined['origin']})",
        examined["layers"],
        letters(examined["refused"]),
        *(cell(methods[method]) for method in SHOWN),
        f"{max(x['merged'] for x in others if x['layers']):.0e}",
        f"{max(slopes):.0e}",
      )
    )
  table = markdown_table(
    (
      *("model", "layers found", "refused"),
      *(*SHOWN, "other methods", "gradients"),
    ),
    rows,
    texts=3,
  )
  listed = "\n".join(f"- ({x}) {why}" for why, x in reasons.items())
  versions = result["versions"]
  return (
    f"{table}\n\n{listed}\n\nThe others: {', '.join(list(METHODS)[4:])}."
    f" jax {versions['jax']}, {result['cpu']}."
  )


def _letter(number: int) -> str:
  return "abcdefghijklmnopqrstuvwxyz"[number]


def numbers(tree: Any) -> Any:
  """All floating-point numbers of a tree as one vector."""
  leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree)]
  floats = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
  return jnp.concatenate([x.reshape(-1) for x in floats])


def distance(actual: Any, expected: Any) -> float:
  """The largest difference, relative to the largest number; NaN stays NaN."""
  scale = float(jnp.abs(expected).max())
  return float(jnp.abs(actual - expected).max()) / scale


if __name__ == "__main__":
  define_flags()
  cli.run(main, usage=__doc__)
