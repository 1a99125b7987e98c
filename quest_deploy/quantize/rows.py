"""Random rows of what layers are given: the same ones whether a batch is run at once or in chunks of its prompts.

A batch holds all prompts of the negative branch, then all of the positive one, and so does every chunk of it; what a
layer is given has samples outermost. Rows are drawn for the whole batch when its first chunk runs, and each chunk gives
those that lie in it. Where a batch is one chunk, that is drawing rows of what the layer is given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

EXTREME_ROWS = 2


class RowChoice:
    """Draws rows for many layers, of one batch after the other.

    Args:
        generator: Asked once for each run of a layer in a batch, in the order of the runs.
        branches: Samples of each prompt.
    """

    def __init__(self, generator: torch.Generator, branches: int) -> None:
        self.generator, self.branches = generator, branches
        self.drawn: dict[str, list[Tensor]] = {}
        self.runs: Counter[str] = Counter()
        self.total = self.first = self.count = 0

    def chunks(self, prompt: Tensor, at_once: int) -> Iterator[Tensor]:
        """The prompts of a new batch, int64 [n], at most `at_once` at a time."""
        self.drawn, self.total, self.first = {}, prompt.numel(), 0
        for chunk in prompt.split(at_once):
            self.runs, self.count = Counter(), chunk.numel()
            yield chunk
            self.first += chunk.numel()

    def of(self, name: str, available: int, count: int) -> tuple[int, Tensor, Tensor]:
        """Which rows of a layer's input are used, in one of its runs.

        Args:
            name: The layer's.
            available: How many rows there are in this chunk.
            count: How many are drawn from the whole batch.

        Returns:
            The run's number among those of the layer in this chunk; which of the drawn rows lie in it, int64 [m];
            and where in the input they are, int64 [m].
        """
        run = self.runs[name]
        self.runs[name] += 1
        samples = self.branches * self.count
        whole = self.count == self.total
        # An input that is no batch is the same in every chunk.
        shared = not whole and available % samples != 0
        each = available if shared else available // samples
        if self.first == 0:
            number = available if whole or shared else each * self.branches * self.total
            rows = torch.randint(number, (count,), generator=self.generator)
            self.drawn.setdefault(name, []).append(rows)
        rows = self.drawn[name][run]
        if whole:
            return run, torch.arange(count), rows
        if shared:
            places = torch.arange(count if self.first == 0 else 0)
            return run, places, rows[places]
        sample, inner = rows // each, rows % each
        branch, prompt = sample // self.total, sample % self.total
        mine = (prompt >= self.first) & (prompt < self.first + self.count)
        local = (branch * self.count + prompt - self.first) * each + inner
        return run, mine.nonzero().flatten(), local[mine]

    def place(self, name: str, run: int) -> int:
        """Where in a list that got an entry at each run of a layer, in first chunks alone, that of this run is."""
        return run - len(self.drawn[name])


def by_group(rows: Sequence[Tensor], steps: int) -> list[Tensor]:
    """Rows [s + 2, c] of every run, in order, as those of each group; runs of one call are mixed."""
    runs = len(rows) // steps
    groups = []
    for step in reversed(range(steps)):
        together = torch.stack(list(rows[step * runs : (step + 1) * runs]))
        # Every run gives its share of the positions, so that all layers have the same number.
        positions = together.shape[1] - EXTREME_ROWS
        run = torch.arange(positions) % runs
        kept = together[run, torch.arange(positions)]
        low, high = together[:, -2].amin(dim=0), together[:, -1].amax(dim=0)
        groups.append(torch.cat([kept, low[None], high[None]]))
    return groups
