"""From texts to packed batches of tokens; knows nothing of tasks."""
