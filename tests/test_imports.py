"""The layers of the project import one way only, and every script stands on its own."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = ["model", "dataset", "eval", "trainer", "trainer/train_", "scripts"]
FILES = [path for folder in sorted({name.split("/")[0] for name in ORDER}) for path in (ROOT / folder).rglob("*.py")]


def layer(path):
    """Place in ORDER of a file, or of an imported module written with slashes."""
    name = str(path)
    return ORDER.index("trainer/train_") if name.startswith("trainer/train_") else ORDER.index(name.split("/")[0])


def project_imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" if "." not in node.module else node.module for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.replace(".", "/") for name in names if name.split(".")[0] in ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_imports_only_from_its_own_layer_and_those_below(path):
    own = layer(path.relative_to(ROOT).as_posix())
    for name in project_imports(path):
        assert layer(name) <= own, f"{path.relative_to(ROOT)} imports {name}"
        if own == layer("trainer/train_"):
            assert layer(name) < own, f"{path.relative_to(ROOT)} imports a sibling script, {name}"


def test_scripts_put_the_project_root_first():
    """Started by path from anywhere, a script finds the project's packages, and no neighbour by its file name."""
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        if 'if __name__ == "__main__":' in text and path.parent.name != "model":
            assert "sys.path[0] = str(pathlib.Path(__file__).resolve().parents[" in text, path


def test_train_scripts_have_the_five_landmarks():
    for path in sorted((ROOT / "trainer").glob("train_*.py")):
        if path.name == "train_tokenizer.py":
            continue                                                     # it has no loss and no steps
        text = path.read_text(encoding="utf-8")
        places = [text.find(mark) for mark in ('"""', "class Config(", "def compute_loss(", "# --- build",
                                               "# --- loop")]
        assert places == sorted(places) and places[0] == 0 and -1 not in places, path
        samples = "class Config(RLConfig)" in text
        assert len(text.splitlines()) <= (220 if samples else 150), path
        if samples:
            marks = ("experience.act(", "judge(rollout)", 'columns["advantages"]', ".backward()")
            phases = [text.find(mark, places[-1]) for mark in marks]     # act, judge, credit, learn
            assert phases == sorted(phases) and -1 not in phases, path


def test_every_flag_is_used():
    """A field of a Config that no line reads is a promise that nobody keeps."""
    code = "\n".join(path.read_text(encoding="utf-8") for path in FILES)
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name in ("Config", "TrainConfig", "FineTuneConfig", "RLConfig"):
                for field in node.body:
                    if isinstance(field, ast.AnnAssign):
                        assert f"cfg.{field.target.id}" in code or f"config.{field.target.id}" in code, \
                            f"{path.name}: --{field.target.id} is never read"
