"""Converts text to Megatron token files: readers, encoders, vocabularies, the demo corpus."""
