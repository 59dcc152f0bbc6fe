"""Many adapters in one batch: each text names the adapter that answers it.

  bank = AdapterBank({"films": "runs/a/adapter"}, capacity=1000)
  bank.add("grammar", "runs/b/adapter")
  bank.logits(["A fine film.", "Him go."], adapters=["films", "grammar"])

Of a base that reads images, these are images (`image_predictor.Images`).

A VeRA adapter is two vectors per layer beside a base and a pair A, B that all
share, so a bank stacks thousands of them in little memory, and each batch
gathers what its rows need (`multi_adapter.mixed_logits`). Other methods work by
the same code and take their own size each. A method whose product would need a
kernel per row is prepared when an adapter is added (`Adapter.prepare`), or is
refused where it can't be.

A bank may be used by several threads at once: they take turns. All answers of
a call come from the adapters that had those names when its turn began.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Int

from vera_jax.adapters.files import (
  SavedAdapter,
  load_adapter,
  save_adapter,
)
from vera_jax.adapters.interface import as_they_are
from vera_jax.adapters.labels import join
from vera_jax.adapters.methods import by_link, links_of, make_adapter
from vera_jax.adapters.projections import STORED, digest
from vera_jax.adapters.saved import is_held, leaves_by_path, misfits
from vera_jax.adapters.sites import prepared_leaves
from vera_jax.data.packing import Batch
from vera_jax.data.tokenizer import load_tokenizer
from vera_jax.errors import UserError
from vera_jax.models.family import IMAGES
from vera_jax.models.kinds import KINDS, TAGS, WORDS, kind_of
from vera_jax.pretrained.classifier import Classifier, restore_adapter
from vera_jax.serve.image_predictor import (
  image_logits,
  processor_of,
  read_images,
)
from vera_jax.serve.predictor import (
  Answer,
  Logits,
  answers,
  check_finite,
  check_texts,
  encode,
  packed_logits,
  task_of,
)
from vera_jax.train.multi_adapter import empty_stack, mixed_logits
from vera_jax.train.step import Frozen


class AdapterBank:
  """Adapters by name over one base and one pair, up to a capacity.

  Attributes:
    params: the trained leaves, [capacity, ...]. Adding and replacing donate it
      and write in place. It is replaced as a whole after training
      (`multi_adapter.mixed_step`), which donates it too: until then nothing
      else may use the bank.
    frozen: the base and the projections.
    model: the adapted module and its inputs' names, for `mixed_step`.
    capacity: how many adapters have room.
    truncated: texts that were cut, so far.
  """

  def __init__(
    self,
    adapters: Mapping[str, str | Path | SavedAdapter],
    *,
    capacity: int | None = None,
    base: str | Path | None = None,
    dtype: DTypeLike = jnp.float32,
    max_length: int | None = None,
  ) -> None:
    """The first adapter decides what all others must fit.

    Args:
      adapters: folders, or what `load_adapter` gave, by name; at least one.
      capacity: None for no more than these.
      base: as in `restore_adapter`.
      dtype: as in `restore_adapter`.
      max_length: the most tokens of a text; None: as each adapter's training.

    Raises:
      UserError: naming the adapter and what it does not fit.
    """
    if not adapters:
      raise UserError("A bank starts with one adapter or more; none was given.")
    self.capacity = len(adapters) if capacity is None else capacity
    if self.capacity < len(adapters):
      raise UserError(
        f"A capacity of {capacity} has no room for {len(adapters)} adapters."
      )
    first = _loaded(next(iter(adapters.values())))
    # factored: any other plan would make a kernel for every row
    classifier = restore_adapter(first, base, dtype=dtype, plan="factored")
    if classifier.kind == TAGS:
      raise UserError(
        f"The adapter {first.folder} tags words, but a bank answers whole"
        " texts. Use a Predictor."
      )
    if classifier.kind == WORDS:
      raise UserError(
        f"The adapter {first.folder} writes texts, but a bank answers"
        " questions about whole ones."
      )
    if classifier.adapter.prepare is None:
      raise UserError(
        f"The adapter {first.folder} is of the method {first.about['method']},"
        " whose rows would need a base or kernels of their own, so that it"
        " can't share a batch in a bank. Use a Predictor for each."
      )
    # What the adapter's file holds is stacked; the base's rest is shared.
    flat = flatten_dict(classifier.params)
    stacked = {
      path: leaf for path, leaf in flat.items() if is_held(first, path, leaf)
    }
    frozen = {path: leaf for path, leaf in flat.items() if path not in stacked}
    self.frozen = Frozen(unflatten_dict(frozen), classifier.projections)
    self._shapes = jax.eval_shape(lambda: stacked)
    self._plain = classifier._replace(params={}, about=first.about)
    links = classifier.adapter.methods
    self._is_prepared = any(link.prepare is not as_they_are for link in links)
    leaves = jax.eval_shape(self._prepare, unflatten_dict(stacked))
    self.params = empty_stack(leaves, capacity=self.capacity)
    self.model: dict[str, Any] = {
      "module": classifier.module,
      "inputs": classifier.inputs,
    }
    self.truncated = 0
    self._max_length = max_length
    self._reads_images = classifier.family.reads == IMAGES
    if not self._reads_images:
      self._tokenizer = load_tokenizer(classifier.folder)
    self._run = jax.jit(partial(mixed_logits, **self.model))
    self._lock = threading.RLock()  # of all that follows, and of `params`
    self._free = list(reversed(range(self.capacity)))
    self._slots: dict[str, int] = {}
    self._adapters: dict[str, Classifier] = {}  # without parameters
    for name, adapter in adapters.items():
      self.add(name, adapter)

  def __contains__(self, name: object) -> bool:
    return name in self._slots

  def __len__(self) -> int:
    return len(self._slots)

  def __iter__(self) -> Iterator[str]:
    with self._lock:
      return iter(list(self._slots))

  @property
  def nbytes(self) -> int:
    """Bytes of all leaves at full capacity, heads among them."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))

  def add(self, name: str, adapter: str | Path | SavedAdapter) -> None:
    """Put an adapter into a free slot; nothing is compiled anew.

    Raises:
      UserError: the name is taken, no slot is free, or it does not fit.
    """
    made = self._fitted(name, adapter)
    with self._lock:
      if name in self:
        raise UserError(f"The bank has {name!r} already: replace or remove it.")
      if not self._free:
        raise UserError(
          f"The bank is full: its capacity is {self.capacity}. Remove an"
          " adapter first, or make a bank with a larger one to add"
          f" {name!r}."
        )
      self._put(name, self._free[-1], *made)
      self._free.pop()

  def replace(self, name: str, adapter: str | Path | SavedAdapter) -> None:
    """Put another adapter in the place of one; errors as for `add`."""
    made = self._fitted(name, adapter)
    with self._lock:
      self._put(name, int(self.slots([name])[0]), *made)

  def remove(self, name: str) -> None:
    """Give a slot back."""
    with self._lock:
      self._free.append(int(self.slots([name])[0]))
      del self._slots[name], self._adapters[name]

  def slots(self, names: Iterable[str]) -> Int[np.ndarray, " names"]:
    """Where on the leading axis of `params` these adapters lie."""
    names = list(names)
    with self._lock:
      unknown = [name for name in dict.fromkeys(names) if name not in self]
      if unknown:
        there = ", ".join(list(self)[:9]) + (", ..." if len(self) > 9 else "")
        raise UserError(
          f"The bank has no adapter {', '.join(map(repr, unknown))}. It has:"
          f" {there or 'none'}."
        )
      return np.array([self._slots[name] for name in names], np.int64)

  def logits(
    self,
    first: Sequence[Any],
    second: Sequence[str] | None = None,
    *,
    adapters: str | Sequence[str],
  ) -> Logits:
    """The logits of every text, or pair of texts, in their order.

    Adapters share a batch if their training cut texts at the same length (or
    the bank has a `max_length`), or resized images to the same size; the others
    get one of their own.

    Args:
      first: as for `Predictor.logits`, or `ImagePredictor.logits`.
      second: as for `Predictor.logits`.
      adapters: a name for each text, or one for all.
    """
    return self._ask(first, second, adapters)[0]

  def answers(
    self,
    first: Sequence[Any],
    second: Sequence[str] | None = None,
    *,
    adapters: str | Sequence[str],
  ) -> list[Answer]:
    """Label, score and probabilities of every text, in its adapter's labels.

    Raises:
      UserError: as for `logits`; or an adapter's task asks about parts of an
        example of which it makes the texts that the model reads.
    """
    logits, owners = self._ask(first, second, adapters)
    for owner in owners:
      task = task_of(owner)
      if task and task.to_texts:
        raise UserError(
          f"{task.name} asks about"
          f" {', '.join(task.presentation.columns[0])}, of which a"
          " Predictor makes the texts that the model reads; a bank has the"
          " logits of such texts alone."
        )
    return [
      next(answers(row[None], owner.labels, kind=owner.kind))
      for row, owner in zip(logits, owners, strict=True)
    ]

  def _ask(
    self,
    first: Sequence[Any],
    second: Sequence[str] | None,
    adapters: str | Sequence[str],
  ) -> tuple[Logits, list[Classifier]]:
    """The logits of every text, and the adapter that each comes from."""
    if not self._reads_images:
      check_texts(first, second)
    names = [adapters] * len(first) if isinstance(adapters, str) else adapters
    if len(names) != len(first):
      raise UserError(
        f"Each text names its adapter: there are {len(first)} texts and"
        f" {len(names)} names."
      )
    outputs = self._plain.outputs
    out = np.empty((len(first), outputs), np.float32)

    def run(batch: Batch) -> Array:
      return self._run(self.params, self.frozen, batch)

    with self._lock:
      slots = self.slots(names)
      owners = [self._adapters[name] for name in names]
      limits = list(map(self._limit, owners))
      for limit in set(limits):
        mine = [i for i, other in enumerate(limits) if other == limit]
        if self._reads_images:
          processor = processor_of(self._plain, limit)
          pixels = read_images([first[i] for i in mine], processor)
          out[mine] = image_logits(
            run, pixels, outputs=outputs, adapters=slots[mine]
          )
          continue
        assert limit is not None  # of texts
        tokens = encode(
          self._plain,
          self._tokenizer,
          [first[i] for i in mine],
          None if second is None else [second[i] for i in mine],
          limit=limit,
        )
        self.truncated += tokens.truncated
        out[mine] = packed_logits(
          run, tokens, outputs=outputs, adapters=slots[mine]
        )
    return check_finite(out), owners

  def save(self, name: str, folder: str | Path) -> None:
    """Write an adapter, as trained in the bank, as `save_adapter` does.

    Raises:
      UserError: the bank has no such adapter, or keeps what was computed from
        its trained leaves and not these themselves.
    """
    slot = self.slots([name])[0]
    if self._is_prepared:
      method = self._plain.about["method"]
      raise UserError(
        f"{name!r} can't be saved from a bank: of the method {method} it keeps"
        " what was computed from the trained numbers, not these themselves."
        " Copy the folder that the adapter was added from."
      )
    with self._lock:
      trained = jax.tree.map(lambda leaf: np.asarray(leaf[slot]), self.params)
      about = self._adapters[name].about
    if about["settings"].get("init") == STORED:
      trained = {**trained, "projections": self.frozen.projections}
    save_adapter(folder, trained, about=about)

  def _limit(self, owner: Classifier) -> int | None:
    """The most tokens of a text, or the pixels of an image's side."""
    if self._reads_images:
      return owner.about.get("image_size")
    length = owner.max_length if self._max_length is None else self._max_length
    return min(length, owner.room)

  def _prepare(self, leaves: Any) -> Any:
    """What the bank keeps of an adapter's leaves."""
    if not self._is_prepared:
      return leaves
    adapter, targets = self._plain.adapter, self._plain.targets
    leaves = jax.tree.map(jnp.asarray, leaves)
    params = join(leaves, self.frozen.params)
    projections = self.frozen.projections
    prepared = prepared_leaves(adapter, targets, params, projections)
    rest = {  # the head, and what else of the base was trained
      path: leaf
      for path, leaf in flatten_dict(leaves).items()
      if not adapter.owns(path[-1])
    }
    return join(prepared, unflatten_dict(rest))

  def _fitted(
    self, name: str, adapter: str | Path | SavedAdapter
  ) -> tuple[Any, Classifier]:
    """The leaves of an adapter that runs by the bank's program, and what is
    known of it."""
    saved = _loaded(adapter)
    make_adapter(saved.about["method"], saved.about["settings"])  # all usable
    ours, theirs = _program(self._plain.about, {}), _program(*saved[:2])
    wrong = [
      f"{key}: {theirs[key]} there, {ours.get(key)} in the bank"
      for key in theirs
      if theirs[key] != ours.get(key)
    ]
    tensors = {
      key: value
      for key, value in saved.tensors.items()
      if not key.startswith("projections.")
    }
    wrong += misfits(tensors, self._shapes)
    if wrong:
      raise UserError(
        f"The adapter {name!r} ({saved.folder}) does not fit this bank:\n  "
        + "\n  ".join(wrong)
      )
    leaves = unflatten_dict(leaves_by_path(tensors, self._shapes))
    labels = tuple(map(str, saved.about["labels"]))
    owner = self._plain._replace(
      about=saved.about, labels=labels, kind=kind_of(saved.about, labels)
    )
    return self._prepare(leaves), owner

  def _put(self, name: str, slot: int, leaves: Any, owner: Classifier) -> None:
    """Write an adapter into a slot, in place."""
    self.params = set_slot(self.params, np.int32(slot), leaves)
    self._slots[name], self._adapters[name] = slot, owner


