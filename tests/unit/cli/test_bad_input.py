"""Every mistake that we could think of: exit code 2, one line that names the key or the file and the fix, and not a
byte written or changed."""

import json
import os
import pickle
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models

from moe_trainer.cli import checkpoint, generate, train
from moe_trainer.config import store
from moe_trainer.config.files import lock
from moe_trainer.data.tokenizer import load_tokenizer

COMMANDS = {"moe-train": train.main, "moe-generate": generate.main, "moe-checkpoint": checkpoint.main}
SMALL = [
    "device=cpu", "nproc=1", "steps=1", "model.hidden_size=16", "model.intermediate_size=16", "model.num_layers=1",
    "model.num_heads=2", "model.num_kv_heads=2", "model.head_dim=8", "data.global_batch_size=1", "optim.lr=0.001",
]  # fmt: skip
TEXT = "data.text=some words to learn"
SENTENCE = ["+recipe=mixtral_sp_ep", "device=cpu"]


@dataclass(frozen=True)
class Mistake:
    """A command line, what is said of it, and what is done to the folder before."""

    argv: str | list[str]
    says: str
    arrange: Callable[[Path], None] | None = None
    env: tuple[tuple[str, str], ...] = ()
    command: str = "moe-train"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, its weights as a Hugging Face folder, and some files."""
    folder = tmp_path_factory.mktemp("trained")
    assert train.main([*SMALL, TEXT, f"run_dir={folder}", "run_name=run"]) == 0
    assert checkpoint.main(["export", f"checkpoint={folder}/run", f"out={folder}/hub"]) == 0
    (folder / "text.txt").write_text("some words to learn")
    load_tokenizer("byte").save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(trained, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "here"
    if dist.is_initialized():
        dist.destroy_process_group()


def contents(folder: Path) -> dict[str, str]:
    """Every file and link below, by a hash of what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        else:
            found[name] = sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


