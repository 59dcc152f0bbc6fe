"""Put an adapter on the Hugging Face hub.

  python -m experiments.push --adapter=RUN/adapter --to=OWNER/NAME
  python -m experiments.push --adapter=RUN/adapter --to=OWNER/NAME --private

Uploads adapter.json, adapter.safetensors and README.md, the model card that a
run writes (edit it first if you like). Log in once with `hf auth login`, or set
HF_TOKEN. What takes --adapter takes OWNER/NAME from then on, or
OWNER/NAME@REVISION.
"""

from absl import flags

from experiments import cli
from vera_jax.errors import UserError

ADAPTER = flags.DEFINE_string("adapter", None, "The adapter's folder.")
TO = flags.DEFINE_string("to", None, "Its id on the hub: owner/name.")
PRIVATE = flags.DEFINE_bool(
  "private", False, "A new repository is only for its owner."
)

cli.define_json()


def main() -> None:
  if not ADAPTER.value or not TO.value:
    raise UserError(
      "Say what to upload, and where to: --adapter=DIR --to=OWNER/NAME"
    )
  from vera_jax.adapters.push import push_adapter  # after the flags' errors

  address = push_adapter(ADAPTER.value, TO.value, private=PRIVATE.value)
  cli.give({"url": address})
  print(address)


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
