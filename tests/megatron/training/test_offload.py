"""Activation offload: tensors come back bit for bit, shared storages move once, files are used again and leave none."""

import errno
import gc
import random

import pytest
import torch

from longctx.megatron.training import offload
from longctx.megatron.training.offload import Files, Host, Offload, open_offload
from longctx.parallel.measure.memory import MemoryMeter

CPU = torch.device("cpu")


class Counted(Files):
    """Files that count the copies that were made, and the bytes that were reserved."""

    copies = reserved = 0

    def write(self, data):
        self.copies += 1
        return super().write(data)

    def _grow(self, size):
        self.reserved += size
        return super()._grow(size)


@pytest.fixture
def files(tmp_path):
    return Counted(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_views_come_back_bit_for_bit_from_one_copy(files, dtype):
    offloaded, whole = Offload(files, (), smallest=1), (torch.rand(7, 11, 3) * 2).to(dtype)
    views = [whole, whole[2:, ::2], whole.transpose(0, 2), whole[3:4].expand(5, 11, 3), whole[6, 10, 2:]]
    packed = [offloaded.pack(view) for view in views]
    expected = [view.clone() for view in views]
    whole.zero_()  # the copy does not change
    for one, view, right in zip(packed, views, expected, strict=True):
        got = offloaded.unpack(one)
        assert torch.equal(got, right) and got.stride() == view.stride() and got.dtype == dtype
    assert files.copies == 1


def test_a_tensor_that_was_written_to_moves_again(files):
    offloaded, x = Offload(files, (), smallest=1), torch.ones(13)
    first = offloaded.pack(x)
    second = offloaded.pack(x.mul_(3))
    assert offloaded.unpack(first).tolist() == [1.0] * 13
    assert offloaded.unpack(second).tolist() == [3.0] * 13


def test_small_tensors_and_weights_stay(files):
    weight, small = torch.nn.Parameter(torch.rand(97, 5)), torch.rand(3)
    offloaded = Offload(files, [weight], smallest=64)
    assert offloaded.pack(weight) is weight
    assert offloaded.pack(weight.detach()[3:]).data_ptr() == weight.data_ptr() + 3 * 5 * 4
    assert offloaded.pack(small) is small
    assert files.copies == 0


def network(x, weight):
    return (torch.nn.functional.silu(x @ weight).exp() @ weight.T).tanh().square().sum()


def test_gradients_are_equal_and_what_is_saved_is_not_in_memory(files):
    """The outputs of exp and tanh are saved; such an output must not keep itself alive."""
    weight, x = torch.nn.Parameter(torch.randn(59, 61) / 60), torch.randn(997, 59, requires_grad=True)
    right = torch.autograd.grad(network(x, weight), (x, weight))
    in_memory = {}
    for name, hooks in (("memory", None), ("files", Offload(files, [weight], smallest=64))):
        with MemoryMeter({}) as meter:
            if hooks:
                with hooks.active():
                    loss = network(x, weight)
            else:
                loss = network(x, weight)
            in_memory[name] = sum(meter.live.values())
            got = torch.autograd.grad(loss, (x, weight))
        assert all(map(torch.equal, got, right))
        del loss, got
        gc.disable()  # freed by reference counts alone
        try:
            assert sum(meter.live.values()) == 0
        finally:
            gc.enable()
    assert in_memory["memory"] > 700_000 and in_memory["files"] < 100, in_memory


def test_space_is_used_again_and_has_no_name(files, tmp_path):
    weight, used = torch.nn.Parameter(torch.randn(59, 61)), []
    hooks = Offload(files, [weight], smallest=64)
    for _ in range(3):
        with hooks.active():
            loss = network(torch.randn(997, 59, requires_grad=True), weight)
        loss.backward()
        del loss
        used.append((files.reserved, hooks.peak))
    assert len(set(used)) == 1 and files.copies == 3 * 4
    assert 700_000 < hooks.peak < 1_500_000
    assert list(tmp_path.iterdir()) == []


def test_space_of_changing_sizes_is_used_again(files):
    """As with experts, which get other numbers of rows in each step."""
    draw, largest = random.Random(3), 0
    for _ in range(50):
        sizes = [draw.randrange(1 << 16, 1 << 20) for _ in range(9)]
        copies = [files.write(torch.zeros(size, dtype=torch.uint8)) for size in sizes]
        largest = max(largest, sum(map(len, copies)))
        del copies
    assert files.reserved < 2.5 * largest


def test_waits_for_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(offload, "_UNWRITTEN", 3 << 16)
    waits, files = list[int](), Files(tmp_path)
    monkeypatch.setattr(offload.os, "fdatasync", waits.append)
    copies = [files.write(torch.zeros(1 << 16, dtype=torch.uint8)) for _ in range(9)]
    assert len(copies) == 9 and len(waits) == 2


def test_space_of_a_copy_that_was_not_written_is_free(files, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    data = torch.zeros(5000, dtype=torch.uint8)
    with monkeypatch.context() as failing:
        failing.setattr(offload.os, "pwrite", fail)
        with pytest.raises(OSError, match=r"cannot hold activations \(Input/output error\)"):
            files.write(data)
    copy = files.write(data)
    assert len(copy) == 5000 and files.reserved == 8192


def test_returns_freed_memory(files, monkeypatch):
    calls = list[int]()
    monkeypatch.setattr(offload, "_MOVED", 5000)
    monkeypatch.setattr(offload, "_return_freed_memory", lambda: calls.append(1))
    for _ in range(4):
        files.read(files.write(torch.zeros(1500, dtype=torch.uint8)))
    assert len(calls) == 2


def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(offload.os, "posix_fallocate", full)
    with pytest.raises(
        OSError, match=r"offload=\S+ has no room .* \(No space left on device\): give a folder on another"
    ):
        Files(tmp_path).write(torch.zeros(99, dtype=torch.uint8))
    assert list(tmp_path.iterdir()) == []


def test_host_memory_holds_a_copy():
    """On a CPU, where the copy is of no use, but is made by the same code."""
    offloaded = Offload(Host(CPU), (), smallest=1)
    x = torch.randn(5, 7)
    packed, right = offloaded.pack(x.T), x.T.clone()
    x.zero_()
    assert torch.equal(offloaded.unpack(packed), right)


def test_where_activations_wait(tmp_path):
    assert open_offload(None, (), CPU) is None
    assert isinstance(open_offload("host", (), CPU)._store, Host)
    assert isinstance(open_offload(str(tmp_path / "new" / "folder"), (), CPU)._store, Files)
