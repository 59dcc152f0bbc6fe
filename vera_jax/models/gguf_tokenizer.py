"""A GGUF file's tokenizer as Hugging Face's files, and back.

The header has the tokens in the order of their ids, each with a type, and for
byte-level BPE ("gpt2") the merges and the name of the rule that cuts a text
into words before merging. SentencePiece vocabularies ("llama") have a score for
each token instead: of all neighbours that a token joins, the one with the
highest score is joined first.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vera_jax.errors import UserError
from vera_jax.files import JSON, read_bytes, read_json
from vera_jax.models.gguf_keys import TOKENIZER, warn
from vera_jax.models.tokenizer_files import check_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BYTE_LEVEL, SENTENCE_PIECE = "gpt2", "llama"
SPACE = "▁"  # how SentencePiece writes a space
# A word as Llama 3 cuts it: an ending of a contraction; letters, with one
# leading sign; up to three digits; other signs and line ends; spaces.
SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What llama.cpp cuts out one after the other: signs; GPT-2's words; numbers;
# threes of digits.
SIGNS = (
  r"[\p{P}$+<=>^~|]+",
  r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
  r"\p{N}+",
  r"[0-9][0-9][0-9]",
)
# Rules by name: "words" is GPT-2's expression, "digits" cuts digits out first,
# "signs" is llama.cpp's own rule, for files that name none; others are
# expressions. The first of a rule's names is the one we write.
RULES = {
  "words": ("gpt-2", "mpt", "olmo", "jais"),
  "digits": ("smollm", "starcoder", "refact", "command-r", "codeshell"),
  "signs": ("default",),
  SPLIT % "{1,3}": ("llama-bpe", "llama3", "llama-v3"),
  SPLIT % "": ("qwen2", "deepseek-r1-qwen", "megrez"),
}
ADDS_START = "llama-bpe"  # whose texts start with BOS unless the file says no
SPECIAL = {
  "bos_token": "tokenizer.ggml.bos_token_id",
  "eos_token": "tokenizer.ggml.eos_token_id",
  "unk_token": "tokenizer.ggml.unknown_token_id",
  "pad_token": "tokenizer.ggml.padding_token_id",
}
# What llama.cpp takes where a header with scores doesn't say.
STANDARD = {"unk_token": 0, "bos_token": 1, "eos_token": 2}
LONGEST = 4096  # letters of a token: those of real files have at most hundreds
WHOLE = 2**20  # letters of all special tokens, which are looked for together
MERGED = 2**25  # letters of all merges: those of real files have some millions
PROBES = (  # texts whose ids are compared when a tokenizer is written
  "Hello, world! It's 12,345.60 in May - don't you THINK so?",
  "def f(x):\n    return [x**2, -1e-5]\t# café ½ 你好 😀\r\n",
)
# The ends of a turn and of a message, where others end these than texts.
MORE_ENDS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
PADDING = "[PAD{}]"  # llama.cpp's name of an id that has no token
TEMPLATE = "tokenizer.chat_template"


def special_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
  """The ids of a header's special tokens, as far as it has them."""
  scored = str(metadata.get("tokenizer.ggml.model")) == SENTENCE_PIECE
  standard = STANDARD if scored else {}
  ids = {
    name: metadata.get(key, standard.get(name)) for name, key in SPECIAL.items()
  }
  return {name: i for name, i in ids.items() if i is not None}


def check_keys(metadata: Mapping[str, Any], *, source: Any) -> None:
  """Warns of what a header leaves open about the ids of a text.

  Raises:
    UserError: a key has a value at which it isn't known here.
  """
  TOKENIZER.check(metadata, prefix="tokenizer.ggml.", source=source)
  rule = metadata.get("tokenizer.ggml.pre", "default")
  if (
    str(metadata.get("tokenizer.ggml.model")) == BYTE_LEVEL
    and str(rule) == "default"
  ):
    warn(
      f"{source} doesn't say by which rule its tokenizer cuts words"
      " (tokenizer.ggml.pre), so they are cut as llama.cpp cuts them then. The"
      " model has probably learned with another rule: convert it again with a"
      " present llama.cpp, or take it as a folder in Hugging Face's layout."
    )


