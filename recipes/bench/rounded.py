"""The setting ``rivals`` of the SPD benchmarks: reductions with rounded messages, measured along with dropped ones."""

from dataclasses import asdict, dataclass

from omegaconf import DictConfig

from longctx.config import Reduce
from recipes.common.cli import say
from recipes.common.settings import sections


@dataclass(frozen=True, kw_only=True)
class Rival(Reduce):
    """An item of ``rivals``; ``label`` names its results."""

    label: str

    @property
    def settings(self) -> dict[str, object]:
        """The settings without the label, for files of results."""
        return {name: value for name, value in asdict(self).items() if name != "label"}


def read_rivals(config: DictConfig) -> tuple[Rival, ...]:
    """Return the items of ``rivals``.

    Raises ValueError for an item that rounds nothing, and for a label that two items share.
    """
    rivals = sections(config, "rivals", Rival, say)
    labels = [rival.label for rival in rivals]
    if len({*labels}) < len(labels):
        raise ValueError(f"rivals have the labels {labels}: give each its own label")
    for rival in rivals:
        if rival.exact:
            raise ValueError(
                f"rivals: {rival.label} rounds nothing: set attention or mlp to bfloat16, int8 or int6, as in "
                "rivals=[{label:int8,attention:int8,mlp:int8}]"
            )
    return rivals
