"""A short hash of everything that a notebook's stored outputs depend on.

It covers the code cells with their tags, the minimoe modules that they import (and the modules those import), the
data files beside these modules, the pins of the packages involved, the files under results/ that a cell names, and
checkpoints/ if a cell speaks of it.
Comments and docstrings of the package may change freely: they cannot change an output.
"""

from __future__ import annotations

import ast
import hashlib
import json
import pathlib
import re

from common import ROOT

PACKAGE = "minimoe"
# where the name that one imports is not the name that one installs
DISTRIBUTIONS = {"llama_cpp": "llama-cpp-python", "PIL": "pillow", "yaml": "pyyaml", "IPython": "ipython"}
DATA = ("*.json", "*.txt", "*.jinja")
ALWAYS = ("ipykernel", "ipython", "nbclient")


def _without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            text = first.value if isinstance(first, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                node.body = node.body[1:]
    return tree


def _dump(node: object) -> str:
    """Like ast.dump, but the same on every Python: empty fields, which come and go between versions, are left out."""
    if isinstance(node, ast.AST):
        fields = [(k, v) for k, v in ast.iter_fields(node) if v is not None and v != [] and k not in ("ctx", "kind")]
        return f"{type(node).__name__}({','.join(f'{k}={_dump(v)}' for k, v in fields)})"
    if isinstance(node, list):
        return f"[{','.join(map(_dump, node))}]"
    return repr(node)


def code_fingerprint(source: str) -> str:
    """The source as its syntax tree, without comments, layout and docstrings."""
    return _dump(_without_docstrings(ast.parse(source)))


def parse_cell(source: str) -> ast.Module:
    """A cell's syntax tree; lines of IPython's own syntax are skipped."""
    plain = "\n".join(re.sub(r"^(\s*)[%!].*", r"\1pass", line) for line in source.splitlines())
    return ast.parse(plain)


class Walker:
    """Follows imports from notebook cells through the package, without importing anything."""

    def __init__(self, src: pathlib.Path):
        self.src = src
        self.modules: dict[str, pathlib.Path] = {}
        self.outside: set[str] = set()

    def _file(self, module: str) -> pathlib.Path | None:
        base = self.src.joinpath(*module.split("."))
        for path in (base / "__init__.py", base.with_suffix(".py")):
            if path.is_file():
                return path
        return None

    def _add(self, module: str) -> None:
        parts = module.split(".")
        for n in range(1, len(parts) + 1):  # importing a.b runs a too
            name = ".".join(parts[:n])
            path = self._file(name)
            if path is None or name in self.modules:
                continue
            self.modules[name] = path
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            # A package's __init__ that names modules for lazy loading pulls in only what is asked for: see _name.
            self.scan(ast.parse(path.read_text(encoding="utf-8")), package)

    def _name(self, package: str, name: str) -> None:
        """`from package import name`: a submodule, a name that package's __init__ loads lazily, or a plain name."""
        if self._file(f"{package}.{name}"):
            self._add(f"{package}.{name}")
            return
        path = self._file(package)
        if path is None or path.name != "__init__.py":
            return
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Dict):
                continue
            for key, value in zip(node.keys, node.values, strict=True):
                left, right = _strings(key), _strings(value)
                for where in right if name in left else left if name in right else []:
                    where = where.lstrip(".")
                    for module in (where, f"{package}.{where}"):
                        if self._file(module):
                            self._add(module)

    def scan(self, tree: ast.AST, package: str = "") -> None:
        aliases, nodes = {}, list(_running(tree))
        for node in nodes:
            if isinstance(node, ast.Import):
                for a in node.names:
                    if a.name.split(".")[0] == PACKAGE:
                        self._add(a.name)
                        aliases[a.asname or PACKAGE] = a.name if a.asname else PACKAGE
                    else:
                        self.outside.add(a.name.split(".")[0])
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                    base = ".".join([*parent, base] if base else parent)
                if base.split(".")[0] != PACKAGE:
                    self.outside.add(base.split(".")[0])
                    continue
                self._add(base)
                for a in node.names:
                    self._name(base, a.name)
        for node in nodes:  # import minimoe; minimoe.generate(...)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
                self._name(aliases[node.value.id], node.attr)


def _running(tree: ast.AST):
    """ast.walk without what stands under `if TYPE_CHECKING:`, which never runs."""
    todo = [tree]
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            todo.extend(node.orelse)
        else:
            todo.extend(ast.iter_child_nodes(node))


def _strings(node: ast.AST | None) -> list[str]:
    return [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)] if node else []


def pins(root: pathlib.Path = ROOT) -> dict[str, str]:
    """constraints.txt as {normalised name: version}."""
    found = {}
    for line in (root / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, sep, version = line.partition("#")[0].strip().partition("==")
        if sep:
            found[re.sub(r"[-_.]+", "-", name).lower()] = version
    return found


def digest(nb: dict, root: pathlib.Path = ROOT) -> str:
    """16 hex digits that change when the stored outputs of `nb` may have become wrong."""
    walker, h, results, weights = Walker(root / "src"), hashlib.sha256(), set(), False

    def feed(*parts: str | bytes) -> None:
        for p in parts:
            h.update((p if isinstance(p, bytes) else p.encode()) + b"\0")

    for cell in nb["cells"]:
        if cell["cell_type"] != "code":
            continue
        meta = cell.get("metadata", {})
        source = "".join(cell["source"])
        feed("cell", source, json.dumps(sorted(meta.get("tags", []))))
        try:
            walker.scan(parse_cell(source))
        except SyntaxError:
            pass  # the cell's text is in the hash, and running it will say what is wrong
        weights = weights or "checkpoints" in source
        results.update(re.findall(r"[\w-]+\.json", source + " " + str(meta.get("minimoe", {}).get("card", ""))))
    for name in sorted(walker.modules):
        path = walker.modules[name]
        feed("module", name, code_fingerprint(path.read_text(encoding="utf-8")))
        if path.name == "__init__.py":
            for data in sorted(p for pattern in DATA for p in path.parent.glob(pattern)):
                feed("data", data.name, data.read_bytes().replace(b"\r\n", b"\n"))
    pinned = pins(root)
    used = {DISTRIBUTIONS.get(m, m).lower().replace("_", "-") for m in walker.outside} | set(ALWAYS)
    for name in sorted(used & set(pinned)):
        feed("pin", name, pinned[name])
    for name in sorted(results):
        for path in sorted((root / "results").rglob(name)):
            feed("result", name, path.read_bytes().replace(b"\r\n", b"\n"))
    for path in sorted((root / "checkpoints").rglob("*")) if weights else ():
        if path.suffix in (".safetensors", ".json", ".gguf", ".jinja"):
            feed("weights", path.relative_to(root).as_posix(), path.read_bytes())
    return h.hexdigest()[:16]
