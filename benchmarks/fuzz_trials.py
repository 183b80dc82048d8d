"""The classes of edits of the fuzz benchmark: each makes one trial, an edited world and the commands to run in it."""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tiny
import yaml
from fuzz_edits import NASTY, edit_bytes, edit_state, edit_text, edit_value
from fuzz_signed import UNTOLD, edit_json, edit_scores, edit_shard, edit_step, edit_tensors, sign, write_otherwise
from fuzz_world import CONFIG, DATA, LOOKS, MODEL, NANO, PROFILE, RUN, STEPS, STOPPED, TABLE, Step, readers

SHARE_OF_LOOKS = 0.3  # of trials that also look at the run: report, status, plan, dry run
ASIDE = "aside"  # where files go that something else has taken the place of


@dataclass
class Trial:
    """What is done in a trial. ``edit``: in words; ``must_fail``: success would mean that nonsense was taken as it is;
    ``is_free``: the config or the words may name another run, and may take long; ``is_same``: what is completed must be
    what an undisturbed run completes; ``num_rows``: texts that prepared data must have at least.
    """

    edit: str = ""
    steps: list[Step] = field(default_factory=list)
    must_fail: bool = False
    is_free: bool = False
    is_same: bool = False
    num_rows: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    in_new_process: bool = False
    as_person: bool = False


class Scene:
    """A trial's random numbers and its own copy of the world."""

    def __init__(self, rng: random.Random, world: Path, base: Path) -> None:
        self.rng, self.world, self.base = rng, world, base
        self.run = world / RUN
        self.num_rows = len((world / TABLE).read_text(encoding="utf-8").splitlines()) - 1

    def steps(self, names: Sequence[str], with_looks: bool = True) -> list[Step]:
        """One of some steps, whose output is removed so that it has to be done, and at times a look at the run."""
        found = [STEPS[self.rng.choice(names)]]
        if with_looks and self.rng.random() < SHARE_OF_LOOKS:
            found.insert(self.rng.randrange(2), STEPS[self.rng.choice(LOOKS)])
        return found

    def output(self, step: Step) -> Path:
        """The directory that a step writes; one that is not there, if it writes none."""
        return self.world / step.run / (step.output or "nothing")

    def remove_outputs(self, steps: Sequence[Step]) -> None:
        """Remove what the steps complete."""
        for step in steps:
            shutil.rmtree(self.output(step), ignore_errors=True)

    def files(self, pattern: str = "**/*") -> list[str]:
        """Files of the world that match, in an order that is the same in every world."""
        return sorted(str(path.relative_to(self.world)) for path in self.world.glob(pattern) if path.is_file())

    def begin_again(self, name: str) -> Step:
        """Put a stage back to where it was stopped after a checkpoint."""
        step = STEPS[name]
        shutil.rmtree(self.output(step))
        shutil.copytree(self.base / STOPPED / name, self.output(step))
        return step

    def edit_as_text(self, path: Path) -> str:
        """Edit a text file by characters and lines."""
        text, what = edit_text(self.rng, path.read_text(encoding="utf-8"))
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return what

    def edit_as_json(self, path: Path) -> str:
        """Edit one value of a JSON file."""
        value, what = edit_value(self.rng, json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(value), encoding="utf-8")
        return what

    def edit_as_bytes(self, path: Path) -> str:
        """Edit bytes of a file."""
        data, what = edit_bytes(self.rng, path.read_bytes())
        path.write_bytes(data)
        return what


# --- what people write ---------------------------------------------------------------------------------------------


def config_text(scene: Scene) -> Trial:
    """A config, or a site profile, as text."""
    name = scene.rng.choice((CONFIG, CONFIG, CONFIG, NANO, PROFILE))
    steps = scene.steps(readers(name))
    scene.remove_outputs(steps)
    return Trial(f"{name}: {scene.edit_as_text(scene.world / name)}", steps, is_free=True)


