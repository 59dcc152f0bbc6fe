"""Fine-tune a decoder on your own texts, or on completions of prompts.

  python -m experiments.language --config=configs/language.py
    --config.data.train=FILE.txt --config.model.name=FOLDER   (in one line)
  python -m experiments.language --config=configs/language.py
    --config.data.train=a.jsonl --config.data.dev=b.jsonl --seeds=0,1,2

A .txt file has a text per line. A .jsonl, .csv, .tsv or .parquet file has a
column "text", or "prompt" and "completion", of which the completion is learned:

  --config.data.text=COLUMN       or two: "('prompt','completion')"
  --config.data.dev=FILE          unset: a tenth of the training rows, by seed
  --config.data.max_length=N      tokens; longer texts are cut
  --config.data.cut=left          there, else on the right
  --config.method=METHOD          vera, lora, ...
  --config.model.name=MODEL       a hub id, or a folder

The score is the geometric mean of the right next tokens' probabilities, one
over the perplexity; the table also has loss, perplexity and next-token
accuracy. The same command again continues an unfinished run and shows the
result of a finished one. docs/language.md tells it from the beginning.
"""

from absl import flags

from experiments import cli, train

flags.adopt_module_key_flags(train)  # --help shows them here as well

if __name__ == "__main__":
  cli.run(train.main, usage=__doc__)
