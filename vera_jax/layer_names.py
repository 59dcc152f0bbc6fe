"""How the layers of a stack are named in files: one name per layer."""

import re


def layer_name(path: tuple[str, ...], *, layer: int | None = None) -> str:
  """The dotted name of the module at a path of a parameter tree.

  ("encoder", "layer", "attention", "self", "query") with layer=3, or
  ("encoder", "layer_3", ...), is "encoder.layer.3.attention.self.query".
  """
  words = []
  for word in path:
    if word == "layer":
      if layer is None:
        raise ValueError(f"{'/'.join(path)} is stacked: which layer?")
      words += ["layer", str(layer)]
    elif re.fullmatch(r"layer_\d+", word):
      words += ["layer", word.removeprefix("layer_")]
    else:
      words.append(word)
  return ".".join(words)