def config_value(scene: Scene) -> Trial:
    """A config, or a site profile, as values."""
    name = scene.rng.choice((CONFIG, CONFIG, CONFIG, NANO, PROFILE))
    steps = scene.steps(readers(name))
    scene.remove_outputs(steps)
    path = scene.world / name
    value, what = edit_value(scene.rng, yaml.safe_load(path.read_text(encoding="utf-8")))
    text = yaml.dump(value, allow_unicode=scene.rng.random() < 0.5)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return Trial(f"{name}: {what}", steps, is_free=True)


def jsonl(scene: Scene) -> Trial:
    """The data as JSONL."""
    path = scene.world / DATA
    steps = scene.steps(["prepare"])
    scene.remove_outputs(steps)
    kind = scene.rng.choice(("text", "bytes", "value", "value", "twice"))
    if kind == "text":
        what = scene.edit_as_text(path)
        return Trial(what, steps, num_rows=0 if what.startswith("cut") else scene.num_rows - len(tiny.LANGUAGES))
    if kind == "bytes":
        return Trial(scene.edit_as_bytes(path), steps)
    lines = path.read_text(encoding="utf-8").splitlines()
    row = scene.rng.randrange(len(lines))
    if kind == "twice":
        lines.insert(scene.rng.randrange(len(lines)), lines[row])
        what = "a group twice"
    else:
        value, what = edit_value(scene.rng, json.loads(lines[row]))
        lines[row] = json.dumps(value)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Trial(f"line {row + 1}: {what}", steps, must_fail=kind == "twice")


def table(scene: Scene) -> Trial:
    """The data as CSV."""
    path = scene.world / TABLE
    is_text = scene.rng.random() < 0.6
    what = scene.edit_as_text(path) if is_text else scene.edit_as_bytes(path)
    words = ("prepare", CONFIG, f"--data.inputs=[{{kind: table, path: {TABLE}}}]", f"--run_dir={RUN}-of-table")
    is_whole = is_text and not what.startswith("cut")
    num_rows = scene.num_rows - 1 - len(tiny.LANGUAGES) if is_whole else 0  # a row of another id is a group more
    return Trial(what, [Step(words)], num_rows=num_rows)


SETTINGS = ("seed", "rounds", "method", "task.labels", "task.template", "task.max_tokens", "data.splits", "data.inputs")
SETTINGS += ("engine.dtype", "engine.zero_stage", "engine.deepspeed", "finetune.num_steps", "distill.learning_rate")
SETTINGS += ("select.rule", "select.beta", "evaluate.alpha", "variants.x", "model.path", "score", "run_dir.x", "")
FLAGS = (
    "--round",
    "--variant",
    "--debug",
    "--dry-run",
    "--on-bad",
    "--help",
    "--lines",
    "--stages",
    "--nodes",
    "--",
    "-",
)
LINES: tuple[tuple[str, ...], ...] = (
    ("prepare", CONFIG, "--on-bad=skip"),
    ("select", CONFIG, "--round=1"),
    ("select", CONFIG, "--variant=paper"),
    ("evaluate", CONFIG),
    ("plan", CONFIG, "--num-processes=2"),
    ("status", RUN, "--lines=3"),
    ("report", RUN),
    ("run", CONFIG, "--dry-run"),
    ("init", "xnli"),
    ("completion", "bash"),
    ("cancel", RUN),
    ("submit", CONFIG, "--cluster=cluster.yaml", "--dry-run"),
    ("--version",),
)


