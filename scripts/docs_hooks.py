"""MkDocs hooks: pages made from the code (commands, Python, HTTP, manifest, checkpoints) or from other files."""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
COPIES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md", "benchmarks.md": "benchmarks/README.md"}
#: public names by module, in the order of the page; without names all that the module exports, or its exceptions
PYTHON: dict[str, tuple[str, ...]] = {
    "hypersd.runtime": (),
    "hypersd.runtime.params": ("Params",),
    "hypersd.runtime.request": ("Request",),
    "hypersd.runtime.stream": ("Stream",),
    "hypersd.runtime.image_files": ("open_image", "fit"),
    "hypersd.runtime.control_images": ("canny", "scribble", "preprocess"),
    "hypersd.errors": (),
    "hypersd.export": (),
    "hypersd.engines": (),
    "hypersd.samplers": (),
    "hypersd.families": (),
}
LIVE = """
## GET /v1/live

A WebSocket (subprotocol `hypersd.live`) for which the newest input wins. With a token, also offer the subprotocol
`bearer.` followed by the token in URL-safe base64 without padding.

- **To the service**: a text frame with a `GenerationRequest` and `id`, a number of your choice, as JSON. It replaces an
  earlier input that has not started. Or a binary frame with the length of that JSON (4 bytes, big-endian), the JSON
  without `image`, and the file of the init image.
- **From the service**, for each image: a binary frame with the length of a header (4 bytes, big-endian), the header as
  JSON (`id`, `index`, `count`, `seed`, `mime`, `width`, `height`, `steps`, `eta`, `model`, `waited`, `timings`) and the
  image file.
- **From the service**, for a rejected input: a text frame `{"id": ..., "error": Problem}`.
"""
ROLE = re.compile(r":(?:class|meth|func|attr|mod|data|exc):<code>~?\.*((?:\w+\.)*\w+)")
ROOM_FILES = ("__init__.py", "errors.py")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)\s#]+)[^)\s]*\)")


@event_priority(100)  # before mkdocstrings reads its options
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Show mkdocstrings the package alone: the folder of the clone may have another name, and holds .venv and tests."""
    folder = Path(tempfile.mkdtemp(prefix="hypersd-docs-")) / "hypersd"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name in ROOM_FILES or (path.is_dir() and (path / "__init__.py").is_file()):
            (folder / path.name).symlink_to(path)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(folder.parent)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {
        "reference/commands.md": commands(),
        "reference/checkpoints.md": checkpoints(),
        "reference/python.md": python_names(),
        "reference/http.md": http(),
        "reference/manifest.md": manifest(),
    }
    for uri, source in COPIES.items():
        pages[uri] = site_links((ROOT / source).read_text("utf-8"), Path(source).parent)
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Show the roles of docstrings, such as ``:class:`.Params```, as the code alone."""
    return ROLE.sub(lambda role: f"<code>{role[1].rpartition('.')[2]}", html)


def site_links(text: str, folder: Path) -> str:
    """A page from the repository's ``folder``, for the site: links to its pages are kept, others become text."""
    uris = {source: uri for uri, source in COPIES.items()}

    def replace(link: re.Match[str]) -> str:
        target = os.path.normpath(folder / link[2])
        uri = uris.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
        return f"[{link[1]}]({uri})" if uri else link[1]

    return LINK.sub(replace, text)


def commands() -> str:
    """Every command, from its parser."""
    from hypersd.cli import make_parser

    os.environ["COLUMNS"] = "100"
    parser = make_parser()
    lines = ["# Commands", "", "`hypersd COMMAND --help` shows the same.", ""]
    for name, command in _subparsers(parser):
        lines += [f"## hypersd {name}", "", _escape(command.description or ""), ""]
        lines += ["```text", command.format_usage().removeprefix("usage: ").rstrip(), "```", ""]
        for group in command._action_groups:
            lines += _option_table(group)
    return "\n".join(lines)


