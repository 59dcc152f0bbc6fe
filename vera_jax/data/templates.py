"""What a question and its answer are put into before a decoder reads them.

chat    the tokenizer's own chat template (`chat.py`)
alpaca  Alpaca's prompt, for models without a chat template
plain   nothing
"""

CHAT, ALPACA, PLAIN = TEMPLATES = ("chat", "alpaca", "plain")
# What Alpaca's models are asked (github.com/tatsu-lab/stanford_alpaca), with
# the line's end behind it that alpaca-lora has: the form in which such rows are
# put to a model without a chat template. It is a format, so its words are
# theirs.
INTRODUCTION = "Below is an instruction that describes a task"
WITH_INPUT = (
  INTRODUCTION + ", paired with an input that provides further context. Write a"
  " response that appropriately completes the request.\n\n"
  "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
  INTRODUCTION + ". Write a response that appropriately completes the request."
  "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


def alpaca_prompt(instruction: str, more: str = "") -> str:
  """An instruction, with an input or none, up to where the answer begins."""
  form = WITH_INPUT if more.strip() else WITHOUT_INPUT
  # not by str.format, for a text may have braces
  return form.replace("{input}", more, 1).replace(
    "{instruction}", instruction, 1
  )
