"""Fine-tune on a GLUE task, or SuperGLUE's, with VeRA or a baseline.

  python -m experiments.glue --config=configs/rte.py
  python -m experiments.glue --config=configs/rte.py:large --config.seed=1
  python -m experiments.glue --config=configs/cola.py --config.method=lora
  python -m experiments.glue --config=configs/superglue/copa.py
  python -m experiments.glue --config=configs/rte.py --seeds=0,1,2,3,4
  python -m experiments.glue --config=configs/rte.py --num_processes=2
    --coordinator=HOST:PORT --process_id=0    (in one line; the other with 1)

The same command again continues an unfinished run and shows the result of a
finished one. Several seeds train at once, on one base, each in a folder of its
own; with --members=N so many, and the others wait until one has ended. Several
processes share one workdir, which all must see; a TPU pod's and SLURM's are
found without flags. Without network, name local folders:

  --config.model.name=FOLDER    config.json, tokenizer, model.safetensors
  --config.data.source=FOLDER   train.tsv, dev.tsv, test.tsv, or RTE/, CoLA/, …
                                (SuperGLUE: train.jsonl, val.jsonl, test.jsonl)
"""

from absl import flags

from experiments import cli, train

flags.adopt_module_key_flags(train)  # --help shows them here as well

if __name__ == "__main__":
  cli.run(train.main, usage=__doc__)
