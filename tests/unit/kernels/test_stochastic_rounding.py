import pytest
import torch

from moe_trainer.kernels.stochastic_rounding import RandomBits, round_stochastically


def bits_of(size: int, name: str = "weight", step: int = 1) -> torch.Tensor:
    return RandomBits.of(name, (size,), [slice(0, size)]).draw(step, torch.device("cpu"))


def test_neighbours_and_mean() -> None:
    for value in (1.001, -3.14159, 1e-30, 0.0, 12345.678):
        x = torch.full((100_000,), value)
        for first_bit in (0, 16, 32):
            rounded = round_stochastically(x, bits_of(len(x)) >> first_bit).float()
            below_and_above = rounded.unique()
            assert len(below_and_above) <= 2
            assert ((below_and_above - value).abs() <= abs(value) * 2**-7).all()
            spread = (below_and_above.max() - below_and_above.min()).item()
            assert abs(rounded.double().mean().item() - value) <= 0.01 * spread + 1e-7 * abs(value)


def test_what_bfloat16_holds_stays() -> None:
    x = torch.randn(1000).to(torch.bfloat16)
    assert torch.equal(round_stochastically(x.float(), bits_of(1000)), x)


def test_the_bits_are_those_of_splitmix64() -> None:
    """In Python's whole numbers."""
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return x ^ x >> 31

    source = RandomBits.of("weight", (10,), [slice(3, 7)])
    expected = [mix(place * 0x9E3779B97F4A7C15 + mix(5 << 32 | source.tag) & mask) for place in range(3, 7)]
    assert [value % 2**64 for value in source.draw(5, torch.device("cpu")).tolist()] == expected


def test_every_bit_is_even_and_none_goes_with_another() -> None:
    size = 1 << 16
    of_many = [bits_of(size), bits_of(size, step=2), bits_of(size, name="other"), bits_of(size + 1)[1:]]
    columns = torch.stack([bits >> number & 1 for bits in of_many for number in range(48)]).double() * 2 - 1
    products = columns @ columns.t() / size - torch.eye(len(columns))  # of independent coins: 0 +- 1 / sqrt(size)
    assert columns.mean(1).abs().max() < 5 / size**0.5
    assert products.abs().max() < 6 / size**0.5


@pytest.mark.parametrize(
    "box",
    [
        (slice(0, 4), slice(0, 2), slice(0, 6), slice(0, 8)),
        (slice(1, 3), slice(0, 2), slice(0, 6), slice(0, 8)),
        (slice(1, 3), slice(0, 2), slice(0, 6), slice(4, 8)),
        (slice(0, 4), slice(0, 2), slice(3, 6), slice(0, 8)),
        (slice(0, 4), slice(0, 2), slice(3, 6), slice(4, 8)),
        (slice(2, 3), slice(0, 2), slice(2, 3), slice(4, 8)),
        (slice(3, 4), slice(1, 2), slice(5, 6), slice(7, 8)),
        (slice(4, 4), slice(0, 2), slice(0, 6), slice(0, 8)),
    ],
)
def test_a_block_has_the_bits_of_its_place_in_the_whole(box: tuple[slice, ...]) -> None:
    shape = 4, 2, 6, 8
    whole = bits_of(384).view(shape)
    source = RandomBits.of("weight", shape, box)
    assert torch.equal(source.draw(1, torch.device("cpu")), whole[box].flatten())
    rest = [part.stop - part.start == size for part, size in zip(box[1:], shape[1:], strict=True)]
    assert source.is_in_one_piece == (all(rest) or whole[box].numel() == 1)
