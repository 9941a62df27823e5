"""A model of transformers, loaded here: the same logits, loss and greedy tokens, on one process and on several."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from moe_trainer.checkpoint.documents import model_config_to_json
from moe_trainer.checkpoint.manager import CheckpointManager
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import DeviceName, GenerateConfig, GenerateParallelConfig, ParallelConfig
from moe_trainer.data.tokenizer import load_tokenizer
from moe_trainer.generate.decoding import generate
from moe_trainer.generate.main import _load_model, continue_prompt, run_generation
from moe_trainer.generate.sampling import Sampler
from moe_trainer.generate.source import open_source
from moe_trainer.models.attention import KVCache
from moe_trainer.models.norm import RMSNorm
from moe_trainer.models.router import Router
from moe_trainer.parallel.collectives import gather_replicated
from moe_trainer.parallel.cross_entropy import cross_entropy_sum
from moe_trainer.parallel.shards import local_part
from moe_trainer.testing.pool import run_distributed

CPU = torch.device("cpu")
PROMPT = "A river"
NEW_TOKENS = 24
CONTEXT = 64


class Expected(NamedTuple):
    """What transformers says of the prompt."""

    logits: torch.Tensor
    """[1, prompt, vocab] float32."""
    loss: float
    greedy: list[int]
    """New tokens."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral with more query than key heads, as transformers saves it, beside the byte tokenizer."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    folder = tmp_path_factory.mktemp("hub")
    model = transformers.MixtralForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    load_tokenizer("byte").save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def expected(hub: Path) -> Expected:
    import transformers

    model = transformers.MixtralForCausalLM.from_pretrained(hub, dtype=torch.float32)
    ids = torch.tensor([list(PROMPT.encode())])
    with torch.no_grad():
        out = model(ids, labels=ids)
        tokens = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    return Expected(out.logits, out.loss.item(), tokens[0, ids.shape[1] :].tolist())


def config(folder: Path, tp: int = 1, **changes: object) -> GenerateConfig:
    return GenerateConfig(
        str(folder), PROMPT, NEW_TOKENS, device=DeviceName.cpu, parallel=GenerateParallelConfig(tp), **changes
    )


def forward(folder: Path) -> tuple[torch.Tensor, float, float]:
    """Logits [1, prompt, vocab] and mean loss of the prompt; largest difference of the cached logits from them."""
    ranks = dist.get_world_size()
    parallel = ParallelConfig(fsdp=1, tp=ranks, ep=ranks, expert_parallel=True)
    model, group = _load_model(open_source(folder), parallel, CPU, torch.float32)

    def whole(logits: torch.Tensor) -> torch.Tensor:
        return logits if group is None else gather_replicated(logits, 2, [logits.shape[2]] * group.size(), group)

    ids = torch.tensor([list(PROMPT.encode())])
    labels = torch.cat((ids[:, 1:], torch.tensor([[-100]])), 1)
    with torch.inference_mode():
        local = model(ids).logits
        logits = whole(local)
        loss = cross_entropy_sum(local, labels, group).item() / (ids.shape[1] - 1)
        cache = KVCache(len(model.model.layers), ids.shape[1])
        worst = 0.0
        for start, stop in ((0, 3), (3, 4), (4, 6), (6, 7)):  # a chunk, one, a chunk after what is cached, one
            last = whole(model(ids[:, start:stop], cache).logits)
            assert last.shape[1] == 1
            worst = max(worst, (last[:, 0] - logits[:, stop - 1]).abs().max().item())
    return logits.clone(), loss, worst


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_logits_and_loss_equal_those_of_transformers(hub: Path, expected: Expected, ranks: int) -> None:
    for logits, loss, worst_cached in run_distributed(forward, ranks, hub):
        assert (logits - expected.logits).abs().max() <= 1e-5
        assert loss == pytest.approx(expected.loss, abs=1e-5)
        assert worst_cached <= 1e-5


