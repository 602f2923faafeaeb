"""Cost models in seconds, bytes and FLOPs: arithmetic only, shared by planning, run-time choice and reports."""
