"""The table of verbs, their modules and parsers. A verb's module is imported only if that verb runs."""

from __future__ import annotations

import importlib
import keyword
from types import ModuleType
from typing import Any

VERBS = {
    "prepare": "convert text to a dataset folder of token files",
    "merge": "join datasets into one",
    "inspect": "print what a dataset holds, and verify it",
    "tokenizer": "train a tokenizer on text",
    "pretrain": "train GPT-2 or BERT with LION, SGD or AdamW; the same command resumes",
    "sweep": "run a grid of settings and pick the best of each optimizer by validation loss",
    "evaluate": "measure the zero-shot perplexity of a run's checkpoints",
    "probe": "measure the full gradient of a run's checkpoints: norms, KKT residual, signal and noise",
    "watch": "show runs in a browser while they train",
    "compare": "write tables and figures over several runs",
    "toy": "run the two-dimensional experiment of the convergence theory",
    "theory": "compute rate constants of runs, and the settings that Corollary 3 gives",
    "scaling": "train models of several sizes and fit the exponent of the norm ratio r against d",
    "reproduce": "make the paper's tables and figures and compare them with the paper",
    "export": "write a checkpoint as a Hugging Face folder",
    "import": "make a run from a Hugging Face folder",
    "generate": "print a few lines of text from a GPT-2 checkpoint",
    "configs": "list, print or copy the shipped configs",
    "completion": "print a script that completes verbs and flags in a shell",
    "env": "print versions and hardware, for bug reports",
    "demo": "run all steps on a small corpus: prepare, pretrain with three optimizers, evaluate, compare",
}


def verb_module(verb: str) -> ModuleType:
    """Imports and returns the module of a verb; `import` is a keyword of Python, so its module is import_.py."""
    return importlib.import_module(f"megatron_lion.commands.{verb}{'_' * keyword.iskeyword(verb)}")


def build_parser(verb: str, module: ModuleType) -> Any:
    """Returns the parser of a verb, with its help line and options."""
    from megatron_lion.configfile import UserParser

    parser = UserParser(prog=f"megatron-lion {verb}", description=module.HELP, exit_on_error=True, print_config=None)
    module.add_arguments(parser)
    return parser