def tokenizer_files(
  metadata: Mapping[str, Any], *, source: Any
) -> dict[str, dict[str, Any]]:
  """The JSON of tokenizer.json and of tokenizer_config.json, by name.

  Args:
    metadata: of a GGUF file.
    source: names the file in errors.

  Raises:
    UserError: the tokenizer is of another kind, its words are cut by a rule
      that is not known here, or its parts don't fit together.
  """
  from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    processors,
  )

  def refuse(reason: str) -> UserError:
    return UserError(
      f"{source}: {reason}. Take the model as a folder in Hugging Face's"
      " layout, with its tokenizer.json."
    )

  def get(name: str, kinds: Any, default: Any = None) -> Any:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if value is not default and not isinstance(value, kinds):
      raise refuse(f"its tokenizer.ggml.{name} is {str(value)[:80]}")
    return value

  check_keys(metadata, source=source)
  kind, tokens = get("model", str), get("tokens", list)
  if kind not in (BYTE_LEVEL, SENTENCE_PIECE) or not tokens:
    raise refuse(f"its tokenizer is {kind!r}, which is not read here")
  types = get("token_type", np.ndarray, np.full(len(tokens), NORMAL))
  if len(set(tokens)) < len(tokens) or len(types) != len(tokens):
    raise refuse("tokens are there twice, or have no types")
  if max(map(len, tokens)) > LONGEST:
    raise refuse(f"one of its tokens has more than {LONGEST} letters")
  vocabulary = {
    token: i
    for i, (token, kind_of) in enumerate(zip(tokens, types, strict=True))
    if kind_of != UNUSED or token != PADDING.format(i)  # not a real token
  }
  ids = special_ids(metadata)
  known = (isinstance(i, int) and 0 <= i < len(tokens) for i in ids.values())
  if not all(known):
    raise refuse(f"its special ids {ids} are beyond its {len(tokens)} tokens")
  special = {name: tokens[i] for name, i in ids.items()}
  steps: list[Any] = []  # of the post-processor
  if kind == BYTE_LEVEL:
    rule = _rule(get("pre", str, "default"))
    if rule is None:
      raise refuse(
        f"it cuts words by the rule {get('pre', str)!r}, not known here"
      )
    if get("merges", list) is None:
      raise refuse("its tokenizer has no merges")
    if get("add_space_prefix", bool, False):
      raise refuse("its texts begin with a space, which llama.cpp leaves out")
    starts = ADDS_START in RULES[rule]
    merges = [tuple(merge.split(" ", 1)) for merge in get("merges", list)]
    # Llama 3's file takes a word that is a token as it is, unmerged
    options: dict[str, Any] = {"ignore_merges": starts}
    parts: dict[str, Any] = {
      "pre_tokenizer": _cut(rule),
      "decoder": decoders.ByteLevel(),
    }
    steps.append(processors.ByteLevel(trim_offsets=False))
  else:
    scores, starts = get("scores", np.ndarray), True
    if scores is None or len(scores) != len(tokens):
      raise refuse("its tokens have no scores")
    try:
      merges = merges_of(tokens, scores, types)
    except UserError as error:
      raise refuse(str(error).rstrip(".")) from error
    unknown = special.get("unk_token", tokens[0])
    options = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True}
    spaces: list[Any] = [normalizers.Replace(" ", SPACE)]
    texts: list[Any] = [
      decoders.Replace(SPACE, " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
    ]
    if get("add_space_prefix", bool, True):
      spaces.insert(0, normalizers.Prepend(SPACE))
      texts.append(decoders.Strip(" ", 1, 0))
    parts = {
      "normalizer": normalizers.Sequence(spaces),
      "decoder": decoders.Sequence(texts),
    }
  try:
    made = Tokenizer(models.BPE(vocabulary, merges, **options))
  except Exception as error:  # `tokenizers` raises Exception itself
    raise refuse(f"its tokens and merges don't fit together ({error})") from (
      error
    )
  for name, part in parts.items():
    setattr(made, name, part)
  kinds = (UNKNOWN, CONTROL, USER_DEFINED)
  special_tokens = [(tokens[i], t) for i, t in enumerate(types) if t in kinds]
  if sum(len(token) for token, _ in special_tokens) > WHOLE:
    raise refuse(f"its special tokens have more than {WHOLE:,} letters")
  made.add_tokens(
    [
      AddedToken(token, special=bool(t != USER_DEFINED), normalized=False)
      for token, t in special_tokens
    ]
  )
  bos, eos = (special.get(f"{name}_token") for name in ("bos", "eos"))
  first = [bos] if get("add_bos_token", bool, starts) else []
  last = [eos] if get("add_eos_token", bool, False) else []
  if None in (*first, *last):
    raise refuse("its texts begin or end with a token that it doesn't name")
  if first or last:
    single = [*first, "$A", *last]
    pair = [*single, *(f"{part}:1" for part in (*first, "$B", *last))]
    around = [(token, tokens.index(token)) for token in {*first, *last}]
    steps.append(
      processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=around
      )
    )
  if steps:
    made.post_processor = processors.Sequence(steps)
  # a batch needs a padding token, and no one reads what is in its place
  special.setdefault("pad_token", special.get("eos_token", tokens[0]))
  config = {
    # not the architecture's own class, which would cut words by its own rule
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    **special,
  }
  if isinstance(metadata.get(TEMPLATE), str):
    config["chat_template"] = metadata[TEMPLATE]
  return {
    "tokenizer.json": json.loads(made.to_str()),
    "tokenizer_config.json": config,
  }


