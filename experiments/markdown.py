"""Tables as the pages of docs/ and results/ have them."""

from collections.abc import Iterable, Sequence


def markdown_table(
  header: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1
) -> str:
  """A table in Markdown; columns after the first `texts` hold numbers."""
  rule = ["---"] * texts + ["---:"] * (len(header) - texts)
  return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))