def check(mistake: Mistake, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in mistake.env:
        monkeypatch.setenv(name, value)
    if mistake.arrange is not None:
        mistake.arrange(place)
    before = contents(place)
    capsys.readouterr()
    argv = mistake.argv.split() if isinstance(mistake.argv, str) else mistake.argv
    code = COMMANDS[mistake.command](argv)
    err = capsys.readouterr().err
    assert code == 2, err
    # What the model is, and that a damaged checkpoint is passed over, may be told on lines before.
    last = err.splitlines()[-1]
    assert last.startswith(f"{mistake.command}: ") and mistake.says in last, err
    assert "Traceback" not in err and sum(line.startswith("moe-") for line in err.splitlines()) == 1
    assert contents(place) == before


def small(*more: str) -> list[str]:
    return [*SMALL, TEXT, *more]


CONFIG = [
    Mistake("optim.lrr=1", "optim.lrr is not a key; did you mean optim.lr?"),
    Mistake("optimm.lr=1", "optimm.lr is not a key; did you mean optim.lr?"),
    Mistake("steps=two", "steps: Value 'two' of type 'str' could not be converted to Integer"),
    Mistake("optim.lr=fast", "optim.lr: Value 'fast' of type 'str' could not be converted to Float"),
    Mistake("steps=null", "steps: field 'steps' is not Optional"),
    Mistake("dtype=f32", "dtype: Invalid value 'f32', expected one of [auto, float32"),
    Mistake("steps=[", "steps=[: the value of steps cannot be read"),
    Mistake("steps=1,2", "steps=1,2: one value is wanted"),
    Mistake("~steps=1", "keys cannot be removed; give steps=VALUE"),
    Mistake("steps", "'steps' is not of the form key=value"),
    Mistake("+recipe=mixtral_spep", "did you mean mixtral_sp_ep?"),
    Mistake("recipe=mixtral_tp", "write +recipe=mixtral_tp"),
    Mistake("model=huge", "model is one of deepseek_v3_tiny"),
    Mistake("_target_=os.system", "_target_ is not a key"),
    Mistake("steps=${nothing}", "steps: Interpolation key 'nothing' not found"),
    Mistake("steps=${oc.env:HOME}", "only ${KEY}, another key of the config, is read"),
    Mistake("steps=${oc.${a}:HOME}", "only ${KEY}, another key of the config, is read"),
    Mistake("steps=0", "steps=0 must be at least 1"),
    Mistake(f"steps={'9' * 5000}", "the value of steps cannot be read"),
    Mistake(f"steps={'[' * 5000}", "the value of steps cannot be read"),
    Mistake(f"run_dir={'x' * 300}", "xxx/mixtral_sp_ep: File name too long"),
    Mistake(f"data.path={'x' * 300}", "xxx: File name too long"),
    Mistake("run_name=\x1b[2J", r"run_name='\x1b[2J' must be a folder name"),
    Mistake("run_dir=\x1b[2J/text.txt/x data.path=\x1b[2J", r"data.path=\x1b[2J: there is no such file"),
    Mistake("seed=-1", "seed=-1 must be at least 0"),
    Mistake("optim.lr=0", "optim.lr=0.0 must be above 0"),
    Mistake("optim.lr=nan", "optim.lr=nan must be above 0"),
    Mistake("optim.beta1=1", "optim.beta1=1.0 must be at least 0 and below 1"),
    Mistake("optim.min_lr_ratio=2", "optim.min_lr_ratio=2.0 must be between 0 and 1"),
    Mistake("optim.warmup_steps=200", "optim.warmup_steps=200 must be at most schedule_steps(100)"),
    Mistake("optim.weight_decay=-1", "optim.weight_decay=-1.0 must be at least 0"),
    Mistake("optim.max_grad_norm=0", "optim.max_grad_norm=0.0 must be above 0"),
    Mistake("max_minutes=0", "max_minutes=0.0 must be above 0"),
    Mistake("dtype=float64 reduce_dtype=float32", "reduce_dtype=float32 must not be narrower than dtype=float64"),
    Mistake("run_name=../x", "run_name='../x' must be a folder name"),
    Mistake("run_name=..", "run_name='..' must be a folder name"),
    Mistake("run_dir=text.txt", "text.txt is a file, not a folder"),
    Mistake("checkpoint.every=0", "checkpoint.every=0 must be at least 1"),
    Mistake("checkpoint.keep_last=0", "checkpoint.keep_last=0 must be at least 1"),
    Mistake("checkpoint.on_failure=panic", "checkpoint.on_failure: Invalid value 'panic', expected one of [report"),
    Mistake("checkpoint.allow_changes=[colour]", "Invalid value 'colour', expected one of [model, tokenizer"),
    Mistake("run_dir=. run_name=run", "run already holds steps of a run; go on with checkpoint.resume=auto"),
    Mistake("launch.max_restarts=-1", "launch.max_restarts=-1 must be at least 0"),
    Mistake("launch.max_restarts=1", "launch.max_restarts=1 needs checkpoint.every"),
    Mistake("launch.shrink=true", "launch.shrink=true needs parallel.mesh=auto"),
    Mistake("parallel.mesh=auto launch.shrink=true", "launch.shrink=true needs launch.max_restarts"),
    Mistake("launch.timeout_seconds=0", "launch.timeout_seconds=0.0 must be above 0"),
    Mistake("checks.replicas_every=0", "checks.replicas_every=0 must be at least 1"),
    Mistake("checks.replay_every=0", "checks.replay_every=0 must be at least 1"),
    Mistake("checks.replay_every=5", "checks.replay_every=5 needs deterministic=true"),
]
CONFIG = [Mistake([*SENTENCE, *str(m.argv).split()], m.says, m.arrange, m.env) for m in CONFIG]

MESH = [
    Mistake("nproc=3", "= 4 ranks, but WORLD_SIZE or nproc says 3"),
    Mistake("parallel.fsdp=-1 nproc=3", "3 ranks do not divide by dp_replicate(1) x tp(2) = 2"),
    Mistake("parallel.ep=3", "parallel.ep=3 must divide fsdp(2) x tp(2)"),
    Mistake("parallel.tp=4 parallel.ep=2", "parallel.ep=2 must be a multiple of tp(4)"),
    Mistake("parallel.fsdp=4 parallel.ep=8", "parallel.ep=8 must divide model.num_experts(4)"),
    Mistake("parallel.tp=3 parallel.fsdp=1", "parallel.tp=3 must divide"),
    Mistake("parallel.tp=0", "parallel.tp=0 must be at least 1"),
    Mistake("parallel.expert_parallel=false parallel.ep=2", "parallel.ep=2 needs parallel.expert_parallel=true"),
    Mistake("data.micro_batch_size=3", "data.global_batch_size=8 must be a multiple of"),
    Mistake("data.micro_batch_size=3 parallel.mesh=auto", "parallel.mesh=auto: no mesh of 1 to 4 ranks is legal"),
    Mistake("parallel.mesh=auto", "no mesh of 3 ranks is legal", env=(("RANK", "0"), ("WORLD_SIZE", "3"))),
    Mistake("", "= 4 ranks, but WORLD_SIZE or nproc says 2", env=(("RANK", "0"), ("WORLD_SIZE", "2"))),
    Mistake("", "WORLD_SIZE=many must be a number", env=(("RANK", "0"), ("WORLD_SIZE", "many"))),
    Mistake("parallel.mesh=auto nproc=1000000000", "parallel: 1000000000 ranks are more than one machine starts"),
    Mistake(
        "device=cpu parallel.dp_replicate=4096 parallel.fsdp=1 parallel.tp=1 data.global_batch_size=4096",
        "4096 ranks are more than one",
    ),
    Mistake(
        "device=cuda parallel.fsdp=64 parallel.tp=1 data.global_batch_size=64",
        "64 ranks need a GPU each" if torch.cuda.is_available() else "PyTorch finds no GPU on this machine",
    ),
]
MESH = [Mistake([*SENTENCE, *str(m.argv).split()], m.says, m.arrange, m.env) for m in MESH]


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda place: (place / name).write_bytes(content) and None


def tokenizer_without_bytes(place: Path) -> None:
    content = json.loads((place / "tokenizer.json").read_text())
    del content["model"]
    (place / "tokenizer.json").write_text(json.dumps(content))


def one_word(place: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0}, unk_token="b")).save(str(place / "tokenizer.json"))