def command_line(scene: Scene) -> Trial:
    """The words of a command."""
    rng = scene.rng
    words = list(rng.choice(LINES))
    done: list[str] = []
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(words) + 1)
        near = min(at, len(words) - 1)
        kind = rng.choice(("drop", "twice", "swap", "letter", "setting", "setting", "flag", "nasty"))
        if kind == "drop" and len(words) > 1:
            del words[near]
        elif kind == "twice":
            words.insert(at, words[near])
        elif kind == "swap":
            words[near], words[0] = words[0], words[near]
        elif kind == "letter":
            words[near] = edit_text(rng, words[near])[0]
        elif kind == "setting":
            words.insert(at, f"--{rng.choice(SETTINGS)}={_typed(rng)}")
        elif kind == "flag":
            words.insert(at, rng.choice(FLAGS) + rng.choice(("", "=", f"={_typed(rng)}")))
        else:
            words.insert(at, _typed(rng))
        done.append(kind)
    words = [word.replace("\0", "")[:100_000] for word in words]  # the system takes no more
    return Trial(", ".join(done), [Step(tuple(words))], is_free=True)


def _typed(rng: random.Random) -> str:
    value = rng.choice(NASTY)
    return value if isinstance(value, str) else rng.choice((str, json.dumps))(value)


# --- what stages write ---------------------------------------------------------------------------------------------


def manifests(scene: Scene) -> Trial:
    """Manifests, marks and other small JSON files of the run, as text or values; nothing is signed again."""
    names = [name for name in scene.files(f"{RUN}/**/*") if name.endswith((".json", ".jsonl", ".yaml"))]
    name = scene.rng.choice(names)
    steps = scene.steps(readers(name))
    keeps = scene.rng.random() < 0.3 or any(name.startswith(f"{RUN}/{step.output}") for step in steps if step.output)
    if not keeps:
        scene.remove_outputs(steps)
    path = scene.world / name
    is_value = path.suffix == ".json" and scene.rng.random() < 0.6
    what = scene.edit_as_json(path) if is_value else scene.edit_as_text(path)
    return Trial(f"{name}: {what}", steps)


def outputs(scene: Scene) -> Trial:
    """Bytes of anything that a stage has written; nothing is signed again."""
    name = scene.rng.choice(scene.files(f"{RUN}/**/*"))
    steps = scene.steps(readers(name))
    keeps = any(name.startswith(f"{RUN}/{step.output}") for step in steps if step.output)
    if not keeps:
        scene.remove_outputs(steps)
    return Trial(f"{name}: {scene.edit_as_bytes(scene.world / name)}", steps, is_same=not keeps)


def _signed(
    scene: Scene, names: list[str], edit: Callable[[random.Random, Path], str], must_fail: bool = True
) -> Trial:
    name = scene.rng.choice(names)
    steps = scene.steps(readers(name), with_looks=False)
    scene.remove_outputs(steps)
    what = edit(scene.rng, scene.world / name)
    sign(scene.world / name, scene.run)
    must_fail = must_fail and steps[0] not in [STEPS[one] for one in UNTOLD.get(what, ())]
    return Trial(f"{name}: {what}", steps, must_fail)


def signed_scores(scene: Scene) -> Trial:
    """Score files."""
    return _signed(scene, scene.files(f"{RUN}/**/*.parquet"), edit_scores)


def signed_shards(scene: Scene) -> Trial:
    """Shards."""
    return _signed(scene, scene.files(f"{RUN}/data/*/*.tar"), edit_shard)


def signed_json(scene: Scene) -> Trial:
    """Selections and evaluations: nonsense that can be told, or any value."""
    names = scene.files(scene.rng.choice(("**/teachers.json", "**/teachers.json", "**/metrics.json")))
    if scene.rng.random() < 0.6:
        return _signed(scene, names, edit_json)
    return _signed(scene, names, lambda rng, path: scene.edit_as_json(path), must_fail=False)


def signed_models(scene: Scene) -> Trial:
    """Weights, config and tokenizer of a model that a stage has made, signed again, or of the model given."""
    directory = scene.rng.choice((f"{RUN}/finetune/model", f"{RUN}/round1/distill/model", MODEL))
    if directory == MODEL and scene.rng.random() < 0.5:
        write_otherwise(scene.rng, scene.world / MODEL)
    names = scene.files(f"{directory}/*")
    if scene.rng.random() < 0.5:
        trial = _signed(scene, [name for name in names if name.endswith((".safetensors", ".bin"))], edit_tensors)
        has_index = any(name.endswith(".index.json") for name in names)  # which says what counts
        return replace(trial, must_fail=not (has_index and trial.edit.endswith("a tensor more")))
    edit = scene.rng.choice((scene.edit_as_json, scene.edit_as_json, scene.edit_as_text, scene.edit_as_bytes))
    if edit != scene.edit_as_bytes:
        names = [name for name in names if name.endswith(".json")]
    return _signed(scene, names, lambda rng, path: edit(path), must_fail=False)


