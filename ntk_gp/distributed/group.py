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
from functools import partial
from itertools import accumulate
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

# The name that newer versions of torch have for it comes first.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
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
    :ivar dict least_memory: Bytes, by the kind of device: what the rank has that has least.
    :ivar Counter traffic: Bytes that this rank has sent, by operation: what a ring sends, the least that there can be.
    """

    def __init__(self, process_group: Any = None, timeout: float = DEFAULT_TIMEOUT):
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "ntk_gp.settings.distributed needs process groups: call torch.distributed.init_process_group first, in "
                "a script that torchrun starts."
            )
        self.process_group = dist.group.WORLD if process_group is None else process_group
        self.timeout = timeout
        self.rank = dist.get_rank(process_group)
        self.size = dist.get_world_size(process_group)
        if self.rank < 0:
            raise RuntimeError("This process is not in the group that ntk_gp.settings.distributed was given.")
        self.least_memory: dict[str, int] = {}
        self.traffic: Counter[str] = Counter()
        self._agreed_on: WeakSet[Any] = WeakSet()

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
        self._wait(name, partial(dist.all_reduce, tensor, operation, self.process_group, async_op=True))
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
        whole = local.new_empty(self.size * longest, *shape)
        self._wait("gather", partial(_all_gather, whole, padded, self.process_group, async_op=True))
        self.traffic["gather"] += (self.size - 1) * padded.nbytes
        if min(sizes) < longest:
            whole = torch.cat([piece[:size] for piece, size in zip(whole.split(longest), sizes, strict=True)])
        return whole.movedim(0, dim)

    def scatter_sums(self, pieces: Sequence[Tensor], owners: Sequence[int]) -> None:
        """Sums over ranks, each for one rank alone, in the memory of its piece there; on others contents are lost.

        One reduction for each piece: not every backend scatters pieces of unlike lengths, and an exchange of all pieces
        would hold those of all ranks at once. The bytes are the same.

        :param pieces: Contiguous tensors; of each, the shape is the same on all ranks.
        :param owners: The rank that gets the sum of each.
        """
        if self.size == 1:
            return
        reductions = [
            partial(dist.reduce, piece.detach(), self.global_rank(owner), group=self.process_group, async_op=True)
            for piece, owner in zip(pieces, owners, strict=True)
        ]
        self._wait("scatter sums", *reductions)
        sent = (piece.nbytes for piece, owner in zip(pieces, owners, strict=True) if owner != self.rank)
        self.traffic["scatter sums"] += sum(sent)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """What one rank has, on all of them; in the tensor's memory, if that is contiguous.

        :param tensor: On the other ranks one of the same shape and dtype, whose contents are lost.
        :param source: The rank that has it.
        """
        if self.size == 1 or tensor.numel() == 0:
            return tensor
        tensor = tensor.detach().contiguous()
        origin = self.global_rank(source)
        self._wait("broadcast", partial(dist.broadcast, tensor, origin, self.process_group, async_op=True))
        self.traffic["broadcast"] += tensor.nbytes * (self.rank == source)
        return tensor

    def exchange(self, outgoing: Iterable[tuple[int, Tensor]], incoming: Iterable[tuple[int, Tensor]]) -> None:
        """Sends tensors to some ranks while it receives others: between two ranks in the order in which they come here.

        :param outgoing: Ranks and what they get.
        :param incoming: Ranks and memory for what comes from them, contiguous.
        """
        sent = [(rank, tensor.detach().contiguous()) for rank, tensor in outgoing]
        calls = [partial(dist.isend, tensor, self.global_rank(rank), group=self.process_group) for rank, tensor in sent]
        calls += [
            partial(dist.irecv, tensor, self.global_rank(rank), group=self.process_group) for rank, tensor in incoming
        ]
        self._wait("exchange", *calls)
        self.traffic["exchange"] += sum(tensor.nbytes for _, tensor in sent)

    def agree_on(self, owner: Any, what: str, values: Iterable[Tensor]) -> None:
        """Checks, once for this owner, that all ranks have the same tensors.

        :param owner: What the tensors belong to and do not change in.
        """
        if owner not in self._agreed_on:
            self.agree(what, *values)
            self._agreed_on.add(owner)

    def agree(self, what: str, *values: int | Tensor) -> None:
        """Checks that all ranks have the same values.

        :param what: What they are called, for the error.
        :param values: Numbers, or tensors: a digest of all of them goes round.
        :raises RuntimeError: On every rank, if they have not: it names the ranks that differ from the first one.
        """
        if self.size == 1:
            return
        mine = torch.tensor([digest(*values)], dtype=torch.int64, device=self.device)
        found = self.gather(mine, 0, [1] * self.size).tolist()
        others = [str(rank) for rank, each in enumerate(found) if each != found[0]]
        if others:
            here = ", ".join(map(_described, values))
            raise RuntimeError(
                f"Ranks must have the same {what}, but of {self.size} ranks {', '.join(others)} differ "
                f"from rank 0 (here: {here}). Every rank runs the same script on the same data: seed random numbers "
                "alike, or broadcast what they differ in."
            )

    @property
    def device(self) -> torch.device:
        """Where the backend expects tensors."""
        return torch.device("cuda" if dist.get_backend(self.process_group) == "nccl" else "cpu")

    def global_rank(self, rank: int) -> int:
        """The number in the world of a rank of this group."""
        group: Any = self.process_group
        return dist.get_global_rank(group, rank)

    def is_of(self, process_group: Any) -> bool:
        """Whether it is the group of these ranks, and they still are one."""
        return self.process_group is process_group

    def _wait(self, name: str, *calls: Callable[[], Any]) -> None:
        """Starts operations and waits for all of them."""
        limit = timedelta(seconds=self.timeout)
        try:
            for work in [call() for call in calls]:
                if work is not None and work.wait(limit) is False:
                    raise RuntimeError("it did not complete")
        except RuntimeError as error:
            raise RuntimeError(
                f"Rank {self.rank} of {self.size} waited for others in ntk_gp's {name!r}, and they did not come: one "
                f"of them has failed (its own message is the one to read), or is more than {self.timeout:g} s behind "
                "(the timeout of ntk_gp.settings.distributed), or the ranks do not run the same script. The process "
                f"group is of no more use. From torch.distributed: {error}"
            ) from error


class OneProcess(Group):
    """A process by itself, for what is written for ranks: nothing is sent.

    :param device: Where tensors are.
    """

    def __init__(self, device: torch.device):
        self.process_group, self.timeout, self.rank, self.size = None, DEFAULT_TIMEOUT, 0, 1
        self.least_memory, self.traffic, self._agreed_on = {}, Counter(), WeakSet()
        self._device = device

    @property
    def device(self) -> torch.device:
        return self._device


def digest(*values: int | Tensor) -> int:
    """63 bits that tell other numbers, and tensors of other contents, shape or dtype, apart."""
    code = hashlib.blake2b(digest_size=8)
    for value in values:
        code.update(f"{_described(value)};".encode())
        if isinstance(value, Tensor) and value.numel():
            data = value.detach().cpu().contiguous().flatten()
            code.update(data.view(torch.uint8).numpy())  # type: ignore[arg-type]
    return int.from_bytes(code.digest(), "big") >> 1


def _described(value: int | Tensor) -> str:
    return f"shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else str(value)
