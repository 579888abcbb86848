"""Attention in linear memory (arrives with its tests)."""
