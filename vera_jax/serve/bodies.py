"""What requests to the server may say, in the words of OpenAI's interface.

A field that is null counts as left out, as it does there. Nothing is ignored in
silence: a field that would change the answer, and that there is not here, is
refused by its name unless it has the value that changes nothing.
"""

import secrets
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
  BaseModel,
  BeforeValidator,
  ConfigDict,
  Field,
  model_validator,
)

from vera_jax.generate.row_sampling import TOP
from vera_jax.generate.sampling import GREEDY, Sampling
from vera_jax.serve.bank import Held
from vera_jax.serve.rows import Request

# Fields that change no answer.
WITHOUT_EFFECT = (
  *("user", "metadata", "service_tier", "safety_identifier"),
  *("prompt_cache_key", "parallel_tool_calls"),
)
# Fields that there are not here, with the values that ask for nothing.
UNUSED: dict[str, tuple[Any, ...]] = {
  "n": (1,),
  "best_of": (1,),
  "echo": (False,),
  "suffix": ("",),
  "store": (False,),
  "frequency_penalty": (0,),
  "presence_penalty": (0,),
  "logit_bias": ({},),
  "tools": ([],),
  "functions": ([],),
  "tool_choice": ("none", "auto"),
  "modalities": (["text"],),
  "response_format": ({"type": "text"},),
}
SMALLEST = 1e-3  # temperature; logits divided by less may overflow
T = TypeVar("T")
Name = Annotated[  # without characters that can't be shown
  str, Field(min_length=1, max_length=200, pattern=r"^\P{C}*$")
]
Positive = Annotated[int, Field(ge=1)]
Pair = Annotated[list[str], Field(min_length=2, max_length=2)]
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
# what one request may have: prompts, or texts to classify
Several = Annotated[list[T], Field(min_length=1, max_length=256)]


@BeforeValidator
def listed(value: Any) -> Any:
  """One text, or one text's tokens, counts as a list of one."""
  tokens = isinstance(value, list) and value and isinstance(value[0], int)
  return [value] if tokens or isinstance(value, str) else value


class Fields(BaseModel):
  """An object of a body, of which every field is known."""

  model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

  @model_validator(mode="before")
  @classmethod
  def _without_unused(cls, data: Any) -> Any:
    if not isinstance(data, dict):
      return data
    for name, values in UNUSED.items():
      if data.get(name) is not None and data[name] not in values:
        raise ValueError(
          f"{name} is not supported here; leave it out (or give {values[0]!r})"
        )
    return {
      name: value
      for name, value in data.items()
      if value is not None and name not in (*UNUSED, *WITHOUT_EFFECT)
    }


class StreamOptions(Fields):
  """`include_usage`: a last event counts the tokens."""

  include_usage: bool = False
  include_obfuscation: Literal[False] = False


class Writing(Fields):
  """What completions and chats have in common."""

  model: Name
  max_tokens: Positive | None = None
  temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
  top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
  top_k: Annotated[int, Field(ge=-1, le=10**6)] = 0  # 0, -1: all
  seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
  stop: Annotated[list[str], listed, Field(max_length=4)] = []
  stream: bool = False
  stream_options: StreamOptions = StreamOptions()

  @model_validator(mode="after")
  def _fit(self) -> "Writing":
    if 0 < self.temperature < SMALLEST:
      raise ValueError(f"temperature is 0, or {SMALLEST} and more")
    if "" in self.stop:
      raise ValueError("stop has an empty text, which would end any answer")
    if "stream_options" in self.model_fields_set and not self.stream:
      raise ValueError("stream_options has an effect only with stream")
    return self


class Completion(Writing):
  """POST /v1/completions; one answer to each prompt."""

  prompt: Annotated[Several[str] | Several[Tokens], listed]
  max_tokens: Positive | None = 16
  logprobs: Annotated[int, Field(ge=0, le=TOP)] | None = None

  @property
  def alternatives(self) -> int | None:
    """How many come with each token; None: no log probabilities at all."""
    return self.logprobs


class TextPart(Fields):
  """A part of a message."""

  type: Literal["text"]
  text: str


class Message(Fields):
  """A message of a conversation; a list of parts is one text."""

  role: Literal["system", "user", "assistant"]
  content: str | list[TextPart]

  @property
  def written(self) -> dict[str, str]:
    """As templates take it."""
    content = self.content
    if not isinstance(content, str):
      content = "".join(part.text for part in content)
    return {"role": self.role, "content": content}


class Chat(Writing):
  """POST /v1/chat/completions."""

  messages: Annotated[list[Message], Field(min_length=1)]
  max_completion_tokens: Positive | None = None
  logprobs: bool = False
  top_logprobs: Annotated[int, Field(ge=0, le=TOP)] = 0

  @model_validator(mode="after")
  def _say_once(self) -> "Chat":
    if self.top_logprobs and not self.logprobs:
      raise ValueError("top_logprobs needs logprobs")
    if self.max_completion_tokens is not None:
      if self.max_tokens not in (None, self.max_completion_tokens):
        raise ValueError("max_tokens is another than max_completion_tokens")
      self.max_tokens = self.max_completion_tokens
    return self

  @property
  def alternatives(self) -> int | None:
    """As for a completion."""
    return self.top_logprobs if self.logprobs else None


def as_request(
  body: Completion | Chat, prompt: list[int], adapter: Held, client: str
) -> Request:
  """What the scheduler is asked for."""
  how = Sampling(body.temperature, max(body.top_k, 0), body.top_p)
  if not body.temperature:  # top_p and top_k can leave out no likeliest word
    how = GREEDY
  return Request(
    tuple(prompt),
    adapter,
    how,
    body.max_tokens,
    tuple(body.stop),
    # without a seed the words are others each time
    secrets.randbelow(2**31) if body.seed is None else body.seed,
    body.alternatives,
    client,
  )


class Classification(Fields):
  """POST /v1/classify: texts, pairs of texts, or images in base64."""

  model: Name
  input: Annotated[Several[str] | Several[Pair], listed]

  @property
  def columns(self) -> tuple[list[str], list[str] | None]:
    """The first texts, and of pairs the second ones."""
    texts: Any = self.input
    if isinstance(texts[0], str):
      return texts, None
    return [first for first, _ in texts], [second for _, second in texts]


class Load(Fields):
  """POST /v1/load_lora_adapter."""

  lora_name: Name
  lora_path: Name
  load_inplace: bool = False  # replaces an adapter of that name


class Unload(Fields):
  """POST /v1/unload_lora_adapter."""

  lora_name: Name
