"""Nothing of a stranger's is run: the syntax trees of all of our Python, launchers and configs included."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("offsetjax", "launch", "configs") for path in (ROOT / folder).rglob("*.py"))

RUNS_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "torch", "code", "codeop"}
CALLS = {"eval", "exec", "compile", "__import__", "system", "popen"}
# Of what may be named so: the file, and why it may.
ALLOWED = {
    ("offsetjax/config/load.py", "run_path"): "a config file is Python that the user named",
}


def _found(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name.split(".")[0] in RUNS_CODE)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in RUNS_CODE:
            yield str(node.module)
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id in CALLS:
            yield function.id
        if isinstance(function, ast.Attribute):
            of = function.value.id if isinstance(function.value, ast.Name) else ""
            if (of, function.attr) in (("os", "system"), ("os", "popen"), ("builtins", "eval"), ("builtins", "exec")):
                yield function.attr
            if function.attr in ("run_path", "run_module") or (of, function.attr) == ("yaml", "load"):
                yield function.attr
        for keyword in node.keywords:
            is_true = not (isinstance(keyword.value, ast.Constant) and keyword.value.value in (False, None))
            if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and is_true:
                yield f"{keyword.arg}=True"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_runs_what_it_reads(file: Path) -> None:
    name = str(file.relative_to(ROOT))
    found = set(_found(ast.parse(file.read_text(encoding="utf-8"), name)))
    assert {each for each in found if (name, each) not in ALLOWED} == set()


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from torch import load",
        "eval('1')",
        "import os; os.system('ls')",
        "f(shell=True)",
        "np.load(a, allow_pickle=True)",
        "g(trust_remote_code=x)",
        "runpy.run_path(a)",
        "yaml.load(a)",
    ],
)
def test_each_of_these_would_be_found(text: str) -> None:
    assert list(_found(ast.parse(text)))


def test_jax_is_looked_into_in_one_file() -> None:
    inside = {
        str(file.relative_to(ROOT))
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jax._src"))
        or (isinstance(node, ast.Import) and any(each.name.startswith("jax._src") for each in node.names))
    }
    assert inside == {"offsetjax/parallel/private.py"}
