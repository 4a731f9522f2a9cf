"""From token files to resumable batches."""
