"""Hydra at the edge: composes `configs/`, `recipes/` and the command line into the dataclasses of `schema`.

Text values of the command line (`prompt=`, `data.path=`, `run_name=` ...) are taken as they stand, down to the last
byte: they never pass through Hydra's grammar, to which spaces, commas, quotes and `${` mean something. Every error of
Hydra, OmegaConf or YAML becomes one line that names the key or the file.
"""

import difflib
import io
import re
from collections.abc import Iterable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe_trainer.config.commands import (
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    InspectConfig,
    PrepareCommandConfig,
    UpcycleConfig,
    VerifyDataConfig,
)
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.keys import Key, keys_of
from moe_trainer.config.schema import Config

SCHEMAS: dict[str, type] = {
    "train": Config,
    "generate": GenerateConfig,
    "eval": EvaluateConfig,
    "export": ExportConfig,
    "inspect": InspectConfig,
    "upcycle": UpcycleConfig,
    "prepare": PrepareCommandConfig,
    "verify_data": VerifyDataConfig,
}
_PACKAGE = Path(__file__).resolve().parents[1]
_MOST_CHARACTERS = 1 << 20
"""Of a recipe: reading YAML takes a minute for some megabytes."""


def config_dir() -> Path:
    """`configs/`: inside the package in a wheel, beside it in a checkout."""
    inside = _PACKAGE / "_configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def recipe_dir() -> Path:
    """`recipes/`: inside the package in a wheel, beside it in a checkout."""
    inside = _PACKAGE / "_recipes"
    return inside if inside.is_dir() else _PACKAGE.parent / "recipes"


def recipes() -> dict[str, str]:
    """Name of each recipe -> the first line of its header."""
    return {path.stem: _first_line(path) for path in _recipe_files()}


def config_groups() -> dict[str, list[str]]:
    """Node -> the ready-made choices for it, files of `configs/NODE/`."""
    folders = sorted(path for path in config_dir().iterdir() if path.is_dir())
    return {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in folders}


def compose(command: str, overrides: list[str]) -> Any:
    """The config of one command line.

    Args:
        command: a key of `SCHEMAS`.
        overrides: `key=value` for a key of the schema, `node=choice` for a file of `configs/node/`, `+recipe=NAME`.

    Returns:
        An instance of `SCHEMAS[command]`: types are checked, the rules of `validate` are not.

    Raises:
        ConfigError: unknown key, recipe or choice; wrong type; bad syntax; a required value that is missing.
    """
    keys = {key.name: key for key in keys_of(SCHEMAS[command])}
    texts, others = _split_texts(overrides, keys)
    refuse_resolvers("the command line", dict(enumerate(others)))
    groups = config_groups() if command == "train" else {}
    parsed = _parse(others, keys, groups)
    for override in parsed:
        _check_override(override, keys, groups)
    recipe = next((override.value() for override in parsed if override.key_or_group == "recipe"), None)
    try:
        _register(with_recipes=command == "train")
        with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
            cfg = hydra.compose(command, [_forced(override, keys) for override in others])
        _insert_texts(cfg, texts)
        if recipe:
            _check_given(_blanks(recipe), cfg, keys)
        result = OmegaConf.to_object(cfg)
    except ConfigError:
        raise
    except RecursionError as error:
        raise ConfigError(f"+recipe={recipe}: nested too deeply, or extends itself") from error
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise ConfigError(_one_line(error, keys)) from error
    _set_texts(result, texts)
    if recipe and "run_name" not in texts and result.run_name == Config().run_name:
        result.run_name = recipe
    return result


def to_yaml(cfg: Any) -> str:
    """YAML of a config object, for `config.yaml` and the golden files."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def _split_texts(overrides: list[str], keys: dict[str, Key]) -> tuple[dict[str, str | None], list[str]]:
    """Takes `key=text` of string-valued keys out of the overrides; `null` clears such a key, except the prompt."""
    texts: dict[str, str | None] = {}
    others = []
    for override in overrides:
        name, equals, value = override.partition("=")
        name = name.removeprefix("++")
        if equals and name in keys and keys[name].is_text:
            texts[name] = None if value == "null" and keys[name].optional and name != "prompt" else value
        else:
            others.append(override)
    # A recipe has one source of text; the one on the command line takes its place.
    for given, replaced in (("data.path", "data.text"), ("data.text", "data.path")):
        if texts.get(given) is not None and replaced not in texts:
            texts[replaced] = None
    return texts, others


def _insert_texts(cfg: DictConfig, texts: dict[str, str | None]) -> None:
    """Makes the texts known to values that interpolate them, such as a tokenizer's path below `model.init_from`."""
    for name, text in texts.items():
        # Escaped, since ${ would be interpolated; a backslash before it counts too. ??? would mean a missing value.
        literal = text and re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
        OmegaConf.update(cfg, name, "" if literal == "???" else literal)


