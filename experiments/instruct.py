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

from absl import flags

from experiments import cli, train

flags.adopt_module_key_flags(train)  # --help shows them here as well

if __name__ == "__main__":
  cli.run(train.main, usage=__doc__)
