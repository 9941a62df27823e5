"""Documents that share a row and do not see each other."""

from functools import cached_property

import torch


class Documents:
    """Which document each token of a batch belongs to, and what attention needs to know of it, found out once.

    Right padding belongs to the last document: being last, nothing sees it.
    """

    def __init__(self, numbers: torch.Tensor, per_row: int) -> None:
        """
        Args:
            numbers: [batch, seq] integers that rise by one from document to document of a row, from 0 on.
            per_row: no row has more documents; known on the host, so that nobody waits for the device to count.
        """
        self.numbers = numbers
        self.per_row = per_row
        self._masks: dict[int | None, torch.Tensor] = {}

    def split(self, parts: int) -> list["Documents"]:
        """Those of equal parts of the batch."""
        return [Documents(numbers, self.per_row) for numbers in self.numbers.chunk(parts)]

    def to(self, device: torch.device | str) -> "Documents":
        """The same on `device`."""
        return Documents(self.numbers.to(device, non_blocking=True), self.per_row)

    def pin_memory(self) -> "Documents":
        """The same in memory that a GPU copies from by itself."""
        return Documents(self.numbers.pin_memory(), self.per_row)

    @cached_property
    def positions(self) -> torch.Tensor:
        """[batch, seq], from 0 on in each document."""
        index = torch.arange(self.numbers.shape[1], device=self.numbers.device)
        begins = torch.ones_like(self.numbers, dtype=torch.bool)
        begins[:, 1:] = self.numbers[:, 1:] != self.numbers[:, :-1]
        return index - (index * begins).cummax(1).values

    @cached_property
    def boundaries(self) -> torch.Tensor:
        """[batch * per_row + 1] int32: where each document begins in the rows laid end to end, and the end; what a
        row has fewer than `per_row` are empty."""
        batch, seq = self.numbers.shape
        rows = self.per_row * torch.arange(batch, device=self.numbers.device).unsqueeze(1)
        slots = (self.numbers + rows).flatten().long()
        lengths = torch.zeros(batch * self.per_row, dtype=torch.int64, device=slots.device)
        lengths.scatter_add_(0, slots, torch.ones_like(slots))
        return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()

    def mask(self, window: int | None) -> torch.Tensor:
        """[batch, 1, seq, seq], true where a token looks: in its own document, not ahead, nor further back than the
        window."""
        if window not in self._masks:
            index = torch.arange(self.numbers.shape[1], device=self.numbers.device)
            distance = index.unsqueeze(1) - index
            near = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
            own = self.numbers.unsqueeze(2) == self.numbers.unsqueeze(1)
            self._masks[window] = (near & own).unsqueeze(1)
        return self._masks[window]
