"""Conversion of models between psannlm's files and those of other libraries (transformers, GGUF)."""