def tokenizer_metadata(folder: Path, *, rows: int) -> dict[str, Any]:
  """What a GGUF header says of a folder's tokenizer.

  Args:
    folder: with config.json, tokenizer.json and often tokenizer_config.json.
    rows: of the embedding; ids without a token get a name that is never used.

  Raises:
    UserError: the tokenizer is of a kind that GGUF has no name for.
  """
  from tokenizers import Tokenizer, models

  def refuse(reason: str) -> UserError:
    return UserError(f"{folder} can't be written as GGUF: {reason}.")

  file = folder / "tokenizer.json"
  if not file.is_file():
    raise refuse("it has no tokenizer.json")
  check_tokenizer(folder)
  try:
    loaded = Tokenizer.from_file(str(file))
    loaded.no_padding()
    loaded.no_truncation()
    made = read_json(file)
    model, added = made["model"], made["added_tokens"]
    vocabulary = dict(model["vocab"])
    merges: list[Any] = [
      tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair)
      for pair in model["merges"]
    ]
  except Exception as error:  # `tokenizers` raises Exception itself
    raise refuse(f"its tokenizer can't be read as BPE ({error})") from error
  vocabulary |= {token["content"]: token["id"] for token in added}
  if max(vocabulary.values()) >= rows:
    raise refuse(f"its tokenizer has ids beyond the embedding's {rows} rows")
  tokens = [PADDING.format(i) for i in range(rows)]
  types = np.full(rows, UNUSED, np.int32)
  for token, i in vocabulary.items():
    tokens[i], types[i] = token, NORMAL
  for token in added:
    types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
  about: dict[str, Any] = {}
  steps = _steps(made["normalizer"])
  for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
    if model.get(option):
      raise refuse(f"its tokenizer has a {option}")
  for token in added:
    flags = [f for f in ("lstrip", "rstrip", "single_word") if token.get(f)]
    # its text would be changed as well, and be found in changed texts only
    if token.get("normalized") and steps and model.get("byte_fallback"):
      flags.append("normalized")
    if flags:
      raise refuse(f"its token {token['content']!r} is {' and '.join(flags)}")
  if model.get("byte_fallback"):
    fallback = {f"<0x{byte:02X}>" for byte in range(256)}
    for i, token in enumerate(tokens):
      types[i] = BYTE if token in fallback else types[i]
    if unknown := model.get("unk_token"):
      types[vocabulary[unknown]] = UNKNOWN
    scores = np.zeros(rows, np.float32)
    for rank, (left, right) in reversed(list(enumerate(merges))):
      scores[vocabulary[left + right]] = -rank
    if merges_of(tokens, scores, types) != merges:
      raise refuse(
        "GGUF gives each token of such a vocabulary one score, from which its"
        " merges don't follow in their order"
      )
    prepend = {"type": "Prepend", "prepend": SPACE}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    cuts = _steps(made["pre_tokenizer"])
    meta = cuts[0] if len(cuts) == 1 and not steps else {}
    if meta.get("type") == "Metaspace" and not meta.get("split", True):
      prefix = meta.get("prepend_scheme", "always") != "never"
      if prefix:
        warn(
          f"{folder}: GGUF has no word for how its tokenizer puts a space in"
          " front of a text. llama.cpp has other ids where a text begins with a"
          " space, or goes on behind a special token."
        )
    elif cuts or steps not in ([spaces], [prepend, spaces]):
      raise refuse("GGUF has no name for how its tokenizer changes texts")
    else:
      prefix = prepend in steps
    about |= {
      "tokenizer.ggml.model": SENTENCE_PIECE,
      "tokenizer.ggml.pre": "default",
      "tokenizer.ggml.scores": scores,
      "tokenizer.ggml.add_space_prefix": prefix,
    }
  else:
    rules = [
      rule for rule in RULES if _same(_as_json(rule), made["pre_tokenizer"])
    ]
    if not rules:
      raise refuse("GGUF has no name, known here, for how it cuts words")
    if any(step != {"type": "NFC"} for step in steps):
      words = ", ".join(str(step.get("type")) for step in steps)
      raise refuse(f"its tokenizer changes texts first ({words})")
    if steps:
      warn(
        f"{folder}: its tokenizer composes letters and their marks (NFC), which"
        " llama.cpp doesn't do: there, texts that are not in NFC get other ids."
      )
    # llama.cpp takes this from the rule's name
    if bool(model.get("ignore_merges")) != (ADDS_START in RULES[rules[0]]):
      bare = models.BPE(dict(model["vocab"]), merges)
      if any(len(bare.tokenize(token)) > 1 for token in model["vocab"]):
        raise refuse(
          f"it has ignore_merges {model.get('ignore_merges')}, and the rule by"
          f" which it cuts words, {RULES[rules[0]][0]}, means the contrary"
        )
    about |= {
      "tokenizer.ggml.model": BYTE_LEVEL,
      "tokenizer.ggml.pre": RULES[rules[0]][0],
      "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
    }
  about |= {
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.token_type": types,
  }
  file = folder / "tokenizer_config.json"
  config = read_json(file) if file.is_file() else {}
  fields = read_json(folder / "config.json")
  for name, key in SPECIAL.items():
    token = config.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    i = vocabulary.get(token, fields.get(f"{name}_id"))
    if isinstance(i, list):
      i = i[0]
    if i is not None:
      about[key] = i
  bos, eos = (about.get(SPECIAL[f"{name}_token"]) for name in ("bos", "eos"))
  ends = fields.get("eos_token_id")
  more = [i for i in ends if i != eos] if isinstance(ends, list) else []
  if len(more) > len(MORE_ENDS):
    raise refuse(f"GGUF has no place for its ends {ends}")
  about |= dict(zip(MORE_ENDS, more, strict=False))
  for text in ("a", *model["vocab"]):  # until one has ids
    if plain := loaded.encode(text, add_special_tokens=False).ids:
      break
  around = loaded.encode(text).ids
  starts = len(around) > len(plain) and around[0] == bos
  stops = len(around) > len(plain) + starts and around[-1] == eos
  if [bos] * starts + plain + [eos] * stops != around:
    raise refuse("its texts begin or end with several tokens, or with others")
  about["tokenizer.ggml.add_bos_token"] = starts
  about["tokenizer.ggml.add_eos_token"] = stops
  template = config.get("chat_template")
  if (file := folder / "chat_template.jinja").is_file():
    template = read_bytes(file, inside=folder, limit=JSON).decode("utf-8")
  if isinstance(template, str):
    about[TEMPLATE] = template
  # what is written is read as the same tokenizer
  try:
    files = tokenizer_files(about, source=folder)
  except UserError as error:
    raise refuse(f"its tokenizer would not be read again ({error})") from error
  again = Tokenizer.from_str(json.dumps(files["tokenizer.json"]))
  for text in PROBES:
    if again.encode(text).ids != loaded.encode(text).ids:
      raise refuse(f"its tokenizer would be read as another one, by {text!r}")
  return about


