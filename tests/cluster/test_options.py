"""Arguments of ``serve run hypersd.cluster.application:app``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest

from hypersd.cluster.application import app
from hypersd.cluster.options import read_options


def test_words_of_a_command_line_become_values(sd15_bundle: Path, sdxl_bundle: Path) -> None:
    """Ray hands over strings; several bundles have commas between them."""
    options = read_options({"bundles": f"{sd15_bundle},{sdxl_bundle}", "num_gpus": "0", "max_batch": "3"})
    assert options.bundles == (sd15_bundle, sdxl_bundle)
    assert (options.device, options.max_batch, options.max_ongoing_requests) == ("cpu", 3, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bundles": None}, "bundles is missing"),
        ({"bundles": "/nowhere"}, "/nowhere is not a bundle"),
        ({"bundels": "x"}, "'bundels' is not known"),
        ({"num_gpus": "two"}, "num_gpus: "),
        ({"num_gpus": "2"}, "num_gpus: "),
        ({"timeout": "nan"}, "timeout: "),
        ({"queue": "0"}, "queue: "),
        ({"min_replicas": "9"}, "max_replicas=8 is below min_replicas=9"),
        ({"backend": "jax"}, "backend: "),
        ({"token_file": "/nowhere"}, "/nowhere cannot be read"),
        ({"lora_folder": "/nowhere"}, "the LoRA folder /nowhere is not there"),
        ({"lora_folder": "/tmp"}, "hypersd export --lora-slot RANK"),
        ({"strict_loras": "true"}, "give lora_folder=FOLDER with it"),
    ],
)
def test_a_wrong_argument_is_one_line(changes: dict[str, Any], message: str, sd15_bundle: Path) -> None:
    """Ray's command line prints a ClickException without its traceback."""
    arguments = {"bundles": str(sd15_bundle), **changes}
    with pytest.raises(click.ClickException) as caught:
        app({name: value for name, value in arguments.items() if value is not None})
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_two_bundles_of_one_name_are_rejected(sd15_bundle: Path, copy_bundle) -> None:
    """Requests could not say which they mean."""
    twin = copy_bundle(sd15_bundle, sd15_bundle.name).root
    with pytest.raises(click.ClickException, match="two bundles are named"):
        app({"bundles": f"{sd15_bundle},{twin}"})
