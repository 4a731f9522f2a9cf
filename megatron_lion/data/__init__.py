"""Reads tokenized corpora: file checks, tokenizers, datasets and the order of samples."""
