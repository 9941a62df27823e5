"""`python scripts/overfit_demo.py`: train, save, resume on another mesh, export, generate; each stage as it happens.

Learns one sentence by heart, so that the end proves every step before it: the last stage must bring the sentence back
token for token. It runs what the commands run, in the same order, in one world of 4, 2 or 1 processes.
"""

import sys
import time
from argparse import ArgumentParser
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
import torch.distributed as dist

from moe_trainer.checkpoint.agreement import on_rank_zero
from moe_trainer.checkpoint.export import export_checkpoint
from moe_trainer.checkpoint.manifest import read_commit
from moe_trainer.cli.command import count_gpus, is_first_rank, run_command, world_size_from_env
from moe_trainer.cli.launch import launch
from moe_trainer.config.choices import DeviceName
from moe_trainer.config.commands import ExportConfig
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import Config
from moe_trainer.config.store import compose
from moe_trainer.config.validate import parse_size, resolve_device, validate, validate_generate
from moe_trainer.data.tokenizer import encode_texts
from moe_trainer.generate.main import continue_prompt
from moe_trainer.observe.log import setup_logging
from moe_trainer.parallel.process_group import process_group
from moe_trainer.train.trainer import Trainer

RECIPE = "mixtral_sp_ep"
MOST_LOSS = 0.05
# Ranks -> (fsdp, tp) of the first and of the second half.
_MESHES = {4: ((2, 2), (1, 4)), 2: ((2, 1), (1, 2)), 1: ((1, 1), (1, 1))}


