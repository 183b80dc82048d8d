"""A small world for tests of the real thing: parallel data with holes, models of a few thousand weights, a config."""

import inspect
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from alsace_dist.files import manifest
from alsace_dist.files.written import take_over
from alsace_dist.models.mt5 import make_body
from alsace_dist.models.nano import LanguageModel, initialise, train_tokenizer

LANGUAGES = ("en", "de", "fr", "ru")
WORDS = {
    "en": ["red", "green", "blue", "stone", "tree", "river", "old", "new"],
    "de": ["rot", "grün", "blau", "Stein", "Baum", "Fluss", "alt", "neu"],
    "fr": ["rouge", "vert", "bleu", "pierre", "arbre", "fleuve", "vieux", "neuf"],
    "ru": ["красный", "зелёный", "синий", "камень", "дерево", "река", "старый", "новый"],
}
LABELS = ["a", "b", "c"]


def write_data(path: Path, num_groups: int) -> None:
    """Groups whose label is their first word's colour; every third group lacks a language, none lacks English."""
    rng = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_groups):
            label = rng.randrange(3)
            words = [label] + [rng.randrange(3, 8) for _ in range(rng.randrange(1, 12))]
            texts = {language: {"text": " ".join(WORDS[language][word] for word in words)} for language in LANGUAGES}
            if number % 3 == 0:
                del texts[LANGUAGES[1 + number // 3 % 3]]
            file.write(json.dumps({"id": f"g{number}", "label": LABELS[label], "texts": texts}) + "\n")


def write_model(directory: Path) -> None:
    """An mT5 directory with random weights, whose head differs from its embedding as in every real mT5."""
    from transformers import MT5Config

    texts = (" ".join(row) for row in WORDS.values() for _ in range(4))
    tokenizer = train_tokenizer(texts, 120, [LABELS])
    config = MT5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=32, num_heads=4, num_layers=2, num_decoder_layers=1
    )
    module = LanguageModel(make_body(config, 0.0))
    initialise(module, 3)
    tensors = {name.removeprefix("body."): value.detach() for name, value in module.named_parameters()}
    tensors["lm_head.weight"] = tensors.pop("head.weight")
    directory.mkdir(parents=True)
    tokenizer.save_pretrained(directory)
    config.architectures = ["MT5ForConditionalGeneration"]
    config.save_pretrained(directory)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def write_xlmr(directory: Path, head: bool) -> None:
    """An XLM-R directory with random weights: a masked language model, or one with a classification head."""
    from transformers import (
        XLMRobertaConfig,
        XLMRobertaForMaskedLM,
        XLMRobertaForSequenceClassification,
        XLMRobertaTokenizer,
    )

    pieces = ["▁", *(f"▁{word}" for row in (LABELS, *WORDS.values()) for word in row)]
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    tokenizer = XLMRobertaTokenizer(vocab=[*special, *((piece, -2.0) for piece in pieces), ("<mask>", 0.0)])
    geometry = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=66, type_vocab_size=1, num_labels=3, **geometry
    )
    torch.manual_seed(4)
    model = (XLMRobertaForSequenceClassification if head else XLMRobertaForMaskedLM)(config)
    with torch.no_grad():
        for parameter in model.parameters():  # transformers' own initial values all but give equal scores
            parameter += 0.1 * torch.randn_like(parameter)
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)


def write_t5gemma2(directory: Path) -> None:
    """A T5Gemma 2 directory with random weights: in bf16, with a vision tower, as those that are released."""
    from models import small_t5gemma2

    words = [word for row in WORDS.values() for word in row]
    tokenizer = small_t5gemma2.make_tokenizer(words, "".join(LABELS))
    config = small_t5gemma2.make_config(len(tokenizer), dtype="bfloat16")
    model = small_t5gemma2.make_model(config, seed=4, size=0.1).to(torch.bfloat16)
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
    for section in ("encoder", "encoder.text_config", "encoder.vision_config", "decoder"):
        small_t5gemma2.change_config(directory, f"{section}.dtype", "bfloat16")


