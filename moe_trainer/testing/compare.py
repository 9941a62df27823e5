"""One process as the reference for every mesh."""

from collections.abc import Mapping

import torch
import torch.distributed as dist

from moe_trainer.kernels.local_part import local_part
from moe_trainer.parallel.shards import Box, local_box


def full_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The global tensors on the first rank's CPU, put together from every rank's box; nothing on the other ranks.

    Checked where several ranks hold the same part, and independent of DTensor's own redistribution. Collective, once
    for all tensors.

    Raises:
        AssertionError: on every rank, if two ranks hold different values of the same part, or a part is nowhere.
    """
    mine = {name: (local_box(tensor), local_part(tensor).cpu().clone()) for name, tensor in tensors.items()}
    ranks = [mine] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, ranks)
    whole: dict[str, torch.Tensor] = {}
    failure = [""]
    if ranks is not None:
        try:
            whole = {
                name: _assemble(name, tensor, [rank[name] for rank in ranks]) for name, tensor in tensors.items()
            }
        except AssertionError as error:
            failure = [str(error)]
    dist.broadcast_object_list(failure)
    assert not failure[0], failure[0]
    return whole


def _assemble(name: str, tensor: torch.Tensor, parts: list[tuple[Box, torch.Tensor]]) -> torch.Tensor:
    whole = torch.zeros(tensor.shape, dtype=tensor.dtype)
    seen = torch.zeros(tensor.shape, dtype=torch.bool)
    for box, part in parts:
        known = seen[box]
        assert torch.equal(whole[box][known], part[known]), f"{name}: ranks hold different values of the same part"
        whole[box], seen[box] = part, True
    assert seen.all(), f"{name}: no rank holds some part"
    return whole


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; infinite where the reference is zero and the other is not."""
    actual, expected = actual.double(), expected.double()
    difference, size = (actual - expected).norm().item(), expected.norm().item()
    if size == 0:
        return 0.0 if difference == 0 else float("inf")
    return difference / size


def zeros_kept(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether every row (along the last dim) that is zero in the reference is exactly zero.

    Rows, not single values: a value may be zero by rounding, a whole row is so for a reason (a token that never
    occurred, an expert that nobody chose).
    """
    return not actual[(expected == 0).all(-1)].any()


def errors_by_part(name: str, actual: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Relative error of a tensor; of an expert weight for each expert, of a router's weight for each row.

    One expert's or one row's mistake drowns in the norm of the whole, so they are compared on their own. A vector is
    compared whole: a single value may be a sum that cancels to its own rounding. Infinite too where a row that is
    zero in the reference is not.
    """
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if not zeros_kept(actual, expected):
        return {name: float("inf")}
    if expected.ndim > 1 and (".experts." in name or ".gate." in name):
        parts = zip(actual, expected, strict=True)
        return {f"{name}[{index}]": relative_error(*part) for index, part in enumerate(parts)}
    return {name: relative_error(actual, expected)}


def assert_close_by_part(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    """Every tensor, expert and router row within `tolerance`; exactly zero where the reference is zero."""
    assert actual.keys() == expected.keys()
    errors: dict[str, float] = {}
    for name in expected:
        errors |= errors_by_part(name, actual[name], expected[name])
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    listing = "\n".join(f"  {name}: {error:.2e}" for name, error in wrong.items())
    assert not wrong, f"{len(wrong)} of {len(errors)} parts differ by more than {tolerance}:\n{listing}"
