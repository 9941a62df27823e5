"""From a command line to dataclasses, and every mistake on the way to one line."""

import dataclasses
import random

import pytest

from moe_trainer.config import store
from moe_trainer.config.choices import ScheduleName
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.keys import keys_of
from moe_trainer.config.schema import Config
from moe_trainer.config.store import compose, recipes, refuse_resolvers, to_yaml

NASTY = [
    "a, b = 'c' \"d\"",
    "${seed}",
    "\\${seed}",
    "\\\\${seed}",
    "${",
    "ends with \\",
    "${oc.env:HOME}\\",
    "[1, 2]",
    "{a: b}",
    "null",
    "???",
    "true",
    "1e3",
    "two\nlines\ttab",
    "é ☃",
    "~#%",
    " spaces around ",
    "a=b=c",
]


def test_override_reaches_its_field_and_nothing_else() -> None:
    plain = compose("train", ["+recipe=mixtral_sp_ep"])
    other = compose("train", ["+recipe=mixtral_sp_ep", "parallel.tp=1", "parallel.fsdp=4", "optim.schedule=linear"])
    assert (other.parallel.tp, other.parallel.fsdp, other.optim.schedule) == (1, 4, ScheduleName.linear)
    other.parallel, other.optim.schedule = plain.parallel, plain.optim.schedule
    assert other == plain


def test_node_choice_replaces_the_recipes_choice() -> None:
    cfg = compose("train", ["+recipe=mixtral_sp_ep", "parallel=tp"])
    assert not cfg.parallel.expert_parallel and not cfg.parallel.sequence_parallel
    assert (cfg.parallel.fsdp, cfg.parallel.tp) == (2, 2)


def test_run_is_named_after_its_recipe_unless_named() -> None:
    assert compose("train", ["+recipe=mixtral_tp"]).run_name == "mixtral_tp"
    assert compose("train", ["+recipe=mixtral_tp", "run_name=run"]).run_name == "run"
    assert compose("train", ["+recipe=mixtral_sp_ep_resume"]).run_name == "mixtral_sp_ep"


def test_recipe_extends_another() -> None:
    base = compose("train", ["+recipe=mixtral_sp_ep"])
    resumed = compose("train", ["+recipe=mixtral_sp_ep_resume"])
    assert (resumed.parallel.fsdp, resumed.parallel.tp, resumed.checkpoint.resume) == (1, 4, "auto")
    assert resumed.steps == 2 * base.steps
    assert (resumed.model, resumed.optim, resumed.data) == (base.model, base.optim, base.data)


def test_source_of_text_on_the_command_line_replaces_the_recipes() -> None:
    cfg = compose("train", ["+recipe=mixtral_sp_ep", "data.path=some, file.txt"])
    assert (cfg.data.path, cfg.data.text) == ("some, file.txt", None)
    both = compose("train", ["data.path=a", "data.text=b"])
    assert (both.data.path, both.data.text) == ("a", "b")


@pytest.mark.parametrize("text", NASTY)
def test_text_arrives_as_it_was_typed(text: str) -> None:
    assert compose("generate", [f"prompt={text}", f"checkpoint=/a {text}"]).prompt == text
    assert compose("train", [f"data.text=x{text}"]).data.text == f"x{text}"


def test_random_text_arrives_as_it_was_typed() -> None:
    source = random.Random(0)
    for _ in range(40):
        text = "".join(source.choice("\\${}ab'\",= ?:[]") for _ in range(source.randint(1, 12)))
        assert compose("generate", [f"prompt={text}"]).prompt == text


def test_null_clears_a_text() -> None:
    assert compose("train", ["+recipe=mixtral_tp", "data.text=null"]).data.text is None


def test_interpolation_sees_a_text_of_the_command_line() -> None:
    cfg = compose("train", ["+recipe=mixtral_8x7b_sp_ep", "model.init_from=/a b/${x}"])
    assert cfg.data.tokenizer == "/a b/${x}/tokenizer.json"


