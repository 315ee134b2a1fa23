"""The field's words: homemade ones are refused in the names of the package and in its prose (CONTRIBUTING.md, Words).

To refuse another word, add a line to NAMES (words in names) or PHRASES (prose and messages), with its replacement.
"""
import ast
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import check

# Words in names of functions, classes, methods and arguments → what to use instead.
NAMES = {
    "dice": "generator",
    "turns": "interleaved, rounds",
    "breath": "interleaved",
    "beside": "name the relation: hybrid, aligned, portrait",
    "kin": "related, similar",
    "heard": "real_rows, seconds",
    "hears": "receives",
    "said": "message, log, comment",
    "told": "log, expected, stated",
    "whoever": "caller",
    "nobody": "none",
    "somebody": "user",
    "looks": "spins",
    "ways": "directions",
    "apart": "separate",
    "took": "seconds, backend_used",
    "piece": "time tile, chunk, segment",
    "pieces": "time tiles, chunks, segments",
    "carry": "layer_state, state",
    "turned": "reversed, reverse_frames",
    "claim": "check_folder, lease",
    "arrangement": "setting",
    "arrangements": "settings, tables",
    "silence": "zero padding",
    "remembering": "checkpointed",
    "unbound": "speechbrain_patched",
}
# Phrases in prose, docstrings and messages (regular expressions, capitals or not) → what to write instead.
PHRASES = {
    "by turns": "interleaved",
    "by rounds": "interleaved",
    "in turns": "interleaved",
    "in the same breath": "interleaved",
    r"takes? (?:its|their) turns?": "is interleaved",
    "dice": "random generator",
    r"in pieces(?! of)": "in time tiles, in chunks",
    "piece by piece": "in time tiles, in blocks",
    r"fresh process(?:es)?": "isolated process",
    "fresh weights": "untrained weights, random weights",
    r"(?:at|with) equal parameters": "parameter-matched",
    "beside a convolution": "hybrid",
    "beside attention": "compared with attention",
    "last word": "summary",
    "crops that do not meet": "independent chunks",
    "liked by": "bias of",
    "whoever arrives": "a thread that arrives",
    "what moves what": "influence",
    "no eye for": "cannot model",
    r"turned? on (?:its|their) sides?": "transposed",
    r"laid (?:end to end|beside)": "concatenated",
    "silenced": "set to zero, masked",
    r"(?:is|are|was|were) told in (?:a|one) sentence": "the error names it",
}
# Labels of settings as strings of code → the label to use.
LABELS = {"equal parameters": "parameter-matched", "beside a convolution": "hybrid"}
PROSE = {"nbs": "*.ipynb", "docs": "*.md"}  # folder → its pages; with README.md, CONTRIBUTING.md and index.ipynb


def homemade_names(code: ast.AST) -> list[str]:
    "Functions, classes, methods and arguments of `code` with a refused word in their name."
    found = []
    for n in ast.walk(code):
        named = []
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            named.append((n.lineno, n.name))
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)):
            given = [*n.args.posonlyargs, *n.args.args, *n.args.kwonlyargs, n.args.vararg, n.args.kwarg]
            named += [(a.lineno, a.arg) for a in given if a is not None]
        for line, name in named:
            for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name):
                if instead := NAMES.get(word.lower()):
                    found.append(f"line {line}: {name} ({word.lower()}: {instead})")
    return found


def homemade_phrases(text: str) -> list[str]:
    "Refused phrases in prose, with what to write instead. Code in backticks does not count."
    prose = re.sub(r"\s+", " ", re.sub(r"```.*?```|`[^`]*`", " ", text, flags=re.S))
    found = []
    for phrase, instead in PHRASES.items():
        for m in re.finditer(rf"\b(?:{phrase})\b", prose, re.I):
            found.append(f"…{prose[max(0, m.start() - 30) : m.end() + 30]}… ({m[0]}: {instead})")
    return found


def prose_of(path: Path) -> str:
    "The Markdown of a page, or the Markdown cells of a notebook."
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    return text


def texts_of(code: ast.AST) -> list[str]:
    "The strings of a module."
    return [n.value for n in ast.walk(code) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def homemade_strings(code: ast.AST) -> list[str]:
    "Refused phrases in docstrings and messages, which have three words or more, and refused labels of settings."
    texts = texts_of(code)
    labels = [f"{t!r} ({t}: {LABELS[t]})" for t in texts if t in LABELS]
    return homemade_phrases("\n\n".join(t for t in texts if t.strip().count(" ") >= 2)) + labels


def test_the_scan_finds_what_it_should():
    for bad in ("def beside(x): 0", "def f(dice=None): 0", "class Pieces: 0", "class G:\n def told(self): 0",
                "def f(*, made_in_turns=0): 0", "def f(**said): 0"):
        assert homemade_names(ast.parse(bad)), bad
    for good in ("def inside(x): 0", "def f(generator=None): 0", "piece = 1", "def disclaim(): 0", "def f(skin): 0"):
        assert not homemade_names(ast.parse(good)), good
    for bad in ("Timed by turns.", "measured in\nthe same breath", "A Fresh process", "at equal parameters", "no dice"):
        assert homemade_phrases(bad), bad
    for good in ("Timed interleaved.", "`by turns` is refused", "```\nby turns\n```", "an isolated process", "indices"):
        assert not homemade_phrases(good), good
    for bad in ("def f():\n    'Timed by turns.'", "raise ValueError(f'{x} came by turns')", "x = 'equal parameters'"):
        assert homemade_strings(ast.parse(bad)), bad
    for good in ("x = 'by rounds'", "def f():\n    'Timed interleaved.'"):  # a value of a stored row, not prose
        assert not homemade_strings(ast.parse(good)), good


ids = dict(ids=lambda p: Path(p).as_posix())


@pytest.mark.parametrize("path", check.modules(ROOT), **ids)
def test_names_and_messages_are_the_fields(path):
    code = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    found = homemade_names(code) + homemade_strings(code)
    assert not found, f"{path}: " + "; ".join(found)


FOUND = [p for folder, kind in PROSE.items() for p in sorted((ROOT / folder).rglob(kind)) if not p.is_symlink()]
PAGES = [p.relative_to(ROOT) for p in FOUND]
PAGES += [Path(name) for name in ("README.md", "CONTRIBUTING.md", "index.ipynb")]


@pytest.mark.parametrize("path", [p for p in PAGES if ".ipynb_checkpoints" not in p.parts], **ids)
def test_prose_is_in_the_fields_words(path):
    found = homemade_phrases(prose_of(path))
    assert not found, f"{path}: " + "; ".join(found)
