"""Fine-tune on your own labelled texts: a CSV, TSV, JSONL or Parquet file.

  python -m experiments.classify --config=configs/text.py
    --config.data.train=reviews.csv                      (in one line)
  python -m experiments.classify --config=configs/text.py
    --config.data.train=a.csv --config.data.dev=b.csv
    --config.data.text="('premise','hypothesis')" --config.data.label=label
  python -m experiments.classify --config=configs/text.py
    --config.data.source=owner/name --seeds=0,1,2

Labels are words or numbers (classes), numbers with a fraction (regression), a
list of labels (several may apply), or a tag for each word (entities). Columns
and kind of problem are found where there is one possibility, and the first
lines say what was decided:

  --config.data.text=COLUMN     or two: "('first','second')"
  --config.data.label=COLUMN
  --config.data.kind=KIND       classification, regression, multi_label or
                                token_classification
  --config.data.dev=FILE        unset: a tenth of the training rows, by seed
  --config.method=METHOD        vera, lora, ...
  --config.model.name=MODEL     a hub id, or a folder

The same command again continues an unfinished run and shows the result of a
finished one. RUN/adapter then answers more texts: experiments.predict.
docs/own_data.md tells it from the beginning.
"""

from absl import flags

from experiments import cli, train

flags.adopt_module_key_flags(train)  # --help shows them here as well

if __name__ == "__main__":
  cli.run(train.main, usage=__doc__)
