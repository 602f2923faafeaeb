"""Answers of data-parallel groups, brought together on all ranks."""

import json
from collections.abc import Mapping

import torch

from eval.answers.requests import Answer
from longctx.parallel.comm import Comm


def gather_answers(
    world: Comm, device: torch.device, answers: Mapping[str, Answer], tokens: int
) -> tuple[dict[str, Answer], int]:
    """Return all ranks' ``answers`` by key, in rank order, and the sum of their ``tokens``; every rank must call this.

    Numbers travel as JSON text, which keeps every digit of a float.  Raises `LostPeer` if a rank has gone.
    """
    text = json.dumps([answers, tokens]).encode()
    mine = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    sizes = world.all_gather(torch.tensor([len(text)], device=device), [(1,)] * world.size)
    merged: dict[str, Answer] = {}
    total = 0
    for each in world.all_gather(mine, [(int(size.item()),) for size in sizes]):
        their_answers, their_tokens = json.loads(each.cpu().numpy().tobytes())
        merged |= {key: answer if isinstance(answer, str) else tuple(answer) for key, answer in their_answers.items()}
        total += their_tokens
    return merged, total
