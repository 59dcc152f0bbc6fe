"""Fine-tune a decoder on E2E and score the sentences that it writes.

  python -m experiments.e2e --config=configs/e2e.py:medium
    --config.data.source=FOLDER                    (in one line)
  python -m experiments.e2e --config=configs/e2e.py:smollm2
    --config.data.source=FOLDER --config.method=lora --seeds=0,1,2

FOLDER has train.txt (or train.txt.gz), valid.txt and test.txt in the form of
microsoft/LoRA: an input, ||, and its sentence on each line. Some settings:

  --config.method=METHOD               vera, lora, bitfit, full, ...
  --config.data.max_train_examples=N   training rows
  --config.data.max_eval_examples=N    rows of valid.txt, and inputs of test.txt
  --config.data.held_out=N             score N inputs of train.txt, not valid's
  --config.data.test=False             write no texts at the end
  --config.generate.beams=N            and length_penalty, max_new_tokens, ...

After each epoch the loss on valid.txt is computed; after the last one the test
inputs are answered by beam search. WORKDIR/test has inputs, outputs and
references, result.json the five metrics. The same command again continues an
unfinished run and shows the result of a finished one. docs/e2e.md tells it from
the beginning.
"""

from absl import flags

from experiments import cli, train

flags.adopt_module_key_flags(train)  # --help shows them here as well

if __name__ == "__main__":
  cli.run(train.main, usage=__doc__)
