"""The table of scalars: everything that training and scoring log by step, what healthy looks like, and what to do.

A scalar is computed where its value is known, under a name of this table; ``sinks.ScalarWriter`` refuses others.
docs/monitoring.md is made of the table (docs/make_monitoring.py), which a test holds.
"""

from typing import NamedTuple


class Scalar(NamedTuple):
    """A row of the table. ``name``: its key in metrics.jsonl. ``healthy``: what it looks like in a run that goes well;
    ``remedy``: what to do where it does not. ``by_language``: there is one for each language, NAME/LANGUAGE."""

    name: str
    unit: str
    meaning: str
    healthy: str
    remedy: str
    by_language: bool = False


# Group -> what it is about, and its scalars. TensorBoard shows a group together, and each scalar by language by itself.
GROUPS: dict[str, tuple[str, tuple[Scalar, ...]]] = {
    "train": (
        "How training goes. What is said to be since the last reading is so since the start, too, where that is later.",
        (
            Scalar(
                "loss",
                "nats",
                "mean over the step's global batch; in distillation the divergence from the targets, each example by "
                "its weight; left out for a step that was skipped, if it is no number",
                "falls fast at first, then slowly; in distillation it starts below 1",
                "rises, or jumps and stays: lower `learning_rate`; flat from the start: raise it",
            ),
            Scalar(
                "divergence",
                "nats",
                "mean KL(target, model) of an example since the last reading, without weights",
                "falls",
                "falls while `target_agreement` does not: the targets are nearly uniform, see `target_entropy`",
            ),
            Scalar("learning_rate", "", "of the step", "rises to its peak, then as `schedule` says", "none is needed"),
            Scalar(
                "gradient_norm",
                "",
                "global norm of the step's gradient before clipping; left out where DeepSpeed reports none",
                "of one order of magnitude after the warm-up",
                "grows with the steps: lower `learning_rate` or raise `warmup_ratio`",
            ),
            Scalar(
                "clipped_share",
                "",
                "share of the steps since the last reading whose gradient was longer than `max_gradient_norm`; left "
                "out where DeepSpeed reports no norm",
                "above 0 in the warm-up, then mostly below 0.5",
                "always 1: the learning rate is in truth lower than it says; raise `max_gradient_norm`, or lower "
                "`learning_rate`",
            ),
            Scalar(
                "skipped_steps",
                "",
                "steps since the start whose gradient was not finite and changed nothing (`on_nonfinite: skip`)",
                "0",
                "grows: look at the examples with `alsace replay`",
            ),
            Scalar(
                "target_entropy",
                "nats",
                "mean entropy of the targets since the last reading",
                "far below the logarithm of the number of candidates, and constant over the training",
                "near that logarithm: the teachers know nothing; look at `alsace select --explain`",
            ),
            Scalar(
                "model_entropy",
                "nats",
                "mean entropy of the model's answers since the last reading",
                "comes near `target_entropy`",
                "falls to 0 while `target_entropy` does not: the model has become too sure; fewer epochs, or a lower "
                "`learning_rate`",
            ),
            Scalar(
                "target_agreement",
                "",
                "share of the examples since the last reading where the model's answer is the target's best",
                "rises",
                "falls: lower `learning_rate`; flat: raise it, or train longer",
            ),
            Scalar(
                "vote_agreement",
                "",
                "share of the examples since the last reading where the model's answer is what most languages of the "
                "group answer; with live teachers alone",
                "rises",
                "falls: the teachers drift; take `teachers: frozen`, or lower `learning_rate`",
            ),
            Scalar(
                "divergence_of",
                "nats",
                "`divergence` of the examples in the language",
                "falls in every language",
                "stays high in one: compare its tokens and unknown pieces in the report's section on the data",
                by_language=True,
            ),
            Scalar(
                "agreement_of",
                "",
                "`target_agreement` of the examples in the language",
                "rises in every language, most in those that were weak",
                "falls in a language: its texts may be no translations of the others",
                by_language=True,
            ),
        ),
    ),
    "speed": (
        "How fast it goes. Rates are means since the last reading.",
        (
            Scalar(
                "sequences_per_second",
                "1/s",
                "examples over all ranks",
                "constant",
                "falls by half: look at `data_wait_share`, then at `forward_seconds_most`",
            ),
            Scalar(
                "tokens_per_second",
                "1/s",
                "encoder tokens without padding, over all ranks",
                "constant, but for steps of longer texts",
                "as for `sequences_per_second`",
            ),
            Scalar(
                "mfu",
                "",
                "model FLOPs (of tokens without padding, no recomputation) over what the GPUs could do in bf16 by "
                "their data sheet; left out on CPUs and unknown GPUs",
                "as `alsace plan --nodes` forecasts",
                "lower: raise `tokens_per_micro_batch`, lower the ZeRO stage, use faster networks",
            ),
            Scalar(
                "step_seconds", "s", "a step, of all that happens from one to the next", "constant", "see its parts"
            ),
            Scalar(
                "data_seconds",
                "s",
                "of a step, waiting for the next batch; mean over the ranks",
                "near 0",
                "see `data_wait_share`",
            ),
            Scalar(
                "forward_seconds",
                "s",
                "of a step, forward passes without communication; mean over the ranks",
                "a quarter to a third of a step",
                "more: micro-batches are too small to fill the device; raise `tokens_per_micro_batch`",
            ),
            Scalar(
                "backward_seconds",
                "s",
                "of a step, backward passes without communication; mean over the ranks",
                "twice the forward passes, thrice with gradient checkpointing",
                "more: as for `forward_seconds`",
            ),
            Scalar(
                "optimizer_seconds",
                "s",
                "of a step, the update without communication; mean over the ranks",
                "below a tenth of a step",
                "more: raise `global_batch_size`; offloaded Adam wants more CPU cores per rank",
            ),
            Scalar(
                "communication_seconds",
                "s",
                "of a step, in collectives and waiting for them, for numbers and for ranks that come late; mean over "
                "the ranks. What goes on behind the computing is not in it",
                "below a quarter of a step",
                "more: larger micro-batches, a lower ZeRO stage, or `--over=hpz`; near `forward_seconds_most`: a "
                "straggler",
            ),
            Scalar(
                "forward_seconds_least",
                "s",
                "`forward_seconds` of the rank that needs least",
                "near `forward_seconds_most`",
                "see there",
            ),
            Scalar(
                "forward_seconds_most",
                "s",
                "`forward_seconds` of the rank that needs most",
                "near `forward_seconds_least`",
                "half as much again: a straggler, which a warning names; look at its GPU's clock and its node's load",
            ),
            Scalar(
                "padding_share",
                "",
                "share of the encoder tokens that are padding",
                "below 0.15",
                "more: raise `global_batch_size`, or lower `tokens_per_micro_batch`",
            ),
            Scalar(
                "data_wait_share",
                "",
                "share of the time that ranks wait for their next batch",
                "below 0.05",
                "more: put the data on a local disk (`data.cache`), give each rank more CPU cores",
            ),
        ),
    ),
    "memory": (
        "Memory of the rank that holds most.",
        (
            Scalar(
                "host_memory_gb",
                "GB",
                "resident memory of a rank's process",
                "constant after the first steps",
                "grows without end: please report it; near the node's memory: fewer ranks a node",
            ),
            Scalar(
                "device_allocated_gb",
                "GB",
                "tensors on the GPU at the reading",
                "constant",
                "grows without end: please report it",
            ),
            Scalar(
                "device_reserved_gb",
                "GB",
                "what PyTorch's allocator holds of the GPU",
                "constant after the first steps",
                "near the GPU's memory and far above `device_peak_gb`: fragments; lower `tokens_per_micro_batch`",
            ),
            Scalar(
                "device_peak_gb",
                "GB",
                "most tensors at a time since the last reading",
                "below 0.9 of the GPU's memory",
                "more: lower `tokens_per_micro_batch`, or `--over=gradient-checkpointing`",
            ),
        ),
    ),
    "eval": (
        "On the split `dev` (`data.splits`), where there is one, at intervals: `evaluate_every_steps`. Accuracies need "
        "labels.",
        (
            Scalar(
                "dev_vote_agreement",
                "",
                "share of the answers that are the majority vote of their group's languages; looks at no label; left "
                "out where all but all answers are one candidate",
                "rises, then stays",
                "falls: languages drift apart, set `patience` and `best_by: vote_agreement`",
            ),
            Scalar("accuracy", "", "mean over the languages", "rises, then stays", "falls: set `patience`"),
            Scalar(
                "accuracy_gap",
                "",
                "accuracy in the source language minus the mean of the others",
                "falls while `accuracy` rises",
                "falls because the source language falls: lower `learning_rate`",
            ),
            Scalar(
                "accuracy_sd", "", "population standard deviation over the languages", "falls", "see `accuracy_gap`"
            ),
            Scalar("accuracy_worst", "", "of the language that is worst then", "rises", "look at `accuracy_of`"),
            Scalar(
                "accuracy_of",
                "",
                "of the language",
                "rises, or stays where it was high",
                "falls in one: its texts may be no translations of the others",
                by_language=True,
            ),
        ),
    ),
    "checkpoint": (
        "Checkpoints; logged when one is complete, but for the age.",
        (
            Scalar("checkpoint_gb", "GB", "size, over all ranks", "constant", "none is needed"),
            Scalar(
                "checkpoint_blocking_seconds",
                "s",
                "the step waited so long, for the copy",
                "below a step",
                "more: save less often (`checkpoint_every_steps`)",
            ),
            Scalar(
                "checkpoint_seconds",
                "s",
                "from the copy until it is written and verified by all ranks",
                "below the time between two",
                "more: save less often, or on a faster disk",
            ),
            Scalar(
                "checkpoint_gb_per_second",
                "GB/s",
                "size over the time until it is written",
                "what the disk is said to take",
                "less: the disk is shared; deal `run_dir` over more servers",
            ),
            Scalar(
                "checkpoint_age_seconds",
                "s",
                "since the last complete checkpoint, or the start",
                "falls to near 0 at every checkpoint",
                "grows without end: nothing is saved; look at the log. This much work a crash costs",
            ),
        ),
    ),
    "score": (
        "How scoring goes: its steps are shards, or parts of them.",
        (
            Scalar("done_share", "", "share of the parts of the data that are scored", "rises evenly", "see `speed`"),
            Scalar(
                "confidence_of",
                "",
                "mean probability of the best candidate, in the language, of what this start has scored",
                "above that of a guess; highest in the source language",
                "near that of a guess in every language: is it the right model, template and labels? "
                "`alsace prepare --show` shows a prompt",
                by_language=True,
            ),
            Scalar(
                "vote_agreement_of",
                "",
                "share of the groups where the language's best candidate is what most languages answer",
                "highest in the languages that will teach",
                "as by chance in a language: the model does not know it, or its texts are no translations",
                by_language=True,
            ),
        ),
    ),
}
SCALARS = tuple(scalar for _, scalars in GROUPS.values() for scalar in scalars)
_BY_NAME = {scalar.name: scalar for scalar in SCALARS}
_GROUP_OF = {scalar.name: group for group, (_, scalars) in GROUPS.items() for scalar in scalars}


def tag_of(key: str) -> str:
    """The name in TensorBoard of a key in metrics.jsonl. Raises ``KeyError`` if the table lacks it."""
    name, is_of_language, _ = key.partition("/")
    scalar = _BY_NAME[name]
    if bool(is_of_language) is not scalar.by_language:
        raise KeyError(key)
    return key if scalar.by_language else f"{_GROUP_OF[name]}/{key}"
