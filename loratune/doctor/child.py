"""The process of one probe: arguments come as JSON on standard input, facts go as JSON to standard output."""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib import import_module
from typing import Any

from pydantic import TypeAdapter

from loratune.doctor.facts import Failure
from loratune.errors import LoratuneError, named_reason_of
from loratune.runtime import PARENT, signal_at_end_of_parent

PROBES = {
    "torch_facts": "torch_facts:torch_facts",
    "trial": "trials:try_package",
    "exchange": "exchange:exchange",
    "packing": "packing:packing_facts",
    "place": "places:place",
    "hub": "hub:hub_facts",
    "hashes": "hashes:modelscope_hashes",
    "base": "base:base_facts",
    "template": "template:check_template",
    "rows": "rows:check_rows_of",
}
"""Name → module in `probes` and its function."""


def run(probe: str, arguments: dict[str, Any]) -> Any:
    """Import a probe and return what it measures; each imports only what it is about."""
    module, _, function = PROBES[probe].partition(":")
    return getattr(import_module(f"loratune.doctor.probes.{module}"), function)(**arguments)


def main() -> None:
    signal_at_end_of_parent(signal.SIGKILL, lambda: os.getppid() == PARENT)
    arguments = json.loads(sys.stdin.read())
    with os.fdopen(os.dup(1), "wb") as output:
        os.dup2(2, 1)  # what libraries print is not a result
        try:
            result = {"facts": run(sys.argv[1], arguments)}
        except LoratuneError as error:
            result = {"failure": Failure("refused", error.message)}
        except Exception as error:  # a package may raise anything
            result = {"failure": Failure("error", named_reason_of(error))}
        output.write(TypeAdapter(dict[str, Any]).dump_json(result))
    os._exit(0)  # what a library does at the end of a process is not examined, and may hang


if __name__ == "__main__":
    main()
