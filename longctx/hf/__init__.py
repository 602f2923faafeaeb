"""Hugging Face folders: find one by name, read its configuration and tokenizer, write one without weights."""
