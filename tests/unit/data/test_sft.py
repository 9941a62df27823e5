"""Fine-tuning on conversations: the loss is that of transformers, and held-out conversations profit."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moe_trainer.cli import checkpoint, train
from moe_trainer.cli import eval as evaluation
from moe_trainer.config.choices import Packing
from moe_trainer.config.schema import PrepareConfig
from moe_trainer.data.loader import Loader
from moe_trainer.data.packing import Samples
from moe_trainer.data.prepare import prepare
from moe_trainer.data.shards import TRAIN, map_shards, read_index
from moe_trainer.observe.sinks import read_metrics
from moe_trainer.train.loss import LossFn
from tests.unit.models.against_transformers import from_folder, randomize

TEMPLATE = """{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
COLOURS = ("red", "green", "blue", "grey", "black", "white")


def write_conversations(path: Path, count: int) -> None:
    """Questions of chance, each with the one answer that it has."""
    dice = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            first, second = dice.sample(COLOURS, 2)
            turns = [f"{dice.choice('abcdefgh')} {first} {second}?", f"{second} {first}", "sure?", "yes"]
            roles = ("user", "assistant", "user", "assistant")
            messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
            file.write(json.dumps({"messages": messages}) + "\n")


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    write_conversations(tmp_path / "chat.jsonl", 7)
    prepare(
        PrepareConfig([str(tmp_path / "chat.jsonl")], chat_template=str(tmp_path / "template.jinja")),
        tmp_path / "out",
    )
    return tmp_path / "out"


def test_the_masked_loss_is_that_of_transformers(prepared: Path, tmp_path: Path) -> None:
    """Theirs over each conversation alone, ours over all of them packed into rows."""
    sizes = {"vocab_size": 264, "hidden_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 2}
    theirs = randomize(Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, norm_topk_prob=True)))
    theirs.save_pretrained(tmp_path / "hub")
    _, ours = from_folder(tmp_path / "hub")

    (shard,) = map_shards(prepared, read_index(prepared), TRAIN)
    total, count = 0.0, 0
    for start, end in zip([0, *shard.ends[:-1]], shard.ends, strict=True):
        ids = torch.tensor(shard.tokens[start:end].astype("int64")).unsqueeze(0)
        labels = ids.masked_fill(torch.tensor(shard.targets[start:end] == 0), -100)
        learned = int((labels[:, 1:] != -100).sum())
        total += theirs(input_ids=ids, labels=labels).loss.item() * learned
        count += learned

    # Long enough for several conversations, and for no window to cut one.
    seq_len = len(shard.tokens) - 1
    loader = Loader([Samples([shard], seq_len, Packing.documents)], 1, 1, 0, 0, 1)
    batch = loader.batch(0)
    assert loader.num_tokens(0) == count < 0.5 * seq_len
    loss, _ = LossFn(4, 0.0)(ours(batch.input_ids, documents=batch.documents), batch.labels, count)
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_the_recipe_lowers_the_loss_on_held_out_conversations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a run of ours through a Hugging Face folder, as the recipe's header says."""
    monkeypatch.chdir(tmp_path)
    one = ["parallel.fsdp=1", "parallel.tp=1", "device=cpu"]
    assert train.main(["+recipe=qwen3_moe_tiny", *one, "data.micro_batch_size=1", "steps=2"]) == 0
    assert checkpoint.main(["export", "checkpoint=runs/qwen3_moe_tiny", "out=base"]) == 0
    (tmp_path / "base" / "chat_template.jinja").write_text(TEMPLATE)
    write_conversations(tmp_path / "chat.jsonl", 200)
    settings = ["data.seq_len=256", "data.global_batch_size=8", "data.micro_batch_size=4", "data.prepare.seed=1"]
    steps = ["steps=30", "eval.every=15", "optim.lr=3e-3", "optim.warmup_steps=3"]
    data = ["model.init_from=base", "data.prepare.inputs=[chat.jsonl]", *settings]
    assert train.main(["+recipe=sft_chat", *data, *steps, *one, "run_name=sft"]) == 0
    losses = [
        line["val_loss"] for line in read_metrics(tmp_path / "runs" / "sft" / "metrics.jsonl") if "val_loss" in line
    ]
    capsys.readouterr()
    assert evaluation.main(["checkpoint=base", "data.path=prepared/sft_chat", "data.seq_len=256"]) == 0
    before = float(capsys.readouterr().out.split()[1])
    assert before > 5 > losses[0] > losses[1] and losses[1] < 0.4 * before
