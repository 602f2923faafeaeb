"""List the model types that every recipe takes as ``model=FOLDER``, with what distinguishes them from Llama.

python -m recipes.models out=models.json
"""

from dataclasses import asdict, dataclass

from omegaconf import DictConfig
from rich.table import Table

from longctx.models import FAMILIES
from longctx.models.features import features_of
from longctx.spd.plan import refuse_unfit_shape
from recipes.common.cli import console, main, write_result
from recipes.common.manifest import record, refuse_other_recipe
from recipes.common.places import refuse_unwritable
from recipes.common.settings import top_level

RECIPE = "recipes.models"


@dataclass(frozen=True)
class ModelsSettings:
    """Settings of recipes.models; ``out`` is the file for the table (None: it is only printed)."""

    out: str | None = None


@dataclass(frozen=True)
class FamilyRow:
    """A model type, examples of it, its features, and whether its blocks can drop a reduction ("exact", or why not)."""

    model_type: str
    examples: str
    features: list[str]
    spd: str


def family_rows() -> list[FamilyRow]:
    """Return a row for each family, from transformers' default configuration with the family's ``typical`` settings."""
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()  # default configurations have special tokens beyond their own vocabularies
    families = []
    for name, family in FAMILIES.items():
        shape = family.shape(AutoConfig.for_model(name, **family.typical), ())
        try:
            refuse_unfit_shape(shape)
            spd = "exact"
        except ValueError as error:
            spd = str(error)
        families.append(FamilyRow(name, family.examples, features_of(shape), spd))
    return families


def task(config: DictConfig) -> None:
    """Print the table, and write it if ``out`` is given."""
    settings = top_level(config, ModelsSettings)
    refuse_unwritable(settings.out)
    refuse_other_recipe(settings.out, RECIPE)
    families = family_rows()
    table = Table("model_type", "models", "differs from Llama in", "SPD", box=None)
    for row in families:
        table.add_row(row.model_type, row.examples, ", ".join(row.features), "yes" if row.spd == "exact" else "no")
    console.print(table)
    with record(config, RECIPE):
        if settings.out:
            write_result(settings.out, {row.model_type: asdict(row) for row in families})


if __name__ == "__main__":
    main("models", task)