class DemoFailed(Exception):
    """A stage did not give what it must."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One line of the table at the end."""

    name: str
    mesh: str
    loss: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Story:
    """What the demo did."""

    stages: list[Stage]
    checkpoints: list[Path]
    hf_folder: Path
    prompt: str
    text: str
    """Prompt and continuation."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of the demo; returns the exit code: 1 if the sentence did not come back."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_command("overfit_demo", lambda: _demo(arguments))


def _demo(argv: list[str]) -> int:
    parser = ArgumentParser("overfit_demo.py", description="Train, save, resume on another mesh, export, generate.")
    parser.add_argument("--nproc", type=int, choices=_MESHES, help="processes; default 4, or one for each GPU")
    nproc = parser.parse_args(argv).nproc
    num_gpus, world_size = count_gpus(DeviceName.auto), world_size_from_env()
    if world_size is None:
        nproc = nproc or next(ranks for ranks in _MESHES if ranks <= (num_gpus or 4))
        if nproc > 1:
            return launch("moe_trainer.cli.demo", [], nproc)
    device_name = resolve_device(DeviceName.auto, world_size or 1, num_gpus)
    with process_group(device_name) as device:
        setup_logging(dist.get_rank())
        try:
            run_name = on_rank_zero("name of the run", lambda: f"demo-{datetime.now():%Y%m%d-%H%M%S}")
            _conclude(tell_story(Path("runs"), run_name, device))
        except DemoFailed as failure:
            if is_first_rank():
                print(f"overfit_demo: {failure}", file=sys.stderr)
            return 1
    return 0


def tell_story(run_dir: Path, run_name: str, device: torch.device) -> Story:
    """The five stages, in the world that is up. Collective.

    Raises:
        DemoFailed: the loss at the end is too high, or a token of the sentence is wrong.
        ConfigError: a world that the demo has no meshes for; a disk that refuses.
    """
    ranks = dist.get_world_size()
    if ranks not in _MESHES:
        raise ConfigError(f"the demo runs on {', '.join(map(str, _MESHES))} processes, not on {ranks}")
    (first, second), run = _MESHES[ranks], run_dir / run_name
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    _say(f"The main story on {ranks} process{'es' * (ranks > 1)} ({where}). All that it writes is in {run}/")
    total = compose("train", [f"+recipe={RECIPE}"]).steps

    _say(f"\n1. Train steps 1 to {total // 2} on {_mesh(*first)}")
    settings = [f"run_dir={run_dir}", f"run_name={run_name}", "logging.every=10", f"optim.schedule_steps={total}"]
    half = _train(_config([*settings, f"steps={total // 2}"], *first, device), device, "2. Save the checkpoint")
    stages = [
        Stage(f"1 train steps 1-{total // 2}", _mesh(*first), half.loss, half.train_seconds),
        Stage("2 save", _mesh(*first), None, half.save_seconds),
    ]

    _say(f"\n3. Load it into {_mesh(*second)}, another topology, and train steps {total // 2 + 1} to {total}")
    cfg = _config([*settings, f"checkpoint.resume={half.checkpoint}"], *second, device)
    whole = _train(cfg, device, "4. Save again, and write a plain Hugging Face folder")
    name = f"3 load, train steps {total // 2 + 1}-{total}"
    stages.append(Stage(name, _mesh(*second), whole.loss, whole.train_seconds))
    start, hf_folder = time.perf_counter(), run / "huggingface"
    on_rank_zero("export", lambda: _export(whole.checkpoint, hf_folder))
    seconds = whole.save_seconds + time.perf_counter() - start
    stages.append(Stage("4 save, export", _mesh(*second), None, seconds))
    if not whole.loss < MOST_LOSS:
        raise DemoFailed(f"the mean loss after {total} steps is {whole.loss:.4f}, not under {MOST_LOSS}")

    prompt = " ".join(cfg.data.text.split()[:3])
    _say(f"\n5. Load that folder into {_generation_mesh(ranks)} and continue {prompt!r} greedily")
    start = time.perf_counter()
    text = _generate(cfg, hf_folder, prompt, whole.sentence_ids, device)
    stages.append(Stage("5 load, generate", _generation_mesh(ranks), None, time.perf_counter() - start))
    return Story(stages, [half.checkpoint, whole.checkpoint], hf_folder, prompt, text)


@dataclass(frozen=True, slots=True)
class _Trained:
    loss: float
    checkpoint: Path
    train_seconds: float
    save_seconds: float
    sentence_ids: list[int]


class _AnnouncingTrainer(Trainer):
    """Says when training ends and saving begins, and times both."""

    def __init__(self, cfg: Config, device: torch.device, save_title: str) -> None:
        self.started = time.perf_counter()
        self.save_title = save_title
        super().__init__(cfg, device)

    def save(self) -> Path:
        self.trained = time.perf_counter()
        _say(f"\n{self.save_title}")
        self.checkpoint = super().save()
        self.saved = time.perf_counter()
        files = read_commit(self.checkpoint)["files"]
        size = sum(file["size"] for file in files.values())
        _say(f"   {size / 1e6:.1f} MB in {len(files)} files, COMMIT.json has their checksums")
        return self.checkpoint


def _train(cfg: Config, device: torch.device, save_title: str) -> _Trained:
    trainer = _AnnouncingTrainer(cfg, device, save_title)
    trainer.start()
    metrics = trainer.fit()
    ids = encode_texts([cfg.data.text], trainer.tokenizer)[0].tolist()
    seconds = trainer.trained - trainer.started, trainer.saved - trainer.trained
    return _Trained(metrics.losses.loss.item(), trainer.checkpoint, *seconds, ids)


def _config(settings: list[str], fsdp: int, tp: int, device: torch.device) -> Config:
    mesh = [f"parallel.fsdp={fsdp}", f"parallel.tp={tp}", f"device={device.type}"]
    # Two sentences a step, in one forward: there is only one to learn, and more copies of it teach nothing more.
    batch = ["data.global_batch_size=2", f"data.micro_batch_size={2 // fsdp}"]
    overrides = [f"+recipe={RECIPE}", *settings, *mesh, *batch]
    return validate(compose("train", overrides), dist.get_world_size(), num_gpus=None)


def _export(checkpoint: Path, out: Path) -> None:
    """As `moe-checkpoint export` does it."""
    cfg = ExportConfig()
    export_checkpoint(checkpoint, out, parse_size(cfg.max_shard_size), cfg.dtype)
    _say(f"wrote {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def _generate(cfg: Config, hf_folder: Path, prompt: str, sentence_ids: list[int], device: torch.device) -> str:
    """As `moe-generate` does it; the tokens must be those of the sentence, with the end of text."""
    ranks = dist.get_world_size()
    settings = [f"checkpoint={hf_folder}", f"prompt={prompt}", f"max_new_tokens={len(sentence_ids)}"]
    generation = compose("generate", [*settings, f"parallel.tp={ranks}", f"device={device.type}"])
    pieces: list[str] = []

    def write(piece: str) -> None:
        pieces.append(piece)
        _say(piece, end="")

    done = continue_prompt(validate_generate(generation, ranks, num_gpus=None), device, write)
    _say("")
    ids = done.prompt_ids + done.new_ids
    for index in range(max(len(ids), len(sentence_ids))):
        if ids[index : index + 1] != sentence_ids[index : index + 1]:
            got, wanted = ids[index : index + 1], sentence_ids[index : index + 1]
            raise DemoFailed(f"token {index} is wrong: {got or 'the end'} instead of {wanted or 'the end'}")
    _say(f"   All {len(ids)} tokens are those of the sentence, the end of text included.")
    return "".join(pieces)


def _mesh(fsdp: int, tp: int) -> str:
    axes = [f"FSDP={fsdp}"] * (fsdp > 1) + [f"(SP&EP)={tp}"] * (tp > 1)
    return " x ".join(axes) or "one process"


def _generation_mesh(ranks: int) -> str:
    return f"TP&EP={ranks}" if ranks > 1 else "one process"


def _conclude(story: Story) -> None:
    """The table, and three commands that go on from here."""
    _say(f"\n{'stage':<26} {'mesh':<20} {'loss':>8} {'seconds':>8}")
    for stage in story.stages:
        loss = "" if stage.loss is None else f"{stage.loss:.4f}"
        _say(f"{stage.name:<26} {stage.mesh:<20} {loss:>8} {stage.seconds:>8.1f}")
    _say("\nTry next:")
    _say(f'  {_command("moe-generate")} checkpoint={story.hf_folder} prompt="{story.prompt}" temperature=0.8')
    _say(f"  {_command('moe-checkpoint')} inspect checkpoint={story.checkpoints[-1]}")
    _say(f"  {_command('moe-train')} +recipe={RECIPE} parallel.fsdp=4 parallel.tp=1 run_name=all_data_parallel")


def _command(name: str) -> str:
    """How to call an installed command from here: it lies beside the interpreter, which need not be on PATH."""
    path = Path(sys.executable).parent / name
    if not path.is_file():
        return f"{sys.executable} -m moe_trainer.cli.{name.removeprefix('moe-')}"
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _say(text: str, end: str = "\n") -> None:
    if is_first_rank():
        print(text, end=end, flush=True)


if __name__ == "__main__":
    sys.exit(main())
