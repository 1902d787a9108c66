"""The plan of the house: which room may import which, and how large a room may be."""
import ast
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
FILES = {".".join(path.relative_to(TOP).with_suffix("").parts).removesuffix(".__init__"): path
         for path in [*TOP.glob("*.py"), *TOP.glob("*/*.py")] if path.parent != TOP / "tests"}
METHODS = ("ssn", "prob_unet", "phiseg", "hpunet", "vae_unet")


def is_main(node) -> bool:
    """`if __name__ == "__main__":`"""
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def imports(nodes):
    """Names of the modules that these statements import, nested ones included."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imports(ast.iter_child_nodes(node))


def functions(tree):
    """Every function that is not only there for a demo, which a method's file ends with."""
    return [node for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("demo")]


def tree(module):
    return ast.parse(FILES[module].read_text())


def test_every_room_is_seen():
    assert {*METHODS, "common", "train", "analysis.pictures", "sources.base"} <= FILES.keys()


def test_there_is_no_import_cycle():
    """Kahn's algorithm: take away what imports nothing that is left, until nothing is left."""
    needs = {module: {name for name in imports(n for n in tree(module).body if not is_main(n))
                      if name in FILES and name != module} for module in FILES}
    while free := {module for module, others in needs.items() if not others & needs.keys()}:
        needs = {module: others for module, others in needs.items() if module not in free}
    assert not needs


@pytest.mark.parametrize("module", FILES)
def test_no_function_imports_a_room_of_the_house(module):
    for function in functions(tree(module)):
        assert not set(imports(function.body)) & FILES.keys(), f"{module}.{function.name}"


@pytest.mark.parametrize("method", METHODS)
def test_a_method_stands_alone(method):
    """It imports no other method, and nothing that draws, but for its demo."""
    body = [node for node in tree(method).body if not is_main(node)
            and not getattr(node, "name", "").startswith("demo")]
    names = set(imports(body))
    assert not names & {*METHODS, "models", "train", "evaluate", "data"}
    assert not [name for name in names if name.startswith(("analysis", "matplotlib"))]
    assert "matplotlib" not in FILES[method].read_text()


@pytest.mark.parametrize("module", FILES)
def test_a_room_has_520_lines_at_most(module):
    assert len(FILES[module].read_text().splitlines()) <= 520