def checkpoints(scene: Scene) -> Trial:
    """Checkpoints of a stopped training and what lies beside them, signed again or not."""
    step = scene.begin_again(scene.rng.choice(("finetune", "distill")))
    output = scene.run / step.output
    (checkpoint,) = output.glob("checkpoints/step-*")
    kind = scene.rng.choice(("tensors", "tensors", "step", "any", "any", "renamed"))
    if kind == "tensors":
        path = scene.rng.choice(sorted(checkpoint.glob("*.safetensors")))
        what = edit_tensors(scene.rng, path)
        sign(path, checkpoint)
    elif kind == "step":
        what = edit_step(scene.rng, checkpoint)
    elif kind == "renamed":
        what = scene.rng.choice(("step-00000009", "step-1", "step-x", "step-00000002.old"))
        checkpoint.rename(checkpoint.with_name(what))
    else:
        path = scene.rng.choice(sorted(path for path in output.rglob("*") if path.is_file()))
        edits = [scene.edit_as_bytes, *([scene.edit_as_text, scene.edit_as_json] if path.suffix == ".json" else [])]
        what = f"{path.name}: {scene.rng.choice(edits)(path)}"
    is_signed = kind in ("tensors", "step")
    return Trial(f"{step.output}: {kind}: {what}", [step], must_fail=is_signed, is_same=not is_signed)


# --- where it runs -------------------------------------------------------------------------------------------------

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "TORCHELASTIC_RUN_ID")
VARIABLES += ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_NUM_NODES", "SLURM_CPUS_PER_TASK")
VARIABLES += ("ALSACE_ATTEMPT_DIR", "ALSACE_NUM_NODES", "ALSACE_NODE_RANK", "ALSACE_RANKS_PER_NODE")
VARIABLES += ("ALSACE_LEAD_SECONDS", "ALSACE_GPUS_PER_NODE", "ALSACE_ERROR_DIR", "GLOO_SOCKET_IFNAME", "DS_ACCELERATOR")
VARIABLES += ("LANG", "LC_ALL", "PYTHONIOENCODING", "PYTHONUTF8", "TMPDIR", "HOME", "TERM", "COLUMNS", "TZ", "PATH")
VARIABLES += ("HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT", "TRANSFORMERS_OFFLINE", "TRANSFORMERS_VERBOSITY", "NO_COLOR")
VARIABLES += ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TORCH_DISTRIBUTED_DEBUG", "XDG_CACHE_HOME")
VALUES = ("", "0", "1", "2", "-1", "abc", "1e9", "9" * 20, "/nowhere", "run.yaml", "☃", " ", "true", "127.0.0.1")
VALUES += ("nowhere.invalid", "C", "de_DE.ISO-8859-1", "ascii", "utf-16", "ascii:strict", "DETAIL", "\x1b[31m", "a=b;c")

# With other values Python itself does not start.
VALUES_OF_PYTHON = {
    "PYTHONUTF8": ("0", "1"),
    "PYTHONIOENCODING": ("ascii", "latin-1", "utf-16", "ascii:strict", ":replace"),
}


