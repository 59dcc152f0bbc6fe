"""Answers of trained models."""
