"""The ranks that work together, and all that goes between them.

Every rank runs the same program. What is replicated has the same bits on all ranks, so that whatever is decided from it
is decided alike, and all ranks come to the same collective operations in the same order. No rank may decide by what it
alone can see: its own clock, memory or rows.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: Seconds that a rank waits for the others.
DEFAULT_TIMEOUT = 600.0


class Group:
    """A process group of `torch.distributed`, whose collective operations end within a bounded time.

    All of them take and return tensors without a graph of autograd's, on the device that the backend serves (CPUs for
    gloo, GPUs for NCCL). Each raises on every rank that waits, if another one fails or does not come in time.

    :param process_group: Of `torch.distributed`; None for the world.
    :param timeout: Seconds to wait for the other ranks in one operation.
    :raises RuntimeError: If `torch.distributed` has not been initialised, or this process is not in the group.

    :ivar int rank: Of this process in the group, from 0.
    :ivar int size: R, how many ranks there are.
    :ivar Counter traffic: Bytes that this rank has sent, by operation: what a ring sends, the least that there can be.
    """

    def __init__(self, process_group: Any = None, timeout: float = DEFAULT_TIMEOUT):
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "ntk_gp.settings.distributed needs process groups: call torch.distributed.init_process_group first, in "
                "a script that torchrun starts."
            )
        self.process_group = process_group
        self.timeout = timeout
        self.rank = dist.get_rank(process_group)
        self.size = dist.get_world_size(process_group)
        if self.rank < 0:
            raise RuntimeError("This process is not in the group that ntk_gp.settings.distributed was given.")
        self.traffic: Counter[str] = Counter()

    def slices(self, count: int) -> list[slice]:
        """Which of so many items belong to each rank: contiguous, as equal as can be, the first ones longer."""
        sizes = [count // self.size + (rank < count % self.size) for rank in range(self.size)]
        return [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks of tensors of one shape, the same bits on all ranks; in the tensor's memory, if that is
        contiguous."""
        return self._reduced("sum", tensor, dist.ReduceOp.SUM)

    def largest(self, tensor: Tensor) -> Tensor:
        """The largest over ranks of each entry of tensors of one shape."""
        return self._reduced("largest", tensor, dist.ReduceOp.MAX)

    def _reduced(self, name: str, tensor: Tensor, operation: Any) -> Tensor:
        if self.size == 1 or tensor.numel() == 0:
            return tensor
        tensor = tensor.detach().contiguous()
        self._wait(name, lambda: dist.all_reduce(tensor, operation, group=self.process_group, async_op=True))
        # Each rank's share goes once round the ring to be added up, and once more to be handed out.
        self.traffic[name] += 2 * (self.size - 1) * tensor.nbytes // self.size
        return tensor

    def gather(self, local: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
        """What all ranks have, one after the other along a dimension.

        :param local: This rank's piece; alike on all ranks but for this dimension.
        :param dim: The dimension.
        :param sizes: The length of each rank's piece in it.
        """
        if self.size == 1:
            return local
        local = local.detach().movedim(dim, 0)
        longest, shape = max(sizes), local.shape[1:]
        if longest == 0 or 0 in shape:
            return local.new_empty(sum(sizes), *shape).movedim(0, dim)
        padded = local.contiguous()
        if len(local) < longest:  # backends gather pieces of one length
            padded = local.new_zeros(longest, *shape)
            padded[: len(local)] = local
        pieces = list(local.new_empty(self.size, longest, *shape))
        self._wait("gather", lambda: dist.all_gather(pieces, padded, group=self.process_group, async_op=True))
        self.traffic["gather"] += (self.size - 1) * padded.nbytes
        whole = torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])
        return whole.movedim(0, dim)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """What one rank has, on all of them; in the tensor's memory, if that is contiguous.

        :param tensor: On the other ranks one of the same shape and dtype, whose contents are lost.
        :param source: The rank that has it.
        """
        if self.size == 1 or tensor.numel() == 0:
            return tensor
        tensor = tensor.detach().contiguous()
        origin = self.global_rank(source)
        self._wait("broadcast", lambda: dist.broadcast(tensor, origin, group=self.process_group, async_op=True))
        self.traffic["broadcast"] += tensor.nbytes * (self.rank == source)
        return tensor

    def exchange(self, outgoing: Iterable[tuple[int, Tensor]], incoming: Iterable[tuple[int, Tensor]]) -> None:
        """Sends tensors to some ranks while it receives others: between two ranks in the order in which they come here.

        :param outgoing: Ranks and what they get.
        :param incoming: Ranks and memory for what comes from them, contiguous.
        """
        outgoing = [(rank, tensor.detach().contiguous()) for rank, tensor in outgoing]
        calls: list[Callable[[], Any]] = []
        for rank, tensor in outgoing:
            calls.append(lambda t=tensor, r=rank: dist.isend(t, self.global_rank(r), group=self.process_group))
        for rank, tensor in incoming:
            calls.append(lambda t=tensor, r=rank: dist.irecv(t, self.global_rank(r), group=self.process_group))
        self._wait("exchange", *calls)
        self.traffic["exchange"] += sum(tensor.nbytes for _, tensor in outgoing)

    def agree(self, what: str, value: int | Tensor) -> None:
        """Checks that all ranks have the same value.

        :param what: What it is called, for the error.
        :param value: A number below 2⁶³, or a tensor, of which a digest goes round.
        :raises RuntimeError: On every rank, if they have not: it names the ranks that differ from the first one.
        """
        if self.size == 1:
            return
        number = value if isinstance(value, int) else digest(value)
        mine = torch.tensor([number], dtype=torch.int64, device=self.device)
        values = self.gather(mine, 0, [1] * self.size).tolist()
        other = [rank for rank, each in enumerate(values) if each != values[0]]
        if other:
            shape = (
                f" (here of shape {tuple(value.shape)}, {value.dtype})"
                if isinstance(value, Tensor)
                else f" (here {value})"
            )
            raise RuntimeError(
                f"Ranks must have the same {what}, but rank{'s' * (len(other) > 1)} {', '.join(map(str, other))} of "
                f"{self.size} differ{'s' * (len(other) == 1)} from rank 0 (here {shape}). Every rank runs the same script on "
                "the same data: seed the random numbers alike, or broadcast what they differ in."
            )

    @property
    def device(self) -> torch.device:
        """Where the backend expects tensors."""
        return torch.device("cuda" if dist.get_backend(self.process_group) == "nccl" else "cpu")

    def global_rank(self, rank: int) -> int:
        """The number in the world of a rank of this group."""
        return rank if self.process_group is None else dist.get_global_rank(self.process_group, rank)

    def _wait(self, name: str, *calls: Callable[[], Any]) -> None:
        """Starts operations and waits for all of them."""
        limit = timedelta(seconds=self.timeout)
        try:
            for work in [call() for call in calls]:
                if work is not None and work.wait(limit) is False:
                    raise RuntimeError("it did not complete")
        except RuntimeError as error:
            raise RuntimeError(
                f"Rank {self.rank} of {self.size} waited for the others in ntk_gp's {name!r} and they did not come: one "
                f"of them has failed (its own message is the one to read), or is more than {self.timeout:g} s behind "
                "(the timeout of ntk_gp.settings.distributed), or the ranks do not run the same script. The process "
                f"group is of no more use. From torch.distributed: {error}"
            ) from error


def digest(tensor: Tensor) -> int:
    """63 bits that tell tensors of other contents, shape or dtype apart."""
    data = tensor.detach().cpu().contiguous()
    code = hashlib.blake2b(f"{tuple(data.shape)} {data.dtype}".encode(), digest_size=8)
    code.update(data.flatten().view(torch.uint8).numpy() if data.numel() else b"")
    return int.from_bytes(code.digest(), "big") >> 1
