"""Scripts to run: ``python -m recipes.generate --help``."""

from recipes.common.startup import announce_module

announce_module()