def merges_of(tokens: list[str], scores: Any, types: Any) -> list[tuple]:
  """The merges that scores mean: each token's cuts in two, best token first.

  Raises:
    UserError: there are more of them than any real vocabulary has.
  """
  skip = {UNKNOWN, CONTROL, BYTE, UNUSED}
  known = {
    token: i
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
    if kind not in skip
  }
  lengths = set(map(len, known))  # of few tokens all cuts are looked at
  merges, letters = [], 0
  for token, i in known.items():
    for cut in range(1, len(token)):
      if cut in lengths and len(token) - cut in lengths:
        left, right = known.get(token[:cut]), known.get(token[cut:])
        if left is not None and right is not None:
          merges.append((-float(scores[i]), left, right))
          letters += len(token)
    if letters > MERGED:  # a file of 8 MB could have 8 million long ones
      raise UserError(
        f"Its tokens are made of one another in {len(merges):,} ways and more."
      )
  return [(tokens[left], tokens[right]) for _, left, right in sorted(merges)]


def _steps(part: Any) -> list[Any]:
  """The parts of a normalizer or pre-tokenizer in the order that they act."""
  if not isinstance(part, dict):
    return []
  inner = part.get("normalizers", part.get("pretokenizers"))
  if part.get("type") != "Sequence" or not isinstance(inner, list):
    return [part]
  return [step for each in inner for step in _steps(each)]


