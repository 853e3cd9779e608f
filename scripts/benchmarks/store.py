"""Load test of `loratune serve --adapters`: more adapters than fit, many clients, answers compared with PEFT's."""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from benchmarks.serve import MOST_GROWTH, Storm, in_threads, send, server, whole_text

TEXT = "Once upon a time"
TARGETS = ("q_proj", "v_proj", "down_proj")
RANK, TOKENS = 8, 8
STORE_METRICS = ("loratune_adapter_loads_total", "loratune_adapter_evictions_total", "loratune_adapters_in_memory")
HOT = 6
"""Adapters that half of the requests ask for."""
ROWS = [{"instruction": "Who are you?", "input": "", "output": "tiny"}] * 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    parser.add_argument("--model", default="tiny-qwen")
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--in-memory", type=int, default=8)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--slots", type=int, default=24)
    parser.add_argument("--max-queue", type=int, default=64)
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--plot", type=Path, help="file for a picture of the memory over time")


def run(arguments: argparse.Namespace) -> None:
    """Write adapters, ask PEFT and the server, and compare; exit with 1 if an answer is wrong or memory grows."""
    arguments.adapter = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "store"
        train_run(arguments.model, folder / "0 run")
        expected = write_adapters(arguments.model, folder, arguments.adapters)
        print(f"{len(expected)} adapters, {len(set(expected.values()))} different answers of PEFT", flush=True)
        more = ["--adapters", str(folder), "--adapters-in-memory", str(arguments.in_memory)]
        arguments.model = str(json.loads((folder / "0 run" / "manifest.json").read_text())["base"]["path"])
        with server(arguments, more) as (port, pid):
            storm = ask_at_random(port, pid, expected, arguments)
            figures = store_figures(port)
    figures |= {"outcomes": dict(storm.outcomes), "wrong": storm.wrong[:20], "resident": storm.resident}
    figures["growth"] = storm.growth
    print(", ".join(f"{name}: {count}" for name, count in sorted(storm.outcomes.items())))
    print(", ".join(f"{name.removeprefix('loratune_')}: {figures[name]:,.0f}" for name in STORE_METRICS))
    print(f"memory: {storm.resident[-1] / 1e6:.0f} MB, {storm.growth:+.1%} from the second quarter to the last")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2))
    if arguments.plot:
        draw(storm.resident, arguments.plot)
    is_bounded = figures["loratune_adapters_in_memory"] <= arguments.in_memory
    if storm.wrong or set(storm.outcomes) - {"right", "429"} or storm.growth > MOST_GROWTH or not is_bounded:
        sys.exit("\n".join(["not as it should be", *storm.wrong[:20]]))


def train_run(model: str, output: Path) -> None:
    """Train one step in float32: the server loads the base as this run says, so that batches change no answer."""
    with tempfile.TemporaryDirectory() as place:
        rows = Path(place) / "rows.json"
        rows.write_text(json.dumps(ROWS))
        flags = ["--model.base", model, "--model.dtype", "float32", "--data.train", str(rows), "--output", str(output)]
        command = [sys.executable, "-m", "loratune", "sft", *flags, "--training.max_steps", "1"]
        subprocess.run(command, check=True, capture_output=True)


def write_adapters(model: str, folder: Path, count: int) -> dict[str, str]:
    """Write PEFT folders with random weights; return name → what PEFT and `generate` say with each."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from loratune.engine.loading import Encoders
    from loratune.engine.request_handle import text_stream
    from loratune.recipe.sections import PromptSettings

    base = json.loads((folder / "0 run" / "manifest.json").read_text())["base"]["path"]
    torch.set_num_threads(1)
    tokenizer, plain = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, target_modules=list(TARGETS))
    adapted = get_peft_model(plain, config).eval()
    shapes = {name: values.shape for name, values in get_peft_model_state_dict(adapted).items()}
    encoder = Encoders().of(Path(base), PromptSettings())
    ends = {encoder.end_id, tokenizer.eos_token_id}
    ids, said = tokenizer(TEXT, return_tensors="pt").input_ids, {}
    for number in range(count):
        torch.manual_seed(number)
        tensors = {name: 0.2 * torch.randn(shape) for name, shape in shapes.items()}
        place = folder / f"adapter-{number:05d}"
        place.mkdir()
        save_file(tensors, place / "adapter_model.safetensors", {"format": "pt"})
        values = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(TARGETS)}
        (place / "adapter_config.json").write_text(json.dumps(values))
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            set_peft_model_state_dict(adapted, tensors)
            output = adapted.generate(input_ids=ids, max_new_tokens=TOKENS, do_sample=False)
        # Broken characters, which random weights write, look otherwise where they are decoded one by one.
        stream = text_stream(encoder, ids[0].tolist())
        tokens = [token for token in output[0, ids.shape[1] :].tolist() if token not in ends]
        said[place.name] = "".join(stream.push(token).text for token in tokens) + stream.finish().text
    return said


def ask_at_random(port: int, pid: int, expected: dict[str, str], arguments: argparse.Namespace) -> Storm:
    """Run clients: half of the requests ask for a few adapters, the others for any."""
    storm, names = Storm({}), list(expected)
    end = time.monotonic() + arguments.seconds

    def work(seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < end:
            name = chance.choice(names[:HOT] if chance.random() < 0.5 else names)
            status, text = send(port, "POST", "/v1/completions", {"model": name, "prompt": TEXT, "max_tokens": TOKENS})
            outcome = str(status)
            if status == 200:
                said = whole_text(text)
                outcome = "right" if said == expected[name] else "wrong"
            if outcome not in ("right", "429"):
                storm.wrong.append(f"{name}: {text if status != 200 else said!r} instead of {expected[name]!r}")
            storm.outcomes[outcome] += 1

    storm.watch(pid, lambda: in_threads(arguments.clients, work))
    return storm


def store_figures(port: int) -> dict[str, Any]:
    """Return the store's metrics."""
    text = send(port, "GET", "/metrics")[1]
    return {name: float(value) for name, value in re.findall(r"^(loratune_adapters?_\w+) (\S+)", text, re.MULTILINE)}


def draw(resident: list[float], path: Path) -> None:
    """Draw resident memory over time."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3))
    axes.plot([size / 1e6 for size in resident])
    axes.set(xlabel="seconds", ylabel="resident memory, MB", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(path)
