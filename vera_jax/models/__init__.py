"""Plain linen models and their weights; no word of adapters."""
