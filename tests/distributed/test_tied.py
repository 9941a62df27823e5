"""A model whose head is its embedding: trained on one mesh, resumed on others, and read back by every reader."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_trainer.checkpoint.export import export_checkpoint
from moe_trainer.config.choices import DType
from moe_trainer.config.schema import CheckpointConfig, ModelConfig
from moe_trainer.testing.pool import run_distributed
from tests.distributed.runs import figures, run_config, train_each
from tests.distributed.test_generate import PROMPT, forward

MODEL = ModelConfig(
    hidden_size=32, intermediate_size=32, num_layers=1, head_dim=8, num_experts=4, tie_word_embeddings=True
)


def test_trained_resumed_and_read_back(tmp_path: Path) -> None:
    whole = run_config(tmp_path, "whole", "one", 6, model=MODEL)
    run_distributed(train_each, 1, [whole])
    for mesh, ranks, steps in (("fsdp2", 2, 2), ("one", 1, 4), ("tp2", 2, 6)):
        cfg = run_config(tmp_path, "parts", mesh, steps, model=MODEL, checkpoint=CheckpointConfig(resume="auto"))
        run_distributed(train_each, ranks, [replace(cfg, optim=replace(cfg.optim, schedule_steps=6))])
    assert figures(tmp_path / "parts") == pytest.approx(figures(tmp_path / "whole"), rel=1e-9)

    checkpoint = tmp_path / "parts" / "checkpoints" / "step-00000006"
    folder = tmp_path / "hf"
    export_checkpoint(checkpoint, folder, 10**9, DType.float32)
    transformers = pytest.importorskip("transformers")
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([list(PROMPT.encode())]))
    for source in (checkpoint, folder):
        for ranks in (1, 2):
            logits = run_distributed(forward, ranks, source)[0][0]
            torch.testing.assert_close(logits, theirs.logits, rtol=1e-4, atol=1e-4)
