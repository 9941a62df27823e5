"""A tiny model of transformers beside ours: the same weights through a folder, then everything compared."""

import json
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_trainer.checkpoint.documents import model_config_to_json
from moe_trainer.checkpoint.export import export_checkpoint
from moe_trainer.checkpoint.hf import load_hf
from moe_trainer.checkpoint.manager import CheckpointManager
from moe_trainer.config.choices import DType
from moe_trainer.config.schema import ModelConfig
from moe_trainer.data.tokenizer import load_tokenizer
from moe_trainer.generate.decoding import generate
from moe_trainer.models.decoder import CausalLM
from moe_trainer.models.registry import FAMILIES
from moe_trainer.testing.compare import relative_error

SEQ = 21
TOLERANCE = 1e-5


@torch.no_grad()
def randomize(model: PreTrainedModel) -> PreTrainedModel:
    """Every parameter and saved buffer random, none at a value that would hide it; norms around one."""
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if "norm" in name:
            tensor.copy_(1 + 0.2 * torch.randn_like(tensor))
        elif tensor.ndim == 1 or name.endswith("_bias"):  # biases, sinks, correction of the choice
            tensor.copy_(0.3 * torch.randn_like(tensor))
        else:
            tensor.copy_(torch.randn_like(tensor) * tensor.shape[-1] ** -0.5)
    return model.eval()


def tensors_of(model: CausalLM) -> dict[str, torch.Tensor]:
    """Parameters and buffers."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def from_folder(folder: Path) -> tuple[ModelConfig, CausalLM]:
    """Ours, built and filled from a folder."""
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    family = next(family for key, family in FAMILIES.items() if key.value == model_type)
    cfg = family.config_from_hf(folder)
    model = family.build(cfg)
    for tensor in tensors_of(model).values():
        tensor.detach().fill_(float("nan"))
    load_hf(folder, tensors_of(model), partial(family.key_map, cfg))
    return cfg, model


def assert_same_as(theirs: PreTrainedModel, tmp_path: Path) -> None:
    """Logits, loss, every gradient, greedy tokens, and the way back."""
    theirs.save_pretrained(tmp_path / "hub")
    cfg, ours = from_folder(tmp_path / "hub")
    ids = torch.randint(0, theirs.config.vocab_size, (2, SEQ), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1, 1)
    their_logits, our_logits = theirs(ids).logits, ours(ids).logits
    assert relative_error(our_logits, their_logits) < TOLERANCE
    losses = [F.cross_entropy(logits.flatten(0, 1), labels.flatten()) for logits in (our_logits, their_logits)]
    assert abs(losses[0] - losses[1]) < TOLERANCE
    for loss in losses:
        loss.backward()
    _assert_same_gradients(ours, theirs, tmp_path)
    _assert_same_tokens(ours, theirs, ids[:, :9])
    _assert_same_after_export(cfg, ours, theirs, tmp_path)


def _assert_same_gradients(ours: CausalLM, theirs: PreTrainedModel, tmp_path: Path) -> None:
    """Their gradients take the weights' way through a folder, and so arrive in our layout."""
    weights = {name: parameter.detach().clone() for name, parameter in theirs.named_parameters()}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            assert parameter.grad is not None, name
            parameter.copy_(parameter.grad)
        theirs.save_pretrained(tmp_path / "gradients")
        for name, parameter in theirs.named_parameters():
            parameter.copy_(weights[name])
    expected = dict(from_folder(tmp_path / "gradients")[1].named_parameters())
    errors = {name: relative_error(p.grad, expected[name]) for name, p in ours.named_parameters()}
    assert all(parameter.norm() > 0 for parameter in expected.values())
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCE}
    assert not wrong, wrong


def _assert_same_tokens(ours: CausalLM, theirs: PreTrainedModel, prompt: torch.Tensor) -> None:
    steps = 14
    expected = theirs.generate(prompt, max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0)
    tokens = torch.stack(list(generate(ours, prompt, steps, lambda logits: logits.argmax(-1), ())), dim=1)
    assert torch.equal(tokens, expected[:, prompt.shape[1] :])


def _assert_same_after_export(cfg: ModelConfig, ours: CausalLM, theirs: PreTrainedModel, tmp_path: Path) -> None:
    documents = {
        "model.json": model_config_to_json(cfg),
        "tokenizer.json": load_tokenizer("byte").to_str(),
        "state.json": "{}",
    }
    tensors = {f"model.{name}": tensor for name, tensor in tensors_of(ours).items()}
    checkpoint = CheckpointManager(tmp_path / "checkpoints", keep_last=None).save(1, tensors, documents)
    export_checkpoint(checkpoint, tmp_path / "out", 10**9, DType.auto)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    expected = theirs.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, value in again.state_dict().items():
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name
    assert FAMILIES[cfg.family].config_from_hf(tmp_path / "out") == cfg
