"""Ridge regression on a frozen base's features of images: a baseline.

  python -m experiments.ridge --config=configs/images/cifar10.py:dinov2
    --config.data.source=FOLDER --workdir=DIR            (in one line)

Nothing is trained step by step, so there are no rates to choose: the classifier
has a closed form, its penalty is chosen by leave-one-out error on the training
images. The result stands beside those of experiments.images in reports.
"""

from absl import flags

from experiments import cli, closing
from vera_jax.errors import UserError

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the result.")


def main() -> None:
  config = cli.chosen(CONFIG)
  if not WORKDIR.value:
    raise UserError("Say where the result goes: --workdir=DIR")
  from vera_jax.train.ridge import ridge  # after the flags' errors

  closing.show_result(ridge(config, WORKDIR.value), WORKDIR.value)


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
