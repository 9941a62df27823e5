"""What may differ between a checkpoint and the run that goes on from it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_trainer.checkpoint.documents import model_config_from_json
from moe_trainer.checkpoint.manager import read_document
from moe_trainer.config.choices import Change
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.plain_yaml import read_leaves
from moe_trainer.config.schema import Config
from moe_trainer.config.store import to_yaml

_NOT_OF_THE_MODEL = ("init_from", "initializer_range")
"""They matter before the first step only."""
_OF_THE_COMMAND = ("run_name", "run_dir", "steps", "max_minutes", "nproc", "print_plan", "checkpoint.resume")
"""They say how far a command goes and where it writes, which every command may."""

_OF_THE_SAMPLES = ("data.text", "data.path", "data.mixture", "data.seq_len", "data.packing", "data.prepare.")
"""Of the keys of the data, those by which the samples are others."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a run is about, beside its config: the seed, and what its data came to."""

    seed: int
    data_fingerprint: str


def check_changes(checkpoint: Path, saved: Identity, cfg: Config, tokenizer: str, ours: Identity) -> str | None:
    """Refuse a run that would mean something else than the checkpoint's, unless `checkpoint.allow_changes` says so.

    Args:
        saved, ours: of the checkpoint and of this run.
        tokenizer: this run's tokenizer.json.

    Returns:
        What else is different (mesh, batch split, learning rate, logging ...), in one line; None if nothing is.

    Raises:
        ConfigError: lists every difference that is not allowed; or a document of the checkpoint cannot be read.
    """
    keys = _changed_keys(checkpoint, cfg)
    found = {
        Change.model: _model_changes(checkpoint, cfg),
        Change.tokenizer: ["data.tokenizer"] if read_document(checkpoint, "tokenizer.json") != tokenizer else [],
        Change.data: _data_changes(keys, saved, ours),
        Change.seed: [f"seed={ours.seed} (there {saved.seed})"] if ours.seed != saved.seed else [],
    }
    allowed = set(cfg.checkpoint.allow_changes)
    if Change.tokenizer in allowed:  # which makes other samples of the same texts
        allowed.add(Change.data)
    refused = {change: texts for change, texts in found.items() if texts and change not in allowed}
    if refused:
        listing = "; ".join(f"another {change.value}: {', '.join(texts)}" for change, texts in refused.items())
        names = ",".join(change.value for change in (*cfg.checkpoint.allow_changes, *refused))
        raise ConfigError(
            f"{checkpoint} is of a run with {listing}; go back to those, or say checkpoint.allow_changes=[{names}], "
            "or export the weights and start from them with model.init_from"
        )
    others = {name: change for name, change in keys.items() if name not in _OF_THE_COMMAND}
    return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in others.items()) or None


def _model_changes(checkpoint: Path, cfg: Config) -> list[str]:
    theirs = asdict(model_config_from_json(read_document(checkpoint, "model.json")))
    ours = asdict(cfg.model)
    names = [name for name in ours if name not in _NOT_OF_THE_MODEL and ours[name] != theirs[name]]
    return [f"model.{name}={ours[name]} (there {theirs[name]})" for name in names]


def _data_changes(keys: dict[str, tuple[Any, Any]], saved: Identity, ours: Identity) -> list[str]:
    if saved.data_fingerprint == ours.data_fingerprint:
        return []
    chosen = {name: values for name, values in keys.items() if name.startswith(_OF_THE_SAMPLES)}
    named = [f"{name}={_short(new)} (there {_short(old)})" for name, (old, new) in chosen.items()]
    return [*named, "or the files' content"] if named else ["data.text, data.path or data.mixture holds others"]


def _changed_keys(checkpoint: Path, cfg: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> what the checkpoint's config says and what this one does."""
    try:
        theirs = read_leaves(read_document(checkpoint, "config.yaml"))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{checkpoint}: config.yaml cannot be read: {error}") from error
    ours = read_leaves(to_yaml(cfg))
    return {name: (theirs[name], ours[name]) for name in ours if name in theirs and theirs[name] != ours[name]}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
