"""Multiple choice by log-likelihood: the choice that a decoder finds likeliest.

Nothing is generated: each choice is put behind its question, and the log
probabilities of its tokens are added. Two forms of questions are read:

  COPA   premise, choice1, choice2, question (cause | effect), label
  ARC    question {stem, choices [{text, label}]}, answerKey, as in its files,
         or question, choices {text, label}, answerKey, as on the hub

They become texts as in EleutherAI's lm-evaluation-harness: COPA's premise goes
on with "because" or "therefore" and the choice, ARC's are "Question: …" and
"Answer: …". A tuned model is asked in the same way, whatever it was tuned on,
so that the numbers say whether something was forgotten.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float32, Float64, Int

from vera_jax.adapters.apply import Adapted
from vera_jax.data.answers import learned_tokens
from vera_jax.data.chat import Rendered
from vera_jax.data.completions import begin_of_text
from vera_jax.data.hub_data import download, hub_table
from vera_jax.data.tables import SUFFIXES, read_table, some
from vera_jax.data.tokenizer import load_tokenizer
from vera_jax.errors import UserError
from vera_jax.models.kinds import WORDS
from vera_jax.operations.cross_entropy import score_words
from vera_jax.places import local_copy
from vera_jax.pretrained.classifier import Classifier

COPA = ("premise", "choice1", "choice2", "question", "label")
ARC = ("question", "answerKey")
CONNECTIVES = {"cause": "because", "effect": "therefore"}
SPLIT = "validation"  # of a data set on the hub; its tests may lack answers
TOKENS = 2048  # about as many in a batch
STEP = 64  # lengths are padded to multiples of it: few shapes are compiled


class ChoiceQuestion(NamedTuple):
  """A question as texts.

  Attributes:
    prompt: what stands before a choice.
    choices: each as it follows the prompt, with a space in front.
    right: the number of the right one.
  """

  prompt: str
  choices: tuple[str, ...]
  right: int


class Accuracy(NamedTuple):
  """Shares of questions that are answered right.

  Attributes:
    plain: by the log probability of the whole choice.
    normalised: by that over the choice's characters, without the space in
      front, so that a long choice has no disadvantage.
  """

  plain: float
  normalised: float


def read_choices(sources: Sequence[str]) -> dict[str, list[ChoiceQuestion]]:
  """Questions from files and data sets on the hub, by a name for tables.

  Args:
    sources: each a file; or HUB_ID, HUB_ID:PART or HUB_ID:PART:SPLIT, as in
      aps/super_glue:copa and allenai/ai2_arc:ARC-Easy:test.

  Raises:
    UserError: one can't be read, has no questions, or other columns or labels
      (the message names file and line); or two would have one name.
  """
  by_name: dict[str, list[ChoiceQuestion]] = {}
  for source in sources:
    name, questions = _read(source)
    if name in by_name:
      earlier = sources[[*by_name].index(name)]
      raise UserError(
        f"The choices of {earlier} and {source} would both be called {name!r}"
        " among the scores: give a file another name, or ask them one after the"
        " other (vera-jax answer --choices)."
      )
    by_name[name] = questions
  return by_name


def _read(source: str) -> tuple[str, list[ChoiceQuestion]]:
  """(the file's name, or the hub's of the part; its questions)."""
  path = local_copy(source)
  if path.is_file():
    table, name = read_table(path), path.stem
  elif path.suffix.lower() in SUFFIXES:
    raise UserError(f"There is no file of choices {path}.")
  else:
    hub_id, _, rest = source.partition(":")
    part, _, split = rest.partition(":")
    split, splits = split or SPLIT, download(hub_id, part or None)
    if split not in splits:
      raise UserError(
        f"{source} has no split {split!r}; it has {', '.join(splits)}."
      )
    table = hub_table(source, split, splits[split])
    name = part or hub_id.rpartition("/")[2]
  readers = {COPA: _copa, ARC: _arc}
  fitting = [
    read for columns, read in readers.items() if {*columns} <= {*table.columns}
  ]
  if not fitting:
    raise UserError(
      f"{table.name}: the columns {some(table.columns)} are neither COPA's"
      f" ({', '.join(COPA)}) nor ARC's ({', '.join(ARC)})."
    )
  if not table.numbers:
    raise UserError(f"{table.name} has no questions.")
  questions = []
  for number in range(len(table.numbers)):
    row = {name: values[number] for name, values in table.columns.items()}
    try:
      questions.append(fitting[0](row))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise UserError(
        f"{table.place(number)}: this is no question with its choices and the"
        f" right one: {error}."
      ) from error
  return name, questions


def _copa(row: dict[str, Any]) -> ChoiceQuestion:
  asked, label = row["question"], row["label"]
  if asked not in CONNECTIVES:
    raise ValueError(f"question is {asked!r}, neither cause nor effect")
  if label not in (0, 1):
    raise ValueError(f"label is {label!r}, neither 0 nor 1")
  premise = row["premise"].strip().removesuffix(".")
  choices = [row[name].strip() for name in ("choice1", "choice2")]
  return _question(
    f"{premise} {CONNECTIVES[asked]}",
    [text[:1].lower() + text[1:] for text in choices],
    int(label),
  )


def _arc(row: dict[str, Any]) -> ChoiceQuestion:
  question, choices = row["question"], row.get("choices")
  if isinstance(question, dict):
    question, choices = question["stem"], question["choices"]
  if isinstance(choices, dict):
    texts, labels = choices["text"], choices["label"]
  else:
    if not isinstance(choices, list):
      raise ValueError("it has no choices")
    texts, labels = ([x[name] for x in choices] for name in ("text", "label"))
  if len(texts) != len(labels):
    raise ValueError(f"it has {len(texts)} choices, but {len(labels)} labels")
  if len({*labels}) < len(labels):
    raise ValueError(f"two choices have one label: {labels}")
  if row["answerKey"] not in labels:
    raise ValueError(f"answerKey is {row['answerKey']!r}, no choice's label")
  return _question(
    f"Question: {question.strip()}\nAnswer:",
    [text.strip() for text in texts],
    list(labels).index(row["answerKey"]),
  )


def _question(
  prompt: str, choices: Sequence[str], right: int
) -> ChoiceQuestion:
  if len(choices) < 2 or not all(choices):
    raise ValueError("two choices are needed at least, and none may be empty")
  return ChoiceQuestion(prompt, tuple(f" {text}" for text in choices), right)


def answer_questions(
  model: Classifier,
  questions: Sequence[ChoiceQuestion],
  *,
  progress: Callable[[int], None] | None = None,
) -> Accuracy:
  """How many questions a decoder answers right.

  Args:
    model: with an adapter on it, or without.
    questions: those to answer.
    progress: called with the number of choices scored so far.

  Raises:
    UserError: there are no questions, the model writes no texts, has no room
      for one, or gives a choice no finite likelihood.
  """
  if not questions:
    raise UserError("There are no questions to answer.")
  texts = [
    Rendered(q.prompt + choice, [(len(q.prompt), len(q.prompt + choice))])
    for q in questions
    for choice in q.choices
  ]
  ends = np.cumsum([len(question.choices) for question in questions])
  values = log_likelihoods(model, texts, progress=progress)
  plain = normalised = 0
  for question, scores in zip(
    questions, np.split(values, ends[:-1]), strict=True
  ):
    if not np.isfinite(scores).all():
      raise UserError(
        f"The log-likelihoods of the choices behind {question.prompt!r}"
        f" are {scores.tolist()}, not finite numbers, so that none is the"
        " likeliest. Was the loss of the model's training finite to the end? In"
        " bfloat16 its numbers may overflow: load it in float32."
      )
    lengths = np.array([len(text) - 1 for text in question.choices])
    plain += int(scores.argmax()) == question.right
    by_length = scores / np.maximum(lengths, 1)
    normalised += int(by_length.argmax()) == question.right
  return Accuracy(plain / len(questions), normalised / len(questions))


def log_likelihoods(
  model: Classifier,
  texts: Sequence[Rendered],
  *,
  progress: Callable[[int], None] | None = None,
) -> Float64[np.ndarray, " texts"]:
  """The summed log probabilities, in nats, of the tokens of each text's spans.

  Raises:
    UserError: the model writes no texts, or has no room for one of them.
  """
  if model.kind != WORDS:
    raise UserError(f"The model in {model.folder} writes no texts.")
  tokenizer = load_tokenizer(model.folder)
  begin = begin_of_text(tokenizer)
  encoded = tokenizer(
    [text.text for text in texts],
    add_special_tokens=False,
    return_offsets_mapping=True,
  )
  ids = [[*begin, *tokens] for tokens in encoded["input_ids"]]
  marks = [
    [*map(bool, begin), *learned_tokens(text, tokens, spans)]
    for text, tokens, spans in zip(
      texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
    )
  ]
  longest = max(map(len, ids))
  if longest > model.room:
    raise UserError(
      f"A question with a choice has {longest} tokens, but the model has room"
      f" for {model.room}."
    )
  values = np.zeros(len(texts))
  order = sorted(range(len(texts)), key=lambda i: len(ids[i]))
  module: Any = model.module  # for rows of one text each, however long
  if isinstance(module, Adapted):
    module = module.clone(model=module.model.clone(longest=None))
  else:
    module = module.clone(longest=None)
  done = 0
  while done < len(order):
    length = len(ids[order[done]])
    width = min(-(-length // STEP) * STEP, model.room)
    most = max(1, TOKENS // width)
    batch = [i for i in order[done : done + most] if len(ids[i]) <= width]
    tokens = np.zeros((most, width), np.int32)
    learned = np.zeros((most, width), bool)
    for row, i in enumerate(batch):
      tokens[row, : len(ids[i])] = ids[i]
      learned[row, : len(ids[i])] = marks[i]
      learned[row, 0] = False  # nothing comes before it
    lengths = np.zeros(most, np.int32)
    lengths[: len(batch)] = [len(ids[i]) for i in batch]
    sums = _sums(module, model.variables, tokens, lengths, learned)
    values[batch] = np.asarray(sums, np.float64)[: len(batch)]
    done += len(batch)
    if progress is not None:
      progress(done)
  return values


@partial(jax.jit, static_argnames="module")
def _sums(
  module: Any,
  variables: Any,
  ids: Int[Array, "rows length"],
  lengths: Int[Array, " rows"],
  learned: Bool[Array, "rows length"],
) -> Float32[Array, " rows"]:
  real = jnp.arange(ids.shape[1])[None] < lengths[:, None]
  words: Any = module.apply(variables, ids, segment_ids=real.astype(jnp.int32))
  labels = jnp.roll(ids, -1, axis=1)
  losses, _ = score_words(words.hidden, words.kernel, labels)
  return -jnp.sum(jnp.where(jnp.roll(learned, -1, axis=1), losses, 0), axis=1)
