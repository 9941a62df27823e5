import hashlib
import json
import math
import os
import threading
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import PrepareConfig
from moe_trainer.config.store import compose
from moe_trainer.data import prepare as module
from moe_trainer.data.prepare import prepare, unigram_entropy
from moe_trainer.data.shards import TRAIN, VALIDATION, Shard, map_shards, read_index, read_tokenizer, verify
from moe_trainer.data.tokenizer import load_tokenizer
from moe_trainer.data.working import Keys

WORDS = "a patient river carries little stones from the mountains to the sea".split()


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Sixty documents, the last twice, in a JSONL file, a Parquet file and two text files."""
    import pyarrow
    from pyarrow import parquet

    made = [f"{number} " + " ".join(WORDS[: 1 + number % len(WORDS)]) + " é" for number in range(59)]
    made.append(made[-1])
    (tmp_path / "a.txt").write_text(made[0])
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text, "id": 3}) + "\n" for text in made[1:30]))
    parquet.write_table(pyarrow.table({"text": made[30:59], "other": [1] * 29}), tmp_path / "c.parquet")
    (tmp_path / "d.md").write_text(made[59])
    return made


def config(folder: Path, **changes: object) -> PrepareConfig:
    names = ("a.txt", "b.jsonl", "c.parquet", "*.md")
    return PrepareConfig(**{"inputs": [str(folder / name) for name in names], **changes})


def documents(shards: list[Shard]) -> list[list[int]]:
    return [part.tolist() for shard in shards for part in np.split(shard.tokens, shard.ends[:-1])]


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_every_document_is_there_once_in_order(tmp_path: Path, texts: list[str]) -> None:
    out = tmp_path / "out"
    index = prepare(config(tmp_path, shard_tokens=500), out)
    tokenizer = read_tokenizer(out, index)
    assert len(index.train) > 3 and not index.validation and index.dtype == "uint16"
    assert [tokenizer.decode(ids[:-1]) for ids in documents(map_shards(out, index, TRAIN))] == texts
    assert index.highest_token == 256
    assert sum(entry.documents for entry in index.train) == 60
    assert [source["path"] for source in index.settings["sources"]] == sorted(
        str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.parquet", "d.md")
    )
    assert verify(out) == index
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "b.jsonl", "c.parquet", "d.md", "out"}


def test_the_split_is_by_content_and_seed(tmp_path: Path, texts: list[str]) -> None:
    splits = {}
    for seed, shard_tokens in ((0, 10**6), (0, 300), (1, 10**6)):
        out = tmp_path / f"out-{seed}-{shard_tokens}"
        index = prepare(config(tmp_path, validation_share=0.3, seed=seed, shard_tokens=shard_tokens), out)
        tokenizer = read_tokenizer(out, index)
        splits[seed, shard_tokens] = [
            [tokenizer.decode(ids[:-1]) for ids in documents(map_shards(out, index, split))]
            for split in (TRAIN, VALIDATION)
        ]
    train, validation = splits[0, 10**6]
    assert splits[0, 300] == [train, validation]
    assert sorted(train + validation) == sorted(texts) and 8 <= len(validation) <= 28
    assert not set(train) & set(validation)  # copies of a document stay together
    assert splits[1, 10**6][1] != validation


class Killed(BaseException):
    """Nobody catches it."""


@pytest.mark.parametrize("train", [None, 300])
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, texts: list[str], train: int | None) -> None:
    cfg = config(tmp_path, shard_tokens=400, validation_share=0.2, train_tokenizer=train)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    prepare(cfg, whole)

    def kill(what: str, count: int, done: int, total: int) -> None:
        if what == "encoding" and count == 40:
            raise Killed

    # The real batches would encode sixty documents at once, before any shard.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_trainer.data.writer._ENCODE_AT_ONCE", 4)
        with pytest.raises(Killed):
            prepare(cfg, halves, kill)
    assert not halves.exists()
    partial = tmp_path / ".halves.partial"
    finished = sorted(path.name for path in partial.glob("shard-*.json"))
    assert finished
    before = {path: path.stat().st_mtime_ns for path in partial.glob("*-*.tokens")}
    prepare(cfg, halves)
    assert files_of(halves) == files_of(whole)
    kept = [path for path in before if (halves / path.name).stat().st_mtime_ns == before[path]]
    assert len(kept) >= len(finished)
    assert not partial.exists()


def test_a_second_run_does_nothing_and_changed_input_is_refused(tmp_path: Path, texts: list[str]) -> None:
    cfg, out = config(tmp_path), tmp_path / "out"
    prepare(cfg, out)
    stamps = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    prepare(cfg, out)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == stamps
    for other in (replace(cfg, seed=1), replace(cfg, inputs=cfg.inputs[:2]), replace(cfg, train_tokenizer=400)):
        with pytest.raises(ConfigError, match="prepared from other files or with other settings"):
            prepare(other, out)
    path = tmp_path / "a.txt"
    path.write_text(path.read_text()[::-1])
    with pytest.raises(ConfigError, match="prepared from other files"):
        prepare(cfg, out)


def test_several_processes_may_ask_at_once(tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the ranks of a run do under a launcher of their own."""
    written = []
    write = module._write
    monkeypatch.setattr(module, "_write", lambda *args: written.append(1) or write(*args))
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            prepare(config(tmp_path), tmp_path / "out")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and written == [1]
    assert not (tmp_path / ".out.partial").exists()