def continuations(cfg: GenerateConfig, seeds: list[int]) -> tuple[list[int], list[int], list[list[int]]]:
    """New tokens: greedily, with top_k=1, and drawn with each seed."""
    greedy = continue_prompt(cfg, CPU, lambda text: None).new_ids
    cfg.temperature, cfg.top_k = 0.7, 1
    first = continue_prompt(cfg, CPU, lambda text: None).new_ids
    cfg.top_k = None
    drawn = []
    for cfg.seed in seeds:
        drawn.append(continue_prompt(cfg, CPU, lambda text: None).new_ids)
    return greedy, first, drawn


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_tokens_equal_those_of_transformers(hub: Path, expected: Expected, ranks: int) -> None:
    results = run_distributed(continuations, ranks, config(hub, ranks), [5, 5, 6])
    assert all(result == results[0] for result in results), "ranks went on with different tokens"
    greedy, first, drawn = results[0]
    assert len(set(expected.greedy)) > 4  # not the same token for ever
    assert greedy == expected.greedy
    assert first == greedy
    assert drawn[0] == drawn[1] != drawn[2]


def disagreeing(folder: Path) -> list[list[int]]:
    """Ranks whose samplers choose different tokens."""
    model, group = _load_model(
        open_source(folder), ParallelConfig(fsdp=1, tp=2, ep=2, expert_parallel=True), CPU, torch.float32
    )
    sampler = Sampler(temperature=5.0, seed=dist.get_rank())
    return [t.tolist() for t in generate(model, torch.tensor([[65, 66]]), 8, sampler, (), group)]


def test_the_first_rank_chooses_for_all(hub: Path) -> None:
    first, second = run_distributed(disagreeing, 2, hub)
    assert first == second


def stopping(folder: Path, stop_id: int) -> list[list[list[int]]]:
    model, group = _load_model(
        open_source(folder), ParallelConfig(fsdp=1, tp=1, ep=1, expert_parallel=True), CPU, torch.float32
    )
    prompt = list(PROMPT.encode())
    runs = []
    for batch in ([prompt], [prompt, prompt[::-1]]):
        tokens = generate(model, torch.tensor(batch), NEW_TOKENS, Sampler(), {stop_id, 999}, group)
        runs.append([step.tolist() for step in tokens])
    return runs


def test_a_stop_token_ends_its_sequence(hub: Path, expected: Expected) -> None:
    place = next(i for i, token in enumerate(expected.greedy) if i > 2 and token not in expected.greedy[:i])
    stop_id = expected.greedy[place]
    ((alone, pair),) = run_distributed(stopping, 1, hub, stop_id)
    assert [step[0] for step in alone] == expected.greedy[: place + 1]
    first = [step[0] for step in pair]
    assert first[: place + 1] == expected.greedy[: place + 1]
    assert set(first[place:]) == {stop_id}, "an ended sequence went on"
    assert len(pair) > place + 1 or pair[-1] == [stop_id, stop_id]


def test_eos_of_the_folder_ends_the_text(hub: Path, expected: Expected, tmp_path: Path) -> None:
    for file in hub.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    stop_id = expected.greedy[3]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [263, stop_id]}))
    ((greedy, _, _),) = run_distributed(continuations, 1, config(tmp_path), [])
    assert greedy == expected.greedy[: expected.greedy.index(stop_id) + 1]


def save_checkpoint(hub: Path, root: Path) -> None:
    """The hub's weights as a float32 checkpoint of ours with optimizer tensors beside them, saved from two ranks."""
    source = open_source(hub)
    model, _ = _load_model(source, ParallelConfig(fsdp=1, tp=2, ep=2, expert_parallel=True), CPU, torch.float32)
    tensors = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    tensors["optim.exp_avg.model.norm.weight"] = torch.zeros(32)
    documents = {"model.json": model_config_to_json(source.model), "tokenizer.json": source.tokenizer.to_str()}
    CheckpointManager(root / "run" / "checkpoints", None).save(7, tensors, documents)


