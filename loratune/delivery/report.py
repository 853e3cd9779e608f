"""What a merge has proved, as a table."""

from __future__ import annotations

from typing import Any

from loratune import console


def show_verification(report: dict[str, Any]) -> None:
    """The closing table of a merge."""
    rows = []
    if report["read_back"]:
        back = report["read_back"]
        rows += [
            ("files", f"{back['tensors']} tensors read back, {back['identical']} equal to the base's byte for byte"),
            (
                "changed",
                f"{back['updated']} tensors: all {back['rows']} rows are what PEFT's own merge makes of the base, "
                f"rounded once; {back['sampled_rows']} in float64 are at most {back['largest_error_steps']:.2f} "
                f"rounding steps off, and rounding takes {back['lost_to_rounding']:.1%} of the update",
            ),
        ]
    for name, values in (report["logits"] or {}).items():
        label = "logits" if len(report["logits"]) == 1 else name
        chosen = " ← taken" if len(report["logits"]) > 1 and name == report["merge_base"] else ""
        rows.append((label, f"{parity_text(**values)}{chosen}"))
    if report.get("without_adapter"):
        rows.append(("base alone", parity_text(**report["without_adapter"])))
    rows += [("beside", change) for change in report["changed_files"]]
    console.table(rows, title="verified" if report["verified"] != "nothing" else "NOT VERIFIED")
    if report["answers"]:
        console.table(_answer_rows(report["answers"]), title="answers, greedy")


def _answer_rows(answers: list[dict[str, str]]) -> list[tuple[str, str]]:
    rows = []
    for answer in answers:
        is_same = answer["adapter"] == answer["merged"]
        rows += [("question", answer["question"]), ("merged", answer["merged"])]
        rows.append(("base+adapter", "the same" if is_same else f"{answer['adapter']} …"))
    return rows


def parity_text(
    tokens: int, top1_agreement: float, mean_kl: float, largest_difference: float, largest_logit: float, **_: float
) -> str:
    """A comparison of logits in a line; the arguments are Parity's fields."""
    return (
        f"{tokens} tokens: same likeliest {top1_agreement:.2%}, mean KL {mean_kl:.1e}, largest difference "
        f"{largest_difference:.2g} of {largest_logit:.3g}"
    )
