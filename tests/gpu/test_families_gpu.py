"""Each family's tiny recipe on two GPUs in bfloat16: the sentence is learned on two meshes and comes back under TP&EP
from weights in 16 and in 8 bits. Prints a row for each run.
"""

from difflib import SequenceMatcher
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_trainer.config.choices import DeviceName, Family, Quantization
from moe_trainer.config.commands import GenerateConfig
from moe_trainer.config.store import compose
from moe_trainer.config.validate import validate
from moe_trainer.generate.main import continue_prompt
from moe_trainer.observe.sinks import read_metrics
from moe_trainer.parallel.gpus import count_places
from moe_trainer.testing.pool import run_distributed
from moe_trainer.train.trainer import Trainer

MESHES = {
    "tp=2 ep=2": ["parallel.fsdp=1", "parallel.tp=2", "parallel.ep=2"],
    "fsdp=2 ep=2": ["parallel.fsdp=2", "parallel.tp=1", "parallel.ep=2", "data.micro_batch_size=1"],
}
SP_EP = ["parallel.sequence_parallel=true", "parallel.expert_parallel=true"]
PROMPT_LENGTH = 15


def learn_and_say(family: str, mesh: str, folder: Path) -> tuple[list[float], dict[str, str]]:
    """The losses, and what the trained model says in each type of weights."""
    # Longer than the recipe: rounding to 8 bits needs a margin at every token of the sentence.
    recipe = [f"+recipe={family}_tiny", "steps=160", f"run_dir={folder}", f"run_name={family}", "device=cuda"]
    cfg = validate(compose("train", [*recipe, *SP_EP, *MESHES[mesh]]), dist.get_world_size(), count_places())
    device = torch.device("cuda", torch.cuda.current_device())
    trainer = Trainer(cfg, device)
    trainer.start()
    trainer.fit()
    said = {}
    for quantization in Quantization:
        pieces: list[str] = []
        prompt = cfg.data.text[:PROMPT_LENGTH]
        generation = GenerateConfig(
            str(trainer.run_folder), prompt, quantization=quantization, device=DeviceName.cuda
        )
        generation.parallel.tp = dist.get_world_size()
        continue_prompt(generation, device, pieces.append)
        said[quantization.value] = "".join(pieces)
    losses = (
        [line["loss"] for line in read_metrics(trainer.run_folder / "metrics.jsonl")] if not dist.get_rank() else []
    )
    return losses, said


@pytest.mark.skipif(count_places() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("family", [family.value for family in Family])
@pytest.mark.parametrize("mesh", MESHES)
def test_the_sentence(family: str, mesh: str, tmp_path: Path) -> None:
    sentence = compose("train", [f"+recipe={family}_tiny"]).data.text
    losses, said = run_distributed(learn_and_say, 2, family, mesh, tmp_path, timeout=150, device="cuda")[0]
    verdicts = {name: "verbatim" if text == sentence else f"says {text!r}" for name, text in said.items()}
    print(
        f"\n{family:12} {mesh:12} loss {losses[0]:.2f} to {losses[-1]:.4f}",
        *map(": ".join, verdicts.items()),
        sep="  ",
    )
    assert losses[-1] < 0.1
    # Three bits of mantissa now and then turn a router's choice that was nearly even, and with it a word.
    is_close = SequenceMatcher(None, said.pop(Quantization.fp8.value), sentence, autojunk=False).ratio() > 0.9
    assert is_close and set(said.values()) == {sentence}, verdicts
