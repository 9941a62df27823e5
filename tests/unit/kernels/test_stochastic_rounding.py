import torch

from moe_trainer.kernels.stochastic_rounding import round_stochastically


def test_neighbours_and_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    for value in (1.001, -3.14159, 1e-30, 0.0, 12345.678):
        x = torch.full((100_000,), value)
        rounded = round_stochastically(x, generator).float()
        below_and_above = rounded.unique()
        assert len(below_and_above) <= 2
        assert ((below_and_above - value).abs() <= abs(value) * 2**-7).all()
        spread = (below_and_above.max() - below_and_above.min()).item()
        assert abs(rounded.double().mean().item() - value) <= 0.01 * spread + 1e-7 * abs(value)


def test_what_bfloat16_holds_stays() -> None:
    x = torch.randn(1000).to(torch.bfloat16)
    assert torch.equal(round_stochastically(x.float(), torch.Generator().manual_seed(0)), x)
