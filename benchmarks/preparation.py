"""How EfficientNet-Lite0 answers images that are prepared in several ways.

  python -m benchmarks.preparation --source=FOLDER_OF_CIFAR10

Its package doesn't say what a byte x of an image has to become, so here are the
usual ways: the probability of the right one of ImageNet's 1,000 classes for the
two photographs that scikit-learn ships, resized to 256 pixels and cut to 224;
how often the likeliest class is of CIFAR-10's kind, on images drawn from the
test split, resized to 224 pixels; and the mean probability of all classes of
that kind. ImageNet has no deer, so antelopes count as such; of a horse it has
the sorrel alone. Writes preparation.json.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from flax.traverse_util import unflatten_dict
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.report import environment, load, write
from configs.images.cifar10 import LITE0
from experiments import cli
from experiments.convert import package_file
from experiments.convert_efficientnet import FILE, PACKAGE, SHA256, read_state
from experiments.markdown import markdown_table
from vera_jax.data.image_files import open_folder
from vera_jax.data.images import read_processor
from vera_jax.errors import UserError
from vera_jax.hub import resolve
from vera_jax.models.family import read_fields
from vera_jax.models.hf_weights import load_params
from vera_jax.pretrained.blueprint import blueprint

ROWS = 20  # images at once
# (x / 255 - mean) / std of a byte x, by colour.
WAYS: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
  "(x - 127) / 128": ((127 / 255,) * 3, (128 / 255,) * 3),
  "ImageNet's means and deviations": (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
  ),
  "x / 255": ((0.0,) * 3, (1.0,) * 3),
  "x": ((0.0,) * 3, (1 / 255,) * 3),
}
PHOTOGRAPHS = {"palace": 698, "daisy": 985}  # china.jpg and flower.jpg
# ImageNet's classes of each of CIFAR-10's kinds.
KINDS: Mapping[str, tuple[int, ...]] = {
  "airplane": (404, 895),
  "automobile": (407, 436, 468, 511, 609, 627, 656, 661, 751, 817),
  "bird": (*range(7, 25), *range(80, 101), *range(127, 147)),
  "cat": tuple(range(281, 286)),
  "deer": (351, 352, 353),
  "dog": tuple(range(151, 269)),
  "frog": (30, 31, 32),
  "horse": (339,),
  "ship": (
    *(403, 472, 484, 510, 554, 576, 625, 628),
    *(724, 780, 814, 833, 871, 914),
  ),
  "truck": (555, 569, 675, 717, 734, 864, 867),
}


def define_flags() -> None:
  flags.DEFINE_string("source", None, "CIFAR-10: class folders, or Parquet.")
  flags.DEFINE_integer("images", 400, "How many are answered.", lower_bound=1)
  flags.DEFINE_string("out", "results/benchmarks", "Where the file goes.")


def main() -> None:
  given = flags.FLAGS
  if not given.source:
    raise UserError("Say where CIFAR-10 is: --source=FOLDER")
  made = environment("preparation")
  made["rows"] = measure(Path(given.source), images=given.images)
  made |= {"images": given.images, "load_after": load()}
  write("preparation", made, folder=given.out)
  print(markdown(made))


def measure(source: Path, *, images: int) -> list[dict[str, Any]]:
  """A row for each of `WAYS`.

  Raises:
    UserError: the network is not installed, or the folder is not CIFAR-10.
  """
  folder = resolve(LITE0)
  data = open_folder(source)
  if set(data.classes) != set(KINDS) or "test" not in data.splits:
    raise UserError(f"{source} is not CIFAR-10 with its test split.")
  test = data.splits["test"]
  drawn = np.random.default_rng(0).permutation(len(test))
  numbers = np.sort(drawn[:images])
  processor = read_processor(folder)
  pixels = np.stack([processor.prepare(one) for one in test.read(numbers)])
  kinds = np.zeros((len(numbers), 1000), bool)
  for row, label in zip(kinds, np.asarray(test.labels)[numbers], strict=True):
    row[list(KINDS[data.classes[label]])] = True

  plan = blueprint(read_fields(folder), outputs=1000)
  params = load_params(folder, unflatten_dict(plan.shapes)).params
  # with ImageNet's head
  state = read_state(package_file(PACKAGE, FILE, sha256=SHA256))
  head = {"kernel": state["_fc.weight"].T, "bias": state["_fc.bias"]}
  params = {**params, "classifier": head}
  run = jax.jit(plan.module.apply)
  larger = processor._replace(edge=256)
  photographs = np.stack(
    [larger.prepare(Image.fromarray(x)) for x in load_sample_images().images]
  )

  rows = []
  for name, (mean, std) in WAYS.items():
    way = processor._replace(scale=1 / 255, mean=mean, std=std)
    blocks = (pixels[i : i + ROWS] for i in range(0, len(pixels), ROWS))
    answers = [run({"params": params}, way.normalise(x)) for x in blocks]
    logits = np.concatenate([np.asarray(x)[:, 0] for x in answers])
    right = kinds[np.arange(len(kinds)), logits.argmax(-1)]
    probability = (np.asarray(jax.nn.softmax(logits)) * kinds).sum(-1)
    shown = run({"params": params}, way.normalise(photographs))[:, 0]
    shown = np.asarray(jax.nn.softmax(shown))
    rows.append(
      {
        "way": name,
        "photographs": {
          photograph: float(shown[i, number])
          for i, (photograph, number) in enumerate(PHOTOGRAPHS.items())
        },
        "right": float(right.mean()),
        "probability": float(probability.mean()),
      }
    )
  return rows


def markdown(result: Mapping[str, Any]) -> str:
  """The table, and what it was made on."""
  table = markdown_table(
    (
      "a byte x becomes",
      *(f"photograph of a {x}: its probability" for x in PHOTOGRAPHS),
      "CIFAR-10: the likeliest class is of the right kind",
      "mean probability of that kind",
    ),
    [
      (
        row["way"],
        *(f"{row['photographs'][x]:.3f}" for x in PHOTOGRAPHS),
        f"{row['right']:.3f}",
        f"{row['probability']:.3f}",
      )
      for row in result["rows"]
    ],
  )
  return (
    f"{table}\n\n{result['images']} images; `{result['command']}`, jax"
    f" {result['versions']['jax']}, {result['cpu']}."
  )


if __name__ == "__main__":
  define_flags()
  cli.run(main, usage=__doc__)
