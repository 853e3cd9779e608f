"""The process of one probe: arguments come as JSON on standard input, facts go as JSON to standard output."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from pydantic import TypeAdapter

from loratune.doctor.facts import Failure
from loratune.errors import LoratuneError, named_reason_of
from loratune.runtime import PARENT, signal_at_end_of_parent


def run(probe: str, arguments: dict[str, Any]) -> Any:
    """Import a probe and return what it measures; each imports only what it is about."""
    match probe:
        case "torch_facts":
            from loratune.doctor.probes.torch_facts import torch_facts

            return torch_facts(**arguments)
        case "trial":
            from loratune.doctor.probes.trials import try_package

            return try_package(**arguments)
        case "exchange":
            from loratune.doctor.probes.exchange import exchange

            return exchange(**arguments)
        case "packing":
            from loratune.doctor.probes.packing import packing_facts

            return packing_facts(**arguments)
        case "place":
            from loratune.doctor.probes.places import place

            return place(**arguments)
        case "hub":
            from loratune.doctor.probes.hub import hub_facts

            return hub_facts(**arguments)
        case "base":
            from loratune.doctor.probes.base import base_facts

            return base_facts(**arguments)
        case "template":
            from loratune.doctor.probes.template import check_template

            return check_template(**arguments)
        case "rows":
            from loratune.doctor.probes.rows import check_rows_of

            return check_rows_of(**arguments)
        case _:
            raise ValueError(probe)


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
