"""Who may import whom, and how large things may grow. Layering decays unless a test holds it."""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LEVELS = (  # a module imports from levels above its own in this list, and from its own package
  ("errors", "log", "bounds"),
  ("bucket",),
  ("hosts", "jobs"),
  ("specs", "masks", "mesh", "hlo", "topology"),
  ("sharding",),
  ("collectives", "placement"),
  ("kernels",),
  ("caches",),
  ("layers",),
  ("objectives", "data", "checkpoints", "quantize", "lora"),
  ("training", "serve"),
  ("config",),
  ("program", "hardware", "signals", "resume", "adoption"),
  ("estimate",),
  ("compiled",),
  ("trainer", "conversion"),
  ("train", "decode", "compile", "launch", "prepare", "explain", "inspect", "replay", "evaluate"),
  ("convert",),  # offers another entry point's work as one of its commands
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
ENTRY_POINTS = {*LEVELS[-1], *LEVELS[-2]}
# Its name is given; it assembles a whole program, as those above the assembly do.
RAISED = {("checkpoints", "convert"): LEVEL["trainer"]}

FAMILIES = re.compile(
  r"llama|gemma|gpt|qwen|mi[sx]tral|deepseek|olmo|falcon|granite|\bphi-?\d|\bglm", re.IGNORECASE
)
NAMELESS = {"utils", "util", "common", "helpers", "helper", "types", "misc", "base"}
HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "numpy", "tensorstore"}
# Their signatures are given, whatever their length; their bodies are held to the limits.
PUBLISHED = {("layers", "Attention.__init__"), ("layers", "Attention.__call__")}

LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 8

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclasses.dataclass(frozen=True)
class Module:
  """A file below maxtext/: `parts` of its dotted name after `maxtext`, and its text."""

  parts: tuple[str, ...]
  text: str

  @property
  def package(self) -> str:
    return self.parts[0]

  @property
  def level(self) -> int:
    """On which of LEVELS it stands; -1 for none."""
    return RAISED.get(self.parts, LEVEL.get(self.package, -1))

  @functools.cached_property
  def tree(self) -> ast.Module:
    return ast.parse(self.text)

  def imports(self, within: ast.AST | None = None) -> Iterator[tuple[str, str]]:
    """(top package, package below maxtext or '') of every import."""
    for node in ast.walk(within or self.tree):
      if isinstance(node, ast.Import):
        yield from (split(alias.name) for alias in node.names)
      elif isinstance(node, ast.ImportFrom) and node.module == "maxtext":
        yield from (("maxtext", alias.name) for alias in node.names)
      elif isinstance(node, ast.ImportFrom):
        yield split(f"maxtext.{self.package}" if node.level else node.module or "")


def split(name: str) -> tuple[str, str]:
  top, _, rest = name.partition(".")
  return top, rest.partition(".")[0]


def functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
  """(qualified name, function), methods and inner functions too."""
  for child in ast.iter_child_nodes(node):
    name = prefix + child.name if isinstance(child, Function | ast.ClassDef) else ""
    if isinstance(child, Function):
      yield name, child
    yield from functions(child, f"{name}." if name else prefix)


def modules() -> list[Module]:
  paths = sorted((ROOT / "maxtext").rglob("*.py"))
  parts = [path.relative_to(ROOT / "maxtext").with_suffix("").parts for path in paths]
  return [Module(p, path.read_text()) for p, path in zip(parts, paths, strict=True)]


def unplaced(m: Module) -> Iterator[str]:
  if m.package not in LEVEL and m.parts != ("__init__",):
    yield "stands on no level"
  for part in NAMELESS & set(m.parts):
    yield f"{part!r} says nothing of what is in it"


def upward(m: Module) -> Iterator[str]:
  for top, package in m.imports():
    if top == "maxtext" and package not in ("", m.package, "__version__"):
      if LEVEL.get(package, 99) > m.level:
        yield f"imports {package}, which stands above it"
      elif LEVEL.get(package) == m.level:
        yield f"imports {package}, its sibling"


def config_below(m: Module) -> Iterator[str]:
  if 0 <= m.level < LEVEL["config"]:
    for node in ast.walk(m.tree):
      if isinstance(node, ast.Name | ast.Attribute | ast.Constant):
        name = getattr(node, "id", getattr(node, "attr", getattr(node, "value", "")))
        if name == "Config":
          yield f"line {node.lineno} knows Config; pass a section"


def families(m: Module) -> Iterator[str]:
  if m.package in ("layers", "kernels", "training"):
    for number, line in enumerate(m.text.splitlines(), 1):
      if found := FAMILIES.search(line):
        yield f"line {number} names the family {found[0]}"


def long_files(m: Module) -> Iterator[str]:
  lines = [
    line for line in m.text.splitlines() if line.strip() and not line.strip().startswith("#")
  ]
  if len(lines) > LINES:
    yield f"has {len(lines)} lines, {LINES} are the limit"


def long_functions(m: Module) -> Iterator[str]:
  for name, function in functions(m.tree):
    begin = function.body[0] if (m.package, name) in PUBLISHED else function
    length = (function.end_lineno or 0) - begin.lineno + 1
    if length > FUNCTION_LINES:
      yield f"{name} has {length} lines, {FUNCTION_LINES} are the limit"


def many_parameters(m: Module) -> Iterator[str]:
  for name, function in functions(m.tree):
    a = function.args
    names = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs) if arg.arg != "self"]
    if len(names) > PARAMETERS and (m.package, name) not in PUBLISHED:
      yield f"{name} has {len(names)} parameters, {PARAMETERS} are the limit"


def late_imports(m: Module) -> Iterator[str]:
  """Of our own house; a third-party package may be optional, or slow and rarely needed."""
  if m.package not in ENTRY_POINTS:
    for name, function in functions(m.tree):
      for top, package in m.imports(within=function):
        if top == "maxtext":
          yield f"{name} imports {package} when it is called"


SIZES = (long_files, long_functions, many_parameters)
RULES = (unplaced, upward, config_below, families, late_imports, *SIZES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_module_keeps_to(rule):
  breaches = [f"maxtext/{'/'.join(m.parts)}.py: {what}" for m in modules() for what in rule(m)]
  assert not breaches, "\n".join(breaches)


@pytest.mark.parametrize(
  "rule, parts, text",
  [
    (unplaced, ("extras",), ""),
    (upward, ("layers", "mlp"), "from maxtext.training.step import State"),
    (upward, ("data", "text"), "from maxtext import checkpoints"),
    (upward, ("specs",), "import maxtext.sharding"),
    (config_below, ("training", "loop"), "def loop(config: 'Config'): ..."),
    (config_below, ("data", "text"), "x: config.Config"),
    (families, ("layers", "mlp"), "if name == 'Llama2': ..."),
    (long_files, ("specs",), "x = 1\n" * 401),
    (long_functions, ("specs",), "class A:\n  def f():\n" + "    x = 1\n" * 60),
    (many_parameters, ("specs",), "def f(a, b, c, d, /, e, f, *, g, h, i): ..."),
    (late_imports, ("specs",), "def f():\n  def g():\n    import maxtext.masks"),
    (unplaced, ("layers", "utils"), ""),
  ],
)
def test_a_breach_is_noticed(rule, parts, text):
  assert list(rule(Module(parts, text)))


@pytest.mark.parametrize(
  "name", ["config", "explain", "train", "decode", "launch", "specs", "mesh"]
)
def test_it_imports_nothing_heavy(name):
  program = f"import sys, maxtext.{name}; print(*({HEAVY!r} & set(sys.modules)))"
  run = subprocess.run(
    [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
  )
  assert run.stdout.split() == []
