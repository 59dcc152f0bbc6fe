"""Text from a decoder: sampling and beam search, each one compiled loop.

The loops know no model. They are given the logits of the words that follow the
prompts, a state, and a function

  tokens_to_logits(ids [rows, 1], state) -> (logits [rows, vocab], state)

that reads one more token of each row. `decode.py` makes it from a module and
its cache.
"""
