"""Shows examples as they are trained on, with the learned tokens marked."""

from typing import Any

from rich.text import Text

from vera_jax.data.tokens import Tokens
from vera_jax.terminal import LINES, Console, printable

OPEN, CLOSE = "⟦", "⟧"  # around what is learned where there are no colours


def preview(
  tokens: Tokens,
  tokenizer: Any,
  *,
  number: int,
  console: Console | None = None,
) -> None:
  """Prints the first examples; special tokens are shown as they are written.

  Args:
    tokens: those of a split whose words are learned.
    tokenizer: the tokenizer that made them.
    number: how many examples are shown.
    console: where they are printed; None for standard output.
  """
  assert tokens.learned is not None
  console = console or Console()
  for i in range(min(number, len(tokens))):
    span = slice(*tokens.offsets[i : i + 2])
    ids, learned = tokens.ids[span].tolist(), tokens.learned[span].tolist()
    console.print()
    place = tokens.place(int(tokens.index[i]))
    console.print(
      f"example {i + 1}, {place}: {len(ids)} tokens, {sum(learned)} learned",
      style="bold",
      soft_wrap=True,
    )
    shown = Text()
    for text, is_learned in stretches(ids, learned, tokenizer):
      text = printable(text, keep=LINES)
      if not is_learned:
        shown.append(text, style="dim")
      elif console.is_terminal and console.color_system:
        shown.append(text, style="bold green")
      else:
        shown.append(f"{OPEN}{text}{CLOSE}")
    console.print(shown, soft_wrap=True)


def stretches(
  ids: list[int], learned: list[bool], tokenizer: Any
) -> list[tuple[str, bool]]:
  """The texts of neighbouring tokens that are learned, or aren't, in turn."""
  parts: list[tuple[str, bool]] = []
  before = ""
  for i, is_learned in enumerate(learned):
    if i + 1 < len(learned) and learned[i + 1] == is_learned:
      continue
    # of all up to here, for a word's text depends on whether it is the first
    text = tokenizer.decode(ids[: i + 1], clean_up_tokenization_spaces=False)
    parts.append((text[len(before) :], is_learned))
    before = text
  return parts
