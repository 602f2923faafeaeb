"""Text input: prompts and conversation turns; documents, packing and batches for training."""
