"""A mask is a value: how far behind and ahead of its own position a query sees, within its document."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mask:
    """A query at position p sees the keys of its document from ``p - before`` to ``p + after``.

    None is no bound.  Documents are of the layout, not of the mask: no mask lets one look into another.
    """

    before: int | None = None
    after: int | None = 0

    def __post_init__(self) -> None:
        if min(self.before or 0, self.after or 0) < 0:
            raise ValueError(f"a mask of {self.before} before and {self.after} after hides a query's own key: use 0 up")

    def __str__(self) -> str:
        names = {CAUSAL: "causal", BIDIRECTIONAL: "bidirectional"}
        return names.get(self) or f"{self.before} before, {'all' if self.after is None else self.after} after"


CAUSAL = Mask()
BIDIRECTIONAL = Mask(None, None)


def window(size: int) -> Mask:
    """Causal, and the last ``size`` keys only, a query's own included: ``sliding_window`` of Hugging Face models."""
    return Mask(size - 1)


def causal_within(size: int | None) -> Mask:
    """`window` of ``size``, or plain causal for None."""
    return CAUSAL if size is None else window(size)
