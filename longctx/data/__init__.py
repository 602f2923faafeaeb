"""Text in: prompts now; documents, packing and batches for training."""