# What scores: sections of a config over ``write_world``, each with the model's directory in it.
SCORERS: dict[str, dict[str, Any]] = {
    "mt5": {"model": {"path": "model"}},
    "cloze": {"model": {"path": "xlmr"}, "task": {"template": "{text} <mask>", "max_tokens": 64}},
    "head": {"model": {"path": "xlmr-head"}, "task": {"max_tokens": 64}},
    "new head": {"model": {"path": "xlmr", "pooling": "mean"}, "task": {"max_tokens": 64}},
    "t5gemma2": {"model": {"path": "t5gemma2"}, "task": {"max_tokens": 64}},
}


def of_scorer(directory: Path, scorer: str) -> dict[str, Any]:
    """Sections for ``make_config``."""
    sections = SCORERS[scorer]
    model = sections["model"]
    return {**sections, "model": {**model, "path": str(directory / model["path"])}}


def make_config(directory: Path, **sections: Any) -> dict[str, Any]:
    """A config over the data and the model in ``directory``; sections are laid over the defaults."""
    value: dict[str, Any] = {
        "run_dir": str(directory / "run"),
        "task": {"fields": ["text"], "template": "{text}", "labels": LABELS},
        "data": {
            "inputs": [{"path": str(directory / "data.jsonl")}],
            "splits": {"labeled": 40, "unlabeled": 45, "test": 30},
            "groups_per_shard": 16,
        },
        "model": {"path": str(directory / "model")},
        "engine": {"num_processes": 2, "dtype": "fp32", "zero_stage": 2},
        "finetune": {"num_steps": 12, "global_batch_size": 10, "learning_rate": 1e-3}
        | {"log_every_steps": 1, "checkpoint_every_steps": 4},
        "distill": {"num_steps": 12, "global_batch_size": 10, "learning_rate": 1e-3}
        | {"log_every_steps": 1, "checkpoint_every_steps": 4},
        "score": {"tokens_per_batch": 200},
    }
    for name, section in sections.items():
        is_laid_over = isinstance(section, dict) and name in value and "directory" not in section
        value[name] = {**value[name], **section} if is_laid_over else section
    if value["engine"]["zero_stage"] == 3:  # tests of ZeRO-3 mean scoring, too, where these models would fit anywhere
        value["score"].setdefault("sharding", "zero3")
    return value


def write_world(directory: Path) -> None:
    """Data and models for ``make_config``."""
    write_data(directory / "data.jsonl", 115)
    write_model(directory / "model")
    write_xlmr(directory / "xlmr", head=False)
    write_xlmr(directory / "xlmr-head", head=True)
    write_t5gemma2(directory / "t5gemma2")


def write_config(path: Path, value: dict[str, Any]) -> Path:
    """A config as a YAML file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(value), encoding="utf-8")
    return path


def environment() -> dict[str, str]:
    """The environment of a command: one thread per process, no hub."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def alsace(*arguments: str, timeout: float = 120, check: bool = True) -> "subprocess.CompletedProcess[str]":
    """Run the command line as a user does."""
    done = subprocess.run(
        [sys.executable, "-m", "alsace_dist", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


@contextmanager
def started(*arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """The command line in the background; whatever is left of it is killed in the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "alsace_dist", *arguments],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ranks_of(process: "subprocess.Popen[str]") -> list[int]:
    """Process ids of the ranks that a launcher has started so far; none if it has ended."""
    import psutil

    try:
        return [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill_one(ranks: list[int], rng: Any = random) -> bool:
    """Kill one of these processes with SIGKILL, as the kernel does when memory runs out; False if it had ended."""
    try:
        os.kill(rng.choice(ranks), signal.SIGKILL)
    except (ProcessLookupError, IndexError):
        return False
    return True


def wait_for(condition: Any, seconds: float = 180, every_seconds: float = 0.02) -> None:
    """Wait until a condition holds. Fails the test if it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(every_seconds)


class Ranks:
    """A real gloo group of some ranks that stays for as many calls as tests make: to start one takes seconds."""

    def __init__(self, world_size: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.folder = tempfile.TemporaryDirectory(prefix="alsace-ranks-")
        self.num_calls = 0
        self.errors = [Path(self.folder.name, f"{rank}.log") for rank in range(world_size)]
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("rank_main.py"))],
                env=environment()
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
                | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                stdin=subprocess.PIPE,
                stderr=file.open("w"),
                text=True,
            )
            for rank, file in enumerate(self.errors)
        ]

    def call(self, function: Callable[..., Any], arguments: dict[str, Any], seconds: float = 150) -> list[Any]:
        """The function's result on every rank. The first error of a rank fails the test."""
        self.num_calls += 1
        outputs = [Path(self.folder.name, f"{self.num_calls}-{rank}.json") for rank in range(len(self.processes))]
        place = {"file": inspect.getfile(function), "function": function.__name__, "arguments": arguments}
        for process, output in zip(self.processes, outputs, strict=True):
            assert process.stdin is not None
            process.stdin.write(json.dumps(place | {"output": str(output)}) + "\n")
            process.stdin.flush()
        end = time.monotonic() + seconds
        while not all(output.exists() for output in outputs):
            answers = [json.loads(output.read_text()) for output in outputs if output.exists()]
            failed = next((answer["error"] for answer in answers if "error" in answer), None)
            dead = next((rank for rank, process in enumerate(self.processes) if process.poll() is not None), None)
            assert failed is None, failed
            assert dead is None, self.errors[dead or 0].read_text()[-4000:]
            assert time.monotonic() < end, "waited too long"
            time.sleep(0.01)
        answers = [json.loads(output.read_text()) for output in outputs]
        for answer in answers:
            assert "error" not in answer, answer["error"]
        return [answer["result"] for answer in answers]

    def kill(self) -> None:
        """End all ranks at once."""
        for process in self.processes:
            process.kill()
            process.wait()
        self.folder.cleanup()


