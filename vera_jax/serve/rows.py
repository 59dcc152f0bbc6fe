"""Answers of many requests at once: a fixed number of rows, which come and go.

  rows = Rows(bank, rows=16)
  rows.warm_up()
  ticket = rows.submit(Request(tokens, adapter="ann"), on_token=print)
  rows.run(stop)  # in a thread of its own

Each row is one request's: its prompt, its adapter, its rule. A step reads a
piece of one prompt and writes a word of every row whose prompt is read, so that
nobody waits longer than for one piece of another's. A row whose answer has
ended is the next request's at the next step, in the order of arrival.

The cache is as long as the longest row needs, by doubling, and for each of its
lengths two programs read; one more chooses the words. `warm_up` compiles them,
and then nothing is compiled, whatever adapters, rules and lengths are asked
for.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vera_jax.errors import UserError
from vera_jax.generate.generator import row_keys
from vera_jax.generate.row_sampling import (
  TOP,
  NextWords,
  next_words,
  no_rules,
)
from vera_jax.generate.sampling import GREEDY, Sampling
from vera_jax.generate.text_pieces import TextPieces
from vera_jax.models.decoder import MULTIPLE, empty_cache
from vera_jax.serve.row_programs import (
  RowModel,
  decode_rows,
  read_piece,
  resized,
)
from vera_jax.train.multi_adapter import empty_stack, set_slot

if TYPE_CHECKING:
  from vera_jax.serve.bank import AdapterBank, Held

log = logging.getLogger(__name__)
SHORTEST = 128  # slots of the shortest cache; each next one has twice as many
STOP, LENGTH, CANCELLED, ERROR = "stop", "length", "cancelled", "error"
IDLE = 0.2  # seconds after which a scheduler that waits looks for its end


class QueueFull(UserError):
  """As many requests wait, of all clients or of this one, as may."""


@dataclass(frozen=True)
class Request:
  """What is asked for.

  Attributes:
    prompt: its tokens.
    adapter: its name in the bank, or what the bank had under a name; None for
      the base alone.
    how: the rule by which words are chosen.
    max_new_tokens: the most tokens of the answer; None: as many as a row has
      room for.
    stop: texts that end the answer, and are no part of it.
    seed: of the words that are drawn.
    logprobs: how many alternatives come with each token, 0 for its own log
      probability alone; None for neither.
    client: whose share it counts to.
  """

  prompt: tuple[int, ...]
  adapter: "Held | str | None" = None
  how: Sampling = GREEDY
  max_new_tokens: int | None = 64
  stop: tuple[str, ...] = ()
  seed: int = 0
  logprobs: int | None = None
  client: str = ""


class Token(NamedTuple):
  """A token of an answer.

  Attributes:
    id: -1 where an answer ends without one: it was cancelled, or failed.
    text: that became certain with it; "" while a character, or what may become
      a stop text, is incomplete.
    logprob: by the model itself, before the rule; None if it wasn't asked for.
    top: the likeliest tokens with theirs.
    finish: in an answer's last token why it ends: "stop" (a token or text that
      ends it), "length", "cancelled", or "error", which the ticket has in
      words. None in all others.
  """

  id: int = -1
  text: str = ""
  logprob: float | None = None
  top: tuple[tuple[int, float], ...] = ()
  finish: str | None = None


@dataclass(eq=False)
class Ticket:
  """A request that was taken.

  Attributes:
    request: as submitted, with the most tokens that its answer may have.
    number: in the order of arrival.
    error: why the answer failed, if it did.
    waited: seconds until it had a row.
  """

  request: Request
  number: int
  error: str = ""
  waited: float = 0.0
  on_token: Callable[[Token], None] = field(repr=False, kw_only=True)
  adapter: "Held" = field(repr=False, kw_only=True)
  key: Any = field(repr=False, kw_only=True)
  pieces: TextPieces = field(repr=False, kw_only=True)
  submitted: float = field(default_factory=time.monotonic, repr=False)
  cancelled: bool = False
  read: int = 0  # tokens of the prompt
  written: int = 0  # tokens of the answer


class Rows:
  """The scheduler. One thread steps; others submit and cancel.

  Attributes:
    length: the most tokens of a request, prompt and answer.
  """

  def __init__(
    self,
    bank: "AdapterBank",
    *,
    rows: int = 16,
    length: int | None = None,
    piece: int = 64,
    queue: int | None = 256,
    per_client: int | None = None,
  ) -> None:
    """Rows over a bank that writes.

    Args:
      bank: of decoders.
      rows: how many requests are answered at once.
      length: the most tokens of a request, prompt and answer; None: as many as
        the model has room for.
      piece: tokens of a prompt that are read between two words of the others.
      queue: how many requests may wait for a row; None for any number.
      per_client: how many requests of one client may wait or be answered; None
        for any number.

    Raises:
      UserError: the bank's adapters write nothing, or a number is none of
        these.
    """
    generator = bank.generator
    room = generator.decoder.room
    self.length = room if length is None else length
    numbers = {"rows": rows, "piece": piece, "length": self.length}
    for name, number in numbers.items():
      if number < 1:
        raise UserError(f"{name} is {number}; give 1 or more.")
    if self.length > room:
      raise UserError(f"length is {length}, but the model has room for {room}.")
    self._bank = bank
    self._pieces = sorted({-(-piece // 4), piece})  # short prompts are quicker
    self._queue, self._per_client = queue, per_client
    config, dtype = generator.decoder.config, generator.dtype
    longest = -(-self.length // MULTIPLE) * MULTIPLE
    self._sizes = [
      SHORTEST << i for i in range(32) if SHORTEST << i < longest
    ] + [longest]
    cache = empty_cache(config, rows, self._sizes[0], dtype)
    self._cache = jax.tree.map(jnp.copy, cache)  # donated: no array twice
    base = bank.vectors(bank.held(None))
    leaves = empty_stack(base, capacity=rows)
    self._model = RowModel(bank.module, bank.frozen, leaves)
    self._rows: list[Ticket | None] = [None] * rows
    self._waiting: deque[Ticket] = deque()
    self._numbers = count()
    self._lock = threading.Lock()  # of the two above and `cancelled`
    self._wake = threading.Event()
    # What is known of each row, as the programs take it.
    self._history = np.zeros((rows, longest + 1), np.int32)
    self._lengths = np.ones(rows, np.int32)
    self._running = np.zeros(rows, bool)
    self._rules = no_rules(rows)

  @property
  def running(self) -> int:
    """Requests that have a row."""
    return sum(ticket is not None for ticket in self._rows)

  @property
  def waiting(self) -> int:
    """Requests that wait for a row."""
    return len(self._waiting)

  def submit(
    self, request: Request, on_token: Callable[[Token], None]
  ) -> Ticket:
    """Takes a request, and returns at once.

    It is answered by the adapter that has the name now, also if that is
    replaced or removed before the answer ends.

    Args:
      request: what is asked for.
      on_token: called with each token, in the thread that steps. If it raises,
        the request is given up.

    Raises:
      QueueFull: too many requests wait.
      TooLong: prompt and answer are longer than a row.
      UserError: the bank has no such adapter, or a setting is none.
    """
    request.how.check()
    generator, prompt = self._bank.generator, request.prompt
    most = request.max_new_tokens
    if most is None:
      most = max(self.length - len(prompt), 1)
    generator.check(prompt, max_new_tokens=most, room=self.length)
    if request.logprobs is not None and not 0 <= request.logprobs <= TOP:
      raise UserError(
        f"logprobs is {request.logprobs}; it is a number from 0 to {TOP}."
      )
    if not -(2**63) <= request.seed < 2**63:
      raise UserError(f"seed is {request.seed}; it is an integer of 64 bits.")
    ticket = Ticket(
      replace(request, max_new_tokens=most),
      next(self._numbers),
      on_token=on_token,
      adapter=self._bank.held(request.adapter),
      key=_key(request.seed),
      pieces=TextPieces(generator.decode, request.stop),
    )
    with self._lock:
      if self._queue is not None and len(self._waiting) >= self._queue:
        raise QueueFull(
          f"{len(self._waiting)} requests wait already; ask again later."
        )
      mine = [
        other
        for other in (*self._rows, *self._waiting)
        if other is not None and other.request.client == request.client
      ]
      if self._per_client is not None and len(mine) >= self._per_client:
        raise QueueFull(
          f"{len(mine)} of your requests wait or are being answered, as many as"
          " one client may have; ask again when one has ended."
        )
      self._waiting.append(ticket)
    self._wake.set()
    return ticket

  def cancel(self, ticket: Ticket) -> None:
    """Gives a request up; its row is free at the next step. Nothing happens
    where it has ended."""
    with self._lock:
      ticket.cancelled = True
    self._wake.set()

  def run(self, stop: threading.Event) -> None:
    """Steps until `stop` is set and all that was taken has ended.

    What fails in a step ends all requests with "error", and is raised.
    """
    try:
      while True:
        self._wake.clear()
        if not self.step():
          if stop.is_set():
            return
          self._wake.wait(IDLE)
    except BaseException as error:
      with self._lock:
        rest = [*filter(None, self._rows), *self._waiting]
        self._waiting.clear()
      for ticket in rest:
        ticket.error = f"The scheduler failed: {error}"
        self._hand_out(ticket, Token(finish=ERROR))
      raise

  def step(self) -> bool:
    """A piece of one prompt, and a word of every row whose prompt is read.

    Returns:
      Whether there was anything to do.
    """
    busy = self._change_rows()
    reading = [
      (ticket.number, row)
      for row, ticket in enumerate(self._rows)
      if ticket is not None and not self._running[row]
    ]
    if reading:
      self._read(min(reading)[1])
    if self._running.any():
      self._decode()
    return busy or bool(reading)

  def warm_up(self) -> None:
    """Compiles all that `step` and `submit` need.

    Raises:
      UserError: requests are being answered.
    """
    if self.running:
      raise UserError("Warm up before requests are answered.")
    bank = self._bank
    _key(0)
    for name in (None, *list(bank)[:1]):
      self._load(0, bank.held(name))
    for size in self._sizes:
      self._fit(size)
      for piece in self._pieces:
        self._choose(self._read_piece(0, 0, [0] * piece), slice(1))
      self._choose(self._decode_rows(), slice(None))
    self._fit(1)
    jax.block_until_ready(self._cache)

  def _change_rows(self) -> bool:
    """Frees the rows of what was cancelled, and gives free rows away."""
    with self._lock:
      gone = [x for x in (*self._rows, *self._waiting) if x and x.cancelled]
      self._waiting = deque(x for x in self._waiting if not x.cancelled)
    for ticket in gone:
      self._hand_out(ticket, Token(finish=CANCELLED))
    for row, held in enumerate(self._rows):
      if held is not None or not self._waiting:
        continue
      with self._lock:
        self._rows[row] = ticket = self._waiting.popleft()
      ticket.waited = time.monotonic() - ticket.submitted
      self._load(row, ticket.adapter)
      request = ticket.request
      self._history[row, : len(request.prompt)] = request.prompt
      self._lengths[row] = len(request.prompt)
      logprobs = request.logprobs is not None
      self._rules.set(row, request.how, ticket.key, logprobs=logprobs)
    return bool(gone) or self.running > 0

  def _load(self, row: int, adapter: "Held") -> None:
    """Puts an adapter's vectors into a row."""
    vectors = self._bank.vectors(adapter)
    leaves = set_slot(self._model.leaves, np.int32(row), vectors)
    self._model = replace(self._model, leaves=leaves)

  def _read(self, row: int) -> None:
    """A piece of a row's prompt; behind the last one, the first word."""
    ticket = self._rows[row]
    assert ticket is not None
    prompt = ticket.request.prompt
    piece = prompt[ticket.read : ticket.read + self._pieces[-1]]
    self._fit(ticket.read + len(piece))
    logits = self._read_piece(row, ticket.read, piece)
    ticket.read += len(piece)
    if ticket.read == len(prompt):
      self._running[row] = True
      self._take(row, self._choose(logits, slice(row, row + 1)), 0)

  def _decode(self) -> None:
    """The next word of every running row."""
    self._fit(1)
    rows = np.flatnonzero(self._running).tolist()
    words = self._choose(self._decode_rows(), slice(None))
    for row in rows:
      self._take(row, words, row)

  def _fit(self, least: int) -> None:
    """Makes the cache as long as it has to be for all rows' tokens, by one size
    after another."""
    used = (t.read + t.written for t in self._rows if t is not None)
    slots = max(least, *used, 0)
    wanted = next(i for i, size in enumerate(self._sizes) if size >= slots)
    at = self._sizes.index(self._cache.slots)
    while at != wanted:
      at += 1 if at < wanted else -1
      self._cache = resized(self._cache, slots=self._sizes[at])

  def _read_piece(self, row: int, start: int, tokens: Sequence[int]) -> Any:
    size = next(size for size in self._pieces if size >= len(tokens))
    piece = np.zeros(size, np.int32)
    piece[: len(tokens)] = tokens
    at = map(np.int32, (row, start))
    logits, self._cache = read_piece(
      self._model, self._cache, *at, piece, np.int32(len(tokens))
    )
    return logits

  def _decode_rows(self) -> Any:
    last = self._history[np.arange(len(self._rows)), self._lengths - 1]
    # copied, for it is written to while the program may still run
    logits, self._cache = decode_rows(
      self._model, self._cache, last, self._running.copy()
    )
    return logits

  def _choose(self, logits: Any, rows: slice) -> NextWords:
    """The next words of these rows, whose logits are given."""
    facts = (self._history, self._lengths, self._rules)
    mine = jax.tree.map(lambda x: x[rows], facts)
    return jax.device_get(next_words(logits, *mine))

  def _take(self, row: int, words: NextWords, at: int) -> None:
    """Hands out a row's next word, and ends its answer where it does."""
    ticket = self._rows[row]
    assert ticket is not None
    request, pieces = ticket.request, ticket.pieces
    if not words.finite[at]:
      ticket.error = self._bank.generator.not_numbers()
      self._hand_out(ticket, Token(finish=ERROR))
      return
    token = int(words.ids[at])
    self._history[row, self._lengths[row]] = token
    self._lengths[row] += 1
    self._rules.step[row] += 1
    ticket.written += 1
    text = pieces.add(token)
    ended = token in self._bank.generator.eos
    last = ended or ticket.written == request.max_new_tokens
    if last:  # it may end with a text that stops it, and that was held back
      text += pieces.finish()
    stopped = ended or pieces.stopped
    finish = STOP if stopped else LENGTH if last else None
    answer = Token(token, text, finish=finish)
    if request.logprobs is not None:
      likeliest = zip(
        words.top[at].tolist(), words.top_logprobs[at].tolist(), strict=True
      )
      answer = answer._replace(
        logprob=float(words.logprobs[at]),
        top=tuple(likeliest)[: request.logprobs],
      )
    self._hand_out(ticket, answer)

  def _hand_out(self, ticket: Ticket, token: Token) -> None:
    """Hands out a token; behind the last one the row is free.

    The row is free first, so that who hears of the end finds it so.
    """
    if token.finish is not None:
      with self._lock:
        if ticket in self._rows:
          row = self._rows.index(ticket)
          self._rows[row] = None
          self._running[row] = False
          self._rules.set(row, GREEDY, ticket.key, logprobs=False)
    try:
      ticket.on_token(token)
    except Exception as error:
      log.exception("A request is given up: its on_token failed.")
      ticket.error, ticket.cancelled = str(error), token.finish is None


def _key(seed: int) -> np.ndarray:
  """The data of the key by which an answer's words are drawn."""
  return np.asarray(jax.random.key_data(row_keys(seed, [0])))[0]
