"""Whether tensors are what they were when last looked at."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .._compat import sparse_indices, sparse_values, version_of

_serial_numbers = itertools.count(1)

# Sums run over every 1021st word. A prime, so that no row of a matrix is so long that exchanging rows leaves them.
_STRIDE = 1021
# States that copies may have in common; each holds a checksum for each tensor.
_STATES = 4


class Fingerprint:
    """A number for the state of some tensors, which no other state has, of these or any others.

    Versions tell of changes that PyTorch knows of, and are compared each time. Edits by `tensor.data` or a numpy array
    that shares the memory leave no trace: they show in checksums, which read every byte (at the rate of the memory: a
    few microseconds for 10,000 weights, milliseconds for 10 million).
    """

    def __init__(self) -> None:
        self._seen: list[_Seen] = []
        self._serial = 0
        self._known = _KnownStates()
        self._lock = threading.Lock()

    def number(self, tensors: Sequence[Tensor], thorough: bool = False) -> int:
        """The number of the present state.

        :param tensors: Always the same places, whatever is in them.
        :param thorough: Look for changes that left no trace, too.
        """
        with self._lock, torch.DisableTorchFunction():  # a mode would look at each of these calls
            unchanged = len(tensors) == len(self._seen) and all(map(_Seen.is_same, self._seen, tensors))
            if not unchanged:
                self._seen = [_Seen(tensor) for tensor in tensors]
                self._serial = self._known.number(self._seen)
            elif thorough:
                edited = [not seen.has_same_contents() for seen in self._seen]
                if any(edited):
                    self._serial = self._known.number(self._seen)
            return self._serial

    def copy(self) -> Fingerprint:
        """For a copy that has the same tensors so far. Where both come to share others, they have one number again."""
        new = Fingerprint()
        with self._lock:
            new._seen, new._serial, new._known = [seen.copy() for seen in self._seen], self._serial, self._known
        return new

    def __getstate__(self) -> dict:
        return {}

    def __setstate__(self, state: dict) -> None:
        self.__init__()  # type: ignore[misc]

    def __deepcopy__(self, memo: dict) -> Fingerprint:
        return self.copy()


class _KnownStates:
    """The last states of a fingerprint and of its copies: kernels of one network are converted one after the other."""

    def __init__(self) -> None:
        self._states: deque[tuple[list[_Seen], int]] = deque(maxlen=_STATES)
        self._lock = threading.Lock()

    def number(self, seen: list[_Seen]) -> int:
        """That of the state in which tensors have just been seen, a new one if none of the copies has seen it."""
        with self._lock:
            for known, serial in self._states:
                if len(known) == len(seen) and all(map(_Seen.is_as, known, seen)):
                    return serial
            serial = next(_serial_numbers)
            self._states.append(([each.without_memory() for each in seen], serial))
            return serial


class _Seen:
    """A tensor as it was seen."""

    def __init__(self, tensor: Tensor):
        self._tensor = weakref.ref(tensor)
        self._version = version_of(tensor)
        self._address = _address(tensor)
        self._words = _words(tensor)
        self._checksum = self._sums()

    def is_same(self, tensor: Tensor) -> bool:
        if self._tensor() is not tensor or self._version != version_of(tensor):
            return False
        return self._address == (tensor.data_ptr() if tensor.layout == torch.strided else 0)

    def has_same_contents(self) -> bool:
        """Whether not a bit has changed since this was last asked."""
        before, self._checksum = self._checksum, self._sums()
        return before == self._checksum

    def _sums(self) -> bytes:
        """Exact sums of the tensor's words, in integers: a change of one of them changes its sum."""
        return b"".join(_sums(words) for words in self._words)

    def is_as(self, other: _Seen) -> bool:
        """Whether the other is of the same tensor, then in the same state."""
        return self.tensor is not None and self.tensor is other.tensor and self.signature == other.signature

    @property
    def tensor(self) -> Tensor | None:
        """None once it is gone."""
        return self._tensor()

    @property
    def signature(self) -> tuple[int, int, bytes]:
        """What it was like when it was last looked at."""
        return self._version, self._address, self._checksum

    def without_memory(self) -> _Seen:
        """A copy that cannot look again, and holds nothing alive."""
        new = self.copy()
        new._words = []
        return new

    def copy(self) -> _Seen:
        new = _Seen.__new__(_Seen)
        new.__dict__.update(self.__dict__)
        return new


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.layout == torch.strided else 0


def _words(tensor: Tensor) -> list[Tensor | np.ndarray]:
    """The tensor's memory as integers, of eight bytes as far as possible; views, that see later edits."""
    pieces: list[Tensor] = []
    for part in _strided_parts(tensor.detach()):
        if not (part.is_contiguous() or part.numel() == 0):
            part = part.as_strided((_reach(part),), (1,))  # whatever the strides, the memory from first to last
        octets = part.reshape(-1).view(torch.uint8)
        whole = octets.numel() // 8 * 8 if octets.storage_offset() % 8 == 0 else 0
        pieces += [octets[:whole].view(torch.int64), octets[whole:]]
    return [piece.numpy() if piece.device.type == "cpu" else piece for piece in pieces if piece.numel()]


def _strided_parts(tensor: Tensor) -> list[Tensor]:
    if tensor.is_meta or tensor.is_quantized:
        return []
    if tensor.layout == torch.strided:
        return [torch.view_as_real(tensor) if tensor.is_complex() else tensor]
    if tensor.layout == torch.sparse_coo:
        return [*_strided_parts(sparse_values(tensor)), sparse_indices(tensor)]
    if tensor.layout == torch.sparse_csr:
        return [*_strided_parts(tensor.values()), tensor.crow_indices(), tensor.col_indices()]
    return []


def _reach(tensor: Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _sums(words: Tensor | np.ndarray) -> bytes:
    rows = len(words) // _STRIDE
    if rows == 0:
        return _bytes(words)
    block = words[: rows * _STRIDE].reshape(rows, _STRIDE)
    total = block.sum(0, dtype=np.int64) if isinstance(block, np.ndarray) else block.sum(0)
    return _bytes(total) + _bytes(words[rows * _STRIDE :])


def _bytes(words: Tensor | np.ndarray) -> bytes:
    return (words if isinstance(words, np.ndarray) else words.cpu().numpy()).tobytes()
