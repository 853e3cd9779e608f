"""`loratune verify`, and what infer and export make of a folder that is not as it was verified."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tree
from safetensors.torch import load_file, save_file
from typer.testing import Result

from loratune.errors import Exit
from loratune.runs import remembered

WEIGHTS = "model.safetensors"
QUERY, OTHER_QUERY = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
NORM = "model.norm.weight"
Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def verified(short_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from typer.testing import CliRunner

    from loratune.cli.app import app

    folder = tmp_path_factory.mktemp("verified") / "merged"
    result = CliRunner().invoke(app, ["merge", "--adapter", str(short_run), "--output", str(folder), "--no-logits"])
    assert result.exit_code == 0, result.stderr
    return folder


@pytest.fixture
def merged(verified: Path, tmp_path: Path) -> Path:
    """A copy of the merged model."""
    return Path(shutil.copytree(verified, tmp_path / "copy"))


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def swap(tensors: dict[str, torch.Tensor]) -> None:
    tensors[QUERY], tensors[OTHER_QUERY] = tensors[OTHER_QUERY], tensors[QUERY]


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1000] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def set_key(name: str, **values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def seal_of(values: dict[str, Any]) -> str:
    """The hash that verification.json holds of its other values, as the page of the run folder has it."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def edit_verification(
    change: Callable[[dict[str, Any]], Any], seal: Callable[[dict[str, Any]], str] | None = None
) -> Callable[[Path], None]:
    """Change what verification.json says, and seal it again or leave it without a seal, as earlier versions did."""

    def damage(folder: Path) -> None:
        path = folder / "verification.json"
        values = json.loads(path.read_text())
        del values["sha256"]
        change(values)
        path.write_text(json.dumps(values | ({"sha256": seal(values)} if seal else {})))

    return damage


def swap_merges(folder: Path) -> None:
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["merges"].reverse()
    path.write_text(json.dumps(values))


def append(name: str, text: str) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        with (folder / name).open("a") as file:
            file.write(text)

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "one per cent": (change_tensors(lambda tensors: tensors[QUERY].mul_(1.01)), f"{WEIGHTS}: changed"),
    "two layers swapped": (change_tensors(swap), f"{WEIGHTS}: changed"),
    "norm zeroed": (change_tensors(lambda tensors: tensors[NORM].zero_()), f"{WEIGHTS}: changed"),
    "one NaN": (change_tensors(lambda tensors: tensors[QUERY][0, :1].fill_(torch.nan)), f"{WEIGHTS}: changed"),
    "one bit": (flip_a_bit, f"{WEIGHTS}: changed"),
    "rope_theta": (set_key("config.json", rope_theta=5.0), "config.json: changed"),
    "end of answers": (set_key("generation_config.json", eos_token_id=3), "generation_config.json: changed"),
    "merges": (swap_merges, "tokenizer.json: changed"),
    "template": (append("chat_template.jinja", "!"), "chat_template.jinja: "),
    "a file is gone": (lambda folder: (folder / "generation_config.json").unlink(), "generation_config.json: missing"),
    "an adapter beside it": (append("adapter_config.json", "{}"), "adapter_config.json"),
    "code beside it": (append("modeling.py", "1"), "modeling.py: added"),
}


def test_an_intact_folder_passes_and_its_hashes_are_those_of_its_files(cli: Cli, verified: Path) -> None:
    result = cli("verify", verified, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["kind"], report["remarks"]) == ("merged model", [])
    known = json.loads((verified / "verification.json").read_text())["files"]
    names = {path.name for path in verified.iterdir()} - {"verification.json"}
    assert (known.keys(), report["files"]) == (names, len(names))
    for name, values in known.items():
        data = (verified / name).read_bytes()
        assert values == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_changed_folder_is_refused_by_every_command_that_reads_it(
    cli: Cli, merged: Path, tmp_path: Path, name: str
) -> None:
    damage, told = DAMAGES[name]
    damage(merged)
    ask = ("infer", "--model", merged, "--prompt", "hi", "--max-new-tokens", "1")
    export = ("export", "--model", merged, "--format", "gguf", "--output", tmp_path / "gguf")
    for command in (("verify", merged), ask, export):
        result = cli(*command, env={"COLUMNS": "20000"})
        assert (result.exit_code, result.stdout) == (Exit.MODEL, ""), result.stderr or result.exception
        assert told in result.stderr
    assert not (tmp_path / "gguf").exists()


