"""What was found, for readers: results/bench.json, and from it a table and a figure."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flops import matrix_peak
from rows import DUELS, OURS, Row, Target

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PACKAGES = ("torch", "transformers", "peft", "trl", "tinker")
MODELS = {
    "0.9M": "0.9 M Llama, random weights",
    "135M": "135 M Llama, random weights",
    "shipped": "the shipped base model",
}
LIMIT_SHARE = 0.6  # of the measured limit: enough, for the shipped model
HEAD = "| work | ours | peer | ratio | spread | target | share of peak: ours, peer | peak MiB |"


def load() -> dict[str, Any]:
    """What is stored; an empty record if nothing is."""
    try:
        return json.loads((RESULTS / "bench.json").read_text())
    except FileNotFoundError:
        return {"rows": {}}


def machine(before: dict[str, Any] | None) -> dict[str, Any]:
    """The machine, without its name: processor, cores, memory, versions, measured matrix peak.

    The peak is the best that was ever seen on it: other work on the machine can only lower it.
    """
    cpu = platform.processor() or platform.machine()
    try:
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
        memory = int(re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())[1]) / 2**20
    except (OSError, TypeError):
        memory = None
    same = {
        "processor": cpu,
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "torch's default"),
    }
    peak = matrix_peak()
    if before and same.items() <= before.items():
        peak = max(peak, before["matrix_peak"])
    return {
        **same,
        "memory_gib": round(memory) if memory else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in PACKAGES},
        "matrix_peak": peak,
        "date": date.today().isoformat(),
    }


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def keep(results: dict[str, Any], name: str, found: dict[str, Any], add: bool) -> None:
    """Put a row's findings in the place of the old ones, or its rounds behind theirs."""
    old = results["rows"].get(name)
    if add and old and "sides" in old:
        for side, values in found["sides"].items():
            values["rounds_s"] = old["sides"][side]["rounds_s"] + values["rounds_s"]
    results["rows"][name] = found


def median(values: list[float]) -> float:
    return statistics.median(values)


def milliseconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 2 else f"{seconds * 1000:.0f} ms"


def ratios(found: dict[str, Any], peer: str) -> list[float]:
    """The peer's time by ours, round by round: noise that both met cancels out."""
    sides = found["sides"]
    return [
        theirs / ours
        for ours, theirs in zip(sides[OURS]["rounds_s"], sides[peer]["rounds_s"], strict=True)
    ]


def wanted(row: Row, found: dict[str, Any], target: Target, about: dict[str, Any]) -> float:
    """The target ratio; for the shipped model at most 60 % of its measured limit.

    The limit is the arithmetic at the matrix peak after the same calls to an engine that computes
    nothing, since every row goes through the SDK.
    """
    if row.model != "shipped" or not found["flops"]:
        return target.ratio
    limit_s = found["flops"] / about["matrix_peak"] + about["idle_s"].get(row.name, 0.0)
    peer_s = median(found["sides"][target.peer]["rounds_s"])
    return min(target.ratio, LIMIT_SHARE * peer_s / limit_s)


def duel_lines(name: str, found: dict[str, Any], about: dict[str, Any]) -> list[str]:
    """A row of the table for each peer."""
    row, lines, peak = DUELS[name], [], about["matrix_peak"]
    for target in row.targets:
        each = ratios(found, target.peer)
        ours, peer = found["sides"][OURS], found["sides"][target.peer]
        shares = [
            f"{found['flops'] / (median(side['rounds_s']) * peak):.0%}" for side in (ours, peer)
        ]
        aim = wanted(row, found, target, about)
        met = median(each) >= aim
        words = f">= {aim:.2f}x"
        if target.share:
            words += f", >= {target.share:.0%} of peak"
            share = found["flops"] / (median(ours["rounds_s"]) * peak)
            met = met and share >= target.share
        if target.memory:
            words += ", memory <= peer's"
            met = met and ours["peak_mib"] <= peer["peak_mib"]
        lines.append(
            f"| {row.title} | {milliseconds(median(ours['rounds_s']))} "
            f"| {target.peer}: {milliseconds(median(peer['rounds_s']))} "
            f"| **{median(each):.2f}x** | {min(each):.2f} to {max(each):.2f} ({len(each)}) "
            f"| {words}: {'met' if met else 'missed'} | {shares[0]}, {shares[1]} "
            f"| {ours['peak_mib']}, {peer['peak_mib']} |"
        )
    return lines