def bfloat16(folder: Path) -> tuple[dict[str, set[torch.dtype]], float]:
    """Types of the weights, and the mean difference of the logits from those in float32."""
    parallel = ParallelConfig(fsdp=1, tp=2, ep=2, expert_parallel=True)
    source = open_source(folder)
    low, wide = (_load_model(source, parallel, CPU, dtype)[0] for dtype in (torch.bfloat16, torch.float32))
    precise = {p.dtype for m in low.modules() if isinstance(m, (RMSNorm, Router)) for p in m.parameters()}
    experts = low.model.layers[0].mlp.experts
    assert local_part(experts.gate_up_proj).shape == (4, 2, 48, 32)
    ids = torch.tensor([list(PROMPT.encode())])
    with torch.inference_mode():
        difference = (low(ids).logits.float() - wide(ids).logits).abs().mean().item()
    return {"precise": precise, "experts": {p.dtype for p in experts.parameters()}}, difference


def test_a_run_and_its_checkpoint_generate_too(hub: Path, expected: Expected, tmp_path: Path) -> None:
    run_distributed(save_checkpoint, 2, hub, tmp_path)
    run = tmp_path / "run"
    for folder, ranks in ((run, 4), (run / "checkpoints" / "step-00000007", 1)):
        assert run_distributed(continuations, ranks, config(folder, ranks), [])[0][0] == expected.greedy


def test_bfloat16_casts_all_but_norms_and_router(hub: Path, tmp_path: Path) -> None:
    run_distributed(save_checkpoint, 2, hub, tmp_path)
    for folder in (hub, tmp_path / "run"):
        types, worst = run_distributed(bfloat16, 2, folder)[0]
        assert types == {"precise": {torch.float32}, "experts": {torch.bfloat16}}
        assert 0 < worst < 0.1  # of logits of about 1


def refusals(folder: Path, configs: list[GenerateConfig]) -> list[str]:
    messages = []
    for cfg in configs:
        try:
            continue_prompt(cfg, CPU, lambda text: None)
        except ConfigError as error:
            messages.append(str(error).replace(str(folder), "DIR"))
    return messages


def test_mistakes_are_one_line_on_every_rank(hub: Path, tmp_path: Path) -> None:
    for file in hub.glob("*.json"):  # the weights are not there: nothing may get as far as reading them
        (tmp_path / file.name).symlink_to(file)
    long = config(tmp_path, 3)
    fits = len(PROMPT)
    ((first, *_),) = {tuple(m) for m in run_distributed(refusals, 3, tmp_path, [long])}
    assert first == "parallel.tp=3 must divide model.num_heads(8)"
    too_long, prompt_too_long, empty = (config(tmp_path) for _ in range(3))
    too_long.max_new_tokens = CONTEXT
    prompt_too_long.prompt = "x" * CONTEXT
    empty.checkpoint = str(tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    ((a, b, c),) = run_distributed(refusals, 1, tmp_path, [too_long, prompt_too_long, empty])
    assert a == (
        f"max_new_tokens={CONTEXT}: with {fits} tokens of the prompt it exceeds the model's context of {CONTEXT}; "
        f"give at most {CONTEXT - fits}"
    )
    assert b.endswith("; give a shorter prompt")
    assert "DIR/empty is neither a checkpoint nor a run" in c


def test_stdout_is_prompt_and_continuation_only(
    hub: Path, expected: Expected, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, a world of one."""
    run_generation(config(hub))
    out, err = capsys.readouterr()
    assert out == PROMPT + load_tokenizer("byte").decode(expected.greedy) + "\n"
    assert err.startswith(f"{NEW_TOKENS} tokens in ") and "tok/s, first token after" in err


def test_the_context_can_be_used_to_its_end(hub: Path) -> None:
    cfg = config(hub)
    cfg.max_new_tokens = CONTEXT - len(PROMPT)
    ((greedy, _, _),) = run_distributed(continuations, 1, cfg, [])
    assert len(greedy) == CONTEXT - len(PROMPT)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
