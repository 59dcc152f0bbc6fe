"""Tune a decoder on instructions and their answers.

  python -m experiments.instruct --config=configs/instruct.py:llama2_7b
  python -m experiments.instruct --config=configs/instruct.py:smollm2
    --config.data.source=FILE.json --preview    (in one line)
  python -m experiments.instruct --config=configs/instruct.py:smollm2
    --config.data.source=FILE.json --config.method=lora --seeds=0,1,2

Rows have the columns instruction, input and output (Alpaca's), messages (chats)
or prompt and completion, in a .json, .jsonl or .parquet file or on the hub.
--preview=N shows the first N of them as they are trained on, with the trained
tokens in green, or between ⟦ and ⟧ where no terminal is, and trains nothing.
Some settings:

  --config.data.template=chat       the tokenizer's chat template; or alpaca, or
                                    plain, for models that have none
  --config.data.dev=FILE            rows to score; unset: N of the source's own
  --config.data.dev_examples=N
  --config.data.max_train_examples=N
  --config.data.max_test_examples=N   rows that are answered at the end
  --config.data.choices="('copa.jsonl','arc.jsonl')"    asked at the end
  --config.method=METHOD            vera, lora, dvora, ...

After each epoch the loss of the held-out answers is computed; after the last
one some of them are written and compared by ROUGE-L. WORKDIR/test has them. The
same command again continues an unfinished run and shows the result of a
finished one. docs/instruct.md tells it from the beginning.
"""

from typing import Any

from absl import flags

from experiments import cli, glue
from vera_jax.errors import UserError
from vera_jax.terminal import printable

flags.adopt_module_key_flags(glue)  # --help shows them here as well
PREVIEW = cli.define_optional_integer(
  "preview", 3, "Show so many training examples, and train nothing."
)


def main() -> None:
  if PREVIEW.value is None:
    glue.main()
    return
  if PREVIEW.value < 1:
    raise UserError(f"--preview={PREVIEW.value}; give 1 or more.")
  config = cli.chosen(glue.CONFIG)
  # Imported only now: a mistake in the flags is reported without the wait.
  from vera_jax.data.preview import preview
  from vera_jax.data.tokenizer import load_tokenizer
  from vera_jax.models.folder import resolve
  from vera_jax.tasks.task import task_for
  from vera_jax.train.config import check_settings

  check_settings(config)
  task: Any = task_for(config)
  folder = resolve(config.model.name)
  data = task.load(config, folder)
  for line in (*task.presentation.notes, *data.introduction()):
    print(printable(line))
  tokens = data.tokens["train"]
  preview(tokens, load_tokenizer(folder), number=PREVIEW.value)


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