def _rule(name: str) -> str | None:
  return next((rule for rule, names in RULES.items() if name in names), None)


def _cut(rule: str) -> Any:
  """The pre-tokenizer of a rule of `RULES`."""
  from tokenizers import Regex
  from tokenizers import pre_tokenizers as cuts

  if rule == "words":
    return cuts.ByteLevel(add_prefix_space=False)
  if rule == "digits":
    return cuts.Sequence([cuts.Digits(individual_digits=True), _cut("words")])
  expressions = SIGNS if rule == "signs" else (rule,)
  splits = [cuts.Split(Regex(x), behavior="isolated") for x in expressions]
  to_bytes = cuts.ByteLevel(add_prefix_space=False, use_regex=False)
  return cuts.Sequence([*splits, to_bytes])


def _as_json(rule: str) -> Any:
  """A rule's pre-tokenizer as a tokenizer.json has it."""
  from tokenizers import Tokenizer, models

  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = _cut(rule)
  return json.loads(tokenizer.to_str())["pre_tokenizer"]


def _same(one: Any, other: Any) -> bool:
  """Whether two pre-tokenizers cut alike; how they count offsets aside."""
  if isinstance(one, dict) and isinstance(other, dict):
    names = (one.keys() | other.keys()) - {"trim_offsets"}
    standard = {"use_regex": True, "invert": False}
    return all(
      _same(one.get(n, standard.get(n)), other.get(n, standard.get(n)))
      for n in names
    )
  if isinstance(one, list) and isinstance(other, list):
    same = (_same(*pair) for pair in zip(one, other, strict=False))
    return len(one) == len(other) and all(same)
  return bool(one == other)
