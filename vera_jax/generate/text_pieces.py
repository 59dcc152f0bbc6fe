"""The text of an answer whose tokens come one by one.

A token may be half of a character, and the text so far may be the beginning of
a text that ends the answer: either is held back until it is certain.
"""

from collections.abc import Callable, Sequence

BROKEN = "\ufffd"  # what a tokenizer gives for half of a character


class TextPieces:
  """Text from tokens, as soon as it is certain.

  Attributes:
    stopped: whether a text came up that ends the answer.
  """

  def __init__(
    self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()
  ) -> None:
    """`decode` gives tokens' text; `stop` are texts that end the answer, and
    are no part of it."""
    self.stopped = False
    self._decode, self._stop = decode, [text for text in stop if text]
    # A token's text may depend on the one before it (a space between words),
    # but on none further back: those from `_first` on are decoded anew, of
    # which the ones before `_next` have given their text.
    self._ids: list[int] = []
    self._first = self._next = 0
    self._held = ""

  def add(self, token: int) -> str:
    """The text that is certain now, "" for none."""
    self._ids.append(token)
    text = self._new()
    if not text or text.endswith(BROKEN):
      return ""
    self._first, self._next = self._next, len(self._ids)
    return self._certain(text)

  def finish(self) -> str:
    """What was held back, once there are no more tokens."""
    piece = self._certain(self._new())
    held, self._held = self._held, ""
    return piece + held

  def _new(self) -> str:
    """The text of the tokens that have given none."""
    shown = self._decode(self._ids[self._first : self._next])
    return self._decode(self._ids[self._first :])[len(shown) :]

  def _certain(self, more: str) -> str:
    if self.stopped:
      return ""
    text = self._held + more
    ends = [at for stop in self._stop if (at := text.find(stop)) >= 0]
    if ends:
      self.stopped, self._held = True, ""
      return text[: min(ends)]
    begun = max(
      (
        count
        for stop in self._stop
        for count in range(1, len(stop))
        if text.endswith(stop[:count])
      ),
      default=0,
    )
    certain, self._held = text[: len(text) - begun], text[len(text) - begun :]
    return certain
