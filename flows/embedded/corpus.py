"""The embedded default's corpus: text that comes with every CPython, read from the running interpreter.

A document is one module of the standard library (its docstrings and comments, in source order) or one topic of
``pydoc_data.topics``. No text is stored in the project. It depends on the interpreter's version, so a run's report
records the digest of the token rows that it used.

Split: the SHA-256 of a document's name decides whether it is *held out* (one in ten), so that no training run with any
seed or interpreter sees a held-out module. Test packages, which some distributions omit, are only used for training.
"""

import ast
import hashlib
import io
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

Split = Literal["train", "heldout"]

# Character tables (thousands of commented rows) and code that is not part of the library itself.
_EXCLUDED_PACKAGES = {"encodings", "site-packages", "dist-packages", "pydoc_data"}
_TEST_PARTS = {"test", "tests", "idle_test"}
_MINIMUM_CHARACTERS = 200  # shorter documents contain little but a licence line


def split_of(name: str) -> Split:
    """Return the split of the document `name`; depends only on the name."""
    return "heldout" if hashlib.sha256(name.encode()).digest()[0] % 10 == 0 else "train"


def documents(split: Split, *, tests: bool = False) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the documents of `split`, in an order that mixes topics and packages.

    Args:
        split: `train` or `heldout`; the two share no document.
        tests: also read the library's own test packages (never held out).

    Documents are ordered by the hash of their names, so the first N are a fair sample: a caller that needs little text
        can stop early.
    """
    library = Path(sysconfig.get_path("stdlib"))
    sources: dict[str, Path | None] = {f"topics/{topic}": None for topic in topics}
    for path in library.rglob("*.py"):
        relative = path.relative_to(library)
        if not _EXCLUDED_PACKAGES.intersection(relative.parts):
            sources[relative.as_posix()] = path
    for name in sorted(sources, key=lambda name: hashlib.sha256(b"order " + name.encode()).digest()):
        is_test = not _TEST_PARTS.isdisjoint(Path(name).parts)
        if (split == "heldout" or not tests) and is_test:
            continue
        if not is_test and split_of(name) != split:
            continue
        source = sources[name]
        text = topics[name.removeprefix("topics/")] if source is None else module_prose(source)
        if len(text) >= _MINIMUM_CHARACTERS:
            yield name, text


def module_prose(path: Path) -> str:
    """Return the docstrings and comments of a module in source order, one paragraph each.

    Files that are not valid UTF-8 Python (the library has some on purpose, as test inputs) give an empty string.
    """
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, UnicodeDecodeError, ValueError, tokenize.TokenError):
        return ""
    pieces: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                pieces.append((node.body[0].lineno, docstring))
    comment: list[str] = []
    last_line = -1
    for token in tokens:
        if token.type != tokenize.COMMENT:
            continue
        if token.start[0] != last_line + 1 and comment:  # comments on consecutive lines are one paragraph
            pieces.append((last_line, "\n".join(comment)))
            comment = []
        comment.append(token.string.lstrip("#!").strip())
        last_line = token.start[0]
    if comment:
        pieces.append((last_line, "\n".join(comment)))
    paragraphs = (text.strip() for _, text in sorted(pieces))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
