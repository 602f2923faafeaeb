"""Text for measuring and repairing a model: token sequences of one length."""

from dataclasses import dataclass

from longctx.shapes import Bool, Tensor, Tokens


@dataclass(frozen=True)
class PackedText:
    """Token sequences of one length, [sequences length], each of which attends only to itself.

    ``targets`` are the next tokens; a target counts in the loss where ``mask`` is True.
    """

    tokens: Tokens
    targets: Tokens
    mask: Bool[Tensor, "b s"]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | list[int]) -> "PackedText":
        return PackedText(self.tokens[rows], self.targets[rows], self.mask[rows])
