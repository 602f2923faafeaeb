"""Communication schedules as values: match every rank's messages, and find mismatches and deadlocks.

`recording` makes the schedules of a pass.  The matching is a pure function of them:

    refuse_faulty(attention_schedules(Mesh(ring=4), zigzag(37, 4), pass_q, heads=6, kv_heads=2, head_dim=5))
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

import torch

EXCHANGE = "exchange"


class ScheduleError(ValueError):
    """Error: the messages of ranks do not match, or ranks wait for each other."""


class Group(NamedTuple):
    """A process group: the mesh axis that it spans, and its world ranks."""

    name: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.ranks}"


class Message(NamedTuple):
    """A message of at least one element to or from the world rank ``peer``."""

    peer: int
    elements: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.elements * self.dtype.itemsize:,} bytes ({self.dtype})".replace("torch.", "")


@dataclass(frozen=True)
class Operation:
    """One call to torch.distributed by one rank: its name, its group, and the messages of this rank.

    The name is "exchange" for a batch of point-to-point messages, which is not called if this rank has none.
    """

    name: str
    group: Group
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]

    @property
    def called(self) -> bool:
        """True if this rank makes the call; a batch of point-to-point messages without any message is not called."""
        return self.name != EXCHANGE or bool(self.sends or self.receives)


Schedule = list[Operation]


@dataclass
class _Rank:
    """A rank at one operation of its schedule, with that operation's unmatched messages."""

    schedule: Schedule
    at: int = -1
    sends: list[Message] = field(default_factory=list)
    receives: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.advance()

    @property
    def current(self) -> Operation | None:
        """The operation that this rank is in; None after the last one."""
        return self.schedule[self.at] if self.at < len(self.schedule) else None

    def advance(self) -> None:
        """Go to the next operation that is called."""
        self.at += 1
        while self.current and not self.current.called:
            self.at += 1
        if self.current:
            self.sends, self.receives = list(self.current.sends), list(self.current.receives)

    def is_in(self, group: Group, *, exchange: bool) -> bool:
        """Return True if this rank is in an exchange of ``group``, or, with ``exchange=False``, in a collective."""
        return bool(self.current and self.current.group == group and (self.current.name == EXCHANGE) == exchange)


def refuse_faulty(schedules: Sequence[Schedule], *, connected: bool = True) -> None:
    """Raise ScheduleError, naming ranks and operations, unless all ranks reach the end of their schedules.

    ``schedules[r]`` is the schedule of world rank r.  Each rank runs one operation at a time, in order, and a send ends
    only when it is received.  gloo and NCCL allow more overlap, so a schedule that is accepted here cannot deadlock
    there.  Messages must agree in peer, number of elements and dtype.  All ranks of a group must call its collectives
    in one order.

    With ``connected=False`` the backend connects a group at its first call, as NCCL does without a ``device_id``.  All
    ranks of the group must then take part in that call if it is an exchange (torch's `batch_isend_irecv`).
    """
    if not connected:
        _refuse_partial_first_exchange(schedules)
    ranks = [_Rank(schedule) for schedule in schedules]
    while any(_progress(ranks, number) for number in range(len(ranks))):
        pass
    waiting = [number for number, rank in enumerate(ranks) if rank.current]
    if waiting:
        raise ScheduleError("deadlock: " + "; ".join(_describe(ranks[number], number) for number in waiting))


def _progress(ranks: Sequence[_Rank], number: int) -> bool:
    """Match messages of rank ``number``'s current operation with those of its peers; return False if none match now."""
    operation = ranks[number].current
    if operation is None:
        return False
    if operation.name == EXCHANGE:
        return any(_deliver(ranks, number, sent, operation.group) for sent in list(ranks[number].sends))
    return _run_collective(ranks, operation)


def _deliver(ranks: Sequence[_Rank], number: int, sent: Message, group: Group) -> bool:
    """Match the message ``sent`` by rank ``number`` in an exchange of ``group``; return False if it has to wait.

    It waits until its receiver is in an exchange of ``group`` that expects a message from ``number``.
    """
    sender, receiver = ranks[number], ranks[sent.peer]
    expected = next((m for m in receiver.receives if m.peer == number), None)
    if not receiver.is_in(group, exchange=True) or expected is None:
        return False
    _refuse_other_size(number, sent.peer, sent, expected, f"exchange of {group}")
    sender.sends.remove(sent)
    receiver.receives.remove(expected)
    for rank in (sender, receiver):
        if not rank.sends and not rank.receives:
            rank.advance()
    return True


def _run_collective(ranks: Sequence[_Rank], operation: Operation) -> bool:
    """Run the collective ``operation`` if all members of its group have reached one; return False if not."""
    group = operation.group
    if not all(ranks[member].is_in(group, exchange=False) for member in group.ranks):
        return False
    calls = {member: call for member in group.ranks if (call := ranks[member].current)}
    if len({call.name for call in calls.values()}) > 1:
        order = ", ".join(f"rank {member} calls {call.name}" for member, call in calls.items())
        raise ScheduleError(f"mismatch: collectives of {group} in another order: {order}")
    for member, call in calls.items():
        for other, other_call in calls.items():
            sent = next((m for m in call.sends if m.peer == other), None)
            expected = next((m for m in other_call.receives if m.peer == member), None)
            _refuse_other_size(member, other, sent, expected, f"{operation.name} of {group}")
    for member in group.ranks:
        ranks[member].advance()
    return True


def _refuse_other_size(sender: int, receiver: int, sent: Message | None, expected: Message | None, where: str) -> None:
    if (sent and sent[1:]) != (expected and expected[1:]):
        raise ScheduleError(
            f"mismatch: in {where}, rank {sender} sends {sent or 'nothing'} to rank {receiver}, "
            f"which expects {expected or 'nothing'}"
        )


def _describe(rank: _Rank, number: int) -> str:
    """Return a text: in which operation ``rank``, with this ``number``, waits, and for which messages."""
    operation = rank.current
    assert operation
    text = f"rank {number} waits in {operation.name} of {operation.group}, its call {rank.at + 1}"
    if operation.name == EXCHANGE:
        text += "".join(f", to send {m} to rank {m.peer}" for m in rank.sends)
        text += "".join(f", to receive {m} from rank {m.peer}" for m in rank.receives)
    return text


def _refuse_partial_first_exchange(schedules: Sequence[Schedule]) -> None:
    for group in sorted({operation.group for schedule in schedules for operation in schedule}):
        of_ranks = [[op for op in schedules[rank] if op.group == group] for rank in group.ranks]
        for call in zip_longest(*of_ranks):
            absent = [rank for rank, op in zip(group.ranks, call, strict=True) if not (op and op.called)]
            if len(absent) == len(group.ranks):
                continue
            if absent and any(op and op.name == EXCHANGE for op in call):
                raise ScheduleError(
                    f"the first exchange of {group} connects the group, but rank {absent[0]} does not take part in it; "
                    "pass device_id to torch.distributed.init_process_group, which connects the groups at once"
                )
            break
