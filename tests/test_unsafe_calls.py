"""No call of the project's Python files can run code that a file, a model or a message brings; each exception has a reason.

Ruff's rules in pyproject.toml cover a part. These rules read the syntax tree, so that they also see renamed imports and
keywords with a value that is computed.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent

CALLS = {
    "eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "shutil.unpack_archive",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "_pickle.load", "_pickle.loads", "marshal.load", "marshal.loads",
    "shelve.open", "dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads", "joblib.load", "pandas.read_pickle",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load", "yaml.unsafe_load_all",
    "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter", "runpy.run_path", "runpy.run_module",
    "jinja2.Template", "jinja2.Environment", "code.interact", "torch.utils.cpp_extension.load_inline",
}  # fmt: skip
METHODS = {"extractall", "from_string"}
"""Names of methods that are rejected on any object: tarfile's and zipfile's extraction, jinja2's templates from text."""
KEYWORDS = {"shell", "allow_pickle", "trust_remote_code"}
"""Keywords whose value must be the literal False wherever they are given."""

ALLOWED = {
    ("megatron_lion/train/checkpoint_tensors.py", "pickle.Unpickler"): "its find_class is the allow-list of .metadata",
    ("tests/distributed.py", "torch.load(weights_only=False)"): "reads what the test's own ranks wrote a moment before",
    ("tests/train/test_checkpoint.py", "pickle.loads"): "reads and changes the metadata of the test's own run",
    ("tests/faults/cases_hostile.py", "allow_pickle=True"): "writes the hostile array that the product must refuse",
    ("tests/test_wheel.py", "extractall"): "unpacks the wheel that the test built a moment before",
    ("tests/prepare/test_tokenizers.py", "pickle.loads"): "a copy for processes of a user must give the same ids",
}


def findings(source: str) -> Iterator[tuple[int, str]]:
    """Yields (line, rule) of each rejected call, base class or keyword in a Python source."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})

    def full(expression: ast.expr) -> str:
        first, _, rest = ast.unparse(expression).partition(".")
        name = f"{names.get(first, first)}{'.' * bool(rest)}{rest}"
        return name.removeprefix("builtins.")

    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from ((node.lineno, full(base)) for base in node.bases if full(base) in CALLS)
        if not isinstance(node, ast.Call):
            continue
        name = full(node.func)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in CALLS:
            yield node.lineno, name
        elif isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            yield node.lineno, node.func.attr
        if name == "torch.load" and not _is(keywords.get("weights_only"), True):
            given = keywords.get("weights_only")
            yield node.lineno, f"torch.load(weights_only={ast.unparse(given)})" if given else "torch.load"
        for word in KEYWORDS & keywords.keys():
            if not _is(keywords[word], False):
                yield node.lineno, f"{word}={ast.unparse(keywords[word])}"


def _is(value: ast.expr | None, wanted: bool) -> bool:
    return isinstance(value, ast.Constant) and value.value is wanted


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("eval('1')", "eval"),
        ("import builtins\nbuiltins.exec('x')", "exec"),
        ("from os import system as go\ngo('ls')", "os.system"),
        ("import pickle as p\np.loads(b'')", "pickle.loads"),
        ("from pickle import Unpickler\nclass Mine(Unpickler): pass", "pickle.Unpickler"),
        ("import marshal\nmarshal.loads(b'')", "marshal.loads"),
        ("import shelve\nshelve.open('a')", "shelve.open"),
        ("import torch\ntorch.load('a')", "torch.load"),
        ("import torch as t\nt.load('a', weights_only=flag)", "torch.load(weights_only=flag)"),
        ("import yaml\nyaml.load(text, Loader=yaml.SafeLoader)", "yaml.load"),
        ("archive.extractall('.')", "extractall"),
        ("import subprocess\nsubprocess.run('ls', shell=True)", "shell=True"),
        ("call('ls', shell=flag)", "shell=flag"),
        ("import numpy as np\nnp.load('a', allow_pickle=True)", "allow_pickle=True"),
        ("model(trust_remote_code=True)", "trust_remote_code=True"),
        ("from jinja2 import Template\nTemplate('{{ x }}')", "jinja2.Template"),
        ("environment.from_string('{{ x }}')", "from_string"),
    ],
)
def test_each_rule_finds_its_call(source: str, rule: str) -> None:
    assert [found for _, found in findings(source)] == [rule]


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('a', weights_only=True)",
        "import numpy\nnumpy.load('a', allow_pickle=False)",
        "import yaml\nyaml.safe_load(text)",
        "model.eval()",
        "import re\nre.compile('a')",
        "import pickle\npickle.dumps(1)",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
    ],
)
def test_safe_calls_are_accepted(source: str) -> None:
    assert not list(findings(source))


def test_no_file_of_the_project_has_an_unsafe_call() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=REPO, capture_output=True, text=True, check=True
    ).stdout.split()
    used, wrong = set(), []
    for name in listed:
        if not (REPO / name).is_file():
            continue  # deleted, and not committed yet
        for line, rule in findings((REPO / name).read_text(encoding="utf-8")):
            used.add((name, rule))
            if (name, rule) not in ALLOWED:
                wrong.append(f"{name}:{line}: {rule}")
    assert not wrong
    assert not ALLOWED.keys() - used, "an exception that nothing needs must be removed"


def test_ruff_has_the_rules_that_it_knows() -> None:
    """One sample for each rule of ruff, against the settings in pyproject.toml."""
    samples = {
        "S102": "exec('x')", "S202": "import tarfile\ntarfile.open('a').extractall()", "S301": "import pickle\npickle.loads(b'')",
        "S302": "import marshal\nmarshal.loads(b'')", "S307": "eval('x')", "S506": "import yaml\nyaml.load('a')",
        "S602": "import subprocess\nsubprocess.Popen(command, shell=True)", "S604": "function(command, shell=True)",
        "S605": "import os\nos.system(command)", "S701": "import jinja2\njinja2.Environment()",
    }  # fmt: skip
    for rule, source in samples.items():
        done = subprocess.run(
            [sys.executable, "-m", "ruff", "check", "--output-format", "concise", "--stdin-filename", "megatron_lion/x.py", "-"],
            cwd=REPO, input=source, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert f" {rule} " in done.stdout, (rule, done.stdout, done.stderr)
