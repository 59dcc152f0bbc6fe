"""Text from a decoder: sampling and beam search, each one compiled loop.

The loops know no model. They are given the logits of the words that follow the
prompts, a state, and a function that reads one more word:

  tokens_to_logits(ids [rows, 1], state) -> (logits [rows, vocab], state)

of each row in sampling, and in beam search of each beam, with the beam of the
step before that it continues:

  tokens_to_logits(ids [rows, beams], origins [rows, beams], state)
    -> (logits [rows, beams, vocab], state)

`decode.py` makes both from a module and its cache.
"""