def test_hashes_are_remembered_until_a_file_is_touched(
    cli: Cli, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "SETTLED_NS", 0)
    read: list[str] = []
    plain = remembered.file_sha256

    def counting(path: Path) -> str:
        read.append(path.name)
        return plain(path)

    monkeypatch.setattr(remembered, "file_sha256", counting)
    ask = ("infer", "--model", merged, "--prompt", "hi", "--max-new-tokens", "1")
    assert cli(*ask).exit_code == 0
    assert WEIGHTS in read
    read.clear()
    assert cli(*ask).exit_code == 0
    assert read == []
    flip_a_bit(merged)
    assert cli(*ask).exit_code == Exit.MODEL
    assert read == [WEIGHTS]


def test_with_force_a_changed_folder_answers_with_a_warning(cli: Cli, merged: Path) -> None:
    DAMAGES["one per cent"][0](merged)
    result = cli("infer", "--model", merged, "--prompt", "hi", "--max-new-tokens", "1", "--force")
    assert result.exit_code == 0, result.stderr
    assert f"{WEIGHTS}: changed" in result.stderr


def test_files_that_no_program_loads_are_told_and_refuse_nothing(cli: Cli, merged: Path) -> None:
    append("README.md", "A word of mine.")(merged)
    append("notes.pdf", "x")(merged)
    append(".gitattributes", "*.safetensors filter=lfs")(merged)
    result = cli("verify", merged, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["remarks"] == ["README.md: changed", "notes.pdf: added"]
    asked = cli("infer", "--model", merged, "--prompt", "hi", "--max-new-tokens", "1")
    assert asked.exit_code == 0, asked.stderr


def test_figures_of_the_merge_are_told_apart_from_those_computed_again(cli: Cli, merged: Path, short_run: Path) -> None:
    for flags, is_recorded in (((), True), (("--adapter", short_run, "--no-logits"), False)):
        result = cli("verify", merged, *flags, env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.stderr
        assert "tensors read back" in result.stderr
        assert ("figures of verification.json" in result.stderr) == is_recorded
        told = result.stderr
        assert told.index("as they were verified") < told.index("tensors read back"), "what was done now comes first"


def test_folders_of_earlier_versions_open_but_cannot_be_verified(cli: Cli, merged: Path) -> None:
    edit_verification(lambda values: values.pop("files"), seal_of)(merged)
    assert cli("infer", "--model", merged, "--prompt", "hi", "--max-new-tokens", "1").exit_code == 0
    result = cli("verify", merged)
    assert result.exit_code == Exit.MODEL
    assert "holds no hashes" in result.stderr
    assert "--adapter" in result.stderr
    combined = {"method": "linear", "density": None, "adapters": {}}
    edit_verification(lambda values: values.update(combined=combined), seal_of)(merged)
    result = cli("verify", merged)
    assert "Make it again" in result.stderr
    assert "--adapter" not in result.stderr, "the merge of several cannot be proved again"


@pytest.mark.parametrize("files", [[], {}, {"config.json": 5}, "x"])
def test_a_damaged_record_is_refused(cli: Cli, merged: Path, files: Any) -> None:
    edit_verification(lambda values: values.update(files=files))(merged)
    for command in (("verify", merged), ("infer", "--model", merged, "--prompt", "hi")):
        result = cli(*command)
        assert result.exit_code == Exit.MODEL
        assert "damaged" in result.stderr


LIES: dict[str, Callable[[Path], Any]] = {
    "prompts": set_key("verification.json", thinking=True),
    "a better proof": set_key("verification.json", verified="files and logits"),
    "a key of its own": set_key("verification.json", note="x"),
    "another hash": set_key("verification.json", sha256="0" * 64),
    "a file's hash": lambda folder: (
        flip_a_bit(folder),
        edit_verification(
            lambda values: values["files"][WEIGHTS].update(
                sha256=hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
            ),
            lambda _: json.loads((folder / "verification.json").read_text())["sha256"],
        )(folder),
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_a_changed_verification_is_refused_by_every_command_that_reads_it(
    cli: Cli, merged: Path, short_run: Path, tmp_path: Path, name: str
) -> None:
    LIES[name](merged)
    commands: list[tuple[Any, ...]] = [
        ("verify", merged),
        ("verify", merged, "--adapter", short_run, "--no-logits"),
        ("infer", "--model", merged, "--prompt", "hi", "--max-new-tokens", "1"),
        ("infer", "--model", merged, "--prompt", "hi", "--max-new-tokens", "1", "--force"),
        ("serve", "--model", merged, "--port", "0"),
        ("export", "--model", merged, "--format", "gguf", "--output", tmp_path / "gguf"),
    ]
    for command in commands:
        result = cli(*command, env={"COLUMNS": "20000"})
        assert (result.exit_code, result.stdout) == (Exit.MODEL, ""), result.stderr or result.exception
        assert "verification.json: has been changed since it was written" in result.stderr
    assert not (tmp_path / "gguf").exists()


def test_a_verification_without_a_seal_is_taken_and_told(cli: Cli, merged: Path, short_run: Path) -> None:
    assert json.loads(cli("verify", merged, "--json").stdout)["sealed"] is True
    edit_verification(lambda _: None)(merged)
    for flags in ((), ("--adapter", short_run, "--no-logits")):
        result = cli("verify", merged, "--json", *flags, env={"COLUMNS": "20000"})
        assert result.exit_code == 0, result.stderr
        report = json.loads(result.stdout)
        assert report["sealed"] is False
        (warning,) = report["warnings"]
        assert "verification.json carries no seal" in warning
        assert result.stderr.count("carries no seal") == 1
    asked = cli("infer", "--model", merged, "--prompt", "hi", "--max-new-tokens", "1", env={"COLUMNS": "20000"})
    assert asked.exit_code == 0, asked.stderr
    assert asked.stderr.count("carries no seal") == 1


def test_the_seal_is_the_hash_of_the_other_values(verified: Path) -> None:
    values = json.loads((verified / "verification.json").read_text())
    assert values.pop("sha256") == seal_of(values)


def asked(folder: Path) -> tuple[Any, ...]:
    """The quickest question to a model."""
    return ("infer", "--model", folder, "--prompt", "hi", "--max-new-tokens", "1")


FOREIGN = ["{}", "[]", '"x"', '{"program": "another", "thinking": 5, "files": 7}']


@pytest.mark.parametrize("text", FOREIGN)
def test_another_program_s_verification_is_none_of_ours(cli: Cli, merged: Path, text: str) -> None:
    (merged / "verification.json").write_text(text)
    (merged / "README.md").unlink()
    result = cli(*asked(merged))
    assert result.exit_code == 0, result.stderr
    assert "its verification.json is not loratune's, so no file was compared" in result.stderr
    assert "nothing can be verified" in " ".join(cli("verify", merged).stderr.split())


@pytest.mark.parametrize("text", [*FOREIGN, None])
def test_a_replaced_verification_is_damage_where_the_folder_is_ours(
    cli: Cli, merged: Path, tmp_path: Path, text: str | None
) -> None:
    path = merged / "verification.json"
    if text is None:  # what the file itself says is a trace too
        path.write_text(json.dumps(json.loads(path.read_text()) | {"program": "another"}))
        (merged / "README.md").unlink()
    else:
        path.write_text(text)
    export = ("export", "--model", merged, "--format", "gguf", "--output", tmp_path / "gguf")
    for command in (("verify", merged), asked(merged), (*asked(merged), "--force"), export):
        result = cli(*command)
        assert (result.exit_code, result.stdout) == (Exit.MODEL, ""), result.stderr
        assert "verification.json: not what loratune wrote there" in result.stderr


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("nowhere")], ids=["folder", "link"])
def test_a_verification_that_is_no_file_is_told(cli: Cli, merged: Path, make: Callable[[Path], Any]) -> None:
    (merged / "verification.json").unlink()
    make(merged / "verification.json")
    for command in (("verify", merged), asked(merged)):
        result = cli(*command)
        assert result.exit_code == Exit.MODEL
        assert "verification.json: cannot be read" in result.stderr


@pytest.mark.parametrize(
    "name", ["../outside.json", "{place}/outside.json", "sub/../config.json", "", ".", "\ud800", "a\0b"]
)
def test_records_of_files_elsewhere_are_damage_and_the_files_are_not_opened(
    cli: Cli, merged: Path, tmp_path: Path, name: str
) -> None:
    os.mkfifo(tmp_path / "outside.json")  # to open it as a plain file would be to wait
    record = {"bytes": 1, "sha256": "0"}
    edit_verification(lambda values: values["files"].update({name.format(place=tmp_path): record}), seal_of)(merged)
    for command in (("verify", merged), asked(merged), (*asked(merged), "--force")):
        result = cli(*command)
        assert (result.exit_code, result.stdout) == (Exit.MODEL, "")
        assert "verification.json: damaged: it does not say what the folder's files were" in result.stderr


def test_a_record_with_a_name_that_no_disk_takes_is_a_missing_file(cli: Cli, merged: Path) -> None:
    edit_verification(lambda values: values["files"].update({"x" * 5000: {"bytes": 1, "sha256": "0"}}), seal_of)(merged)
    result = cli("verify", merged)
    assert result.exit_code == 0  # no program loads a file of this name
    assert "xxx…: missing" in result.stderr
    assert "x" * 300 not in result.stderr


@pytest.mark.parametrize("name", [WEIGHTS, "README.md"])
def test_a_link_out_of_the_folder_is_refused_and_not_followed(
    cli: Cli, merged: Path, tmp_path: Path, name: str
) -> None:
    (merged / name).rename(tmp_path / name)
    (merged / name).symlink_to(tmp_path / name)
    for command in (("verify", merged), asked(merged), (*asked(merged), "--force")):
        result = cli(*command)
        assert (result.exit_code, result.stdout) == (Exit.MODEL, "")
        assert f"{name}: a link that leads out of the folder" in result.stderr
    (merged / name).unlink()
    (tmp_path / name).rename(merged / f"own-{name}")
    (merged / name).symlink_to(f"own-{name}")
    if name == "README.md":
        assert cli("verify", merged).exit_code == 0


def test_the_links_of_a_hub_s_cache_lead_to_its_own_files(cli: Cli, merged: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--me--it" / "snapshots" / "abc", tmp_path / "models--me--it" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in merged.iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blobs / digest)
        (snapshot / path.name).symlink_to(f"../../blobs/{digest}")
    for command in (("verify", snapshot), asked(snapshot)):
        result = cli(*command)
        assert result.exit_code == 0, result.stderr
        assert "warning" not in result.stderr


@pytest.mark.parametrize("name", ["notes", "model.json", "additional_chat_templates/x.jinja"])
def test_a_pipe_in_a_folder_is_refused_by_every_command_and_none_waits_for_it(
    cli: Cli, merged: Path, tmp_path: Path, name: str
) -> None:
    (merged / name).parent.mkdir(exist_ok=True)
    os.mkfifo(merged / name)
    export = ("export", "--model", merged, "--format", "gguf", "--output", tmp_path / "gguf")
    for command in (("verify", merged), asked(merged), export):
        result = cli(*command)
        assert (result.exit_code, result.stdout) == (Exit.MODEL, "")
        assert f"not regular files, or far too large, and therefore not read: {name}" in result.stderr


def test_templates_are_compared_where_their_folder_is_a_link_or_their_name_is_hidden(
    cli: Cli, merged: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ".default.jinja").write_text("Be rude.")
    (merged / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    for command in (("verify", merged), asked(merged)):
        result = cli(*command)
        assert (result.exit_code, result.stdout) == (Exit.MODEL, "")
        assert "additional_chat_templates/.default.jinja: added" in result.stderr
    (tmp_path / "elsewhere" / ".default.jinja").unlink()
    os.mkfifo(tmp_path / "elsewhere" / "pipe.jinja")
    for command in (("verify", merged), asked(merged)):
        result = cli(*command)
        assert (result.exit_code, result.stdout) == (Exit.MODEL, "")
        assert "not read: additional_chat_templates/pipe.jinja" in result.stderr


@pytest.mark.parametrize("place", ["inside", "around"])
def test_an_export_never_lies_in_its_model_nor_replaces_it(cli: Cli, merged: Path, tmp_path: Path, place: str) -> None:
    around = tmp_path / "around"
    assert cli("export", "--model", merged, "--format", "gguf", "--output", around).exit_code == 0
    model = merged.rename(around / "model")
    before = tree(around)
    output = model / "gguf" if place == "inside" else around
    result = cli("export", "--model", model, "--format", "gguf", "--output", output, "--overwrite")
    assert result.exit_code == Exit.USAGE
    assert f"{output} and the model at {model} overlap" in result.stderr
    assert tree(around) == before


def test_a_changed_note_is_not_counted_among_the_unchanged_files(cli: Cli, merged: Path) -> None:
    files = len(list(merged.iterdir())) - 1
    assert f"merged model, {files} files as they were verified" in cli("verify", merged).stderr
    append("README.md", "A word of mine.")(merged)
    result = cli("verify", merged)
    assert result.exit_code == 0
    assert f"merged model, {files - 1} of {files} files as they were verified" in result.stderr
    report = json.loads(cli("verify", merged, "--json").stdout)
    assert (report["files"], report["unchanged"], report["remarks"]) == (files, files - 1, ["README.md: changed"])


def test_an_exported_adapter_is_compared_by_every_command(cli: Cli, short_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    assert cli("export", "--adapter", short_run, "--format", "adapter", "--output", folder).exit_code == 0
    base = json.loads((short_run / "manifest.json").read_text())["base"]["path"]
    ask = ("infer", "--adapter", folder, "--base-model", base, "--prompt", "hi", "--max-new-tokens", "1")
    assert cli(*ask).exit_code == 0
    set_key("adapter_config.json", lora_alpha=64)(folder)
    merge = ("merge", "--adapter", folder, "--base-model", base, "--output", tmp_path / "merged")
    for command in (("verify", folder), ask, merge):
        result = cli(*command)
        assert (result.exit_code, result.stdout) == (Exit.MODEL, ""), result.stderr
        assert "adapter_config.json: changed" in result.stderr
    forced = cli(*ask, "--force")
    assert forced.exit_code == 0, forced.stderr
    assert "adapter_config.json: changed" in forced.stderr


def test_a_single_file_is_one_file(cli: Cli, merged: Path, tmp_path: Path) -> None:
    assert cli("export", "--model", merged, "--format", "gguf", "--output", tmp_path / "gguf").exit_code == 0
    assert "export, 1 file as it was verified" in cli("verify", tmp_path / "gguf").stderr


def test_runs_are_verified_by_their_manifest(cli: Cli, short_run: Path, tmp_path: Path) -> None:
    verified = cli("verify", short_run, "--json")
    assert verified.exit_code == 0
    sealed = {"recipe.yaml", "probe.json", "findings.json", "adapter", "report.json"}
    assert set(json.loads(verified.stdout)["parts"]) == sealed
    shown = cli("verify", short_run, env={"COLUMNS": "400"}).stderr
    files = len(list((short_run / "adapter").iterdir())) + len(sealed) - 1
    assert f"run, {files} files as the run left them, by the hashes in manifest.json: " in shown
    assert {*shown.rpartition(": ")[2].strip().split(", ")} == sealed
    run = Path(shutil.copytree(short_run, tmp_path / "run"))
    set_key("adapter/adapter_config.json", lora_alpha=64)(run)
    result = cli("verify", run)
    assert result.exit_code == Exit.MODEL
    assert "adapter/adapter_config.json; restore it" in result.stderr
    assert "--force" not in result.stderr, "verify lets nothing through"


def go_on(cli: Cli, run: Path, *flags: Any) -> Result:
    return cli("sft", "--config", run / "recipe.yaml", "--output", run, "--resume", *flags)


REPORT_DAMAGES: dict[str, Callable[[Path], Any]] = {
    "changed": set_key("report.json", steps=400),
    "missing": lambda run: (run / "report.json").unlink(),
    "not JSON": lambda run: (run / "report.json").write_text("x"),
}


@pytest.mark.parametrize("name", REPORT_DAMAGES)
def test_a_finished_run_s_report_is_sealed(cli: Cli, short_run: Path, tmp_path: Path, name: str) -> None:
    run = Path(shutil.copytree(short_run, tmp_path / "run"))
    assert go_on(cli, run, "--json").exit_code == 0
    REPORT_DAMAGES[name](run)
    for result in (cli("verify", run), go_on(cli, run, "--json")):
        assert result.exit_code == Exit.MODEL, result.stderr
        assert not result.stdout or json.loads(result.stdout)["exit_code"] == Exit.MODEL
        assert "changed or missing since the run ended: report.json; restore it" in result.stderr
        assert "--force" not in result.stderr
    assert json.loads(cli("runs", "show", run, "--json").stdout)["changed"] == ["report.json"]
    asking = cli("infer", "--adapter", run, "--prompt", "hi", "--max-new-tokens", "1")  # which reads no report
    assert asking.exit_code == 0, asking.stderr
    longer = go_on(cli, run, "--training.max_steps", 5)
    assert longer.exit_code == 0, longer.stderr
    assert cli("verify", run).exit_code == 0
    assert json.loads((run / "report.json").read_text())["steps"] == 5


def test_a_run_whose_version_did_not_seal_its_report_opens_in_silence(
    cli: Cli, short_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(short_run, tmp_path / "run"))
    values = json.loads((run / "manifest.json").read_text())
    del values["sha256"], values["files"]["report.json"]
    (run / "manifest.json").write_text(json.dumps(values | {"sha256": seal_of(values)}))
    set_key("report.json", steps=400)(run)
    for result in (cli("verify", run), go_on(cli, run)):
        assert result.exit_code == 0, result.stderr
        assert "report" not in result.stderr
        assert "changed" not in result.stderr


def test_a_run_whose_adapter_is_gone_is_not_shown_as_unchanged(cli: Cli, short_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(short_run, tmp_path / "run"))
    shutil.rmtree(run / "adapter")
    assert "adapter/adapter_model.safetensors" in json.loads(cli("runs", "show", run, "--json").stdout)["changed"]


def test_a_run_says_whether_its_manifest_carries_a_seal(cli: Cli, short_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(short_run, tmp_path / "run"))
    report = json.loads(cli("verify", run, "--json").stdout)
    assert (report["sealed"], report["warnings"]) == (True, [])
    assert "probe.json" in json.loads((run / "manifest.json").read_text())["files"]
    values = json.loads((run / "manifest.json").read_text())
    del values["sha256"]
    (run / "manifest.json").write_text(json.dumps(values))
    result = cli("verify", run, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["sealed"] is False
    assert "carries no seal" in report["warnings"][0]
    assert " ".join(result.stderr.split()).count("carries no seal") == 1


@pytest.mark.parametrize("flags", [(), ("--adapter",)])
def test_a_merged_model_without_its_record_cannot_be_verified(
    cli: Cli, merged: Path, short_run: Path, flags: tuple[str, ...]
) -> None:
    (merged / "verification.json").unlink()
    result = cli("verify", merged, *flags, *([short_run] if flags else []))
    assert (result.exit_code, result.stdout) == (Exit.MODEL, "")
    assert "nothing can be verified: no verification.json" in " ".join(result.stderr.split())


def test_other_folders_have_nothing_to_compare_with(cli: Cli, random_qwen: Path, tmp_path: Path) -> None:
    for folder in (random_qwen, tmp_path, tmp_path / "none", "x" * 5000):
        result = cli("verify", folder)
        assert result.exit_code == Exit.MODEL
        assert "run folder" in result.stderr
        assert ("no such folder" in result.stderr) == (folder not in (random_qwen, tmp_path))


@pytest.mark.parametrize("flags", [(), ("--force",)], ids=["plain", "forced"])
def test_a_changed_model_is_no_silent_base_of_a_merge_or_a_training(
    cli: Cli, merged: Path, short_run: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    plain = shutil.copytree(short_run / "adapter", tmp_path / "plain")
    DAMAGES["one per cent"][0](merged)
    merge = ("merge", "--adapter", plain, "--base-model", merged, "--output", tmp_path / "m", "--no-verify", *flags)
    result = cli(*merge)
    assert result.exit_code == (0 if flags else Exit.MODEL), result.stderr
    assert f"{merged} is not as it was verified:\n  {WEIGHTS}: changed" in result.stderr
    if flags:
        return
    rows = short_run.parent / "rows.json"
    train = ("--data.train", rows, "--training.max_steps", 1, "--evaluation.questions_share", 0)
    trained = cli("sft", "--model.base", merged, *train, "--output", tmp_path / "run")
    assert trained.exit_code == 0, trained.stderr
    assert f"warning: {merged} is not as it was verified:\n  {WEIGHTS}: changed" in trained.stderr


# --- the merge proved again ---


def sealed_again(folder: Path) -> None:
    """Record the hashes of what is there, as somebody would who changes a folder on purpose."""

    def record(values: dict[str, Any]) -> None:
        for name in values["files"]:
            data = (folder / name).read_bytes()
            values["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    edit_verification(record, seal_of)(folder)


@pytest.mark.parametrize("logits", [True, False])
def test_a_merge_is_proved_again(cli: Cli, verified: Path, short_run: Path, logits: bool) -> None:
    flags = () if logits else ("--no-logits",)
    result = cli("verify", verified, "--adapter", short_run, "--json", *flags)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["proved_again"] is True
    assert report["proved"]["verified"] == ("files and logits" if logits else "files")
    assert report["proved"]["read_back"]["rows"] > 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_merge_of_another_type_and_in_several_files_is_proved_again(
    cli: Cli, short_run: Path, tmp_path: Path, dtype: str
) -> None:
    merge = ("merge", "--adapter", short_run, "--output", tmp_path / "m", "--dtype", dtype, "--shard-size", "50kB")
    assert cli(*merge, "--no-logits", "--force").exit_code == 0
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    result = cli("verify", tmp_path / "m", "--adapter", short_run, "--no-logits")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    "damage",
    [
        change_tensors(lambda tensors: tensors[QUERY][3].neg_()),
        change_tensors(lambda tensors: tensors[NORM].mul_(1.01)),
        change_tensors(lambda tensors: tensors.update(extra=torch.ones(3))),
        change_tensors(lambda tensors: tensors.pop(NORM)),
        set_key("generation_config.json", eos_token_id=3),
        swap_merges,
    ],
)
def test_what_hashes_cannot_tell_the_proof_does(
    cli: Cli, merged: Path, short_run: Path, damage: Callable[[Path], Any]
) -> None:
    damage(merged)
    sealed_again(merged)
    assert cli("verify", merged).exit_code == 0
    result = cli("verify", merged, "--adapter", short_run, "--no-logits")
    assert (result.exit_code, result.stdout) == (Exit.MODEL, ""), result.stderr or result.exception
    assert "has been removed" not in result.stderr
    assert merged.is_dir()


def test_tensors_that_are_missing_or_too_many_are_named(cli: Cli, merged: Path, short_run: Path) -> None:
    change_tensors(lambda tensors: tensors.update(extra=tensors.pop(NORM)))(merged)
    sealed_again(merged)
    told = cli("verify", merged, "--adapter", short_run, "--no-logits").stderr
    assert f"  {NORM}: is missing\n" in told
    assert "  extra: is not of them\n" in told


def test_a_merge_is_proved_with_its_own_adapter_alone(cli: Cli, merged: Path, short_run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(short_run / "adapter", tmp_path / "other"))
    weights = load_file(other / "adapter_model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, other / "adapter_model.safetensors")
    base = json.loads((short_run / "manifest.json").read_text())["base"]["path"]
    result = cli("verify", merged, "--adapter", other, "--base-model", base)
    assert result.exit_code == Exit.MODEL
    assert "another adapter" in " ".join(result.stderr.split())


def test_what_the_proof_could_not_check_is_told(cli: Cli, merged: Path, short_run: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(short_run / "adapter", tmp_path / "plain")
    base = json.loads((short_run / "manifest.json").read_text())["base"]["path"]
    result = cli("verify", merged, "--adapter", plain, "--base-model", base, "--no-logits")
    assert result.exit_code == 0, result.stderr
    assert "warning: the adapter has no loratune manifest" in " ".join(result.stderr.split())


@pytest.mark.parametrize("flags", [("--base-model", "x"), ("--no-logits",), ("--force",)])
def test_flags_of_the_proof_need_an_adapter(cli: Cli, verified: Path, flags: tuple[str, ...]) -> None:
    assert cli("verify", verified, *flags).exit_code == Exit.USAGE


def test_a_run_without_its_manifest_is_not_shown_as_unchanged(cli: Cli, short_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(short_run, tmp_path / "run")
    (run / "manifest.json").unlink()
    shown = cli("runs", "show", run, "--json")
    assert json.loads(shown.stdout)["changed"] == ["manifest.json (missing)"]


@pytest.mark.parametrize(
    "given", [("verify",), ("runs", "show"), ("export", "-f", "gguf", "-o", "out", "-m"), ("infer", "-a")]
)
def test_a_path_that_is_too_long_is_no_folder(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli(*given, "x" * 5000)
    assert result.exit_code == Exit.MODEL
    assert "xxx…: no such folder" in result.stderr
    assert "x" * 1000 not in result.stderr


@pytest.mark.parametrize(
    ("name", "code"),
    [("answers.jsonl.report.json", 0), ("LICENSE.txt", 0), ("notes.txt", 0), ("vocab.txt", Exit.MODEL)],
)
def test_notes_beside_a_model_change_nothing(cli: Cli, merged: Path, name: str, code: int) -> None:
    (merged / name).write_text("hello")
    assert cli("verify", merged).exit_code == code
