"""A model of transformers, loaded here: the same logits, loss and greedy tokens, on one process and on several."""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from moe_trainer.checkpoint.documents import model_config_to_json
from moe_trainer.checkpoint.manager import CheckpointManager
from moe_trainer.config.choices import DeviceName
from moe_trainer.config.commands import GenerateConfig, GenerateParallelConfig
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import ModelConfig, ParallelConfig
from moe_trainer.data.tokenizer import load_tokenizer
from moe_trainer.generate.decoding import generate
from moe_trainer.generate.main import Continuation, _load_model, continue_prompt, continue_prompts, run_generation
from moe_trainer.generate.sampling import Sampler, Sampling
from moe_trainer.generate.source import open_source
from moe_trainer.kernels.local_part import local_part
from moe_trainer.models.attention import KVCache
from moe_trainer.models.decoder import CausalLM
from moe_trainer.models.norm import RMSNorm
from moe_trainer.models.registry import FAMILIES
from moe_trainer.models.router import Router
from moe_trainer.parallel.apply import build_model
from moe_trainer.parallel.collectives import gather_replicated
from moe_trainer.parallel.cross_entropy import cross_entropy_sum
from moe_trainer.parallel.mesh import build_meshes
from moe_trainer.parallel.shards import local_box
from moe_trainer.testing.pool import run_distributed
from tests.unit.generate.test_batches import MODELS

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
    sampler = Sampler(Sampling(5.0), [dist.get_rank()], 8)
    return [t.tolist() for t in generate(model, [[65, 66]], 8, sampler, (), group)]


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
        tokens = generate(model, batch, NEW_TOKENS, None, {stop_id, 999}, group)
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


def wish(folder: Path, values: dict[str, object]) -> None:
    """Replace the generation_config.json."""
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(values))


def test_eos_of_the_folder_ends_the_text(hub: Path, expected: Expected, tmp_path: Path) -> None:
    for file in hub.iterdir():
        (tmp_path / file.name).symlink_to(file)
    stop_id = expected.greedy[3]
    wish(tmp_path, {"eos_token_id": [263, stop_id]})
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
    used, speed = err.splitlines()
    assert used == "greedy" and speed.startswith(f"{NEW_TOKENS} tokens in ") and "tok/s, first token after" in speed


def test_the_context_can_be_used_to_its_end(hub: Path) -> None:
    cfg = config(hub)
    cfg.max_new_tokens = CONTEXT - len(PROMPT)
    ((greedy, _, _),) = run_distributed(continuations, 1, cfg, [])
    assert len(greedy) == CONTEXT - len(PROMPT)


PROMPTS = ["A river", "of", "patient water, wide", "A", "A river"]


