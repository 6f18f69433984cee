"""Whole language models: find the decoder blocks, calibrate them one by one, prune, report, resume."""

from s3tensor.files import locked
from s3tensor.llm.auto import check_options
from s3tensor.llm.calibrate import ModuleInputCatcher, transfer_to_device
from s3tensor.llm.recover import Recovery
from s3tensor.llm.report import BlockRow, LinearRow, PruneReport
from s3tensor.llm.resume import check_out, forget_run
from s3tensor.llm.run import prune_model
from s3tensor.llm.structure import decoder_blocks, prunable_layers
from s3tensor.text.text import (
    calibration_tokens,
    get_c4,
    has_parts,
    load_text,
    load_tokens,
    tokenize,
    windows,
)

__all__ = [
    "BlockRow",
    "LinearRow",
    "ModuleInputCatcher",
    "PruneReport",
    "Recovery",
    "calibration_tokens",
    "check_options",
    "check_out",
    "decoder_blocks",
    "forget_run",
    "get_c4",
    "has_parts",
    "load_text",
    "load_tokens",
    "locked",
    "prunable_layers",
    "prune_model",
    "tokenize",
    "transfer_to_device",
    "windows",
]
