"""Examples of networks that are no transformers: a CNN and an LSTM.

Nothing else needs them: without this folder and its lines in
`family.FAMILIES` the rest works.
"""
