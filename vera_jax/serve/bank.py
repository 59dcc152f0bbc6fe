"""Many adapters in one batch: each text names the adapter that answers it.

  bank = AdapterBank({"films": "runs/a/adapter"}, capacity=1000)
  bank.add("grammar", "runs/b/adapter")
  bank.logits(["A fine film.", "Him go."], adapters=["films", "grammar"])

Of a base that reads images, these are images (`image_predictor.Images`). Of one
that writes, they are prompts, and each row has a rule of its own:

  bank.generate(["Dear Ann,", "Once"], adapters=["ann", None], seed=[1, 2])

A VeRA adapter is two vectors per layer beside a base and a pair A, B that all
share, so a bank stacks thousands of them in little memory, and each batch
gathers what its rows need (`multi_adapter.mixed_logits`). Other methods work by
the same code and take their own size each. A method whose product would need a
kernel per row is prepared when an adapter is added (`Adapter.prepare`), or is
refused where it can't be.

With `resident` only so many adapters lie on the device, and those that were
used least recently wait in the host's memory, in float32 as on the device.
Bringing one back compiles nothing.

A bank may be used by several threads at once: they take turns. All answers of
a call come from the adapters that had those names when its turn began.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
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
from vera_jax.adapters.interface import Path as TreePath
from vera_jax.adapters.interface import as_they_are
from vera_jax.adapters.labels import join
from vera_jax.adapters.methods import by_link, links_of, make_adapter
from vera_jax.adapters.projections import STORED, digest
from vera_jax.adapters.saved import is_held, leaves_by_path, misfits
from vera_jax.adapters.sites import identity_leaves, prepared_leaves
from vera_jax.data.packing import Batch
from vera_jax.data.tokenizer import load_tokenizer
from vera_jax.errors import UserError
from vera_jax.generate.generator import Generator, check_template, template_in
from vera_jax.generate.sampling import GREEDY, Sampling
from vera_jax.models.family import IMAGES
from vera_jax.models.hf_weights import load_params, read_model
from vera_jax.models.kinds import KINDS, TAGS, WORDS, kind_of
from vera_jax.pretrained.blueprint import blueprint
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
from vera_jax.serve.rows import Request, Rows, Token
from vera_jax.train.multi_adapter import (
  empty_stack,
  get_slot,
  mixed_logits,
  set_slot,
)
from vera_jax.train.step import Frozen

ROWS = 16  # prompts that are answered together
LOW = -1e9  # the logit of a label that an adapter has not


@dataclass(eq=False)
class Held:
  """An adapter that a bank has, or had: replacing one makes another `Held`.

  Attributes:
    name: in the bank; None for the base alone.
    owner: what is known of it, without parameters.
    slot: where on the leading axis of the bank's `params` it lies.
    vectors: its leaves where it has no slot.
  """

  name: str | None
  owner: Classifier
  slot: int | None = None
  vectors: Any = None


class AdapterBank:
  """Adapters by name over one base and one pair, up to a capacity.

  Attributes:
    params: the trained leaves, [resident, ...]. Adding and replacing donate it
      and write in place. It is replaced as a whole after training
      (`multi_adapter.mixed_step`), which donates it too: until then nothing
      else may use the bank.
    frozen: the base and the projections.
    module: the adapted module.
    lock: who holds it sees the same adapters in several calls; others wait.
    capacity: how many adapters have room.
    resident: how many of them lie on the device.
    truncated: texts that were cut, so far.
  """

  def __init__(
    self,
    adapters: Mapping[str, str | Path | SavedAdapter],
    *,
    capacity: int | None = None,
    resident: int | None = None,
    base: str | Path | None = None,
    dtype: DTypeLike = jnp.float32,
    max_length: int | None = None,
  ) -> None:
    """The first adapter decides what all others must fit, but for the number
    of labels: there is room for as many as the widest of these has.

    Args:
      adapters: folders, or what `load_adapter` gave, by name; at least one.
      capacity: None for no more than these.
      resident: the most adapters that lie on the device at once; None for all.
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
    self.resident = self.capacity if resident is None else resident
    if self.resident < 1:
      raise UserError(f"resident is {resident}; give 1 or more.")
    first = _loaded(next(iter(adapters.values())))
    if first.about["labels"]:  # heads are as wide as the widest of these
      loaded = map(_loaded, adapters.values())
      first = max(loaded, key=lambda saved: len(saved.about["labels"]))
    # factored: any other plan would make a kernel for every row
    classifier = restore_adapter(
      first,
      base,
      dtype=dtype,
      # looped layers write quicker (`generate.generator`)
      scan=first.about.get("kind") != WORDS,
      plan="factored",
    )
    if classifier.kind == TAGS:
      raise UserError(
        f"The adapter {first.folder} tags words, but a bank answers whole"
        " texts. Use a Predictor."
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
    self._plain = classifier._replace(params={}, about=first.about)
    shapes: Any = jax.eval_shape(lambda: stacked)
    self._shapes_of = {self._plain.outputs: shapes}  # by number of outputs
    links = classifier.adapter.methods
    self._is_prepared = any(link.prepare is not as_they_are for link in links)
    leaves = jax.eval_shape(self._prepare, unflatten_dict(stacked))
    self.params = empty_stack(leaves, capacity=self.resident)
    self.module = classifier.module
    self.truncated = 0
    self._max_length = max_length
    self._reads_images = classifier.family.reads == IMAGES
    self._generator = None
    if classifier.kind == WORDS:
      self._generator = Generator(classifier, keep_adapter=True)
    elif not self._reads_images:
      self._tokenizer = load_tokenizer(classifier.folder)
    run = partial(mixed_logits, module=self.module, inputs=classifier.inputs)
    self._run = jax.jit(run)
    self.lock = threading.RLock()  # of all that follows, and of `params`
    self._writing = threading.Lock()  # one call writes at a time
    self._free = list(reversed(range(self.resident)))
    self._adapters: dict[str, Held] = {}
    self._recent: dict[int, Held] = {}  # by slot, the last one used at the end
    for name, adapter in adapters.items():
      self.add(name, adapter)

  def __contains__(self, name: object) -> bool:
    return name in self._adapters

  def __len__(self) -> int:
    return len(self._adapters)

  def __iter__(self) -> Iterator[str]:
    with self.lock:
      return iter(list(self._adapters))

  @property
  def nbytes(self) -> int:
    """Bytes of all leaves on the device when it is full, heads among them."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))

  @property
  def model(self) -> dict[str, Any]:
    """The adapted module and its inputs' names, as `mixed_step` takes them.

    Raises:
      UserError: adapters may wait on the host, where no step trains them.
    """
    if self.resident < self.capacity:
      raise UserError(
        f"Of this bank's {self.capacity} adapters only {self.resident} lie on"
        " the device at once, and their places change: to train them, make the"
        " bank without resident."
      )
    return {"module": self.module, "inputs": self._plain.inputs}

  @property
  def generator(self) -> Generator:
    """What knows the decoder's tokenizer, templates and ends of texts.

    Raises:
      UserError: the bank's adapters write no texts.
    """
    if self._generator is None:
      raise UserError(
        "The adapters of this bank answer questions about whole texts, or"
        " images, and write none: ask for answers or logits."
      )
    return self._generator

  def add(self, name: str, adapter: str | Path | SavedAdapter) -> None:
    """Put an adapter into the bank; nothing is compiled anew.

    Where the device is full, it waits on the host until it is first used.

    Raises:
      UserError: the name is taken, there is no room, or it does not fit.
    """
    made = self._fitted(name, adapter)
    with self.lock:
      if name in self:
        raise UserError(f"The bank has {name!r} already: replace or remove it.")
      if len(self) >= self.capacity:
        raise UserError(
          f"The bank is full: its capacity is {self.capacity}. Remove an"
          " adapter first, or make a bank with a larger one to add"
          f" {name!r}."
        )
      self._put(name, *made)

  def replace(self, name: str, adapter: str | Path | SavedAdapter) -> None:
    """Put another adapter in the place of one; errors as for `add`.

    Answers that are being written by the old one are finished by it.
    """
    made = self._fitted(name, adapter)
    with self.lock:
      self._let_go(self.held(name))
      self._put(name, *made)

  def remove(self, name: str) -> None:
    """Give an adapter's room back; answers by it are finished."""
    with self.lock:
      self._let_go(self.held(name))
      del self._adapters[name]

  def held(self, name: Held | str | None) -> Held:
    """The adapter that has this name now, or had it when it was looked up;
    None is the base alone.

    Raises:
      UserError: there is none.
    """
    if isinstance(name, Held):
      return name
    if name is None:
      return self._base_alone
    with self.lock:
      self._check_names([name])
      return self._adapters[name]

  def vectors(self, held: Held) -> Any:
    """A copy of an adapter's leaves on the device, also of one that the bank
    has no more."""
    with self.lock:
      if held.name is None or self._adapters.get(held.name) is not held:
        return held.vectors
      slot = self._bring(held)  # which makes `params` anew
      return get_slot(self.params, np.int32(slot))

  def slots(self, names: Iterable[str]) -> Int[np.ndarray, " names"]:
    """Where on the leading axis of `params` these adapters lie.

    Those that wait on the host are brought back. With `resident`, another call
    may send them there again.

    Raises:
      UserError: one of them is not there, or they are more than `resident`.
    """
    names = list(names)
    with self.lock:
      self._check_names(names)
      if len(set(names)) > self.resident:
        raise UserError(
          f"{len(set(names))} adapters are asked for at once, but only"
          f" {self.resident} lie on the device (resident)."
        )
      # each is the last one used by then, so that none displaces another
      slots = [self._bring(self._adapters[name]) for name in names]
      return np.array(slots, np.int64)

  def generate(
    self,
    prompts: Sequence[str],
    *,
    adapters: str | None | Sequence[str | None],
    how: Sampling | Sequence[Sampling] = GREEDY,
    max_new_tokens: int | Sequence[int] = 64,
    seed: int | Sequence[int] = 0,
    stop: Sequence[str] | Sequence[Sequence[str]] = (),
  ) -> list[str]:
    """What each prompt's adapter writes behind it, whatever stands beside it.

    It is what a `Generator` of that adapter writes with `keep_adapter=True`,
    asked for this prompt alone with the same rule, length and seed.

    Args:
      prompts: the texts.
      adapters: a name for each prompt, or one for all; None is the base alone.
      how: the rule by which words are chosen, for each or for all, as the
        following are.
      max_new_tokens: the most tokens of an answer.
      seed: of the words that are drawn. Unlike a generator's, a prompt's
        place in the list counts for nothing: give each a seed of its own.
      stop: texts that end an answer and are no part of it.

    Raises:
      UserError: as for `Generator.encode` and `Rows.submit`, of which the
        prompt is named; there is no such adapter; or the lists differ in
        length.
    """
    if isinstance(prompts, str):
      raise UserError("A list of prompts is needed, also for one: ['Once'].")
    single = all(isinstance(text, str) for text in stop)
    stops = [stop] * len(prompts) if single else stop
    columns = {
      "adapters": _for_each(adapters, prompts, str | None),
      "how": _for_each(how, prompts, Sampling),
      "max_new_tokens": _for_each(max_new_tokens, prompts, int),
      "stop": list(map(tuple, stops)),
      "seed": _for_each(seed, prompts, int),
    }
    for name, column in columns.items():
      if len(column) != len(prompts):
        raise UserError(
          f"There are {len(prompts)} prompts and {len(column)} {name}: give one"
          " for each, or one for all."
        )
    texts, tickets = [""] * len(prompts), []

    def write(at: int, token: Token) -> None:
      texts[at] += token.text

    with self._writing:
      with self.lock:  # all names are looked up at once
        columns["adapters"] = [self.held(name) for name in columns["adapters"]]
      # all rows are computed, so no more than hold the prompts
      count = min(ROWS, 1 << (len(prompts) - 1).bit_length())
      rows = Rows(self, rows=count, queue=None)
      for at, (prompt, held, rule, most, *row) in enumerate(
        zip(prompts, *columns.values(), strict=True)
      ):
        try:
          tokens = self.generator.encode(
            prompt, max_new_tokens=most, about=held.owner.about
          )
          request = Request(tuple(tokens), held, rule, most, *row)
          tickets.append(rows.submit(request, partial(write, at)))
        except UserError as error:
          raise UserError(f"Prompt {at + 1}: {error}") from error
      while rows.step():
        pass
    for number, ticket in enumerate(tickets, 1):
      if ticket.error:
        raise UserError(f"Prompt {number}: {ticket.error}")
    return texts

  def logits(
    self,
    first: Sequence[Any],
    second: Sequence[str] | None = None,
    *,
    adapters: str | Sequence[str],
  ) -> Logits:
    """The logits of every text, or pair of texts, in their order.

    They are as many as the adapter with most labels has; -inf stands for those
    that a text's adapter has not.

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
      next(answers(row[None, : owner.outputs], owner.labels, kind=owner.kind))
      for row, owner in zip(logits, owners, strict=True)
    ]

  def _ask(
    self,
    first: Sequence[Any],
    second: Sequence[str] | None,
    adapters: str | Sequence[str],
  ) -> tuple[Logits, list[Classifier]]:
    """The logits of every text, and the adapter that each comes from."""
    if self._generator is not None:
      raise UserError(
        "The adapters of this bank write texts, and answer no questions about"
        " whole ones: ask it to generate."
      )
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

    with self.lock:
      self._check_names(names)
      owners = [self._adapters[name].owner for name in names]
      limits = list(map(self._limit, owners))
      for mine in self._batches(names, limits):
        slots = self.slots([names[i] for i in mine])
        limit = limits[mine[0]]
        if self._reads_images:
          processor = processor_of(self._plain, limit)
          pixels = read_images([first[i] for i in mine], processor)
          out[mine] = image_logits(run, pixels, outputs=outputs, adapters=slots)
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
        out[mine] = packed_logits(run, tokens, outputs=outputs, adapters=slots)
    check_finite(out)
    for row, owner in zip(out, owners, strict=True):
      row[owner.outputs :] = -np.inf
    return out, owners

  def save(self, name: str, folder: str | Path) -> None:
    """Write an adapter, as trained in the bank, as `save_adapter` does.

    Raises:
      UserError: the bank has no such adapter, or keeps what was computed from
        its trained leaves and not these themselves.
    """
    held = self.held(name)
    if self._is_prepared:
      method = self._plain.about["method"]
      raise UserError(
        f"{name!r} can't be saved from a bank: of the method {method} it keeps"
        " what was computed from the trained numbers, not these themselves."
        " Copy the folder that the adapter was added from."
      )
    trained = jax.device_get(self.vectors(held))
    about, outputs = held.owner.about, held.owner.outputs
    if outputs < self._plain.outputs:
      shapes = self._shapes(outputs)
      trained = unflatten_dict(
        {
          path: leaf[..., : shapes[path].shape[-1]]
          for path, leaf in flatten_dict(trained).items()
        }
      )
    if about["settings"].get("init") == STORED:
      trained = {**trained, "projections": self.frozen.projections}
    save_adapter(folder, trained, about=about)

  def _batches(
    self, names: Sequence[str], limits: Sequence[Any]
  ) -> Iterator[list[int]]:
    """Places of texts with one limit, whose adapters lie on the device at
    once."""
    distinct = list(dict.fromkeys(names))
    for start in range(0, len(distinct), self.resident):
      some = set(distinct[start : start + self.resident])
      for limit in set(limits):
        mine = [
          i
          for i, name in enumerate(names)
          if name in some and limits[i] == limit
        ]
        if mine:
          yield mine

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
    labels = tuple(map(str, saved.about["labels"]))
    owner = self._plain._replace(
      about=saved.about, labels=labels, kind=kind_of(saved.about, labels)
    )
    if owner.outputs > self._plain.outputs:
      wrong.append(
        f"number of labels: {owner.outputs} there, at most"
        f" {self._plain.outputs} in the bank; make the bank with this adapter"
        " among its first"
      )
    shapes = self._shapes(min(owner.outputs, self._plain.outputs))
    wrong += misfits(tensors, shapes)
    if wrong:
      raise UserError(
        f"The adapter {name!r} ({saved.folder}) does not fit this bank:\n  "
        + "\n  ".join(wrong)
      )
    leaves = leaves_by_path(tensors, shapes)
    for path, widest in self._shapes(self._plain.outputs).items():
      leaf = leaves[path]
      lacking = widest.shape[-1] - leaf.shape[-1]
      if lacking:  # the logits of labels that it has not
        widths = [(0, 0)] * (leaf.ndim - 1) + [(0, lacking)]
        never = LOW if path[-1] == "bias" else 0.0
        leaves[path] = np.pad(leaf, widths, constant_values=never)
    if self._generator is not None:
      check_template(template_in(saved.about))
    return self._prepare(unflatten_dict(leaves)), owner

  def _shapes(self, outputs: int) -> dict[TreePath, Any]:
    """The shapes of an adapter's leaves that has so many outputs."""
    if outputs not in self._shapes_of:
      plain = self._plain
      widest = self._shapes_of[plain.outputs]
      head = KINDS[plain.kind].head
      made = blueprint(read_model(plain.folder), outputs=outputs, head=head)
      self._shapes_of[outputs] = {
        path: made.shapes.get(path, leaf) for path, leaf in widest.items()
      }
    return self._shapes_of[outputs]

  @cached_property
  def _base_alone(self) -> Held:
    """Leaves with which the adapted model is the base."""
    generator = self.generator
    plain, frozen = self._plain, self.frozen
    adapter, decoder = plain.adapter, generator.decoder
    shapes = self._shapes(plain.outputs)
    flat = {p: x for p, x in shapes.items() if not adapter.owns(p[-1])}
    base: Any = {}  # what the method trains of it
    if flat:
      base = load_params(decoder.folder, unflatten_dict(flat)).params
      base = jax.tree.map(jnp.asarray, base)
    params = join(base, frozen.params)
    own = identity_leaves(adapter, plain.targets, params, frozen.projections)
    leaves = self._prepare(join(own, base))
    about: dict[str, Any] = {}
    return Held(None, plain._replace(about=about), vectors=leaves)

  def _check_names(self, names: Iterable[str]) -> None:
    unknown = [name for name in dict.fromkeys(names) if name not in self]
    if unknown:
      there = ", ".join(list(self)[:9]) + (", ..." if len(self) > 9 else "")
      raise UserError(
        f"The bank has no adapter {', '.join(map(repr, unknown))}. It has:"
        f" {there or 'none'}."
      )

  def _put(self, name: str, leaves: Any, owner: Classifier) -> None:
    """Give a name to an adapter, in a free slot or on the host."""
    held = Held(name, owner, vectors=jax.device_get(leaves))
    if self._free:
      self._bring(held)
    self._adapters[name] = held

  def _let_go(self, held: Held) -> None:
    """Take an adapter's slot; answers by it that wait go on with a copy."""
    if held.slot is not None:
      self._free.append(self._to_host(held))

  def _bring(self, held: Held) -> int:
    """The slot of an adapter, which is written to the device if it waits."""
    if held.slot is None:
      oldest = next(iter(self._recent.values()), None)
      if not self._free:
        assert oldest is not None
        self._free.append(self._to_host(oldest))
      slot = self._free[-1]
      self.params = set_slot(self.params, np.int32(slot), held.vectors)
      held.slot, held.vectors = self._free.pop(), None
    self._recent[held.slot] = self._recent.pop(held.slot, held)
    return held.slot

  def _to_host(self, held: Held) -> int:
    """Takes an adapter from the device, and gives the slot that it had."""
    slot = held.slot
    assert slot is not None
    held.vectors = jax.device_get(get_slot(self.params, np.int32(slot)))
    held.slot = None
    del self._recent[slot]
    return slot


def _for_each(value: Any, prompts: Sequence[str], single: Any) -> list[Any]:
  """One value for each prompt, of which one may have been given for all."""
  if isinstance(value, single):
    return [value] * len(prompts)
  return list(value)


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
    "head": KINDS[kind_of(about, about["labels"])].head,
    **fixed,
    "projections (digest)": checksum and checksum[:12],
  }