def _set_texts(result: Any, texts: dict[str, str | None]) -> None:
    for name, text in texts.items():
        *nodes, field = name.split(".")
        setattr(reduce(getattr, nodes, result), field, text)


def _parse(overrides: list[str], keys: dict[str, Key], groups: dict[str, list[str]]) -> list[Override]:
    parser = OverridesParser.create()
    parsed = []
    for override in overrides:
        if not re.match(r"[^=-][^=]*=", override):
            raise ConfigError(f"{override!r} is not of the form key=value{_meant(override, keys, groups)}")
        try:
            parsed.append(parser.parse_override(override))
        except (HydraException, ValueError, RecursionError) as error:  # thousands of digits, or of brackets
            key = override.partition("=")[0]
            raise ConfigError(f"{override}: the value of {key} cannot be read") from error
    return parsed


def _meant(argument: str, keys: dict[str, Key], groups: dict[str, list[str]]) -> str:
    """`; did you mean X?` for what other programs take: options with dashes, names and paths without a key."""
    bare = argument.lstrip("-")
    name, equals, value = bare.partition("=")
    first = next(iter(keys.values()))
    if groups and bare in recipes():
        meant = f"+recipe={bare}"
    elif groups and name == "recipe":
        meant = f"+recipe={value if equals else 'NAME'}"
    elif name in keys or name in groups:
        meant = f"{name}={value if equals else 'VALUE'}"
    elif not groups and first.is_text and bare == argument and not equals:
        meant = f"{first.name}={argument}"
    else:
        return ""
    return f"; did you mean {meant}?"


def _forced(override: str, keys: dict[str, Key]) -> str:
    """An override that Hydra takes: it adds entries to a mapping only where it is made to."""
    name = override.partition("=")[0]
    return f"++{override}" if name in keys and keys[name].is_mapping else override


def _check_override(override: Override, keys: dict[str, Key], groups: dict[str, list[str]]) -> None:
    name, line = override.key_or_group, override.input_line
    if override.is_delete():
        raise ConfigError(f"{line}: keys cannot be removed; give {name}=VALUE instead")
    if override.is_sweep_override():
        raise ConfigError(f"{line}: one value is wanted; start a run for each value")
    if name == "recipe" and groups:
        recipe = str(override.value())
        if recipe not in recipes():
            hint = _nearest(recipe, recipes())
            raise ConfigError(f"there is no recipe {recipe!r}{hint}; recipes: {', '.join(recipes())}")
        if not override.is_add():
            raise ConfigError(f"{line}: write +recipe={recipe}")
    elif name in groups:
        if override.value() not in groups[name]:
            raise ConfigError(f"{line}: {name} is one of {', '.join(groups[name])}, or give {name}.KEY=VALUE")
    elif whole := next((k for k in keys.values() if k.is_mapping and f"{name}.".startswith(f"{k.name}.")), None):
        if whole.optional:
            raise ConfigError(f"{line}: give it in a recipe, not on the command line")
        if name != whole.name or not isinstance(override.value(), dict) or "_target_" in override.value():
            raise ConfigError(f"{line}: give it whole, in a recipe or as '{whole.name}={{KEY: VALUE, ...}}'")
    elif name not in keys:
        raise ConfigError(f"{name} is not a key{_nearest(name, keys)}")
    elif override.is_add():
        raise ConfigError(f"{line}: write it without +")


def _register(with_recipes: bool) -> None:
    store = ConfigStore.instance()
    for command, schema in SCHEMAS.items():
        store.store(name=f"{command}_schema", node=schema)
    for path in _recipe_files() if with_recipes else ():
        store.store(group="recipe", name=path.stem, node=_load(path), package="_global_")


def _recipe_files() -> list[Path]:
    return sorted(path for path in recipe_dir().glob("*.yaml") if path.is_file())


