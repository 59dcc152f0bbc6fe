"""The five metrics of the E2E NLG challenge, as its own scorer computes them.

BLEU and NIST read the words of mteval-v13a in lower case; METEOR, ROUGE-L and
CIDEr those of Stanford's PTB tokenizer without punctuation, as COCO's captions
are scored. That tokenizer and METEOR are Java programs, which come in the
package pycocoevalcap: without Java these three metrics are not available.

NIST divides by the length of the references, for which the challenge has two
rules (github.com/tuetschek/e2e-metrics):

  NIST       the sum over inputs of their references' mean length: its option
             -p, which microsoft/LoRA uses
  NIST_perl  the mean length of all references times the number of inputs: its
             Perl script, by which the challenge's systems were published
"""

import importlib.util
import math
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from vera_jax.errors import UserError, install

METRICS = ("BLEU", "NIST", "NIST_perl", "METEOR", "ROUGE_L", "CIDEr")
OF_JAVA = ("METEOR", "ROUGE_L", "CIDEr")
LONGEST = 5  # n-grams of NIST
BETA = math.log(2) / math.log(1.5) ** 2  # two thirds of the length cost a half
PUNCTUATION = frozenset(
  "'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split()
)
# In a locale with decimal commas METEOR can't read its own numbers.
JAVA = ("java", "-Duser.language=en", "-Duser.country=US")
UTF8 = "-Dfile.encoding=UTF-8"


class Scores(NamedTuple):
  """The scores of all outputs together.

  Attributes:
    values: the scores by a name in `METRICS`; better texts have higher ones.
    missing: why others are not available, in a sentence; "" if none is missing.
  """

  values: dict[str, float]
  missing: str = ""


def score_texts(
  outputs: Sequence[str], references: Sequence[Sequence[str]]
) -> Scores:
  """All metrics that can be computed here.

  Args:
    outputs: a text for each input.
    references: the texts that people wrote for each of these inputs.

  Raises:
    UserError: their numbers differ, there is none, an input has no reference,
      sacrebleu is not installed, or a Java program failed.
  """
  check_groups(outputs, references)
  check_installed()
  from sacrebleu.metrics.bleu import BLEU
  from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

  tokenise = Tokenizer13a()
  bleu = BLEU(lowercase=True, tokenize="13a", smooth_method="none")
  most = max(map(len, references))
  # a stream for each reference; where an input has fewer, None
  streams: Any = [
    [group[i] if i < len(group) else None for group in references]
    for i in range(most)
  ]
  values = {"BLEU": bleu.corpus_score(list(outputs), streams).score / 100}
  values |= nist(
    [tokenise(text.lower()).split() for text in outputs],
    [[tokenise(text.lower()).split() for text in x] for x in references],
  )
  missing = without_java()
  if not missing:
    values |= _caption_scores(outputs, references)
  return Scores(values, missing)


def check_groups(
  outputs: Sequence[str], references: Sequence[Sequence[str]]
) -> None:
  """Raises a UserError for texts that can't be compared."""
  if not outputs or not references:
    raise UserError("There is no text to score.")
  if len(outputs) != len(references):
    raise UserError(
      f"There are {len(outputs)} outputs, but references for"
      f" {len(references)} inputs: one output for each input is needed."
    )
  empty = [i for i, group in enumerate(references, 1) if not any(group)]
  if empty:
    raise UserError(f"Input {empty[0]} has no reference.")


def nist(
  outputs: Sequence[Sequence[str]],
  references: Sequence[Sequence[Sequence[str]]],
) -> dict[str, float]:
  """NIST by both rules, from words.

  An n-gram that output and references share is worth its information, log2 of
  how often its first n - 1 words come in the references over how often all of
  it does. The score is the sum over n of the mean worth of an output's n-grams,
  times a penalty for outputs that are shorter than the references (Doddington
  2002, "Automatic evaluation of machine translation quality using n-gram
  co-occurrence statistics").
  """
  all_grams: Counter[tuple[str, ...]] = Counter()
  shared: Counter[tuple[str, ...]] = Counter()
  for output, group in zip(outputs, references, strict=True):
    most: Counter[tuple[str, ...]] = Counter()  # in any one reference
    for reference in group:
      grams = _grams(reference)
      all_grams.update(grams)
      most |= grams
    shared.update(_grams(output) & most)
  tokens = sum(map(len, chain.from_iterable(references)))
  all_grams[()] = tokens
  worth = 0.0
  for n in range(1, LONGEST + 1):
    written = sum(max(0, len(output) - n + 1) for output in outputs)
    gains = (
      count * math.log2(all_grams[gram[:-1]] / all_grams[gram])
      for gram, count in shared.items()
      if len(gram) == n
    )
    worth += sum(gains) / max(1, written)
  length = sum(map(len, outputs))
  texts = sum(map(len, references))
  expected = {
    "NIST": sum(sum(map(len, group)) / len(group) for group in references),
    "NIST_perl": tokens * len(references) / texts,
  }
  scores = {}
  for name, other in expected.items():
    ratio = min(1.0, length / other)
    penalty = math.exp(-BETA * math.log(ratio) ** 2) if ratio else 0.0
    scores[name] = penalty * worth
  return scores


