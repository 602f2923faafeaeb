"""Text as a model is measured and repaired with: sequences of one length."""

from dataclasses import dataclass

from longctx.shapes import Bool, Tensor, Tokens


@dataclass(frozen=True)
class PackedText:
    """Sequences of one length, each attending to itself, with the targets that count where ``mask`` says so."""

    tokens: Tokens
    targets: Tokens
    mask: Bool[Tensor, "b s"]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | list[int]) -> "PackedText":
        return PackedText(self.tokens[rows], self.targets[rows], self.mask[rows])