def _load(path: Path) -> DictConfig:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if len(text) > _MOST_CHARACTERS:
            raise ConfigError(f"{path} has {len(text):,} characters; put a text to learn into a file: data.path=FILE")
        # A few lines of aliases make a tree of billions of leaves.
        if "*" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ConfigError(f"{path}: an alias (*) is not allowed; ${{KEY}} takes the value of another key")
        node = OmegaConf.load(io.StringIO(text))
        values = OmegaConf.to_container(node, resolve=False)
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: a recipe is a mapping of keys to values")
        if odd := [name for name, _ in _leaves(values) if "_target_" in name or f"{name}.".startswith("hydra.")]:
            raise ConfigError(f"{path}: {odd[0]} is not allowed, a recipe holds values only")
        refuse_resolvers(str(path), values)
    except ConfigError:
        raise
    except (OSError, OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {_message(error)}") from error
    return node


def refuse_resolvers(where: str, values: Any) -> None:
    """Refuse `${name:...}`, by which OmegaConf reads the environment, files of its own or anything registered.

    `${key}`, which takes another value of the same config, is fine. What a run needs of the environment (ranks, GPUs,
    a login of wandb) it asks for by name in code; nothing of it can get into a config, which is saved and shown.
    """
    if isinstance(values, dict):
        for name, value in values.items():
            refuse_resolvers(f"{where}: {name}" if isinstance(name, str) else where, value)
    elif isinstance(values, list):
        for value in values:
            refuse_resolvers(where, value)
    elif isinstance(values, str) and re.search(r"\$\{.*:", _without_keys(values), re.DOTALL):
        raise ConfigError(f"{where}: {values[:60]} is not allowed: only ${{KEY}}, another key of the config, is read")


def _without_keys(text: str) -> str:
    """The text without each `${key}`, from the inside out: what is left of `${a.${b}:c}` is no key."""
    while (shorter := re.sub(r"\$\{[^${}:\\]*\}", "_", text)) != text:
        text = shorter
    return text


def _blanks(recipe: str) -> set[str]:
    """Keys that a recipe, or one that it extends, leaves to the user with `???`.

    Merged into typed nodes, `???` would give way to the schema's default in silence.
    """
    node = OmegaConf.to_container(_load(recipe_dir() / f"{recipe}.yaml"), resolve=False)
    values = dict(_leaves(node))
    defaults = [str(entry) for entry in node.get("defaults", [])]
    bases = [entry.removeprefix("/recipe/") for entry in defaults if entry.startswith("/recipe/")]
    inherited = set().union(*(_blanks(base) for base in bases)) - values.keys()
    return inherited | {name for name, value in values.items() if value == "???"}


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _check_given(blanks: set[str], cfg: DictConfig, keys: dict[str, Key]) -> None:
    missing = [keys[name] for name in sorted(blanks) if OmegaConf.select(cfg, name) is None]
    if missing:
        raise ConfigError("; ".join(f"{key.name} must be given: {key.doc.rstrip('.')}" for key in missing))


def _one_line(error: Exception, keys: dict[str, Key]) -> str:
    """The innermost message, with the file and full key in front and the nearest known key behind."""
    file = re.match(r"In '(.+?)': ", str(error))
    where = f"{file[1]}: " if file else ""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            name = str(cause.full_key)
            hint = "" if name in keys else _nearest(name, keys)
            return f"{where}{name}: {_message(cause)}{hint}"
        cause = cause.__cause__ or cause.__context__
    return where + _message(error).removeprefix(f"In '{file[1]}': " if file else "")


def _message(error: BaseException) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    lines = [line for line in str(error).splitlines() if line and "raised while composing config:" not in line]
    return lines[0] if lines else type(error).__name__


def _nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?`: the last part or its initials (`lr` and `learning_rate` are `optim.lr`), else the nearest
    spelling."""
    lasts = {key: key.rsplit(".", 1)[-1] for key in known}
    last = name.rsplit(".", 1)[-1]
    initials = "".join(word[:1] for word in last.split("_"))
    close = [key for key in lasts if lasts[key] in (last, initials)]
    close = close or difflib.get_close_matches(name, list(lasts), cutoff=0.75)
    close = close or [key for key in lasts if difflib.get_close_matches(last, [lasts[key]], cutoff=0.8)]
    return f"; did you mean {close[0]}?" if close else ""


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").partition("\n")[0].lstrip("# ").strip()
