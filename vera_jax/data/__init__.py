"""Text data: GLUE's splits, tokens, packed batches."""
