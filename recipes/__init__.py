"""Scripts to run: ``python -m recipes.generate --help``."""
