"""Whole models written for others: Hugging Face folders and GGUF files."""
