"""One process as the reference for every mesh."""

import torch
import torch.distributed as dist

from moe_trainer.parallel.shards import local_box, local_part


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The global tensor on the CPU, put together from every rank's box, and checked where several ranks hold a part.

    Independent of DTensor's own redistribution. Collective.

    Raises:
        AssertionError: two ranks hold different values of the same part, or a part is nowhere.
    """
    mine = (local_box(tensor), local_part(tensor).cpu().clone())
    parts = [mine] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    whole = torch.zeros(tensor.shape, dtype=tensor.dtype)
    seen = torch.zeros(tensor.shape, dtype=torch.bool)
    for box, part in parts:
        known = seen[box]
        assert torch.equal(whole[box][known], part[known]), "ranks hold different values of the same part"
        whole[box], seen[box] = part, True
    assert seen.all(), "no rank holds some part of the tensor"
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
    """Relative error of a tensor; of an expert weight for each expert, of a router for each row.

    One expert's or one row's mistake drowns in the norm of the whole, so they are compared on their own. Infinite too
    where a row that is zero in the reference is not.
    """
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if not zeros_kept(actual, expected):
        return {name: float("inf")}
    if ".experts." in name or ".gate." in name:
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
