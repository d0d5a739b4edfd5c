"""Pages of the documentation that scripts/docs_hooks.py makes from the code and from other files."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="the documentation is built with the extra docs")
import docs_hooks


@pytest.mark.parametrize(
    ("link", "on_the_site"),
    [
        ("[guide](../docs/guides/cpu.md)", "[guide](guides/cpu.md)"),
        ("[rules](../CONTRIBUTING.md#words)", "[rules](contributing.md)"),
        ("[raw figures](serve/)", "raw figures"),
        ("[project](https://example.org)", "[project](https://example.org)"),
        ("[below](#latency)", "[below](#latency)"),
        ("![chart](chart.png)", "![chart](chart.png)"),
    ],
)
def test_links_of_a_page_outside_docs(link: str, on_the_site: str) -> None:
    assert docs_hooks.site_links(f"See {link}.", Path("benchmarks")) == f"See {on_the_site}."


def test_the_python_page_names_the_public_values() -> None:
    page = docs_hooks.python_names()
    for name in ("Pipeline", "PipelineOutput", "Params", "Request", "ExportOptions", "Bundle", "canny", "RequestError"):
        assert f".{name}\n" in page


def test_roles_of_docstrings_are_code() -> None:
    html = "<p>See :class:<code>.params.Params</code> and :attr:<code>choice</code>.</p>"
    assert docs_hooks.on_page_content(html) == "<p>See <code>Params</code> and <code>choice</code>.</p>"


def test_the_commands_page_has_every_command() -> None:
    from hypersd.cli import COMMANDS

    page = docs_hooks.commands()
    assert [line for line in page.splitlines() if line.startswith("## ")] == [f"## hypersd {name}" for name in COMMANDS]