@pytest.mark.parametrize(
    ("value", "is_allowed"),
    [
        ("${model.init_from}/a:b", True),
        ("a:${seed}:${steps}", True),
        ("${a.${b}}/c:d", True),
        ("${oc.env:HOME}", False),
        ("${seed}${oc.env:HOME}", False),
        ("${oc.${a}:HOME}", False),
        ("${oc.${a.${b}}:HOME}", False),
        ("${oc.${a$b}:HOME}", False),
        ("${${oc.env:HOME}}", False),
    ],
)
def test_resolvers_are_told_from_colons(value: str, is_allowed: bool) -> None:
    if is_allowed:
        return refuse_resolvers("recipe", {"key": [value]})
    with pytest.raises(ConfigError, match="recipe: key: .* is not allowed"):
        refuse_resolvers("recipe", {"key": [value]})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.tpp=2"], "parallel.tpp is not a key; did you mean parallel.tp?"),
        (["+parallel.tpp=2"], "parallel.tpp is not a key; did you mean parallel.tp?"),
        (["lr=1e-3"], "lr is not a key; did you mean optim.lr?"),
        (["optim.learning_rate=1e-3"], "optim.learning_rate is not a key; did you mean optim.lr?"),
        (["schedul=linear"], "schedul is not a key; did you mean optim.schedule?"),
        (["zzzzzz=1"], "zzzzzz is not a key"),
        (["hydra.verbose=true"], "hydra.verbose is not a key"),
        (["_target_=os.system"], "_target_ is not a key"),
        (["optim={lr: 1, _target_: os.system}"], "optim is one of adamw, overfit, or give optim.KEY=VALUE"),
        (["+parallel.plan={_target_: os.system}"], "parallel.plan={_target_: os.system}: give it in a recipe"),
        (["+seed=1"], "+seed=1: write it without +"),
        (["steps=two"], "steps: Value 'two' of type 'str' could not be converted to Integer"),
        (["seed=1.5"], "seed: Value '1.5' of type 'float' could not be converted to Integer"),
        (["steps=null"], "steps: field 'steps' is not Optional"),
        (["dtype=f32"], "dtype: Invalid value 'f32', expected one of [auto, float32, bfloat16, float64]"),
        (["parallel.tp=[1]"], "parallel.tp: "),
        (["model.family=gpt"], "model.family: Invalid value 'gpt', expected one of [mixtral, qwen3_moe, olmoe, "),
        (["steps=${nothing}"], "steps: Interpolation key 'nothing' not found"),
        (["steps=["], "steps=[: the value of steps cannot be read"),
        (["steps=1,2"], "steps=1,2: one value is wanted"),
        (["steps=range(1,3)"], "one value is wanted"),
        (["~steps=1"], "~steps=1: keys cannot be removed"),
        (["steps"], "'steps' is not of the form key=value"),
        (["steps"], "'steps' is not of the form key=value; did you mean steps=VALUE?"),
        (["--multirun"], "'--multirun' is not of the form key=value"),
        (["--steps=20"], "'--steps=20' is not of the form key=value; did you mean steps=20?"),
        (["--model", "mixtral_tiny"], "'--model' is not of the form key=value; did you mean model=VALUE?"),
        (["--recipe", "mixtral_tp"], "'--recipe' is not of the form key=value; did you mean +recipe=NAME?"),
        (["--recipe=mixtral_tp"], "did you mean +recipe=mixtral_tp?"),
        (["mixtral_tp"], "'mixtral_tp' is not of the form key=value; did you mean +recipe=mixtral_tp?"),
        (["=3"], "'=3' is not of the form key=value"),
        (["model=mixtral_huge"], "qwen3_30b_a3b, qwen3_moe_code, qwen3_moe_tiny, or give model.KEY=VALUE"),
        (["recipe=mixtral_tp"], "recipe=mixtral_tp: write +recipe=mixtral_tp"),
        (["+recipe=mixtral_spep"], "no recipe 'mixtral_spep'; did you mean mixtral_sp_ep?; recipes: deepseek"),
        (["+recipe=mixtral_tp", "+recipe=mixtral_sp"], "recipe"),
        (["+recipe=mixtral_8x7b_sp_ep"], "model.init_from must be given: Hugging Face folder to start from"),
    ],
)
def test_mistake_is_one_line_that_names_the_key(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("train", overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", ["generate", "eval", "export", "inspect"])
def test_a_bare_path_is_told_its_key(command: str) -> None:
    with pytest.raises(
        ConfigError, match="^'runs/a' is not of the form key=value; did you mean checkpoint=runs/a\\?$"
    ):
        compose(command, ["runs/a"])


def test_no_key_is_offered_where_none_is_near() -> None:
    with pytest.raises(ConfigError, match="^model.foo is not a key$"):
        compose("train", ["+model.foo=1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# x\nsteps: 1\nsteps: 2\n", "broken.yaml: line 3: found duplicate key steps"),
        ("# x\nsteps: [1\n", "broken.yaml: line"),
        ("# x\n- steps\n", "broken.yaml: a recipe is a mapping"),
        ("# x\noptim:\n  lrr: 1\n", "recipe/broken: optim.lrr: Key 'lrr' not in 'OptimConfig'; did you mean optim"),
        ("# x\noptim:\n  _target_: os.system\n", "broken.yaml: optim._target_ is not allowed"),
        ("# x\nsteps: many\n", "steps: Value 'many' of type 'str' could not be converted to Integer"),
        ("# x\nparallel:\n  plan:\n    _target_: os.system\n", "broken.yaml: parallel.plan._target_ is not allowed"),
        ("# x\ndefaults:\n  - override /model: nope\n  - _self_\n", "model/nope"),
        ("# x\ndefaults:\n  - /recipe/broken\n", "+recipe=broken: nested too deeply, or extends itself"),
        ("# x\ndefaults: model\n", "recipe/broken', defaults must be a list"),
        ("# x\noptim: 5\n", "recipe/broken: Merge error: int is not a subclass of OptimConfig"),
        ("# x\n5: 6\n", "recipe/broken: 5: Key '5' not in 'Config'"),
        ("# x\nhydra:\n  run: {dir: /tmp}\n", "broken.yaml: hydra.run.dir is not allowed"),
        ("# caf\udce9\n", "broken.yaml: 'utf-8' codec can't decode byte 0xe9"),
        (f"# x\nsteps: {'9' * 5000}\n", "broken.yaml: Exceeds the limit"),
        (f"# x\nsteps: {'[' * 5000}\n", "broken.yaml: maximum recursion depth exceeded"),
        ("# x\nseed: &a [x, x]\nsteps: [*a, *a]\n", "broken.yaml: an alias (*) is not allowed"),
        (f"# {'x' * 2**20}\n", "broken.yaml has 1,048,579 characters"),
    ],
    ids=lambda text: text[-40:],
)
def test_mistake_in_a_recipe(tmp_path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    (tmp_path / "broken.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    (tmp_path / "folder.yaml").mkdir()
    monkeypatch.setattr(store, "recipe_dir", lambda: tmp_path)
    with pytest.raises(ConfigError) as caught:
        compose("train", ["+recipe=broken"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_blank_of_an_extended_recipe_must_be_given(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base.yaml").write_text("# base\nmodel:\n  init_from: ???\n")
    (tmp_path / "same.yaml").write_text("# same\ndefaults:\n  - /recipe/base\n  - _self_\nsteps: 3\n")
    (tmp_path / "filled.yaml").write_text("defaults:\n  - /recipe/base\n  - _self_\nmodel:\n  init_from: /a\n")
    monkeypatch.setattr(store, "recipe_dir", lambda: tmp_path)
    with pytest.raises(ConfigError, match="model.init_from must be given"):
        compose("train", ["+recipe=same"])
    assert compose("train", ["+recipe=same", "model.init_from=/b"]).model.init_from == "/b"
    assert compose("train", ["+recipe=filled"]).model.init_from == "/a"


def test_own_plan_comes_from_a_recipe(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {"model.layers.*.mlp.experts.gate_up_proj": "grouped_gemm", "lm_head": "vocab_parallel"}
    lines = "".join(f'    "{pattern}": {style}\n' for pattern, style in plan.items())
    (tmp_path / "own.yaml").write_text(f"# own\nparallel:\n  plan:\n{lines}")
    monkeypatch.setattr(store, "recipe_dir", lambda: tmp_path)
    cfg = compose("train", ["+recipe=own"])
    assert cfg.parallel.plan == plan
    assert "grouped_gemm" in to_yaml(cfg)


def test_every_key_has_its_text_and_every_dataclass_slots() -> None:
    keys = list(keys_of(Config))
    assert len(keys) > 40
    assert not [key.name for key in keys if not key.doc]
    for name in ("model", "parallel", "optim", "data", "checkpoint", "logging"):
        assert hasattr(type(getattr(Config(), name)), "__slots__")
        assert dataclasses.is_dataclass(getattr(Config(), name))


def test_every_recipe_says_what_it_is_for() -> None:
    assert {"mixtral_tp", "mixtral_sp", "mixtral_tp_ep", "mixtral_sp_ep", "mixtral_sp_ep_resume"} < set(recipes())
    assert all(len(purpose) > 20 for purpose in recipes().values())


def test_bundled_sentence() -> None:
    text = compose("train", ["+recipe=mixtral_sp_ep"]).data.text
    assert text.isascii() and len(text) == 199
    assert all(len(text) % tp for tp in (2, 3, 4, 5, 6, 7, 8))
