"""Texts that continue prompts, by a decoder with an adapter or without.

  decoder = restore_adapter(load_adapter("runs/a/adapter"))
  generator = Generator(decoder)
  generator.texts(["Once upon a time"], max_new_tokens=40)
  generator.texts(prompts, how=Sampling(temperature=0.7, top_p=0.9), seed=1)
  generator.texts(prompts, how=Beam(beams=4, no_repeat_ngram=3))
  for piece in generator.stream("Once upon a time"): print(piece, end="")
  Generator(decoder, template="chat").texts(["What is the capital of France?"])

The adapter is merged into the weights first, for then it costs nothing at each
token; `keep_adapter=True` decodes with it beside them. So does a base that is
in codes (`operations/quantised.py`), of which one layer's kernels at a time are
dequantised.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vera_jax.adapters.apply import Adapted
from vera_jax.adapters.merge import merge
from vera_jax.data.chat import message_ids
from vera_jax.data.completions import Completions, prompt_ids
from vera_jax.data.templates import CHAT, PLAIN, TEMPLATES
from vera_jax.data.tokenizer import load_tokenizer
from vera_jax.errors import UserError
from vera_jax.files import read_json
from vera_jax.generate.beam import Beam
from vera_jax.generate.conversation import Past, conversation_ids
from vera_jax.generate.decode import (
  compiled,
  compiled_prefill,
  compiled_read,
)
from vera_jax.generate.history import append
from vera_jax.generate.sampling import (
  GREEDY,
  Sampled,
  Sampling,
  are_numbers,
  compiled_next,
)
from vera_jax.generate.text_pieces import TextPieces
from vera_jax.models.decoder import empty_cache, grow
from vera_jax.models.kinds import WORDS
from vera_jax.operations.quantised import is_quantised
from vera_jax.pretrained.blueprint import decoder_in
from vera_jax.pretrained.classifier import Classifier

STEP = 32  # prompts are padded to multiples of it: few shapes are compiled
Ids = list[int]


class TooLong(UserError):
  """Prompt and answer are longer than there is room for."""


class Generator:
  """A decoder with its tokenizer, compiled for a few shapes."""

  def __init__(
    self,
    decoder: Classifier,
    *,
    keep_adapter: bool = False,
    rows: int = 16,
    template: str | None = None,
  ) -> None:
    """A generator of texts.

    Args:
      decoder: from `restore_adapter`, or `load_classifier` of a whole folder.
      keep_adapter: decode with the adapter beside the weights, unmerged.
      rows: how many prompts are answered together.
      template: what prompts are put into: "chat", the tokenizer's chat
        template, "alpaca", Alpaca's prompt, or "plain", nothing. None: what the
        decoder was trained with, by what it says about itself, else "plain".

    Raises:
      UserError: the model answers questions about texts, and writes none; there
        is no such template; or as for `message_ids`.
    """
    if decoder.kind != WORDS:
      raise UserError(
        f"The model in {decoder.folder} is no decoder that writes texts; its"
        " answers to texts are given by vera-jax predict."
      )
    plain = decoder_in(decoder.module, decoder.config)
    self.rows = rows
    self.template = template or template_in(decoder.about)
    check_template(self.template)
    self.tokenizer = load_tokenizer(decoder.folder)
    if self.template == CHAT:  # what fails is reported before a prompt is read
      message_ids(self.tokenizer, "Hello.")
    self.module, self.variables = decoder.module, decoder.variables
    # Merged, a base in codes would be dequantised as a whole; and with looped
    # layers XLA does that before the loop over tokens, where none changes.
    if not any(map(is_quantised, flatten_dict(decoder.params).values())):
      if isinstance(self.module, Adapted) and not keep_adapter:
        merged = merge(
          decoder.params,
          decoder.projections,
          adapter=decoder.adapter,
          targets=decoder.targets,
        )
        self.module, self.variables = self.module.model, {"params": merged}
      self.module, self.variables = _unrolled(self.module, self.variables)
    # stacked weights are let go
    empty: Any = {"projections": {}}
    self.decoder = decoder._replace(
      module=self.module, **(empty | self.variables)
    )
    self.dtype = plain.dtype
    self.eos = _ends(decoder, self.tokenizer)

  def encode(
    self,
    prompt: str,
    *,
    max_new_tokens: int,
    about: Mapping[str, Any] | None = None,
  ) -> Ids:
    """A prompt's tokens, as the decoder was trained on them.

    They begin with what the tokenizer puts before a text, and end with an
    end-of-text token if that stood behind the prompts of training. A template
    alone says what is around a message.

    Args:
      prompt: a text.
      max_new_tokens: the most tokens of the answer.
      about: what an adapter other than the decoder's says of its training.

    Raises:
      UserError: there is none, they and the answer have no room, or the model
        lacks one of them.
    """
    template = self.template if about is None else template_in(about)
    if template != PLAIN:
      asked = [{"role": "user", "content": prompt}]
      ids = conversation_ids(self.tokenizer, asked, template=template)
    else:
      about = self.decoder.about if about is None else about
      separate = about.get("separate") is True
      how = Completions("left", separate)
      [ids] = prompt_ids(self.tokenizer, [prompt], how=how)
    self.check(ids, max_new_tokens=max_new_tokens)
    return ids

  def check(
    self, ids: Sequence[int], *, max_new_tokens: int, room: int | None = None
  ) -> None:
    """Raises a UserError for tokens that the decoder can't continue, with
    `room` for prompt and answer; None: as the model has."""
    if not len(ids):
      raise UserError(
        "The prompt is empty, and this tokenizer puts nothing before a text:"
        " give one word at least."
      )
    room = self.decoder.room if room is None else room
    vocab = self.decoder.config.vocab_size
    if max_new_tokens < 1:
      raise UserError(f"max_new_tokens is {max_new_tokens}; give 1 or more.")
    if len(ids) + max_new_tokens > room:
      raise TooLong(
        f"The prompt has {len(ids)} tokens, and with {max_new_tokens} new ones"
        f" they are more than the {room} that fit: shorten it, or lower"
        " max_new_tokens."
      )
    if not 0 <= min(ids) <= max(ids) < vocab:
      raise UserError(
        f"The prompt has the token {max(ids)}, but the model's vocabulary ends"
        f" before {vocab}: tokenizer and model don't belong together."
      )

  def texts(
    self,
    prompts: Sequence[str],
    *,
    how: Sampling | Beam = GREEDY,
    max_new_tokens: int = 64,
    seed: int = 0,
  ) -> list[str]:
    """What follows each prompt, without it; the arguments are those of `ids`.

    Raises:
      UserError: what was given is no list of texts, or as for `encode`.
    """
    if isinstance(prompts, str):
      raise UserError("A list of prompts is needed, also for one: ['Once'].")
    encoded = []
    for number, prompt in enumerate(prompts, 1):
      try:
        encoded.append(self.encode(prompt, max_new_tokens=max_new_tokens))
      except UserError as error:
        raise UserError(f"Prompt {number}: {error}") from error
    answers = self.ids(
      encoded, how=how, max_new_tokens=max_new_tokens, seed=seed
    )
    return [self.decode(ids) for ids in answers]

  def ids(
    self,
    prompts: Sequence[Sequence[int]],
    *,
    how: Sampling | Beam = GREEDY,
    max_new_tokens: int = 64,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    eos: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
  ) -> list[Ids]:
    """The tokens that follow each prompt's, with the end among them if any.

    Args:
      prompts: tokens; those of like lengths are answered together.
      how: the rule by which words are taken: greedily, drawn, or by beam
        search.
      max_new_tokens: the most tokens of an answer.
      seed: the seed of the words that are drawn. Each prompt has a key of its
        own, by its number, so that its answer does not depend on the others.
      numbers: the prompts' numbers, by default from 0. Give them where prompts
        of one list come in parts.
      eos: the ids that end a text; None for those that the folder names.
      progress: called with the number of prompts answered so far.

    Raises:
      UserError: as for `check`, settings that there are not, or a model whose
        logits are no numbers.
    """
    how.check()
    for ids in prompts:
      self.check(ids, max_new_tokens=max_new_tokens)
    numbers = range(len(prompts)) if numbers is None else numbers
    answers: list[Ids] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), self.rows):
      batch = order[start : start + self.rows]
      # rows that fill the batch up repeat its last prompt
      count = min(self.rows, 1 << (len(batch) - 1).bit_length())
      filled = batch + batch[-1:] * (count - len(batch))
      tokens, lengths = self._padded([prompts[i] for i in filled])
      answered = compiled(
        self.module,
        self.decoder.config,
        self.variables,
        tokens,
        lengths,
        row_keys(seed, [numbers[i] for i in filled]),
        how=how,
        eos=self.eos if eos is None else tuple(eos),
        max_new_tokens=max_new_tokens,
        pad=self.tokenizer.pad_token_id,
        dtype=self.dtype,
      )
      new, counts = np.asarray(answered.ids), np.asarray(answered.lengths)
      if not isinstance(answered, Sampled):  # the best of each prompt's texts
        new, counts = new[:, 0], counts[:, 0]
      finite = np.asarray(answered.finite)
      for i, row, length, fine in zip(batch, new, counts, finite, strict=False):
        self._check_numbers(fine, f"Prompt {numbers[i] + 1}: ")
        answers[i] = row[:length].tolist()
      if progress is not None:
        progress(start + len(batch))
    return answers

  def stream(
    self,
    prompt: str,
    *,
    how: Sampling | Beam = GREEDY,
    max_new_tokens: int = 64,
    seed: int = 0,
  ) -> Iterator[str]:
    """The answer that `texts` gives to one prompt, piece by piece.

    That of a beam search is known only at its end, and comes as one piece.

    Raises:
      UserError: as for `encode` and `ids`.
    """
    how.check()
    if not isinstance(how, Sampling):
      yield from self.texts([prompt], how=how, max_new_tokens=max_new_tokens)
      return
    tokens = self.encode(prompt, max_new_tokens=max_new_tokens)
    yield from self.stream_ids(
      tokens, how=how, max_new_tokens=max_new_tokens, seed=seed
    )

  def stream_ids(
    self,
    tokens: Ids,
    *,
    how: Sampling = GREEDY,
    max_new_tokens: int = 64,
    seed: int = 0,
    past: Past | None = None,
  ) -> Iterator[str]:
    """As `stream`, for a prompt's tokens.

    Args:
      tokens: of the whole prompt.
      how: the rule by which words are taken.
      max_new_tokens: the most tokens of the answer.
      seed: the seed of the words that are drawn.
      past: what was read and written before: of the prompt only what follows
        it is read. The answer is put into it token by token, so it has what
        was written also if nobody waits for the end.

    Raises:
      UserError: as for `ids`.
    """
    how.check()
    self.check(tokens, max_new_tokens=max_new_tokens)
    past = past or Past()
    ids, lengths = self._padded([tokens])
    keys = row_keys(seed, [0])
    history = append(ids, lengths, jnp.zeros((1, max_new_tokens), jnp.int32))
    cache = past.cache
    if cache is None:
      cache = empty_cache(self.decoder.config, 1, 0, self.dtype)
    missing = history.shape[1] - cache.slots
    if missing > 0:  # at least doubled, so that few shapes are compiled
      cache = grow(cache, max(missing, cache.slots))
    same = past.same_as(tokens)
    # slots behind are seen by no token before one is written there
    cache = cache._replace(positions=jnp.full(1, same, jnp.int32))
    logits, cache = compiled_prefill(
      self.module, self.variables, cache, *self._padded([tokens[same:]])
    )
    answer: Ids = []
    pieces = TextPieces(self.decode)
    while True:
      self._check_numbers(are_numbers(logits)[0])
      token = compiled_next(
        logits,
        keys,
        jnp.int32(len(answer)),
        history,
        lengths + len(answer),
        sampling=how,
      )
      history = history.at[0, len(tokens) + len(answer)].set(token[0])
      answer.append(int(token[0]))
      past.cache, past.ids = cache, [*tokens, *answer]
      if text := pieces.add(answer[-1]):
        yield text
      if answer[-1] in self.eos or len(answer) == max_new_tokens:
        break
      logits, cache = compiled_read(
        self.module, self.variables, cache, token[:, None]
      )
    if text := pieces.finish():
      yield text

  def decode(self, ids: Sequence[int]) -> str:
    """An answer's text, without what ends it and other special tokens."""
    kept = [i for i in ids if i not in self.eos]
    return self.tokenizer.decode(
      kept, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )

  def _check_numbers(self, fine: Any, prompt: str = "") -> None:
    if not fine:
      raise UserError(prompt + self.not_numbers())

  def not_numbers(self) -> str:
    """What to do where logits are not finite numbers, in words."""
    return (
      "The next word can't be chosen, for its logits are not finite"
      " numbers. Either a weight of the model or its adapter is not: see"
      " whether the loss of its training was finite to the end. Or computing"
      f" in {jnp.dtype(self.dtype).name} overflows: load the model"
      " in float32."
    )

  def _padded(
    self, prompts: Sequence[Sequence[int]]
  ) -> tuple[jax.Array, jax.Array]:
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    width = min(-(-lengths.max() // STEP) * STEP, self.decoder.room)
    padded = np.full((len(prompts), width), self.tokenizer.pad_token_id)
    for row, ids in zip(padded, prompts, strict=True):
      row[: len(ids)] = ids
    return jnp.asarray(padded, jnp.int32), jnp.asarray(lengths)


def template_in(about: Mapping[str, Any]) -> str:
  """The template of a decoder's prompts, by what it says of its training."""
  return about.get("template") or PLAIN


def check_template(name: str) -> None:
  """Raises a UserError where there is no such template."""
  if name not in TEMPLATES:
    raise UserError(
      f"There is no template {name!r} for prompts; choose"
      f" {', '.join(TEMPLATES)}."
    )


def _unrolled(module: Any, variables: Any) -> tuple[Any, dict[str, Any]]:
  """The model with its layers looped, which makes each token quicker.

  A loop over stacked layers copies a layer's weights and its part of the cache
  at every token.
  """
  adapted = isinstance(module, Adapted)
  plain = module.model if adapted else module
  if not plain.scan:
    return module, variables
  plain = plain.clone(scan=False)
  leaves = {}
  for path, leaf in flatten_dict(variables).items():
    if "layer" not in path:
      leaves[path] = leaf
      continue
    at = path.index("layer")
    for i in range(leaf.shape[0]):
      layer = jax.tree.map(lambda codes, i=i: codes[i], leaf)
      leaves[*path[:at], f"layer_{i}", *path[at + 1 :]] = layer
  module = module.clone(model=plain) if adapted else plain
  return module, unflatten_dict(leaves)


def row_keys(seed: int, numbers: Sequence[int]) -> jax.Array:
  """A key for each prompt's number."""
  key = jax.random.key(seed)
  return jax.vmap(partial(jax.random.fold_in, key))(jnp.asarray(numbers))


def _ends(decoder: Classifier, tokenizer: Any) -> tuple[int, ...]:
  """The ids that end a text: those of the first file of the folder that names
  some, and the tokenizer's, which is what is learned here.

  Raises:
    UserError: the file holds something else there.
  """
  end = tokenizer.eos_token_id
  ends = [] if end is None else [end]
  for name in ("generation_config.json", "config.json"):
    path = decoder.folder / name
    named = read_json(path).get("eos_token_id") if path.is_file() else None
    if named is None:
      continue
    ids = named if isinstance(named, list) else [named]
    if not all(isinstance(i, int) for i in ids):
      raise UserError(f"{path}: eos_token_id is {named!r}, not ids.")
    return tuple(dict.fromkeys([*ids, *ends]))
  return tuple(ends)