def write_prompts(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


def of_file(folder: Path, prompts: Path, tp: int = 1, **changes: object) -> GenerateConfig:
    cfg = config(folder, tp, prompts=str(prompts), **changes)
    cfg.prompt = None
    return cfg


def every_continuation(configs: list[GenerateConfig]) -> list[list[Continuation]]:
    return [list(continue_prompts(cfg, CPU, lambda text: None)) for cfg in configs]


def greedy_alone(hub: Path, prompt: str) -> list[int]:
    """New tokens by transformers."""
    import transformers

    model = transformers.MixtralForCausalLM.from_pretrained(hub, dtype=torch.float32)
    ids = torch.tensor([list(prompt.encode())])
    return model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("ranks", [1, 2])
def test_prompts_of_a_file_come_out_as_alone(hub: Path, tmp_path: Path, ranks: int) -> None:
    file = write_prompts(tmp_path)
    sampled = {"temperature": 0.9, "top_k": 40, "top_p": 0.95}
    configs = [
        of_file(hub, file, ranks, batch_size=5),
        of_file(hub, file, ranks, batch_size=2),
        of_file(hub, file, ranks, batch_size=5, **sampled),
        of_file(hub, file, ranks, batch_size=2, **sampled),
    ]
    whole, pairs, drawn, drawn_in_pairs = run_distributed(every_continuation, ranks, configs)[0]
    assert [done.prompt for done in whole] == PROMPTS
    assert [done.new_ids for done in whole] == [greedy_alone(hub, prompt) for prompt in PROMPTS]
    assert pairs == whole
    assert drawn_in_pairs == drawn, "what is drawn depends on the batch"
    assert drawn[0].new_ids != drawn[4].new_ids, "equal prompts drew the same"
    assert all(done.new_ids != greedy.new_ids for done, greedy in zip(drawn, whole, strict=True))


def test_a_finished_sequence_is_not_written_on(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process: what is printed, what is counted, and the file."""
    for file in hub.iterdir():
        (tmp_path / file.name).symlink_to(file)
    alone = [greedy_alone(hub, prompt) for prompt in PROMPTS]
    stop_id = alone[0][5]
    wish(tmp_path, {"eos_token_id": stop_id})
    expected = [ids[: ids.index(stop_id) + 1] if stop_id in ids else ids for ids in alone]
    assert len({len(ids) for ids in expected}) > 1
    texts = [load_tokenizer("byte").decode(ids) for ids in expected]
    cfg = of_file(tmp_path, write_prompts(tmp_path), batch_size=4)
    run_generation(cfg)
    out, err = capsys.readouterr()
    assert out == "".join(f"{prompt}{text}\n\n" for prompt, text in zip(PROMPTS, texts, strict=True))
    assert err.splitlines()[-1].startswith(f"{sum(map(len, expected))} tokens in ")

    cfg.output = str(tmp_path / "out.jsonl")
    run_generation(cfg)
    assert capsys.readouterr().out == ""
    assert [json.loads(line) for line in Path(cfg.output).read_text().splitlines()] == [
        {"prompt": prompt, "continuation": text, "tokens": len(ids), "stopped": ids[-1] == stop_id}
        for prompt, text, ids in zip(PROMPTS, texts, expected, strict=True)
    ]


def test_the_folder_says_how_to_sample_unless_the_command_does(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in hub.iterdir():
        (tmp_path / file.name).symlink_to(file)

    def said(**changes: object) -> str:
        run_generation(config(tmp_path, **changes))
        return capsys.readouterr().err.splitlines()[0]

    wish(tmp_path, {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95})
    assert said() == "temperature=0.6 top_k=20 top_p=0.95 seed=0"
    assert said(temperature=2.0, top_k=3, seed=4) == "temperature=2 top_k=3 top_p=0.95 seed=4"
    assert said(temperature=0.0) == "greedy"
    wish(tmp_path, {"do_sample": True})
    assert said() == "temperature=1 top_k=all top_p=1 seed=0"
    for values in ({"do_sample": False, "temperature": 0.6, "top_k": 20}, {"temperature": 0.6}):
        wish(tmp_path, values)
        assert said() == "greedy"
        assert said(temperature=0.5) == "temperature=0.5 top_k=all top_p=1 seed=0"
    wish(tmp_path, {"do_sample": True, "top_p": "most"})
    with pytest.raises(ConfigError, match="generation_config.json: top_p=most must be a number"):
        said()


def test_a_line_that_is_too_long_is_named_before_weights_are_read(hub: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).symlink_to(hub / name)
    (tmp_path / "p.txt").write_text("short\n" + "x" * 50 + "\n")
    ((message,),) = run_distributed(file_refusals, 1, of_file(tmp_path, tmp_path / "p.txt"))
    assert message == (
        f"max_new_tokens={NEW_TOKENS}: with 50 tokens of the prompt in line 2 it exceeds the model's context of "
        f"{CONTEXT}; give at most 14"
    )


def file_refusals(cfg: GenerateConfig) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        list(continue_prompts(cfg, CPU, lambda text: None))
    return [str(caught.value)]


def follow(model: CausalLM, batch: list[list[int]], group: ProcessGroup | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens [batch, new] and the whole logits that they were chosen from, [batch, new, vocab]."""
    seen = []

    def choose(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits.clone())
        return logits.argmax(-1)

    tokens = torch.stack(list(generate(model, batch, NEW_TOKENS, choose, (), group)), dim=1)
    assert torch.equal(tokens, torch.stack(list(generate(model, batch, NEW_TOKENS, None, (), group)), dim=1))
    return tokens, torch.stack(seen, dim=1)


@torch.no_grad()
def fill(model: CausalLM) -> None:
    """The same values on every mesh, none at one that hides it: biases, sinks and the expert bias are not zero."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        whole = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        scaled = 1 + 0.2 * whole if "norm" in name else 0.3 * whole
        local_part(tensor).copy_(scaled[local_box(tensor)])


def follow_split(models: list[ModelConfig], batch: list[list[int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    ranks = dist.get_world_size()
    parallel = ParallelConfig(fsdp=1, tp=ranks, ep=ranks, expert_parallel=True)
    outcomes = []
    for cfg in models:
        meshes = build_meshes(parallel, "cpu")
        model, _ = build_model(cfg, parallel, meshes, torch.float64)
        model.to_empty(device="cpu").requires_grad_(False)
        fill(model)
        outcomes.append(follow(model, batch, meshes.tp.get_group()))
    return outcomes


def test_every_family_split_and_in_a_batch_is_as_alone_on_one_process() -> None:
    """TP&EP=2: experts, heads, windows, sinks and latents are split; sequences begin in different columns."""
    batch = [[5, 1, 4], [3], [2, 7, 1, 8, 2, 8, 1]]
    outcomes = run_distributed(follow_split, 2, list(MODELS.values()), batch, timeout=120)
    for family, *results in zip(MODELS, *outcomes, strict=True):
        model = FAMILIES[family].build(MODELS[family]).double().requires_grad_(False)
        fill(model)
        alone = [follow(model, [prompt], None) for prompt in batch]
        for tokens, logits in results:
            assert torch.equal(tokens, torch.cat([one for one, _ in alone])), family
            assert (logits - torch.cat([one for _, one in alone])).abs().max() <= 1e-9, family


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
