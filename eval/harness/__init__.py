"""lm-evaluation-harness: its model interface, its tasks over local files and long texts."""
