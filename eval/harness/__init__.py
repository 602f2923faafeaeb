"""lm-evaluation-harness: its model interface, its tasks over local files, tasks of long texts."""
