"""Runs an iterator some items ahead, in a thread of its own."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

_LOOK_SECONDS = 0.1  # how often a waiting thread looks whether to stop


class _End:
  """The last thing in the queue, with the error that ended the items."""

  def __init__(self, error: BaseException | None):
    self.error = error


def prefetch(items: Iterable[T], depth: int) -> Iterator[T]:
  """Yields the items in order, `depth` of them made ahead.

  An error of `items` is raised here. The thread starts with the first item
  and ends when this iterator is used up, closed or collected.
  """
  ready: queue.Queue[T | _End] = queue.Queue(maxsize=depth)
  stop = threading.Event()
  thread = threading.Thread(
    target=_produce, args=(items, ready, stop), name="prefetch", daemon=True
  )
  thread.start()
  try:
    while not isinstance(item := ready.get(), _End):
      yield item
    if item.error is not None:
      raise item.error
  finally:
    stop.set()
    thread.join()


def _produce(
  items: Iterable[T], ready: "queue.Queue[T | _End]", stop: threading.Event
) -> None:
  error: BaseException | None = None
  try:
    for item in items:
      if not _put(ready, item, stop):
        return
  except BaseException as raised:  # told to the reader, who raises it
    error = raised
  _put(ready, _End(error), stop)


def _put(
  ready: "queue.Queue[T | _End]", item: T | _End, stop: threading.Event
) -> bool:
  """Waits for room; False when the reader has gone."""
  while not stop.is_set():
    try:
      ready.put(item, timeout=_LOOK_SECONDS)
      return True
    except queue.Full:
      continue
  return False
