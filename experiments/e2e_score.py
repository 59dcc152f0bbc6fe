"""Score texts by the five metrics of the E2E NLG challenge.

  python -m experiments.e2e_score --references=FILE --outputs=FILE

Prints a table, and as JSON on the last line BLEU, NIST by its two official
rules (NIST: the scorer's -p, as microsoft/LoRA reports it; NIST_perl: as the
challenge published it), METEOR, ROUGE_L and CIDEr.

The outputs are a text per line, the references lines with an empty line between
inputs. Either may be a .csv or .tsv file of two columns, with inputs in the
first one. BLEU and NIST need sacrebleu, the other three pycocoevalcap and Java:

  pip install 'vera_jax[e2e]'
"""

import json

from absl import flags
from rich.table import Column, Table

from experiments import cli
from vera_jax.errors import UserError
from vera_jax.tasks.e2e_files import read_for_scoring
from vera_jax.tasks.e2e_metrics import METRICS, score_texts
from vera_jax.terminal import Console

REFERENCES = flags.DEFINE_string("references", None, "A file of references.")
OUTPUTS = flags.DEFINE_string("outputs", None, "A file of outputs.")


def main() -> None:
  if not REFERENCES.value or not OUTPUTS.value:
    raise UserError("Name both files: --references=FILE --outputs=FILE")
  outputs, references = read_for_scoring(OUTPUTS.value, REFERENCES.value)
  scores = score_texts(outputs, references)
  table = Table("metric", Column("score", justify="right"))
  for name in METRICS:
    value = scores.values.get(name)
    shown = "not available" if value is None else f"{value:.4f}"
    table.add_row(name, shown)
  Console().print(table)
  if scores.missing:
    cli.complain(scores.missing)
  print(json.dumps({name: scores.values.get(name) for name in METRICS}))


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
