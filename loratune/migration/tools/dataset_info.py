"""LLaMA-Factory's descriptions of data sets: dataset_info.json, and the YAML file of v1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loratune.errors import Exit, LoratuneError
from loratune.migration.config_file import parse, read_text
from loratune.migration.rows import MEDIA, Rows, add_named, check_turns
from loratune.migration.sheet import Context, Sheet, texts, whole
from loratune.nearest import nearest
from loratune.plain_files import is_file

ALPACA_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "system": "system",
    "history": "history",
}
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "assistant",
    "system_tag": "system",
}
HUBS = {"hf_hub_url": "hf", "ms_hub_url": "ms"}


def described_rows(sheet: Sheet, named: Any, listed: Any) -> Rows:
    """Return the rows of `dataset`, by dataset_info.json, or of v1's `train_dataset`."""
    rows = Rows()
    if listed is not None:
        _add_listed(rows, str(listed), sheet.context.folder)
    if not named:
        return rows
    folder = str(sheet.known.get("dataset_dir", "data"))
    if folder.startswith(("REMOTE:", "ONLINE")):
        rows.problems.append(
            f"dataset_dir {folder}: no description of a data set is fetched; name files or hf:owner/name"
        )
        return rows
    try:
        about, path = _dataset_info(folder, sheet.context)
    except LoratuneError as error:
        rows.problems.append(error.message)
        return rows
    for name in texts(named):
        entry = about.get(name)
        if isinstance(entry, dict):
            _add_described(rows, name, entry, path.parent)
        else:
            near = nearest(name, map(str, about))
            rows.problems.append(f"{name}: {path} does not describe it" + (f"; did you mean {near}?" if near else ""))
    return rows


def _dataset_info(folder: str, context: Context) -> tuple[dict[str, Any], Path]:
    """Return the descriptions of data sets and their file: from the working folder, or the config's or one above it.

    Raises:
        LoratuneError: there is none, or it cannot be read.
    """
    above = [Path(), context.folder, *context.folder.resolve().parents]
    places = [place / folder / "dataset_info.json" for place in above]
    path = context.dataset_info or next((place for place in places if is_file(place)), None)
    if path is None:
        raise LoratuneError(
            f"{places[0]}: no such file, also not beside the config or above it; --dataset-info says where it is",
            Exit.USAGE,
        )
    values = parse(path, read_text(path))
    return (values if isinstance(values, dict) else {}), path


def _add_described(rows: Rows, name: str, entry: dict[str, Any], folder: Path) -> None:
    """Add the rows of one entry of dataset_info.json."""
    columns, tags = entry.get("columns") or {}, TAGS | (entry.get("tags") or {})
    if entry.get("ranking") or "kto_tag" in columns:
        rows.problems.append(f"{name}: rows of preferences are not trained on")
        return
    if media := [column for column in columns if column in MEDIA]:
        rows.problems.append(f"{name}: rows with {', '.join(media)}; only texts are trained")
        return
    if entry.get("script_url") or entry.get("cloud_file_name"):
        rows.problems.append(f"{name}: rows of a script or a cloud's file are not read; name a file or a data set")
        return
    if entry.get("formatting", "alpaca") == "alpaca":
        mapped = {ALPACA_COLUMNS[one]: str(own) for one, own in columns.items() if one in ALPACA_COLUMNS}
    else:
        mapped = _columns_of_turns(rows, name, columns, tags)
    rows.map_columns(mapped, name)
    count = whole(entry["num_samples"]) if entry.get("num_samples") else None
    if file_name := entry.get("file_name"):
        add_named(rows, "hf", str(folder / str(file_name)), count)
    elif hub := next((key for key in HUBS if entry.get(key)), ""):
        if entry.get("folder"):
            rows.problems.append(f"{name}: a folder of a data set, {entry['folder']}, is not read; name its files")
        rows.add_hub(HUBS[hub], str(entry[hub]), entry.get("subset"), entry.get("split"), count)
    else:
        rows.problems.append(f"{name}: its description names neither a file nor a data set")


def _columns_of_turns(rows: Rows, name: str, columns: dict[str, Any], tags: dict[str, Any]) -> dict[str, str]:
    """Return the columns of rows with lists of turns, and record what no format has."""
    keys = {str(tags["role_tag"]), str(tags["content_tag"])}
    check_turns(rows, name, keys, {str(tags[one]): role for one, role in ROLES.items()})
    if "system" in columns and keys != {"from", "value"}:
        rows.problems.append(f"{name}: a column with the system prompt beside turns with role and content is not read")
    turns = str(columns.get("messages", "conversations"))
    mapped = {} if turns in ("messages", "conversations") else {"conversations": turns}
    return mapped | {one: str(columns[one]) for one in ("system", "tools") if one in columns}


def _add_listed(rows: Rows, listed: str, folder: Path) -> None:
    """Add the rows of v1: a file of rows, a data set, or a YAML file with a description of each source."""
    if not listed.endswith((".yaml", ".yml")):
        add_named(rows, "hf", listed)
        return
    path = next((one for one in (Path(listed), folder / listed) if is_file(one)), Path(listed))
    try:
        about = parse(path, read_text(path))
    except LoratuneError as error:
        rows.problems.append(error.message)
        return
    for name, entry in about.items() if isinstance(about, dict) else ():
        if not isinstance(entry, dict) or "path" not in entry:
            rows.problems.append(f"{name}: {path} names no path for it")
            continue
        if entry.get("converter") not in (None, "alpaca", "sharegpt", "openai"):
            rows.problems.append(f"{name}: the converter {entry['converter']} is not known")
        hub = "ms" if str(entry.get("source", "")).startswith("ms") else "hf"
        add_named(
            rows, hub, str(entry["path"]), whole(entry["size"]) if entry.get("size") else None, entry.get("split")
        )
