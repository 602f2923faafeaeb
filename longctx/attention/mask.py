"""Attention masks as values: how many positions before and after its own a query sees, within its document."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mask:
    """A band around the diagonal: a query at position p sees positions ``p - before`` to ``p + after``.

    ``Mask(before=1, after=0)`` in a document of three tokens: query 0 sees key 0, query 1 keys 0 and 1, query 2 keys 1
    and 2.  None is no bound: ``Mask(None, 0)``, the default, is causal.  Documents belong to the `Layout`: under every
    mask, a query sees only keys of its document.

    Raises ValueError for a negative bound, which would hide a query's own key.
    """

    before: int | None = None
    after: int | None = 0

    def __post_init__(self) -> None:
        if min(self.before or 0, self.after or 0) < 0:
            raise ValueError(
                f"a mask of before={self.before}, after={self.after} hides a query's own key; use bounds of 0 or more"
            )

    def __str__(self) -> str:
        names = {CAUSAL: "causal", BIDIRECTIONAL: "bidirectional"}
        return names.get(self) or f"{self.before} before, {'all' if self.after is None else self.after} after"


CAUSAL = Mask()
BIDIRECTIONAL = Mask(None, None)


def window(size: int) -> Mask:
    """Return the causal mask of a query's own key and the ``size - 1`` keys before it.

    ``size`` is ``sliding_window`` of Hugging Face models.
    """
    return Mask(size - 1)


def causal_within(size: int | None) -> Mask:
    """Return the causal mask in which a query sees the last ``size`` positions (`window`); None: all earlier ones."""
    return CAUSAL if size is None else window(size)