_GROUPS: dict[int, Ranks] = {}


@contextmanager
def no_room(num_bytes: int) -> Iterator[None]:
    """Files cannot grow beyond so many bytes: what a full disk says, but for the number of the error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def unfinish(directory: Path, kind: str) -> None:
    """Make of a complete output what a killed run leaves right before it writes the manifest."""
    found = manifest.load_manifest(directory, kind)
    take_over(directory, found.files)
    manifest.begin(directory, kind, found.fingerprint)
    (directory / manifest.MANIFEST).unlink()


def gathered(parameter: torch.nn.Parameter) -> AbstractContextManager[Any]:
    """Context in which a parameter of an engine is whole. Collective under ZeRO-3."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameter) if hasattr(parameter, "ds_id") else nullcontext()


def run_ranks(function: Callable[..., Any], world_size: int, **arguments: Any) -> list[Any]:
    """Call ``function(group, **arguments)``, of a test file, on every rank of a real gloo group; their results.

    Arguments and results travel as JSON. The ranks stay for later calls, unless one fails.
    """
    if world_size not in _GROUPS:
        _GROUPS[world_size] = Ranks(world_size)
    try:
        return _GROUPS[world_size].call(function, arguments)
    except BaseException:
        _GROUPS.pop(world_size).kill()  # a rank that failed may have left others in a collective
        raise


def end_ranks() -> None:
    """End the groups of ``run_ranks``."""
    while _GROUPS:
        _GROUPS.popitem()[1].kill()


def stage_on_rank(group: Any, path: str, command: str, round: int, variant: str) -> None:
    """One stage of a config on this rank, as ``alsace COMMAND`` does it once its ranks have started."""
    from alsace_dist import pipeline, runner

    (stage,) = (
        stage
        for stage in pipeline.stages(pipeline.load_run(path))
        if (stage.command, stage.round, stage.variant) == (command, round, variant)
    )
    runner.run_on_ranks(stage, group)


def do(command: str, path: Path, round: int = 0, variant: str = "") -> None:
    """A stage that succeeds, on the ranks of ``run_ranks``: what follows the start of a group, without the start.

    What starts, stops and dies is tested through ``alsace`` and ``started``.
    """
    from alsace_dist.config_file import load_config

    size = load_config(path).engine.num_processes
    assert isinstance(size, int)
    run_ranks(stage_on_rank, size, path=str(path), command=command, round=round, variant=variant)


def run_all(path: Path) -> None:
    """Every stage of a config, as ``alsace run`` does it, with the ranks of ``run_ranks``."""
    from alsace_dist import pipeline, runner

    config = pipeline.load_run(path)
    stages = pipeline.stages(config)
    pipeline.write_config(config, path, stages)
    for stage in stages:
        if stage.on_ranks:
            do(stage.command, path, stage.round, stage.variant)
        else:
            runner.run_stage(stage)


def state_of(directory: Path) -> dict[str, torch.Tensor]:
    """Tensors of an exported model."""
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")
