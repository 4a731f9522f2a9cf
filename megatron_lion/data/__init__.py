"""Token files: format, checks, writer, manifest, tokenizers, datasets and the order of samples."""
