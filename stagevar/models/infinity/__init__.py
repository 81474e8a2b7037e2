"""Infinity: transformer, bitwise tokenizer, text encoder, loader."""