def test_the_folder_is_locked_until_it_has_its_name(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever finds it without a lock before takes it for his own and empties it."""
    rename, locked = Path.rename, []

    def look(self: Path, target: Path) -> Path:
        if self.name == ".out.partial":
            locked.append({"lock", "request.json"} <= {path.name for path in self.iterdir()})
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", look)
    prepare(config(tmp_path), tmp_path / "out")
    assert locked == [True] and not {"lock", "request.json"} & {path.name for path in (tmp_path / "out").iterdir()}


def test_a_full_disk_is_told_and_the_finished_shards_stay(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", "index.json")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_index", fail)
        with pytest.raises(ConfigError, match="out=.*out: cannot be made .index.json: No space left on device"):
            prepare(config(tmp_path), tmp_path / "out")
    assert list((tmp_path / ".out.partial").glob("shard-*.json"))
    prepare(config(tmp_path), tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists()


def test_an_empty_folder_is_filled_by_any_name_but_not_around_us(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "deep")
    with pytest.raises(ConfigError, match="out=.* exists already"):
        prepare(config(tmp_path), Path("."))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty" / "deep").rmdir()
    (tmp_path / "other").mkdir()
    prepare(config(tmp_path), Path("other/../empty"))
    assert verify(tmp_path / "empty")


def test_a_file_with_two_names_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        Path(name).write_text(name)
    inputs = ["a.txt", "./a.txt", str(tmp_path / "a.txt"), "b.txt"]
    assert sum(entry.documents for entry in prepare(PrepareConfig(inputs), Path("one")).train) == 2
    index = prepare(PrepareConfig(inputs, exclude=["./*"]), Path("two"))
    assert [source["path"] for source in index.settings["sources"]] == ["b.txt"]


@pytest.mark.parametrize("text", ["", "[" * 10**5, "{}", '{"stop": 1, "train": [{}], "validation": []}'])
def test_what_a_killed_run_left_may_be_damaged(tmp_path: Path, texts: list[str], text: str) -> None:
    def kill(what: str, count: int, done: int, total: int) -> None:
        if count == 60:
            raise Killed

    with pytest.raises(Killed):
        prepare(config(tmp_path, shard_tokens=100), tmp_path / "out", kill)
    (tmp_path / ".out.partial" / "shard-00000.json").write_text(text)
    with pytest.raises(ConfigError, match="shard-00000.json cannot be read"):
        prepare(config(tmp_path, shard_tokens=100), tmp_path / "out")
    prepare(config(tmp_path, shard_tokens=100), tmp_path / "out")
    verify(tmp_path / "out")


def test_what_another_request_left_is_thrown_away(tmp_path: Path, texts: list[str]) -> None:
    def kill(what: str, count: int, done: int, total: int) -> None:
        if count == 60:
            raise Killed

    with pytest.raises(Killed):
        prepare(config(tmp_path, shard_tokens=100), tmp_path / "out", kill)
    (tmp_path / ".out.partial" / "train-99999.tokens.new").write_bytes(b"torn")
    index = prepare(config(tmp_path, seed=5), tmp_path / "out")
    assert len(index.train) == 1 and verify(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "index.json",
        "tokenizer.json",
        "train-00000.tokens",
        "train-00000.ends",
    }


def test_a_tokenizer_is_trained_on_the_training_documents(tmp_path: Path) -> None:
    """The same each time; what it makes of a document reads back as the document."""
    lines = [f"{word}zebra {word}zebra" for word in "abcdefghij"] * 20
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    cfg = PrepareConfig([str(tmp_path / "a.jsonl")], train_tokenizer=270, validation_share=0.5)
    out, again = tmp_path / "out", tmp_path / "again"
    index = prepare(cfg, out)
    prepare(cfg, again)
    assert files_of(out) == files_of(again)
    tokenizer = read_tokenizer(out, index)
    assert tokenizer.get_vocab_size() <= 270 and tokenizer.token_to_id("<|endoftext|>") == 0
    assert len(tokenizer.encode("zebra").ids) < 5
    assert tokenizer.decode(documents(map_shards(out, index, TRAIN))[0][:-1]) in lines
    held_out = {tokenizer.decode(ids[:-1]) for ids in documents(map_shards(out, index, VALIDATION))}
    assert held_out and held_out < set(lines)


def test_large_vocabularies_need_four_bytes(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({str(number): number for number in range(70000)}, unk_token="0")).save(str(path))
    (tmp_path / "a.jsonl").write_text('{"text": "69999"}\n{"text": "3"}\n')
    index = prepare(PrepareConfig([str(tmp_path / "a.jsonl")], tokenizer=str(path)), tmp_path / "out")
    assert index.dtype == "uint32" and index.highest_token == 69999
    assert documents(map_shards(tmp_path / "out", index, TRAIN)) == [[69999], [3]]


def test_a_vocabulary_may_have_holes(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, processors

    path = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 70000}, unk_token="a"))
    tokenizer.save(str(path))
    (tmp_path / "a.txt").write_text("b")
    index = prepare(PrepareConfig([str(tmp_path / "a.txt")], tokenizer=str(path)), tmp_path / "out")
    assert index.dtype == "uint32" and documents(map_shards(tmp_path / "out", index, TRAIN)) == [[70000]]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <s>", special_tokens=[("<s>", 70001)])
    tokenizer.save(str(path))
    with pytest.raises(ConfigError, match="a.txt: the tokenizer makes id 70001 of it, above the highest"):
        prepare(PrepareConfig([str(tmp_path / "a.txt")], tokenizer=str(path)), tmp_path / "other")


def test_unigram_entropy() -> None:
    assert unigram_entropy(np.array([4, 0, 4, 8])) == pytest.approx(1.5 * math.log(2))
    assert unigram_entropy(np.array([0, 7])) == 0


def test_unigram_entropy_is_of_the_training_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("aabb")
    index = prepare(PrepareConfig([str(tmp_path / "a.txt")]), tmp_path / "out")
    assert index.unigram_entropy == pytest.approx(-(2 * 0.4 * math.log(0.4) + 0.2 * math.log(0.2)))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"text": "fine"}\n{"text": ""}\n', "line 2: the text is empty"),
        ('{"text": "fine"}\nnothing\n', "line 2: is not JSON"),
        ('{"text": "fine"}\n{"txt": 3}\n', "line 2: needs a JSON object with a string `text`"),
        ('{"messages": []}\n', "line 1: `messages` must be a list of objects"),
        ('{"messages": [{"content": "a"}]}\n', "line 1: message 1 needs a string `role`"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "line 1: `messages` need a chat template"),
        ("[" * 100000, "line 1: is nested too deeply"),
        ("", "is empty"),
    ],
)
def test_a_bad_document_is_named_and_nothing_is_left(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "b.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=f"b.jsonl.*{problem}") as caught:
        prepare(PrepareConfig([str(tmp_path / "b.jsonl")]), tmp_path / "out")
    can_be_left_out = "chat template" not in problem
    assert str(caught.value).endswith("; skip_bad=true leaves such documents out") == can_be_left_out
    assert {path.name for path in tmp_path.iterdir()} == {"b.jsonl"}


def test_mistakes_in_the_data_of_a_run_name_its_keys(tmp_path: Path) -> None:
    keys = Keys("data.prepare.", "data.path")
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    (tmp_path / "b.txt").write_text("")
    cfg = PrepareConfig([str(tmp_path / "a.jsonl")])
    for changes, out, problem in (
        ({}, tmp_path / "out", "line 1: .* give data.prepare.chat_template=FILE"),
        ({"inputs": [str(tmp_path / "b.txt")]}, tmp_path / "out", "b.txt: .* data.prepare.skip_bad=true leaves"),
        ({"exclude": ["*"]}, tmp_path / "out", "data.prepare.exclude leaves out all 1 files"),
        ({"inputs": ["none"]}, tmp_path / "out", "data.prepare.inputs: none names no file"),
        ({}, tmp_path, "data.path=.* exists already"),
    ):
        with pytest.raises(ConfigError, match=problem):
            prepare(replace(cfg, **changes), out, keys=keys)


def test_bad_documents_can_be_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "x"}\n{\n{"text": "\xff"}\n{"text": "y"}\n')
    index = prepare(PrepareConfig([str(tmp_path / "*.*")], skip_bad=True), tmp_path / "out")
    assert index.skipped == 4 and "4 documents left out" in index.describe()
    assert documents(map_shards(tmp_path / "out", index, TRAIN)) == [[ord("x"), 256], [ord("y"), 256]]


def test_conversations_that_the_template_refuses_can_be_left_out(tmp_path: Path) -> None:
    """Counted once, also by a run that goes on after it was killed."""
    template = "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('no') }}{% endif %}"
    (tmp_path / "t.jinja").write_text(template + "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
    said = ["yes", "no", "yes", "no", "no"] * 4
    lines = [json.dumps({"messages": [{"role": "assistant", "content": content}]}) for content in said]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    cfg = PrepareConfig([str(tmp_path / "a.jsonl")], chat_template=str(tmp_path / "t.jinja"), shard_tokens=6)
    with pytest.raises(ConfigError, match="a.jsonl, line 2: .*t.jinja cannot be applied .no"):
        prepare(cfg, tmp_path / "out")
    cfg = replace(cfg, skip_bad=True)

    def kill(what: str, count: int, done: int, total: int) -> None:
        if count == 14:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_trainer.data.writer._ENCODE_AT_ONCE", 4)
        with pytest.raises(Killed):
            prepare(cfg, tmp_path / "out", kill)
        assert list((tmp_path / ".out.partial").glob("shard-*.json"))
    index = prepare(cfg, tmp_path / "out")
    assert index.skipped == 12 and sum(entry.documents for entry in index.train) == 8
    trained = prepare(replace(cfg, train_tokenizer=300), tmp_path / "trained")
    assert trained.skipped == 12


def test_parquet_with_bad_text_and_with_dates(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    bad = pyarrow.array([b"fine", b"b\xff", b"too"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "a.parquet")
    cfg = PrepareConfig([str(tmp_path / "a.parquet")])
    with pytest.raises(ConfigError, match="a.parquet, row 2: is not UTF-8 .byte 1.; convert it"):
        prepare(cfg, tmp_path / "out")
    index = prepare(replace(cfg, skip_bad=True), tmp_path / "out")
    assert index.skipped == 1 and sum(entry.documents for entry in index.train) == 2

    message = {"role": "assistant", "content": "a", "at": datetime(2020, 1, 2)}
    parquet.write_table(pyarrow.table({"messages": [[message]]}), tmp_path / "b.parquet")
    (tmp_path / "t.jinja").write_text("{% generation %}{{ messages[0].at.year }}{% endgeneration %}")
    cfg = PrepareConfig([str(tmp_path / "b.parquet")], chat_template=str(tmp_path / "t.jinja"))
    index = prepare(cfg, tmp_path / "dates")
    assert documents(map_shards(tmp_path / "dates", index, TRAIN)) == [list(b"2020")]


def test_files_that_cannot_be_used(tmp_path: Path, texts: list[str]) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    out = tmp_path / "out"
    for cfg, target, problem in (
        (PrepareConfig([str(tmp_path / "none*")]), out, "names no file"),
        (PrepareConfig([str(tmp_path)]), out, r"names no file; .*/\*\*/\* names the files in it"),
        (config(tmp_path, exclude=["*"]), out, "exclude leaves out all 4 files"),
        (PrepareConfig([str(tmp_path / "bad.parquet")]), out, "bad.parquet: is no readable Parquet file"),
        (config(tmp_path, validation_share=0.9999999), out, "no document is left to train on"),
        (config(tmp_path), tmp_path / "file", "exists already and is no prepared folder"),
        (config(tmp_path), tmp_path / "full", "exists already and is no prepared folder"),
    ):
        with pytest.raises(ConfigError, match=problem) as caught:
            prepare(cfg, target)
        assert "\n" not in str(caught.value)
    assert not out.exists() and not (tmp_path / ".out.partial").exists()


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("some words, and some more")
    prepare(PrepareConfig([str(tmp_path / "a.txt")]), tmp_path / "out")
    return tmp_path / "out"


def damage_index(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**values, **changes}))


def damage_entry(folder: Path, **changes: object) -> None:
    damage_index(folder, train=[{**json.loads((folder / "index.json").read_text())["train"][0], **changes}])


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda f: (f / "index.json").unlink(), "is no prepared folder"),
        (lambda f: (f / "index.json").write_text("{"), "index.json cannot be read"),
        (lambda f: (f / "index.json").write_text("[]"), "index.json cannot be read"),
        (lambda f: damage_index(f, format=99), "has format 99, this version reads 1"),
        (lambda f: damage_index(f, dtype="object"), "index.json cannot be read"),
        (lambda f: damage_index(f, strange=1), "index.json cannot be read"),
        (lambda f: damage_index(f, highest_token="x"), "index.json cannot be read .odd highest_token 'x'"),
        (lambda f: damage_index(f, highest_token=70000), "index.json cannot be read .odd highest_token 70000"),
        (lambda f: damage_index(f, unigram_entropy=math.nan), "index.json cannot be read .odd unigram_entropy nan"),
        (lambda f: damage_index(f, skipped=None), "index.json cannot be read .odd skipped None"),
        (lambda f: damage_index(f, train=[]), "index.json cannot be read .no training data"),
        (lambda f: (f / "index.json").write_text("[" * 100000), "index.json cannot be read .maximum recursion"),
        (lambda f: damage_entry(f, tokens="x"), "index.json cannot be read .odd entry"),
        (lambda f: damage_entry(f, tokens=None), "index.json cannot be read .odd entry"),
        (lambda f: damage_entry(f, documents=0), "index.json cannot be read .odd entry"),
        (lambda f: damage_entry(f, name="train-0\0"), "index.json cannot be read .odd entry"),
        (lambda f: damage_entry(f, name=3), "index.json cannot be read .odd entry 3"),
        (
            lambda f: damage_index(f, train=[{"name": "../a", "documents": 1, "tokens": 1, "sha256": {}}]),
            "index.json cannot be read .odd entry",
        ),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "not a readable tokenizer.json"),
        (
            lambda f: (f / "tokenizer.json").write_text(load_tokenizer("byte").to_str().replace("endoftext", "end")),
            "is not the tokenizer that made the shards",
        ),
        (lambda f: (f / "train-00000.tokens").unlink(), "train-00000.tokens: cannot be read"),
        (lambda f: os.truncate(f / "train-00000.tokens", 4), "has 4 bytes instead of 52"),
        (lambda f: os.truncate(f / "train-00000.ends", 80), "has 80 bytes instead of 8"),
        (lambda f: (f / "train-00000.ends").write_bytes(bytes([25, *[0] * 7])), "ends does not fit index.json"),
        (lambda f: (f / "train-00000.tokens").write_bytes(b"\x01\x00" * 26), "its checksum is not the one"),
    ],
)
def test_damage_is_named(prepared: Path, damage: object, problem: str) -> None:
    verify(prepared)
    damage(prepared)
    with pytest.raises(ConfigError, match=problem) as caught:
        verify(prepared)
    assert str(prepared) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("ends", [[3, 3, 8], [5, 3, 8], [0, 3, 8], [-1, 3, 8]])
def test_documents_follow_one_another(tmp_path: Path, ends: list[int]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": "cde"}\n')
    index = prepare(PrepareConfig([str(tmp_path / "a.jsonl")]), tmp_path / "out")
    (tmp_path / "out" / "train-00000.ends").write_bytes(np.array(ends, dtype="<i8").tobytes())
    with pytest.raises(ConfigError, match="train-00000.ends does not fit index.json"):
        map_shards(tmp_path / "out", index, TRAIN)


def test_index_reads_as_written(prepared: Path) -> None:
    assert prepare(PrepareConfig([str(prepared.parent / "a.txt")]), prepared) == read_index(prepared)


def test_the_standard_library_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it lies: a folder of it that is left out is not one of the same name above it."""
    folder = tmp_path / "test" / "python[3]"
    for name in ("a.py", "test/b.py", "deep/tests/c.py", "site-packages/d.py", "json/e.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x = 1\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(folder)})
    recipe = compose("train", ["+recipe=stdlib_code"]).data.prepare
    index = prepare(replace(recipe, train_tokenizer=None, validation_share=0.0), tmp_path / "out")
    assert [Path(source["path"]).name for source in index.settings["sources"]] == ["a.py", "e.py"]
