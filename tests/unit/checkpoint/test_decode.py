"""Quantised tensors of hub folders: MXFP4 against transformers, 128 x 128 float8 against a few lines."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moe_trainer.checkpoint.decode import read_decoded
from moe_trainer.checkpoint.hf import load_hf
from moe_trainer.config.errors import ConfigError
from moe_trainer.models.keymap import Encoding, Piece
from moe_trainer.parallel.shards import Box
from tests.unit.models.against_transformers import from_folder
from tests.unit.models.test_deepseek_v3 import theirs as deepseek_v3
from tests.unit.models.test_gpt_oss import theirs as gpt_oss


class Recorder:
    """Reads blocks from memory and counts what it read."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.elements = dict.fromkeys(tensors, 0)

    def __call__(self, key: str, box: Box) -> torch.Tensor:
        block = self.tensors[key][box]
        self.elements[key] += block.numel()
        return block


def packed(*shape: int) -> dict[str, torch.Tensor]:
    """Random MXFP4 of the decoded shape, with scales from far below to far above one."""
    generator = torch.Generator().manual_seed(0)
    groups = (*shape[:-1], shape[-1] // 32)
    return {
        "w_blocks": torch.randint(0, 256, (*groups, 16), generator=generator, dtype=torch.uint8),
        "w_scales": torch.randint(100, 150, groups, generator=generator, dtype=torch.uint8),
    }


def blocked(rows: int, columns: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A matrix in float8 with a factor for each 128 x 128 block, and its value."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    factors = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator) + 0.1
    value = weight.float()
    for row in range(rows):
        for column in range(0, columns, 128):
            value[row, column : column + 128] *= factors[row // 128, column // 128]
    return {"w": weight, "w_scale_inv": factors}, value


def test_mxfp4_as_in_transformers() -> None:
    tensors = packed(3, 8, 96)
    expected = convert_moe_packed_tensors(tensors["w_blocks"], tensors["w_scales"], dtype=torch.float32).mT
    assert expected.unique().numel() > 100
    whole = tuple(slice(0, size) for size in (3, 8, 96))
    assert torch.equal(read_decoded(Recorder(tensors), "w", Encoding.mxfp4, whole), expected)


def test_mxfp4_reads_only_the_groups_that_it_needs() -> None:
    tensors = packed(3, 8, 96)
    expected = convert_moe_packed_tensors(tensors["w_blocks"], tensors["w_scales"], dtype=torch.float32).mT
    read = Recorder(tensors)
    box = (slice(1, 2), slice(2, 5), slice(40, 70))  # columns of the second and the third group
    assert torch.equal(read_decoded(read, "w", Encoding.mxfp4, box), expected[box])
    assert read.elements == {"w_blocks": 3 * 2 * 16, "w_scales": 3 * 2}


def test_fp8_reads_only_the_rows_that_it_needs() -> None:
    tensors, expected = blocked(300, 200)
    read = Recorder(tensors)
    box = (slice(120, 260), slice(130, 200))
    assert torch.equal(read_decoded(read, "w", Encoding.fp8_blocks, box), expected[box])
    assert read.elements == {"w": 140 * 70, "w_scale_inv": 3 * 1}
    whole = tuple(slice(0, size) for size in (300, 200))
    assert torch.equal(read_decoded(read, "w", Encoding.fp8_blocks, whole), expected)


@pytest.mark.parametrize("broken", ["w_scale_inv", "w"])
def test_fp8_of_a_wrong_form_is_refused(broken: str, tmp_path: Path) -> None:
    tensors, _ = blocked(130, 16)
    pieces = {"p": [Piece("w", encoding=Encoding.fp8_blocks)]}
    save_file(tensors, tmp_path / "model.safetensors")
    load_hf(tmp_path, {"p": torch.zeros(130, 16)}, lambda keys: pieces)
    save_file(tensors | {broken: torch.ones(1, 1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=f"{broken}: "):
        load_hf(tmp_path, {"p": torch.zeros(130, 16)}, lambda keys: pieces)


def test_a_folder_of_gpt_oss_in_mxfp4(tmp_path: Path) -> None:
    """As published: the experts' blocks lie the other way round than transformers holds them."""
    model = gpt_oss(intermediate_size=32)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    values = {}
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        shape = tensors.pop(key).mT.shape  # [experts, rows, columns]
        parts = {f"{key}{name[1:]}": tensor for name, tensor in packed(*shape).items()}
        tensors |= parts
        values[key] = convert_moe_packed_tensors(*parts.values(), dtype=torch.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    _, ours = from_folder(tmp_path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in values:
                parameter.copy_(values[name])
    model.save_pretrained(tmp_path / "plain")
    _, plain = from_folder(tmp_path / "plain")
    assert len(values) == 6
    for (name, left), right in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_a_folder_of_deepseek_v3_in_fp8(tmp_path: Path) -> None:
    model = deepseek_v3(q_lora_rank=12, hidden_size=136)
    model.save_pretrained(tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    kept = ("embed_tokens", "lm_head", "norm", "mlp.gate.")
    decoded = {}
    for key in [key for key in tensors if not any(part in key for part in kept)]:
        parts, decoded[key] = blocked(*tensors[key].shape)
        tensors |= {key: parts["w"], f"{key}_scale_inv": parts["w_scale_inv"]}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((tmp_path / "plain" / "config.json").read_text())
    _, ours = from_folder(tmp_path)
    plain = {key: value for key, value in tensors.items() if value.dtype == torch.float32 and "scale_inv" not in key}
    save_file(plain | decoded, tmp_path / "plain" / "model.safetensors")
    _, expected = from_folder(tmp_path / "plain")
    assert len(decoded) > 50
    for (name, left), right in zip(ours.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(left, right), name
