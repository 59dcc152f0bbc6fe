"""Adapter methods, and what puts them on a model."""
