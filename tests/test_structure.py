"""The house stays as it was drawn: imports run one way and are light, the links point where they should."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the bottom up: a room may import itself and what stands before it.
ORDER = ["base", "data", "models", "train", "top", "evals", "cli"]
BASE = {"mm.errors", "mm.settings", "mm.files", "mm.page", "mm.curves"}
TOP = {"mm.config", "mm.hub", "mm.report", "mm.compare", "mm.fit", "mm.doctor", "mm.display"}


def room(module: str) -> str:
    if module == "mm.__main__":
        return "cli"
    if module in TOP:
        return "top"
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ORDER else "base"


def imports(path: Path, anywhere: bool = True) -> set[str]:
    """The mm modules that a file imports: anywhere in it, or only when it is itself imported."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found.add(module)
            found |= {f"{module}.{alias.name}" for alias in node.names}
    modules = {str(p.relative_to(ROOT).with_suffix("")).replace("/", ".") for p in (ROOT / "mm").rglob("*.py")}
    modules |= {m.removesuffix(".__init__") for m in modules}
    return {name for name in found if name in modules and name != "mm"}


SOURCES = sorted((ROOT / "mm").rglob("*.py"))


def module_of(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_run_one_way(path: Path) -> None:
    here = module_of(path)
    if here == "mm":
        return  # only hands on mm.load, when it is asked for
    for target in imports(path):
        assert ORDER.index(room(target)) <= ORDER.index(room(here)), f"{here} imports {target}: against the flow"


def test_no_circle_among_modules() -> None:
    graph = {module_of(path): imports(path, anywhere=False) - {module_of(path)} for path in SOURCES}
    graph = {
        name: {t for t in targets if not t.endswith("__init__")} for name, targets in graph.items() if name != "mm"
    }
    done: set[str] = set()

    def visit(name: str, chain: tuple[str, ...]) -> None:
        assert name not in chain, f"circle: {' -> '.join((*chain[chain.index(name) :], name))}"
        if name not in done:
            for target in graph.get(name, ()):
                # A package's __init__ is imported with its modules; it is no step of its own.
                if not name.startswith(f"{target}."):
                    visit(target, (*chain, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_base_layer_is_what_it_says() -> None:
    assert {module_of(p) for p in SOURCES if room(module_of(p)) == "base"} <= BASE | {"mm"}


@pytest.mark.parametrize("name", ["data", "models", "train"])
def test_links_point_into_the_package(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink() and link.readlink() == Path("mm") / name


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/").stdout


def test_import_is_light_and_installs_no_generic_names() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'pydantic', 'data', 'models', 'train'}"
    assert python(f"import sys, mm; print({heavy} & set(sys.modules))").strip() == "set()"


def test_configs_are_checked_without_torch() -> None:
    code = (
        "import sys; from mm.cli import main; "
        f"status = main(['config', {str(ROOT / 'configs/quickstart.yaml')!r}, '--json']); "
        "print(status, 'torch' in sys.modules, 'data' in sys.modules)"
    )
    assert python(code).splitlines()[-1] == "0 False False"
