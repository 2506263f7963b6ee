"""A 2-bit release of Baidu's together with its original: finding it, checking it, and taking its experts.

What its bytes mean is in `wint2`, the comparison of the weights in `wint2_check`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pyllamaernie.convert import ernie4_5_moe, wint2
from pyllamaernie.convert.checkpoint import Checkpoint, open_checkpoint
from pyllamaernie.convert.families import family_of
from pyllamaernie.convert.outputs import TYPES, OutFile
from pyllamaernie.convert.progress import Bar, Progress, cancellable
from pyllamaernie.convert.tokenizer import Vocabulary
from pyllamaernie.convert.wint2_check import CheckReport, Originals, check
from pyllamaernie.errors import ConvertError
from pyllamaernie.gguf.file import TensorType


def check_two_bit(
    source: str | Path, original: str | Path, *, reading: str = wint2.DOCUMENTED, progress: Progress | None = None
) -> CheckReport:
    """Holds every expert of a 2-bit release against its original and says what was found; writes nothing.

    Raises: WeightMismatchError when they do not fit, other ConvertErrors as `convert` does.
    """
    two_bit = find_two_bit(Path(source), original)
    assert two_bit is not None  # with an original it is one, or refused
    checkpoint = open_checkpoint(Path(original))
    experts = two_bit_experts(two_bit, checkpoint, reading)
    return compare_experts(experts, checkpoint, progress if progress is not None else Bar())


def find_two_bit(source: Path, original: str | Path | None, *, dry_run: bool = False) -> wint2.TwoBitFolder | None:
    """The source as a 2-bit release if it is one, which is the case if and only if an `original` is given.

    Raises: ConvertError where that is not so, and as `wint2.find`.
    """
    two_bit = wint2.find(source, need_weights=original is not None and not dry_run)
    if two_bit and original is None:
        raise ConvertError(
            f"{source}: a 2-bit release, of which only the experts can be used; pass --original with the folder of "
            f"{wint2.original_name(source)}, which the rest is taken from"
        )
    if original is not None and not two_bit:
        raise ConvertError(
            f"{source}: its config.json does not say that it is a 2-bit release (quantization 'wint2'), so it needs no "
            "--original"
        )
    return two_bit


def two_bit_experts(two_bit: wint2.TwoBitFolder, checkpoint: Checkpoint, reading: str) -> wint2.Experts:
    """The experts of a release, found and of the right shape; `checkpoint` is the original.

    Raises: ConvertError if the two are not of one model, or of a kind that no release is known of.
    """
    wint2.check_same_model(two_bit, checkpoint.config, checkpoint.folder)
    if family_of(checkpoint) is not ernie4_5_moe:
        raise ConvertError(
            f"{checkpoint.folder}: not a text mixture of experts; 2-bit releases are known of those only"
        )
    c = ernie4_5_moe.read_config(checkpoint.config)
    return wint2.Experts(two_bit, c, ernie4_5_moe.text_bank(c), reading)


def with_experts(
    file: OutFile, checkpoint: Checkpoint, vocabulary: Vocabulary, experts: wint2.Experts, w4_type: str
) -> OutFile:
    """The original's text model with the experts of the release; those that it has in 4 bits become `w4_type`."""
    kind = TensorType.Q4_0 if w4_type == "q4_0" else TYPES[w4_type]
    _, w4 = ernie4_5_moe.text_model(checkpoint, ernie4_5_moe.pool(checkpoint), vocabulary, kind)
    keys, tensors = wint2.with_experts(file.keys, file.tensors, w4, experts)
    return replace(file, keys=keys, tensors=tensors)


def compare_experts(experts: wint2.Experts, checkpoint: Checkpoint, progress: Progress) -> CheckReport:
    """Holds the experts against the original's, expert by expert. Raises: as `wint2_check.check`; CancelledError."""
    c = ernie4_5_moe.read_config(checkpoint.config)
    originals = Originals(ernie4_5_moe.pool(checkpoint), c, ernie4_5_moe.text_bank(c))
    progress.start(len(experts.layers) * experts.n_expert, "experts", "check")
    try:
        return check(experts, originals, checkpoint.tensors, cancellable(progress))
    finally:
        progress.close()
