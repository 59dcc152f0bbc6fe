"""Fine-tune on images: the paper's fourth experiment, or your own.

  python -m experiments.images --config=configs/images/cifar100.py
  python -m experiments.images --config=configs/images/cifar100.py:large
  python -m experiments.images --config=configs/images/cifar10.py:dinov2
    --config.data.source=FOLDER                          (in one line)
  python -m experiments.images --config=configs/images/food101.py
    --config.method=lora --seeds=0,1,2,3,4

FOLDER has one folder of image files per class, perhaps in train/ and test/, or
.parquet files as `datasets` writes them; a hub id serves too.

  --config.data.shots=N         training images per class; 10 as in the paper
  --config.data.subset_seed=N   which ones
  --config.data.dev_shots=N     score N per class of the training images that
                                are not trained on, to choose rates by
  --config.data.image_size=N    pixels of a side
  --config.method=METHOD        vera, lora, head, full, ...

An image file that can't be read is named and left out. The same command again
continues an unfinished run and shows the result of a finished one. RUN/adapter
then answers more images: experiments.predict --input=FOLDER.
"""

from absl import flags

from experiments import cli, train

flags.adopt_module_key_flags(train)  # --help shows them here as well

if __name__ == "__main__":
  cli.run(train.main, usage=__doc__)