def one_word_in_the_hub(place: Path) -> None:
    one_word(place / "hub")


DATA = [
    Mistake([*SMALL, "data.path=no file.txt"], "data.path=no file.txt: there is no such file"),
    Mistake([*SMALL, "data.path=empty.txt"], "data.path=empty.txt: the file is empty", write("empty.txt", b"")),
    Mistake([*SMALL, "data.path=run"], "data.path=run: is a folder, not a file"),
    Mistake(small("data.path=text.txt"), "exactly one of them"),
    Mistake([*SMALL, "data.path=a.txt"], "data.path=a.txt: is not UTF-8 (byte 2)", write("a.txt", b"ab\xff")),
    Mistake([*SMALL, "data.path=a.jsonl"], "a.jsonl, line 2: is not JSON", write("a.jsonl", b'{"text": "a"}\n{')),
    Mistake([*SMALL, "data.path=a.jsonl"], "line 1: needs a JSON object with", write("a.jsonl", b'{"txt": "a"}\n')),
    Mistake(small("model.vocab_size=100"), "vocab_size"),
    Mistake(small("data.seq_len=100000"), "data.seq_len=100000 must be at most model.max_position_embeddings"),
    Mistake(small("data.seq_len=0"), "data.seq_len=0 must be at least 1"),
    Mistake(small("data.tokenizer=none.json"), "data.tokenizer=none.json: there is no such file"),
    Mistake(small("data.tokenizer=text.txt"), "data.tokenizer=text.txt: not a readable tokenizer.json"),
    Mistake(small("data.tokenizer=tokenizer.json"), "not a readable tokenizer.json", tokenizer_without_bytes),
    Mistake(small("data.tokenizer=tokenizer.json"), "the tokenizer cannot take a text (WordLevel", one_word),
]


def weights(place: Path) -> Path:
    return place / "hub" / "model.safetensors"


