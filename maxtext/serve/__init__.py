"""Tokens out of a trained decoder."""