def environment(scene: Scene) -> Trial:
    """Variables of the environment, in a forked process or, now and then, in one that Python starts anew."""
    in_new_process = scene.rng.random() < 0.15
    names = ("select", "evaluate", "report", "status", "plan") if in_new_process else tuple(STEPS)
    if in_new_process and scene.rng.random() < 0.3:
        names = ("score", "finetune")
    steps = scene.steps(names, with_looks=False)
    scene.remove_outputs(steps)
    names_of_variables = [scene.rng.choice(VARIABLES) for _ in range(scene.rng.choice((1, 1, 2, 3)))]
    changes = {name: scene.rng.choice(VALUES_OF_PYTHON.get(name, VALUES)) for name in names_of_variables}
    what = ", ".join(f"{name}={value!a}" for name, value in changes.items())
    # Ranks that never meet are waited for as long as a collective may take.
    soon = ("--engine.timeout_seconds=6", "--engine.hang_seconds=null")
    steps = [replace(step, words=step.words + soon) if step.on_ranks else step for step in steps]
    if in_new_process and steps[0].on_ranks and scene.rng.random() < 0.7:  # else behind the launcher
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29531"}
        changes = place | changes
    return Trial(what, steps, is_same=True, environment=changes, in_new_process=in_new_process)


def file_state(scene: Scene) -> Trial:
    """A pipe, a device, a link, a directory, a huge or a closed file in the place of a file, or nothing at all."""
    paths = [path for path in scene.world.rglob("*") if path.name != "mine.txt"]
    name = scene.rng.choice(sorted(str(path.relative_to(scene.world)) for path in paths))
    steps = scene.steps(readers(name))
    is_own = any(f"{RUN}/{step.output}".startswith(name) or name.startswith(f"{RUN}/{step.output}") for step in steps)
    if not is_own:
        scene.remove_outputs(steps)
    what = edit_state(scene.rng, scene.world / name, scene.world / ASIDE / Path(name).name)
    return Trial(f"{name}: {what}", steps, is_same=not is_own, as_person=True)


NAMES = ("mine.txt", "000099.tar", "000099.parquet", "manifest.json.bak", ".hidden", "step-notes", "metrics.jsonl.old")
NAMES += (
    "model.safetensors.bak",
    "part-00000.safetensors",
    "rank00000.txt",
    "mine/deep.txt",
    "bad-records.txt",
    "a.tmp",
)
NAMES += (
    ".manifest.json.mine.tmp",
    "step-00000009/mine.txt",
    "model/mine.bin",
    "checkpoints/mine.txt",
    "hang/mine.txt",
)


def own_file(scene: Scene) -> Trial:
    """A person's own file somewhere in the run, before a stage is done: anew, or once more after it was stopped."""
    if scene.rng.random() < 0.3:
        steps = [scene.begin_again(scene.rng.choice(("finetune", "distill")))]
    else:
        steps = scene.steps([name for name, step in STEPS.items() if step.output])
        scene.remove_outputs(steps)
    step = next(step for step in steps if step.output)
    run = scene.world / step.run
    below = [path.relative_to(run) for path in scene.output(step).rglob("*") if path.is_dir()]
    places = [step.output, *sorted(map(str, below)), "", "data", "finetune", "scores/test", "slurm", ".locks"]
    path = run / scene.rng.choice(places) / scene.rng.choice(NAMES)
    if path.exists():
        path = path.with_name(f"{path.name}.mine")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a person's own\n")
    return Trial(str(path.relative_to(scene.world)), steps, is_same=True)


# Class of edit -> how often it is drawn.
CLASSES: dict[Callable[[Scene], Trial], int] = {
    config_text: 3,
    config_value: 4,
    command_line: 4,
    jsonl: 3,
    table: 3,
    manifests: 4,
    outputs: 3,
    signed_scores: 4,
    signed_shards: 3,
    signed_json: 4,
    signed_models: 4,
    checkpoints: 4,
    environment: 4,
    file_state: 5,
    own_file: 3,
}


def make(scene: Scene) -> tuple[str, Trial]:
    """Draw a class, and edit the world as it says; its name and the trial."""
    classes: list[Any] = list(CLASSES)
    drawn = scene.rng.choices(classes, list(CLASSES.values()))[0]
    return drawn.__name__.replace("_", " "), drawn(scene)
