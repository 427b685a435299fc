"""What ``offload.py`` writes: tables of its results, for the results' folder and for the documentation."""

from __future__ import annotations

from typing import Any

_COPIES = {False: "copies only take their time", True: "the processor does the copies"}
_PLACE = "All rows, and what was predicted, are in `benchmarks/results/`"


def markdown(result: dict[str, Any]) -> str:
    """All rows."""
    parts = {"host": _host, "link": _link, "copied": _link, "gpu": _gpu}
    lines = [line for name, part in parts.items() if name in result for line in [*part(result[name]), ""]]
    return "\n".join(lines)


def summary(result: dict[str, Any]) -> str:
    """The tables for the documentation."""
    lines = [*_host_summary(result["host"]), ""] if "host" in result else []
    lines += [*_link_summary(result), ""] if "link" in result or "copied" in result else []
    lines += [*_gpu(result["gpu"]), ""] if "gpu" in result else []
    return "\n".join(lines[:-1]) + "\n"


def _about(machine: dict[str, Any]) -> str:
    words = f"{machine['cpu']}, {machine['threads']} threads, {machine['simd']}; torch {machine['torch']}"
    return f"{words}; {machine['compiler']}; {machine['date']}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _host(part: dict[str, Any]) -> list[str]:
    about = part["machine"]
    lines = [
        f"The host's pass. {_about(about)}; DeepSpeed {about['deepspeed'] or 'not installed'}; torchao: "
        f"{about['torchao']}. `python benchmarks/offload.py --parts host`",
        "",
        "| weights | group | step | ns per weight | predicted | share of the limit | times ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in part["cases"]:
        for row in case["rows"]:
            cells = [
                case["label"],
                case["group"],
                row["name"],
                f"{row['ns_per_weight']:.3f}",
                _number(row["predicted_ns_per_weight"], ".2f"),
                f"{row['share_of_limit']:.0%}",
                f"{row['times_ours']:.2f}×",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _host_summary(part: dict[str, Any]) -> list[str]:
    about, cases = part["machine"], part["cases"]
    labels = list(dict.fromkeys(case["label"] for case in cases))
    names = list(dict.fromkeys((case["group"], row["name"]) for case in cases for row in case["rows"]))
    # Ours is in every group, as what the others are compared with.
    seen: set[str] = set()
    lines = [
        f"| ns per weight (times ours), in {cases[0]['tensors']} tensors | {' | '.join(labels)} |",
        "|---|" + "---|" * len(labels),
    ]
    for group, name in names:
        if name in seen:
            continue
        seen.add(name)
        cells = []
        for label in labels:
            rows = [r for case in cases if (case["label"], case["group"]) == (label, group) for r in case["rows"]]
            row = next(r for r in rows if r["name"] == name)
            cells.append(f"{row['ns_per_weight']:.2f} ({row['times_ours']:.2f}×)")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    full = [case for case in cases if case["label"] == labels[-1] and case["group"] == "peers"]
    share = full[0]["rows"][0]["share_of_limit"]
    lines += [
        "",
        f"At {labels[-1]} one pass takes {1 / share:.2f} times as long as the memory needs for its traffic alone. "
        f"{_about(about)}; DeepSpeed {about['deepspeed'] or 'not installed'}. {_PLACE}.",
    ]
    return lines


def _link(part: dict[str, Any]) -> list[str]:
    setting = part["setting"]
    lines = [
        f"Exposed time on a simulated link of {setting['bandwidth'] / 1e9:g} GB/s, between a backward pass of "
        f"{1e3 * setting['backward']:g} ms and a forward pass of "
        f"{1e3 * setting['forward']:g} ms, {_COPIES[setting['copies']]}; the serial ways run "
        f"{part['machine']['serial_optimizer']}. {_about(part['machine'])}. "
        f"`python benchmarks/offload.py --parts {'copied' if setting['copies'] else 'link'}`",
        "",
        "| model | weights | step | exposed ms | lowest to highest | predicted | of serial | of DeepSpeed's order |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in part["cases"]:
        for row in case["rows"]:
            low, high = row["spread_ms"]
            cells = [
                case["model"],
                f"{case['weights'] / 1e6:.4g}M",
                row["name"],
                f"{row['exposed_ms']:.1f}",
                f"{low:.1f} to {high:.1f}",
                _number(row["predicted_ms"], ".0f"),
                f"{row['of_serial']:.0%}",
                f"{row['of_deepspeed']:.0%}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _link_summary(result: dict[str, Any]) -> list[str]:
    parts = [result[name] for name in ("link", "copied") if name in result]
    columns = [(case, part["setting"]["copies"]) for part in parts for case in part["cases"]]
    heads = [f"{case['model']}{', copying' if copies else ''}" for case, copies in columns]
    lines = [
        f"| ms exposed (share of serial), {columns[0][0]['weights'] / 1e6:.0f}M weights | {' | '.join(heads)} |",
        "|---|" + "---|" * len(columns),
    ]
    for index, first in enumerate(columns[0][0]["rows"]):
        rows = [case["rows"][index] for case, _ in columns]
        cells = [f"{row['exposed_ms']:.0f} ({row['of_serial']:.0%})" for row in rows]
        lines.append(f"| {first['name']} | {' | '.join(cells)} |")
    setting, about = parts[0]["setting"], parts[0]["machine"]
    return [
        *lines,
        "",
        f"Backward pass of {1e3 * setting['backward']:g} ms, forward pass of {1e3 * setting['forward']:g} ms, "
        f"link of {setting['bandwidth'] / 1e9:g} GB/s; the serial "
        f"ways run {about['serial_optimizer']}. {_about(about)}. {_PLACE}.",
    ]


def _gpu(part: dict[str, Any]) -> list[str]:
    size, about = part["size"], part["machine"]
    lines = [
        f"{about['gpu']}, CUDA {about['cuda']}, torch {about['torch']}; {about['date']}. {size['layers']} layers of "
        f"{size['width']}², batch {size['batch']}; the largest model: in {size['cap']:.0%} of the memory. "
        "`python benchmarks/offload.py --parts gpu`",
        "",
        "| step | ms | peak GB | link busy | largest model |",
        "|---|---|---|---|---|",
    ]
    for row in part["rows"]:
        peak = _number(None if row["peak_bytes"] is None else row["peak_bytes"] / 1e9, ".2f")
        largest = f"{row['largest_weights'] / 1e9:.2f}e9"
        lines.append(f"| {row['name']} | {row['step_ms']:.1f} | {peak} | {row['link_busy']:.0%} | {largest} |")
    return lines
