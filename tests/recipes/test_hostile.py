"""Files that someone else wrote run no code: each kind of folder holds a program, which must not have run."""

import io
import json
import os
import pickle
import shutil
import zlib
from pathlib import Path

import jinja2
import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from eval.answers import responses
from longctx import checkpoint_index
from longctx.data.turns import turn_tokens
from longctx.hf.checkpoint import tensor_files
from longctx.hf.config import shape_of, tokenizer_of
from longctx.megatron.spd.joint import JointDistillation
from longctx.megatron.training import checkpoint
from longctx.spd.plan import saved_plan
from recipes import chat, export, reproduce
from tests.recipes.conftest import SAVED


class Program:
    """An object whose unpickling makes the folder ``ran``."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self):
        return os.mkdir, (str(self.ran),)


@pytest.fixture
def ran(tmp_path) -> Path:
    """A folder that each test's program makes."""
    return tmp_path / "ran"


@pytest.fixture
def program(ran) -> bytes:
    """A pickle that makes the folder ``ran``."""
    content = pickle.dumps(Program(ran))
    pickle.loads(content)
    ran.rmdir()
    return content


@pytest.fixture
def saved(tmp_path) -> Path:
    folder = tmp_path / "v0_1"
    shutil.copytree(SAVED, folder)
    return folder


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sign(place: Path) -> None:
    """Make the checkpoint's run.json fit its files, as a forger would."""
    metadata = checkpoint_index.read_metadata(place)
    names = [file.name for file in sorted(place.iterdir()) if file.name != "run.json"]
    checksums = {name: zlib.crc32((place / name).read_bytes()) for name in names}
    checkpoint_index.write_index(place, {k: v for k, v in metadata.items() if k not in ("files", "crc32")}, checksums)


@pytest.fixture
def place(saved) -> Path:
    return saved / "train_ring" / "checkpoints" / "step-00000004"


def test_checkpoint_index_that_holds_a_program_is_refused(place, saved, program, ran, refused, one_rank):
    (place / ".metadata").write_bytes(program)
    sign(place)
    words = (f"checkpoint={saved / 'train_ring'}", f"to={saved / 'to'}")
    assert "it names posix.mkdir, which belongs in no checkpoint" in refused(export, export.task, *words)
    words = (f"checkpoint={place}", f"to={saved / 'to'}")
    assert "it names posix.mkdir, which belongs in no checkpoint" in refused(export, export.task, *words)
    with pytest.raises(ValueError, match=r"none is whole \(.*posix\.mkdir.*\): restore one to resume; to begin again"):
        checkpoint.agreed_on_all_ranks(saved / "train_ring" / "checkpoints")
    with pytest.raises(ValueError, match=r"posix\.mkdir"):
        checkpoint.read_state({}, place)
    assert not ran.exists()


def test_export_of_a_checkpoint_with_a_flipped_bit_is_refused(place, saved, refused):
    sign(place)
    file = place / "__0_1.distcp"
    content = bytearray(file.read_bytes())
    content[40_000] ^= 1
    file.write_bytes(content)
    words = (f"checkpoint={saved / 'train_ring'}", f"to={saved / 'to'}")
    assert "__0_1.distcp has changed since it was written" in refused(export, export.task, *words)


def test_checkpoint_index_that_names_another_file_is_refused(place, tmp_path, one_rank):
    index = pickle.loads((place / ".metadata").read_bytes())
    next(iter(index.storage_data.values())).relative_path = "../secret"
    (place / ".metadata").write_bytes(pickle.dumps(index))
    sign(place)
    assert "refers to ../secret, which is not one of its files" in checkpoint_index.content_fault_of(place)
    with pytest.raises(ValueError, match=r"refers to \.\./secret"):
        checkpoint.read_state({}, place)


