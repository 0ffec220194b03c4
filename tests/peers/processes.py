"""Questions to a peer, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from benchmarks import peers

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = {"laplace_torch": "torch"}  # where a package is, if not in one of its own name


def ask(peer: str, question: str, **arrays: Tensor | float | Sequence[str] | str) -> dict[str, np.ndarray]:
    """What `question` in `computed_by_PEER.py` makes of these, in the peer's environment; skips where there is none.

    :param arrays: Tensors, numbers, and strings or lists of them, which arrive as NumPy arrays.
    """
    python = peers.interpreter(ENVIRONMENTS.get(peer, peer))
    if python is None:
        pytest.skip(f"{peer} is not installed. {peers.SETUP_HINT}")
    with tempfile.TemporaryDirectory() as folder:
        question_file, answer_file = Path(folder) / "question.npz", Path(folder) / "answer.npz"
        np.savez(question_file, **{name: np.asarray(array) for name, array in arrays.items()})
        command = [python, "-m", f"tests.peers.computed_by_{peer}", question, question_file, answer_file]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        with np.load(answer_file) as answer:
            return dict(answer)