def header_of(place: Path) -> tuple[dict, bytes]:
    raw = weights(place).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def rewrite(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Change the header of the safetensors file and leave its bytes."""

    def arrange(place: Path) -> None:
        header, payload = header_of(place)
        change(header)
        text = json.dumps(header).encode()
        weights(place).write_bytes(struct.pack("<Q", len(text)) + text + payload)

    return arrange


def truncated(place: Path) -> None:
    os.truncate(weights(place), weights(place).stat().st_size - 10)


def not_a_number(place: Path) -> None:
    header, payload = header_of(place)
    raw, start = bytearray(weights(place).read_bytes()), header[NORM]["data_offsets"][0]
    struct.pack_into("<f", raw, len(raw) - len(payload) + start, float("nan"))
    weights(place).write_bytes(raw)


def absurd_length(place: Path) -> None:
    weights(place).write_bytes(struct.pack("<Q", 2**62) + weights(place).read_bytes()[8:])


def index(weight_map: object) -> Callable[[Path], None]:
    def arrange(place: Path) -> None:
        weights(place).rename(place / "hub" / "model-1.safetensors")
        (place / "hub" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return arrange


def no_weights(place: Path) -> None:
    weights(place).rename(place / "hub" / "pytorch_model.bin")


def no_config(place: Path) -> None:
    (place / "hub" / "config.json").unlink()


def hub_config(**values: object) -> Callable[[Path], None]:
    def arrange(place: Path) -> None:
        path = place / "hub" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return arrange


NORM = "model.norm.weight"
FROM_HUB = ["device=cpu", "nproc=1", "steps=1", "model.init_from=hub", "data.global_batch_size=1", TEXT]
WEIGHTS = [
    Mistake([*FROM_HUB, "model.init_from=gone"], "model.init_from=gone: there is no such folder"),
    Mistake(FROM_HUB, "config.json", no_config),
    Mistake(FROM_HUB, "config.json", write("hub/config.json", b"{")),
    Mistake(FROM_HUB, "config.json: rms_norm_eps=1000", hub_config(rms_norm_eps=10**400)),
    Mistake(FROM_HUB, "model.num_layers=4611686018427387904 must be at most", hub_config(num_hidden_layers=2**62)),
    Mistake(FROM_HUB, f"missing: {NORM}", rewrite(lambda header: header.update(x=header.pop(NORM)))),
    Mistake(FROM_HUB, "unexpected: x", rewrite(lambda header: header.update(x=header.pop(NORM)))),
    Mistake(FROM_HUB, f"{NORM}: shape [4, 4] in the file", rewrite(lambda header: header[NORM].update(shape=[4, 4]))),
    Mistake(FROM_HUB, "model.safetensors is missing, truncated or damaged", truncated),
    Mistake(FROM_HUB, "truncated or damaged", rewrite(lambda h: h[NORM].update(data_offsets=[0, 2**40]))),
    Mistake(FROM_HUB, "truncated or damaged", rewrite(lambda h: h[NORM].update(shape=[2**40]))),
    Mistake(FROM_HUB, "truncated or damaged", absurd_length),
    Mistake(FROM_HUB, f"hub: {NORM} holds NaN or infinity", not_a_number),
    Mistake(FROM_HUB, "model-9.safetensors is missing", index({NORM: "model-9.safetensors"})),
    Mistake(FROM_HUB, "not in the file that it names", index({"x": "model-1.safetensors"})),
    Mistake(FROM_HUB, "names a file outside its folder", index({NORM: "../hub/model-1.safetensors"})),
    Mistake(FROM_HUB, "index.json cannot be read", index([1, 2])),
    Mistake(FROM_HUB, "holds only .bin files, which can run code when read", no_weights),
]


def step(place: Path) -> Path:
    return place / "run" / "checkpoints" / "step-00000001"


def shard(place: Path) -> Path:
    return step(place) / "tensors" / "__0_0.distcp"


def newer(name: str, **values: object) -> Callable[[Path], None]:
    """Change a JSON document, and the checksum with it: as a newer version would have written it."""

    def arrange(place: Path) -> None:
        path = step(place) / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        seal(place)

    return arrange


def seal(place: Path) -> None:
    commit = json.loads((step(place) / "COMMIT.json").read_text())
    for name in commit["files"]:
        raw = (step(place) / name).read_bytes()
        commit["files"][name] = {"size": len(raw), "sha256": sha256(raw).hexdigest()}
    (step(place) / "COMMIT.json").write_text(json.dumps(commit))


def odd_config(place: Path) -> None:
    (step(place) / "config.yaml").write_text("steps: !!bool maybe")
    seal(place)


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("owned",)


def evil_metadata(place: Path) -> None:
    (step(place) / "tensors" / ".metadata").write_bytes(pickle.dumps(Evil()))
    seal(place)


def commit_changed(**values: object) -> Callable[[Path], None]:
    def arrange(place: Path) -> None:
        path = step(place) / "COMMIT.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return arrange


def linked_outside(place: Path) -> None:
    shard(place).rename(place / "elsewhere")
    shard(place).symlink_to(place / "elsewhere")


def with_a_later_step(place: Path) -> None:
    later = step(place).with_name("step-00000002")
    shutil.copytree(step(place), later)
    text = (later / "COMMIT.json").read_text()
    (later / "COMMIT.json").write_text(text.replace('"step": 1', '"step": 2'))


def tensors_linked(place: Path) -> None:
    (step(place) / "tensors").rename(place / "elsewhere")
    (step(place) / "tensors").symlink_to(place / "elsewhere")


ONE = "run/checkpoints/step-00000001"
RESUMED = [*SMALL, TEXT, "run_name=next", "checkpoint.resume=run", "steps=2"]
NAMED = [*RESUMED, "checkpoint.resume=run/checkpoints/step-00000001"]
CHECKPOINT = [
    Mistake([*RESUMED, "checkpoint.resume=gone"], "checkpoint.resume=gone: no such folder"),
    Mistake([*RESUMED, "checkpoint.resume=hub"], "checkpoint.resume=hub is no complete checkpoint"),
    Mistake(NAMED, "damaged tensors/__0_0.distcp: 5 bytes", lambda place: os.truncate(shard(place), 5)),
    Mistake(NAMED, "missing tensors/__0_0.distcp", lambda place: shard(place).unlink()),
    Mistake(NAMED, "wrong SHA-256", lambda place: flip(shard(place))),
    Mistake(NAMED, "wrong SHA-256", lambda place: flip(step(place) / "state.json")),
    Mistake(NAMED, "COMMIT.json cannot be read", lambda place: os.truncate(step(place) / "COMMIT.json", 9)),
    Mistake(NAMED, "COMMIT.json cannot be read", write("run/checkpoints/step-00000001/COMMIT.json", b"[" * 10**5)),
    Mistake(RESUMED, "holds no undamaged checkpoint (1 damaged)", lambda place: flip(shard(place))),
    Mistake(
        [*RESUMED, "checkpoint.resume=run/checkpoints/step-00000009"],
        "COMMIT.json is of step 1",
        lambda place: step(place).rename(step(place).with_name("step-00000009")) and None,
    ),
    Mistake([*RESUMED, "model.intermediate_size=32"], "model.intermediate_size=32 (there 16)"),
    Mistake([*RESUMED, "seed=7"], "another seed: seed=7 (there 0); go back to those, or say checkpoint.allow"),
    Mistake([*RESUMED, "data.text=other words here"], "another data: data.text=other words here (there some words"),
    Mistake(NAMED, "COMMIT.json has format 9; this version reads 1", commit_changed(format=9)),
    Mistake(NAMED, "state.json has format 9", newer("state.json", format=9)),
    Mistake(NAMED, "state.json cannot be read", newer("state.json", step="one")),
    Mistake(NAMED, "state.json cannot be read", newer("state.json", samples=10**30)),
    Mistake(NAMED, "state.json cannot be read", newer("state.json", schedule_steps=0)),
    Mistake(NAMED, "state.json cannot be read", newer("state.json", skipped_steps=9)),
    Mistake(NAMED, "state.json cannot be read", newer("state.json", grad_norms=[1.0] * 9)),
    Mistake(NAMED, "state.json cannot be read", newer("state.json", grad_norms=[float("nan")] * 5)),
    Mistake(NAMED, "config.yaml cannot be read", odd_config),
    Mistake([*NAMED, "run_dir=.", "run_name=run"], "run/checkpoints holds later steps (step-0000", with_a_later_step),
    Mistake(NAMED, "unknown warp_drive; it was saved by a newer version", newer("model.json", warp_drive=1)),
    Mistake(NAMED, "mkdir is not allowed here", evil_metadata),
    Mistake(NAMED, "is a link that leads outside the folder", linked_outside),
    Mistake(NAMED, "a file outside the folder", commit_changed(files={"../../../x": {"size": 0, "sha256": ""}})),
]


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))


def cli(command: str, argv: list[str], says: str, arrange: Callable[[Path], None] | None = None) -> Mistake:
    return Mistake(argv, says, arrange, command=command)


ASK = ["checkpoint=hub", "prompt=some", "device=cpu", "max_new_tokens=2"]
TOOLS = [
    cli("moe-checkpoint", [], "the first argument is one of"),
    cli("moe-checkpoint", ["inspect"], "checkpoint=DIR must be given"),
    cli("moe-checkpoint", ["inspect", "checkpoint=hub"], "hub is neither a checkpoint nor a run"),
    cli("moe-checkpoint", ["inspect", f"checkpoint={ONE}"], "a link that leads outside the folder", tensors_linked),
    cli("moe-checkpoint", ["verify", "checkpoint=run"], "no undamaged checkpoint", lambda place: flip(shard(place))),
    cli("moe-checkpoint", ["verify", "checkpoint=run/checkpoints/step-00000001"], "extra x", lambda place: (
        (step(place) / "x").touch())),
    cli("moe-checkpoint", ["export", "checkpoint=run", "out=hub"], "out=hub exists already; name a folder that"),
    cli("moe-checkpoint", ["export", "checkpoint=run", "out=new", "max_shard_size=big"], "must be a size such as"),
    cli("moe-checkpoint", ["export", "checkpoint=run", "out=new", f"max_shard_size={'9' * 400}"], "must be a size"),
    cli("moe-checkpoint", ["export", "checkpoint=run", f"out={'x' * 300}"], "File name too long"),
    cli("moe-checkpoint", ["export", "checkpoint=run", "out=new"], "mkdir is not allowed here", evil_metadata),
    cli("moe-generate", ["prompt=x"], "checkpoint=DIR must be given"),
    cli("moe-generate", ["checkpoint=hub"], 'prompt="TEXT" must be given'),
    cli("moe-generate", [*ASK, "checkpoint=."], "."),
    cli("moe-generate", [*ASK[:1], "prompt=\udce9"], "prompt: character 0 is not valid Unicode"),
    cli("moe-generate", [*ASK, "top_p=2"], "top_p=2.0 must be above 0 and at most 1"),
    cli("moe-generate", [*ASK, "temperature=-1"], "temperature=-1.0 must be at least 0"),
    cli("moe-generate", [*ASK, "prompts=gone.txt"], "prompt and prompts are both given"),
    cli("moe-generate", [*ASK[:1], "prompts=gone.txt"], "prompts=gone.txt: there is no such file"),
    cli("moe-generate", [*ASK, "quantization=int4"], "quantization: Invalid value 'int4', expected one of [none"),
    cli("moe-generate", ASK, "truncated or damaged", truncated),
    cli("moe-generate", ASK, "the tokenizer cannot take a text (WordLevel", one_word_in_the_hub),
    cli("moe-generate", ASK, "tokenizer.json", lambda place: (place / "hub" / "tokenizer.json").unlink()),
    cli("moe-generate", [*ASK, "checkpoint=run"], "no undamaged checkpoint", lambda place: flip(shard(place))),
]  # fmt: skip


@pytest.mark.parametrize("mistake", [*CONFIG, *MESH, *DATA, *WEIGHTS, *CHECKPOINT, *TOOLS], ids=lambda m: m.says[:50])
def test_mistake_is_one_line_and_nothing_is_written(
    mistake: Mistake, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check(mistake, place, capsys, monkeypatch)


def test_there_are_enough_of_them() -> None:
    assert len([*CONFIG, *MESH, *DATA, *WEIGHTS, *CHECKPOINT, *TOOLS]) >= 100


def test_environment_in_a_recipe(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "leaky.yaml").write_text("# leaky\nrun_name: ${oc.env:WANDB_API_KEY}\n")
    monkeypatch.setattr(store, "recipe_dir", lambda: place)
    mistake = Mistake("+recipe=leaky", "run_name: ${oc.env:WANDB_API_KEY} is not allowed")
    check(mistake, place, capsys, monkeypatch)


def test_port_in_use(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        world = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        env = tuple((world | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}).items())
        mistake = Mistake(small(), f"MASTER_ADDR:MASTER_PORT=127.0.0.1:{port} cannot be used", env=env)
        check(mistake, place, capsys, monkeypatch)


def test_folder_that_cannot_be_written(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.access  # root may write anywhere, so the answer is given here
    monkeypatch.setattr(os, "access", lambda path, mode: mode & os.W_OK == 0 and real(path, mode))
    check(Mistake(small(), "cannot be written to; name another run_dir"), place, capsys, monkeypatch)
    check(cli("moe-generate", [*ASK, "output=a.jsonl"], "output=a.jsonl: . cannot be"), place, capsys, monkeypatch)


def test_a_run_that_goes_on_elsewhere(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs in one folder would delete each other's half-written checkpoints."""
    with lock(place / "run" / "metrics.jsonl"):
        monkeypatch.setattr("moe_trainer.train.report.lock", partial(lock, seconds=0.2))
        again = [*SMALL, TEXT, "run_dir=.", "run_name=run", "checkpoint.resume=auto", "steps=2"]
        check(Mistake(again, "is being written by a run that has not ended; wait"), place, capsys, monkeypatch)
    assert train.main(again) == 0


def test_files_of_a_run_that_cannot_be_written(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.yaml", "metrics.jsonl", "environment.jsonl"):
        (place / "runs" / name / name).mkdir(parents=True)
        assert train.main(small(f"run_name={name}")) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(f"moe-train: runs/{name} cannot be written to: ")


def test_full_disk(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(place)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert train.main(small("run_name=full")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("moe-train: ") and "disk full: the checkpoint needs" in last and "10 are free" in last
    assert not list((place / "runs" / "full" / "checkpoints").iterdir())