def _loaded(adapter: str | Path | SavedAdapter) -> SavedAdapter:
  if isinstance(adapter, SavedAdapter):
    return adapter
  return load_adapter(adapter)


def _program(
  about: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """What adapters of one bank have in common, beside the leaves' shapes.

  A pair A, B that lies in the file is compared by its own digest.
  """
  pair = {k: tensors.get(f"projections.{k}") for k in "AB"}
  stored = all(matrix is not None for matrix in pair.values())
  checksum = digest(pair) if stored else about["projection_digest"]
  method, settings = about["method"], about["settings"]
  # Settings that only first values come from may differ; for the matrices the
  # digest is compared.
  fixed: dict[str, Any] = {}
  groups = by_link(method, settings)
  for name, line in links_of(method).items():
    link = f"{name}." if len(groups) > 1 else ""
    chosen = line.read(groups[name])
    free = line.starts(chosen)
    fixed |= {
      f"{link}{key}": value
      for key, value in vars(chosen).items()
      if key not in free
    }
    made, targets = make_adapter(name, groups[name])
    if made.init is None and made.common is not None:
      # no leaf lies at a layer, where its name would tell which these are
      fixed[f"{link}targets"] = ", ".join(sorted(set(targets)))
  return {
    "method": method,
    "base (fingerprint)": about["base_fingerprint"][:12],
    "base (quantised)": about.get("quantise") or "none",
    "base (codes)": str(about.get("codes_digest"))[:12],
    "number of labels": len(about["labels"]),
    "head": KINDS[kind_of(about, about["labels"])].head,
    **fixed,
    "projections (digest)": checksum and checksum[:12],
  }


@partial(jax.jit, donate_argnums=0)  # the stack is written in place
def set_slot(stack: Any, slot: Array, leaves: Any) -> Any:
  """The stack with one adapter's leaves in a slot."""
  return jax.tree.map(
    lambda stacked, leaf: stacked.at[slot].set(leaf), stack, leaves
  )
