"""The process of one check: calls its function, and writes the figures or the error.

python -m gpu_checks.child MODULE:FUNCTION gpu|cpu FOLDER RESULT.json
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path

from gpu_checks.table import Workplace


def main(function: str, kind: str, folder: str, result: str) -> None:
    module, _, name = function.partition(":")
    try:
        check = getattr(importlib.import_module(module), name)
        found = {"figures": dict(check(Workplace(Path(folder), kind == "gpu")))}
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
