"""The flags of commands that let a decoder write, and how it is loaded."""

from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from experiments import cli

if TYPE_CHECKING:
  from vera_jax.generate.sampling import Sampling
  from vera_jax.pretrained.classifier import Classifier

flags.disclaim_key_flags()  # what is defined here belongs to the script


class DecodingFlags(NamedTuple):
  """A decoder, what is put around its prompts, and how words are drawn."""

  model: cli.ModelFlags
  template: flags.FlagHolder
  max_new_tokens: flags.FlagHolder
  temperature: flags.FlagHolder
  top_k: flags.FlagHolder
  top_p: flags.FlagHolder
  seed: flags.FlagHolder
  no_repeat_ngram: flags.FlagHolder
  keep_adapter: flags.FlagHolder
  dtype: flags.FlagHolder

  def sampling(self) -> "Sampling":
    """How words are drawn.

    Raises:
      UserError: the flags don't fit together.
    """
    # Imported only now: a mistake in the flags is reported without the wait.
    from vera_jax.generate.sampling import Sampling

    how = Sampling(
      self.temperature.value,
      self.top_k.value,
      self.top_p.value,
      self.no_repeat_ngram.value,
    )
    how.check()
    return how

  def load(self) -> "Classifier":
    """The decoder, with its layers looped, as a `Generator` has them: so it
    makes no second copy of them."""
    import jax.numpy as jnp

    options: Any = {"dtype": jnp.dtype(self.dtype.value), "scan": False}
    return self.model.load(**options)


def define_decoding(*, template: str, max_new_tokens: int) -> DecodingFlags:
  """The flags.

  Args:
    template: what --help says of --template.
    max_new_tokens: the default.
  """
  return DecodingFlags(
    cli.define_model("A whole decoder, such as a merged one."),
    flags.DEFINE_enum("template", None, ["chat", "alpaca", "plain"], template),
    flags.DEFINE_integer(
      "max_new_tokens", max_new_tokens, "The most tokens of an answer.", 1
    ),
    flags.DEFINE_float(
      "temperature",
      0.0,
      "0: the likeliest word each time. Above: words are drawn.",
    ),
    flags.DEFINE_integer("top_k", 0, "Draw among as many words; 0 for all."),
    flags.DEFINE_float(
      "top_p",
      1.0,
      "Draw among the words that together have this probability.",
    ),
    flags.DEFINE_integer("seed", 0, "Of what is drawn.", 0, 2**32 - 1),
    flags.DEFINE_integer(
      "no_repeat_ngram",
      0,
      "No n-gram of this size comes twice; 0: no rule.",
      0,
    ),
    flags.DEFINE_bool(
      "keep_adapter", False, "Decode with the adapter unmerged."
    ),
    flags.DEFINE_enum(
      "dtype", "float32", ["float32", "bfloat16"], "Of weights and computing."
    ),
  )