@pytest.mark.filterwarnings("ignore:`load_state_dict` is deprecated:FutureWarning")  # megatron-core's call
@pytest.mark.parametrize("where", ["common.pt", "__0_0.distcp"])
@pytest.mark.parametrize("forced", [False, True], ids=["", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_checkpoint_tensors_that_hold_a_program_are_refused(place, ran, where, forced, one_rank, monkeypatch):
    """torch reads a checkpoint's extra states with weights_only=False."""
    key = "decoder.layers.mlp.linear_fc1._extra_state"
    content = io.BytesIO()
    torch.save([Program(ran)], content)
    if where == "common.pt":
        (place / where).write_bytes(content.getvalue())
    else:
        index = pickle.loads((place / ".metadata").read_bytes())
        [info] = [one for name, one in index.storage_data.items() if name.fqn == f"{key}/shard_0_2"]
        info.offset, info.length = (place / where).stat().st_size, len(content.getvalue())
        with (place / where).open("ab") as file:
            file.write(content.getvalue())
        (place / ".metadata").write_bytes(pickle.dumps(index))
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    sign(place)
    assert not checkpoint_index.content_fault_of(place), "the index is as megatron-core writes it"
    sharded = checkpoint.dist_checkpointing.ShardedObject
    state = {f"{key}{i}": sharded(key, None, (2,), (i,)) for i in (0, 1)}
    with pytest.raises(ValueError, match="cannot be read as tensors and plain values"):
        checkpoint.read_state(state, place)
    assert not ran.exists()
    assert ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" in os.environ) == forced
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_state_of_joint_distillation_that_holds_a_program_is_refused(saved, ran, one_rank):
    place = saved / "spd_adapted" / "joint_0.5" / "step-00000003"
    torch.save(Program(ran), place / "rank-0.pt")
    sign(place)
    run = object.__new__(JointDistillation)
    run._order = checkpoint_index.read_metadata(place)["order"]
    run._blocks = type("Blocks", (), {"tp": type("Comm", (), {"rank": 0})})
    with pytest.raises(pickle.UnpicklingError):
        run.resume(place.parent)
    assert not ran.exists()


@pytest.mark.parametrize("model_type", ["llama", "unknown"])
@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "code.Tokenizer"])
def test_model_folder_with_code_runs_none_of_it(saved, ran, monkeypatch, model_type, tokenizer_class):
    """The answer to transformers' question, whether to run the code, is already waiting in standard input."""
    folder = saved / "model"
    code = f"import os\nos.mkdir({str(ran)!r})\nclass Config: ...\nclass Tokenizer: ...\n"
    for name in ("code.py", "modeling_llama.py", "tokenization_llama.py", "sitecustomize.py", "conftest.py"):
        (folder / name).write_text(code)
    own = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Config", "AutoTokenizer": ["code.Tokenizer"] * 2}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type, "auto_map": own}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class, "auto_map": own}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    if model_type == "unknown":
        with pytest.raises(ValueError, match="needs custom Python code"):
            shape_of(folder)
    else:
        shape_of(folder)
    if tokenizer_class == "code.Tokenizer":
        with pytest.raises(ValueError, match="needs custom Python code"):
            tokenizer_of(folder)
    assert not ran.exists()


def test_chat_template_runs_no_code(saved, ran):
    tokenizer = tokenizer_of(saved / "model")
    for name in ("cycler.__init__.__globals__.os", "''.__class__.__mro__[1].__subclasses__()[0].__init__.__globals__"):
        tokenizer.chat_template = f"{{{{ {name}.mkdir({str(ran)!r}) }}}}"
        with pytest.raises(jinja2.exceptions.TemplateError):
            turn_tokens("Hello", tokenizer, before=[], ends=())
    assert not ran.exists()


@pytest.mark.parametrize("name", ["model/pytorch_model.bin", "model/model.safetensors", "spd_adapted/spd.safetensors"])
def test_pickled_weights_are_not_read(saved, program, ran, name):
    (saved / "model" / "model.safetensors").unlink()
    (saved / name).write_bytes(program)
    with pytest.raises((ValueError, SafetensorError)):
        tensor_files((saved / name).parent)
    assert not ran.exists()


def test_plan_that_holds_a_program_is_refused(saved, program, ran):
    (saved / "spd_adapted" / "spd_plan.json").write_bytes(program)
    with pytest.raises(ValueError, match="is not a plan"):
        saved_plan(saved / "spd_adapted")
    assert not ran.exists()


@pytest.mark.parametrize("name", ["session.json", "ring0-heads0.safetensors"])
def test_session_that_holds_a_program_is_refused(saved, program, ran, refused, monkeypatch, name):
    session = saved / "chat" / "session"
    (session / name).write_bytes(program)
    if name != "session.json":
        index = json.loads((session / "session.json").read_text())
        index["files"][name] = {"size": len(program), "crc32": zlib.crc32(program)}
        (session / "session.json").write_text(json.dumps(index))
    monkeypatch.chdir(saved)
    words = ("model=model", "turns=inputs/more_turns.jsonl", "session.load=chat/session")
    assert "chat/session" in refused(chat, chat.task, *words)
    assert not ran.exists()


def test_stored_answers_that_hold_a_program_are_not_used(tmp_path, program, ran):
    file = tmp_path / "answers.jsonl"
    lines = [json.dumps({**entry, "crc32": zlib.crc32(json.dumps(entry).encode())}) for entry in UNFIT_ENTRIES]
    file.write_bytes(program + b"\n" + "\n".join(lines).encode())
    stored = responses.read(file)
    assert not stored.answers and not stored.commits
    assert len(stored.corrupt) == file.read_bytes().count(b"\n") + 1
    assert not ran.exists()


UNFIT_ENTRIES = (
    {},
    {"key": ["a"], "answer": "b"},
    {"key": "a"},
    {"key": "a", "answer": [1.0]},
    {"key": "a", "answer": {"__class__": "os.system"}},
    {"requests": "1", "tokens": 2, "seconds": 0.1, "commit": "c"},
    {"requests": 1, "tokens": 2, "seconds": None, "commit": ["c"]},
)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("timeit", ["import os; os.mkdir('RAN')"]),
        ("recipes.generate", ["--config-dir=RAN"]),
        ("recipes.generate", ["+hydra.callbacks.x._target_=os.mkdir", "++hydra.callbacks.x.path=RAN"]),
        ("eval.run;os", []),
    ],
)
def test_manifest_that_starts_another_program_is_refused(saved, ran, module, words):
    file = saved / "generate" / "manifest.json"
    words = [word.replace("RAN", str(ran)) for word in words]
    file.write_text(json.dumps({**json.loads(file.read_text()), "module": module, "overrides": words}))
    with pytest.raises(ValueError, match="which is not a command of longctx"):
        reproduce.run_again(str(saved / "generate"))
    assert not ran.exists()