def single_lines(rows: dict[str, Any]) -> list[str]:
    """What is not a duel: value, spread, target."""
    lines = ["| what | value | spread | target |", "| --- | --- | --- | --- |"]

    def line(what: str, values: list[float], target: float | None, note: str = "") -> None:
        spread = f"{milliseconds(min(values))} to {milliseconds(max(values))} ({len(values)})"
        verdict = ""
        if target is not None:
            met = median(values) <= target
            verdict = f"<= {milliseconds(target)}: {'met' if met else 'missed'} "
        lines.append(f"| {what}{note} | {milliseconds(median(values))} | {spread} | {verdict}|")

    if found := rows.get("first_token"):
        peer = milliseconds(median(found["sides"]["transformers"]["rounds_s"]))
        alone = milliseconds(found["import_tinker_s"])
        note = f" (`import tinker` alone {alone}; transformers without SDK and engine {peer})"
        values = found["sides"][OURS]["rounds_s"]
        line("from `import tinker` to the first sampled token", values, 4.0, note)
    if found := rows.get("sdk"):
        line("cost of SDK and HTTP on an SFT step", found["cost_s"], 0.010)
    for name, side in rows.get("idle", {}).get("sides", {}).items():
        line(f"an engine that computes nothing: {DUELS[name].title}", side["rounds_s"], None)
    if found := rows.get("growth"):
        lines.append(
            f"| step time grows with tokens^n, rows of 64 to 1,023 tokens: n | "
            f"{found['exponent']:.2f} | | about 1 |"
        )
    if found := rows.get("memory"):
        few, many = found["peak_mib"].values()
        lines.append(
            f"| peak memory with 8 and with 40 queued steps of 8,192 tokens | {few}, {many} MiB | "
            f"| no growth: {'met' if many <= 1.1 * few else 'missed'} |"
        )
    return lines


def limits(results: dict[str, Any]) -> dict[str, Any]:
    """The machine, and what each row costs where the engine computes nothing."""
    sides = results["rows"].get("idle", {}).get("sides", {})
    idle_s = {name: median(side["rounds_s"]) for name, side in sides.items()}
    return results["machine"] | {"idle_s": idle_s}


def table(results: dict[str, Any]) -> str:
    """All tables, in Markdown."""
    about, rows = limits(results), results["rows"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    parts = [
        f"{about['processor']}, {about['cores']} cores, threads: {about['threads']}, "
        f"{about['memory_gib']} GiB, {about['system']}, Python {about['python']}, {versions}; "
        f"matrix peak {about['matrix_peak'] / 1e9:.0f} GFLOP/s in float32; {about['date']}."
    ]
    for model, title in MODELS.items():
        lines = [
            line
            for name, row in DUELS.items()
            if row.model == model and name in rows
            for line in duel_lines(name, rows[name], about)
        ]
        if lines:
            parts.append("\n".join([f"**{title}**\n", HEAD, "| --- " * 8 + "|", *lines]))
    parts.append("\n".join(single_lines(rows)))
    return "\n\n".join(parts)


def summary(name: str, results: dict[str, Any]) -> str:
    if name in DUELS:
        return "; ".join(duel_lines(name, results["rows"][name], limits(results)))
    return single_lines({name: results["rows"][name]})[-1]


def write(results: dict[str, Any]) -> None:
    """results/bench.json, bench.md and bench.png, and the table in README.md."""
    from figure import draw

    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "bench.json").write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    (RESULTS / "bench.md").write_text(text + "\n")
    draw(results, RESULTS / "bench.png")
    readme = HERE / "README.md"
    if readme.is_file():
        begin, end = "<!-- bench: made by bench.py -->", "<!-- /bench -->"
        before, _, rest = readme.read_text().partition(begin)
        after = rest.partition(end)[2]
        if rest:
            readme.write_text(f"{before}{begin}\n{text}\n{end}{after}")
