"""From text to Megatron token files: readers, encoders, the demo corpus."""
