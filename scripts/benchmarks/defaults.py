"""Trains with default settings and with others on the same rows, scores the adapters, and tabulates all results."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.defaults_plot import plot_defaults
from benchmarks.processes import measure, printed_figures

HERE = Path(__file__).parent
FIRST_UNSEEN = 900
"""Rows from this index on are never trained on."""
LONGEST, SHORTEST_ANSWER = 160, 16
"""Tokens of a row's conversation at most, and of its answer at least."""
MODULES = "argparse ast calendar csv difflib fractions heapq inspect json/decoder statistics textwrap zipfile"
"""Modules of the standard library: text of another kind."""
CHARACTERS = 2000
"""Characters of each module that are scored, from its middle on."""
SETTINGS = {
    "rank": "lora.rank", "alpha": "lora.alpha", "rate": "training.learning_rate", "dropout": "lora.dropout",
    "targets": "lora.target_modules", "epochs": "training.epochs", "decay": "training.weight_decay",
}  # fmt: skip
UNSET = {"dropout": "0", "targets": "all-linear", "epochs": "3", "decay": "0", "rows": "128"}
UNTRAINED = "untrained"
TEXTS = ("unseen", "other", "code")
"""What is scored: unseen rows, unseen rows in another language, source code."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    parser.add_argument("--results", type=Path, required=True, help="file of JSON lines; what it has is not run again")
    parser.add_argument("--plot", type=Path, help="file for a plot")
    parser.add_argument("--model", type=Path, help="model to train; without it, nothing is")
    parser.add_argument("--data", type=Path, help="Alpaca rows: the first 900 for training, the others unseen")
    parser.add_argument("--other", type=Path, help="Alpaca rows in another language")
    parser.add_argument("--seeds", nargs="+", default=["1", "2"])
    parser.add_argument("--cells", nargs="+", default=[], help="rank=16,alpha=32,rate=2e-4 and others in this form")


def run(arguments: argparse.Namespace) -> None:
    """Run what the results lack, and print the tables."""
    if arguments.model and not (arguments.data and arguments.other):
        raise SystemExit("--model needs --data and --other")
    arguments.results.touch()
    if arguments.model:
        known = {(result["model"], result["cell"], result["seed"]) for result in read(arguments.results)}
        with tempfile.TemporaryDirectory(prefix="loratune-benchmark-") as place:
            rows = write_rows(arguments, Path(place))
            cells = [(UNTRAINED, ""), *((cell, seed) for cell in arguments.cells for seed in arguments.seeds)]
            for cell, seed in cells:
                if (arguments.model.name, cell, seed) not in known:
                    result = train_and_score(arguments.model, rows, Path(place) / "run", cell, seed)
                    with arguments.results.open("a") as file:
                        file.write(json.dumps(result) + "\n")
    results = read(arguments.results)
    print("\n".join(table_lines(results)))
    if arguments.plot:
        plot_defaults(points(results), arguments.plot)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the results of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(arguments: argparse.Namespace, place: Path) -> dict[str, Path]:
    """Write the rows to train on and those to score; the sizes are those of the model's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)

    def fits(row: dict[str, str]) -> bool:
        question = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
        whole = tokenizer.apply_chat_template(turns, return_dict=False)
        answer = tokenizer(row["output"], add_special_tokens=False).input_ids
        return len(whole) <= LONGEST and len(answer) >= SHORTEST_ANSWER

    own, other = (json.loads(path.read_text(encoding="utf-8")) for path in (arguments.data, arguments.other))
    library = Path(argparse.__file__).parent
    sources = [(library / f"{name}.py").read_text(encoding="utf-8") for name in MODULES.split()]
    rows = {
        "train": [row for row in own[:FIRST_UNSEEN] if fits(row)],
        "unseen": [row for row in own[FIRST_UNSEEN:] if fits(row)],
        "other": [row for row in other[FIRST_UNSEEN:] if fits(row)],
        "code": [{"text": source[len(source) // 2 :][:CHARACTERS]} for source in sources],
    }
    for name, some in rows.items():
        (place / f"{name}.json").write_text(json.dumps(some), encoding="utf-8")
    return {name: place / f"{name}.json" for name in rows}


def train_and_score(model: Path, rows: dict[str, Path], place: Path, cell: str, seed: str) -> dict[str, Any]:
    """Return the steps and tokens of a run, and the losses of its adapter; those of the model for "untrained"."""
    result: dict[str, Any] = {"model": model.name, "cell": cell, "seed": seed}
    adapter = "none"
    if cell != UNTRAINED:
        settings = settings_of(cell)
        few = rows["train"].with_name("first.json")
        some = json.loads(rows["train"].read_text(encoding="utf-8"))[: int(settings.pop("rows"))]
        few.write_text(json.dumps(some), encoding="utf-8")
        flags = {
            "model.base": model, "model.dtype": "bfloat16", "data.train": few, "data.validation": 0,
            "training.batch_size": 16, "evaluation.questions_share": 0,
            "seed": seed, "output": place, **{SETTINGS[name]: value for name, value in settings.items()},
        }  # fmt: skip
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        measure([sys.executable, "-m", "loratune", "sft", "--overwrite", *words])
        report = json.loads((place / "report.json").read_text(encoding="utf-8"))
        result |= {name: report[name] for name in ("steps", "tokens")}
        adapter = str(place / "adapter")
    nll = printed_figures(HERE / "unseen_loss.py", model, adapter, *(rows[name] for name in TEXTS))["nll"]
    return result | dict(zip(TEXTS, nll, strict=True))


def settings_of(cell: str) -> dict[str, str]:
    """Return the settings of a cell by their short names."""
    return UNSET | dict(pair.split("=") for pair in cell.split(","))


def changes(results: list[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    """Return the runs of a model with each loss less that of the untrained model."""
    (untrained,) = (one for one in results if (one["model"], one["cell"]) == (model, UNTRAINED))
    runs = [one for one in results if one["model"] == model and one is not untrained]
    return [run | {name: run[name] - untrained[name] for name in TEXTS} for run in runs]


def table_lines(results: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a table for each model: the mean change of each loss by training, and ± half the range over the seeds."""
    for untrained in (one for one in results if one["cell"] == UNTRAINED):
        runs = changes(results, untrained["model"])
        losses = ", ".join(f"{name} {untrained[name]:.4f}" for name in TEXTS)
        yield f"\n{untrained['model']}, untrained: {losses}\n"
        yield "| run | alpha × rate | seeds | unseen rows | other language | code |\n|---|---|---|---|---|---|"
        for cell in sorted({one["cell"] for one in runs}, key=lambda cell: (pace(cell), cell)):
            same = [one for one in runs if one["cell"] == cell]
            shown = " | ".join(spread([one[name] for one in same]) for name in TEXTS)
            yield f"| {cell.replace(',', ' ')} | {pace(cell):.1e} | {len(same)} | {shown} |"


def points(results: list[dict[str, Any]]) -> dict[str, list[tuple[float, dict[str, float]]]]:
    """Return model → (alpha × learning rate, changes of the losses) of each run, for the plot.

    Runs of another length than most, and those that adapt some modules, are left out.
    """
    shown = {}
    for model in dict.fromkeys(one["model"] for one in results):
        runs = changes(results, model)
        usual = statistics.mode(run["steps"] for run in runs)
        alike = [run for run in runs if run["steps"] == usual and "targets=" not in run["cell"]]
        shown[model] = [(pace(run["cell"]), run) for run in alike]
    return shown


def pace(cell: str) -> float:
    """Return alpha × learning rate, which the first steps of a run depend on."""
    settings = settings_of(cell)
    return float(settings["alpha"]) * float(settings["rate"])


def spread(values: list[float]) -> str:
    """Return the mean, and half of the range if there are several values."""
    half = f" ± {(max(values) - min(values)) / 2:.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.4f}{half}"