def _grams(words: Sequence[str]) -> Counter[tuple[str, ...]]:
  """How often each n-gram comes, of all sizes up to `LONGEST`."""
  return Counter(
    tuple(words[i : i + n])
    for n in range(1, LONGEST + 1)
    for i in range(len(words) - n + 1)
  )


def check_installed() -> None:
  """Raises a UserError where not even BLEU and NIST can be computed."""
  if importlib.util.find_spec("sacrebleu") is None:
    raise UserError(f"BLEU and NIST need sacrebleu: {install('e2e')}")


def without_java() -> str:
  """Why the metrics of `OF_JAVA` are not available here; "" if they are."""
  names = ", ".join(OF_JAVA)
  if not shutil.which("java"):
    return (
      f"{names} are not available: they need Java 8 or newer on the PATH (on"
      " Debian and Ubuntu: apt install default-jre-headless)."
    )
  if importlib.util.find_spec("pycocoevalcap") is None:
    return (
      f"{names} are not available: they need pycocoevalcap. {install('e2e')}"
    )
  return ""


def _caption_scores(
  outputs: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
  """METEOR, ROUGE-L and CIDEr."""
  from pycocoevalcap.cider.cider import Cider
  from pycocoevalcap.rouge.rouge import Rouge

  lines = _ptb_lines([*outputs, *chain.from_iterable(references)])
  rest = iter(lines[len(outputs) :])
  written = {i: [line] for i, line in enumerate(lines[: len(outputs)])}
  expected = {i: [next(rest) for _ in x] for i, x in enumerate(references)}
  return {
    "METEOR": _meteor(
      list(zip(written.values(), expected.values(), strict=True))
    ),
    "ROUGE_L": float(Rouge().compute_score(expected, written)[0]),
    "CIDEr": float(Cider().compute_score(expected, written)[0]),
  }


def _file_of_captions(*parts: str) -> Path:
  spec = importlib.util.find_spec("pycocoevalcap")
  assert spec is not None and spec.submodule_search_locations
  return Path(spec.submodule_search_locations[0], *parts)


def _ptb_lines(texts: Sequence[str]) -> list[str]:
  """Each text's words in lower case, by Stanford's tokenizer, without
  punctuation."""
  jar = _file_of_captions("tokenizer", "stanford-corenlp-3.4.1.jar")
  tokenizer = "edu.stanford.nlp.process.PTBTokenizer"
  lines = [" ".join(text.split()) for text in texts]
  done = subprocess.run(
    [*JAVA, UTF8, "-cp", jar, tokenizer, "-preserveLines", "-lowerCase"],
    input="".join(f"{line}\n" for line in lines),
    capture_output=True,
    encoding="utf-8",
  )
  words = done.stdout.split("\n")[:-1]
  if done.returncode or len(words) != len(texts):
    raise UserError(f"The PTB tokenizer failed: {done.stderr.strip()[-500:]}")
  return [
    " ".join(word for word in line.split() if word not in PUNCTUATION)
    for line in words
  ]


def _meteor(pairs: Sequence[tuple[list[str], list[str]]]) -> float:
  """METEOR 1.5 of all ([output], references) together."""
  jar = _file_of_captions("meteor", "meteor-1.5.jar")
  options = ("-", "-", "-stdio", "-l", "en", "-norm")
  command = [*JAVA, UTF8, "-Xmx2G", "-jar", str(jar), *options]
  pipe = subprocess.PIPE
  with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
    try:
      with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=errors, encoding="utf-8"
      ) as process:
        assert process.stdin and process.stdout
        asked, answers = process.stdin, process.stdout

        def ask(*parts: str) -> str:
          print(*parts, sep=" ||| ", file=asked, flush=True)
          return answers.readline().strip()

        statistics = [ask("SCORE", *group, output) for [output], group in pairs]
        # it answers with each one's score, then that of all
        ask("EVAL", *statistics)
        for _ in statistics[1:]:
          answers.readline()
        return float(answers.readline())
    except (OSError, ValueError) as error:
      errors.seek(0)
      reason = errors.read().strip()[-500:] or error
      raise UserError(f"METEOR's Java program failed: {reason}") from error
