"""Recipes: commands such as ``python -m recipes.generate``, each with a ``--help``."""

from recipes.common.startup import announce_module

announce_module()
