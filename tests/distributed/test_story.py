"""The main story, whole: half on one mesh, half on another, out to a Hugging Face folder, and the sentence back."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_trainer.cli.demo import DemoFailed, Story, tell_story
from moe_trainer.config.choices import DeviceName, Quantization
from moe_trainer.config.commands import GenerateConfig
from moe_trainer.config.store import compose
from moe_trainer.generate.main import continue_prompt
from moe_trainer.observe.sinks import read_metrics
from moe_trainer.testing.pool import run_distributed

SENTENCE = compose("train", ["+recipe=mixtral_sp_ep"]).data.text


def story(root: Path) -> Story | str:
    try:
        return tell_story(root, "demo", torch.device("cpu"))
    except DemoFailed as failure:
        return str(failure)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("story")


@pytest.fixture(scope="module")
def told(root: Path) -> Story:
    stories = run_distributed(story, 4, root, timeout=120)
    assert isinstance(stories[0], Story), stories[0]
    return stories[0]


def test_the_sentence_comes_back(told: Story) -> None:
    assert told.text == SENTENCE
    assert SENTENCE.startswith(told.prompt) and len(told.prompt) < 20
    assert told.stages[2].loss < 0.05


def test_the_loss_goes_on_where_it_was(told: Story, root: Path) -> None:
    metrics = read_metrics(root / "demo" / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 101))
    losses = [line["loss"] for line in metrics]
    assert losses[0] > 5 and losses[49] == pytest.approx(told.stages[0].loss)
    assert losses[50] < 1.5 * losses[49], "the second half did not start where the first ended"
    tokens = [line["tokens"] for line in metrics]
    assert tokens == [step * tokens[0] for step in range(1, 101)]


def test_each_checkpoint_says_it_is_complete(told: Story) -> None:
    assert [json.loads((path / "COMMIT.json").read_text())["step"] for path in told.checkpoints] == [50, 100]
    meshes = [json.loads((path / "state.json").read_text())["mesh"] for path in told.checkpoints]
    assert [(mesh["fsdp"], mesh["tp"], mesh["ep"]) for mesh in meshes] == [(2, 2, 2), (1, 4, 4)]


def test_transformers_says_the_sentence_too(told: Story) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(told.hf_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(told.hf_folder)
    ids = tokenizer(told.prompt, return_tensors="pt").input_ids
    tokens = model.generate(ids, max_new_tokens=300, do_sample=False)
    assert tokenizer.decode(tokens[0]) == SENTENCE + "<|endoftext|>"


def say_it_in_8_bits(folder: Path, prompt: str, quantization: Quantization) -> str:
    cfg = GenerateConfig(str(folder), prompt, quantization=quantization, device=DeviceName.cpu)
    cfg.parallel.tp = dist.get_world_size()
    pieces: list[str] = []
    continue_prompt(cfg, torch.device("cpu"), pieces.append)
    return "".join(pieces)


@pytest.mark.parametrize("quantization", [Quantization.int8, Quantization.fp8])
def test_the_sentence_comes_back_from_8_bit_weights(told: Story, quantization: Quantization) -> None:
    said = run_distributed(say_it_in_8_bits, 4, told.hf_folder, told.prompt, quantization, timeout=120)
    assert said == [SENTENCE] * 4