def _subparsers(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def _option_table(group: argparse._ArgumentGroup) -> list[str]:
    actions = [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
    if not actions:
        return []
    lines = [f"**{(group.title or 'options').capitalize()}**", ""]
    lines += [_escape(group.description), ""] if group.description else []
    lines += _table(("argument", "meaning"), ((_code(_words(action)), _help(action)) for action in actions))
    return [*lines, ""]


def _words(action: argparse.Action) -> str:
    formatter = argparse.HelpFormatter("hypersd", width=1000)
    return formatter._format_action_invocation(action)


def _help(action: argparse.Action) -> str:
    values = {**vars(action), "prog": "hypersd"}
    text = (action.help or "") % {name: value for name, value in values.items() if value is not argparse.SUPPRESS}
    return f"{text} (may be repeated)" if isinstance(action, argparse._AppendAction) and "several" not in text else text


def checkpoints() -> str:
    """The table that `hypersd list` prints."""
    from hypersd.export import CHECKPOINTS, DEMO_CHECKPOINTS

    lines = ["# Checkpoints", "", "`hypersd list` shows this table, and the ControlNets whose settings are known.", ""]
    for title, known in (("Hyper-SD", CHECKPOINTS), ("Demonstration, in the clone", DEMO_CHECKPOINTS)):
        rows = (
            (
                f"`{entry.name}`",
                f"`{entry.base}`",
                ", ".join(str(steps) for steps in entry.allowed_steps),
                entry.sampler,
                ", ".join(map(str, entry.timesteps or ())) or "the sampler's",
                f"{entry.eta:g}",
                f"{entry.guidance_scale:g}" if entry.is_guided else "none",
            )
            for entry in known
        )
        lines += [
            f"## {title}",
            "",
            *_table(("name", "base", "steps", "sampler", "timesteps", "eta", "guidance"), rows),
            "",
        ]
    return "\n".join(lines)


def python_names() -> str:
    """A page that mkdocstrings fills: the public names under the modules that have them."""
    lines = ["# Python", "", "All public names. `Pipeline` and `HyperSDError` can also be imported from `hypersd`.", ""]
    done: set[str] = set()
    for name, members in PYTHON.items():
        module = importlib.import_module(name)
        values = [getattr(module, member) for member in members or _public(module)]
        places = [f"{v.__module__}.{v.__qualname__}" for v in values if inspect.isclass(v) or inspect.isfunction(v)]
        new = [place for place in places if place not in done]
        lines += [f"## {name}", "", *(line for place in new for line in _member(place))]
        done |= {*places}
    return "\n".join(lines)


def _public(module: ModuleType) -> list[str]:
    """The names that a package exports, or the exceptions of a module."""
    exceptions = [
        name for name, value in vars(module).items() if inspect.isclass(value) and issubclass(value, Exception)
    ]
    return getattr(module, "__all__", exceptions)


def _member(place: str) -> list[str]:
    return [f"::: {place}", "    options:", "      heading_level: 3", ""]


def http() -> str:
    """The HTTP API, from the description that the service itself gives at /openapi.json."""
    from hypersd.serve.app import make_app
    from hypersd.serve.settings import ServeSettings

    service: Any = SimpleNamespace(metrics=None)
    schema = make_app(service, ServeSettings()).openapi()
    lines = [
        "# HTTP",
        "",
        schema["info"]["description"],
        "",
        "The service itself has this description at `GET /openapi.json`.",
    ]
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            lines += [
                "",
                f"## {method.upper()} {path}",
                "",
                _escape(operation.get("description") or operation["summary"]),
            ]
            answers = operation["responses"].items()
            rows = ((f"`{status}`", answer["description"]) for status, answer in answers)
            lines += ["", *_table(("status", "meaning"), rows)]
    lines += [LIVE, "## Bodies", "", "`*` marks a required field, or one that is always present in an answer.", ""]
    bodies = schema["components"]["schemas"]
    for name in sorted(bodies, key=lambda name: name != "GenerationRequest"):
        body = bodies[name]
        lines += [f"### {name}", "", _escape(body.get("description", "")), "", *_schema_table(body), ""]
    return "\n".join(lines)


def manifest() -> str:
    """The manifest, from the types that read it."""
    import msgspec

    from hypersd.engines import Manifest

    types = msgspec.json.schema(Manifest)["$defs"]
    lines = [
        "# Manifest",
        "",
        "`bundle.json` holds one `Manifest`. Unknown fields are rejected. `*` marks a required field.",
        "",
    ]
    for name in ["Manifest", *(name for name in sorted(types) if name != "Manifest")]:
        lines += [f"## {name}", "", _docstring(types[name].get("description", "")), "", *_schema_table(types[name]), ""]
    return "\n".join(lines)


def _docstring(text: str) -> str:
    """A docstring's paragraphs, its attributes as a list."""
    head, _, attributes = inspect.cleandoc(text).partition("Attributes:\n")
    items = re.sub(r"(?m)^ {4}(\w+): ", r"- `\1`: ", attributes)
    return f"{_escape(head)}\n{_escape(items)}".replace("``", "`").strip()


def _schema_table(schema: Mapping[str, Any]) -> list[str]:
    required = schema.get("required", ())
    rows = [
        (
            f"`{name}`" + (" *" if name in required else ""),
            _code(_type(field)),
            _default(field),
            field.get("description", ""),
        )
        for name, field in schema.get("properties", {}).items()
    ]
    headings = ("field", "type", "default", "meaning")
    kept = [i for i in range(len(headings)) if any(row[i] for row in rows)]
    return _table(tuple(headings[i] for i in kept), ([row[i] for i in kept] for row in rows)) if rows else []


def _default(field: Mapping[str, Any]) -> str:
    value = field.get("default")
    return _code(str(value)) if value not in (None, "", [], {}) else ""


def _type(field: Mapping[str, Any]) -> str:
    """A JSON schema's type in a few words."""
    if "$ref" in field:
        return field["$ref"].rpartition("/")[2]
    if "anyOf" in field:
        return " or ".join(_type(option) for option in field["anyOf"])
    if "enum" in field or "const" in field:
        return " | ".join(str(value) for value in field.get("enum", [field.get("const")]))
    kind = field.get("type", "any")
    if kind == "array":
        return f"list of {_type(field.get('items') or {})}"
    if kind == "object" and isinstance(field.get("additionalProperties"), dict):
        return f"object of {_type(field['additionalProperties'])}"
    return str(kind) + _limits(field)


def _limits(field: Mapping[str, Any]) -> str:
    signs = {"minimum": ">=", "maximum": "<=", "exclusiveMinimum": ">", "exclusiveMaximum": "<"}
    found = [f"{sign} {field[key]:.15g}" for key, sign in signs.items() if key in field]
    return f" {' '.join(found)}" if found else ""


def _table(headings: tuple[str, ...], rows: Any) -> list[str]:
    lines = [f"| {' | '.join(headings)} |", "|" + " --- |" * len(headings)]
    return lines + [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows]


def _cell(text: str) -> str:
    parts = " ".join(text.split()).split("`")  # a pipe in code does not end a cell
    return _escape("`".join(part if i % 2 else part.replace("|", "\\|") for i, part in enumerate(parts)))


def _code(text: str) -> str:
    return f"`{text}`"


def _escape(text: str) -> str:
    """Text that Markdown would read as HTML, outside of code."""
    parts = text.split("`")
    return "`".join(part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(parts))
