"""Puts the committed results into the pages that show them, between ``<!-- bench:<name> -->`` and ``<!-- /bench -->``.

python benchmarks/report.py           write the tables into README.md and docs/
python benchmarks/report.py --check   fail if a page says something else than the results
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
PAGES = (
    README,
    *(
        HERE.parent / "docs" / f"{name}.md"
        for name in (
            "benchmarks",
            "comparison",
            "coordination",
            "decisions",
            "ecosystem",
            "encryption",
            "reliability",
            "scale",
            "server",
        )
    ),
)
MARKED = re.compile(r"<!-- bench:(\w+) -->\n.*?<!-- /bench -->", re.DOTALL)
Result = dict[str, Any]


def main() -> None:
    """Write, print or check the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the README differs")
    options = parser.parse_args()
    stale = [page for page in PAGES if page.read_text(encoding="utf-8") != rendered(page)]
    if options.check:
        names = ", ".join(page.name for page in stale)
        sys.exit(f"{names}: not what the results say, run benchmarks/report.py." if stale else None)
    for page in stale:
        page.write_text(rendered(page), encoding="utf-8")


def rendered(page: Path) -> str:
    """A page with its tables made anew."""
    return render(page.read_text(encoding="utf-8"))


def render(text: str) -> str:
    """A text with every marked table made anew."""
    return MARKED.sub(lambda found: _marked(found[1]), text)


def table(name: str) -> str:
    """The table of one benchmark, and a line that says where it was measured."""
    result = read(name)
    return f"{TABLES[name](result)}\n\n{_origin(name, result)}"


def read(name: str) -> Result:
    """A committed result."""
    result: Result = json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return result


def meets(value: float, target: str) -> bool:
    """Whether a value meets a target such as ``<= 1.25``."""
    return value <= bound(target) if target.startswith("<=") else value >= bound(target)


def bound(target: str) -> float:
    """The number in a target such as ``<= 1.25``."""
    return float(target.split()[1])


def _ttft(result: Result) -> str:
    targets = result["settings"]["targets"]
    rows = [["KV at rest", "floor", "hot", "resumed", "cold", *targets]]
    for codec, found in result["results"].items():
        times = [_time(found["medians"][name]) for name in ("floor", "hot", "resumed", "cold")]
        rows.append([codec, *times, *(f"{found['ratios'][name]:.3g}" for name in targets)])
    rows.append(["target", "", "", "", "", *(_sign(target) for target in targets.values())])
    aims = result["settings"].get("aims", {})
    rows.append(["aim", "", "", "", "", *(_sign(aims[name]) if name in aims else "" for name in targets)])
    return _grid(rows)


def _append_cost(result: Result) -> str:
    found = result["results"]
    names = (
        "floor",
        "restore",
        "prefill",
        "finish",
        "bytes",
        "hashes",
        "naive bytes",
        "naive save",
        "naive load",
    )
    rows = [["tokens before", *names]]
    for length, middle in found["middles"].items():
        rows.append([f"{int(length):,}", *(_quantity(name, middle[name]) for name in names)])
    rows.append(["growth per 1,024 tokens", *(f"{found['slopes'][name]:.0%}" for name in names)])
    return _grid(rows)


def _throughput(result: Result) -> str:
    found = result["results"]
    rows = [["tokens a second", "engine", "mlx-lm", "engine / mlx-lm", "target"]]
    for name, ratio in found["ratios"].items():
        rates = [f"{found['medians'][side][name]:.0f}" for side in ("engine", "mlx-lm")]
        rows.append([name, *rates, f"{ratio:.2f}", _sign(result["settings"]["targets"].get(name, ""))])
    return _grid(rows)


def _waiting(result: Result) -> str:
    found = result["results"]
    rows = [["seconds", "median", "worst"]]
    for name, middle in found["medians"].items():
        rows.append([name, f"{middle:.3g}", f"{found['worst'][name]:.3g}"])
    busy, aims = "turn, busy / idle", result["settings"].get("aims", {})
    aim = f" (aim: {_sign(aims[busy])})" if busy in aims else ""
    rows.append([f"{busy}{aim}", f"{found['ratios'][busy]:.3g}", ""])
    return _grid(rows)


def _quality(result: Result) -> str:
    codecs, targets = result["results"]["codecs"], result["settings"]["targets"]
    rows = [
        [
            "KV at rest",
            "bytes a token",
            "perplexity lost",
            "same next token",
            "recall",
            "tool calls",
            "error, outlier keys",
        ]
    ]
    for name, row in codecs.items():
        shown = f"**{name}**" if name == result["results"]["default"] else name
        loss = "" if name == "raw" else f"{row['loss']:.2%} \u00b1 {row['loss error']:.2%}"
        right = [_right(row[task]) for task in ("recall", "tool calls")]
        error = f"{row['key error']:.1%}" if "key error" in row else ""
        rows.append([shown, f"{row['bytes']:,.0f}", loss, f"{row['agreement']:.2%}", *right, error])
    error = codecs["8/4"]["key error"] * bound(targets["key error / 8/4"])
    rows.append(
        ["target", "", _sign(f"<= {bound(targets['loss']):.1%}"), "", "", "", _sign(f"<= {error:.1%}")]
    )
    return _grid(rows)


def _right(tally: dict[str, int]) -> str:
    changed = f" (+{tally['gained']} \u2212{tally['lost']})" if tally["gained"] or tally["lost"] else ""
    return f"{tally['right']} of {tally['of']}{changed}"


def _families(result: Result) -> str:
    rows = [["family", "its layers keep", "resumed, uninterrupted", "in a batch", "disk / KV of full length"]]
    for name, found in result["results"].items():
        batch = f"{found['batched gap']:.1g}" if found["batched"] else "one at a time"
        share = f"{found['disk'] / found['full length']:.2f}" if found["full length"] else "no KV"
        rows.append([name, found["layers"], f"{found['resumed gap']:.1g}", batch, share])
    rows.append(["target", "", _sign(result["settings"]["targets"]["resumed gap"]), "", ""])
    return _grid(rows)


def _ecosystem(result: Result) -> str:
    rows = [["package", "what runs", "first turn", "second turn", "third turn, after a kill"]]
    for found in result["results"].values():
        turns = (f"{turn['prompt']:,} / {turn['reused']:,}" for turn in found["turns"])
        rows.append([f"{found['package']} {found['version']}", found["what"], *turns])
    return _grid(rows)


def _reliability(result: Result) -> str:
    found, wanted = result["results"], result["settings"]["targets"]
    kills, damage, soak = found["kills"], found["damage"], found["soak"]
    faults: list[dict[str, Any]] = list(found["faults"]["faults"].values())
    slowest = max(faults, key=lambda fault: float(fault["stranger_ms"]))
    share = f"{kills['largest_share']:.2f} of the budget ({_sign(wanted['largest share of the budget'])})"
    flat = ", ".join(
        f"{soak[name][0]:g} \u2192 {soak[name][1]:g} {unit}"
        for name, unit in (("memory", "MiB resident"), ("descriptors", "descriptors"), ("threads", "threads"))
    )
    rows = [
        ["", "tried", "lost", "wrong answers", "besides"],
        ["processes killed", f"{kills['kills']:,}", str(kills["lost"]), str(kills["wrong"]), share],
        [
            "damages of a file or table",
            str(damage["damages"]),
            f"{damage['refused']} stores",
            str(damage["wrong"]),
            f"{damage['kinds_of_file']} kinds of file, {damage['tables']} tables",
        ],
        [
            "faults under a running engine",
            str(len(faults)),
            f"{sum(not fault['saved_afterwards'] for fault in faults)} not saved again",
            str(sum(not fault["right"] for fault in faults)),
            f"a stranger's longest turn {slowest['stranger_ms']:.0f} ms, "
            f"{max(fault['stranger_healthy_ms'] for fault in faults):.0f} ms without a fault",
        ],
        [
            f"{soak['minutes']:g} minutes of several processes",
            f"{soak['turns']:,} turns",
            f"{soak['not_saved']} not saved",
            str(soak["wrong"]),
            f"{flat}; disk {max(soak['disk']):.2f} of {soak['disk_budget']:g} MiB",
        ],
    ]
    points = ", ".join(f"{name} ({count})" for name, count in kills["at_points"].items())
    return f"{_grid(rows)}\n\nKilled at named points: {points}."


def _encryption(result: Result) -> str:
    targets = result["settings"]["targets"]
    rows = [
        ["KV at rest", "size", *(f"{part}{kind}" for part in targets for kind in ("", ", sealed", ", ratio"))]
    ]
    for codec, found in result["results"].items():
        row = [codec, f"{found['bytes'] / 2**20:.1f} MiB"]
        for part in targets:
            times = [_time(found["medians"][name][part]) for name in ("off", "on")]
            row += [*times, f"{found['ratios'][part]:.2f}"]
        rows.append(row)
    rows.append(["target", "", *(cell for target in targets.values() for cell in ("", "", _sign(target)))])
    return _grid(rows)


def _coordination(result: Result) -> str:
    targets = result["settings"]["targets"]
    rows = [
        [
            "conversation",
            "memory",
            "turns",
            "prompt tokens",
            "computed",
            "seconds",
            "computed / all",
            "target",
        ]
    ]
    for name, costs in result["results"]["costs"].items():
        for mode, cost in costs.items():
            target = _sign(targets[f"{name}, tokens"]) if mode == "persistent" else ""
            numbers = [f"{cost[part]:,}" for part in ("turns", "prompt", "computed")]
            share = f"{cost['computed'] / cost['prompt']:.3f}"
            rows.append([name, mode, *numbers, f"{cost['seconds']:.1f}", share, target])
    ratios = ", ".join(
        f"{part} {result['results']['ratios'][part]:.2f} ({_sign(target)})"
        for part, target in targets.items()
        if part.endswith("seconds")
    )
    return f"{_grid(rows)}\n\nPersistent / whole history: {ratios}."


def _eviction(result: Result) -> str:
    shares, rules = result["settings"]["shares"], ("LRU", "best other rule", "who knows the future")
    rows = [["trace", "rule", *(f"1/{round(1 / share)}" for share in shares)]]
    for trace, curve in result["results"]["curves"].items():
        others = [min(at[rule]["again"] for rule in at if rule not in ("LRU", "the future")) for at in curve]
        found = [[at["LRU"]["again"] for at in curve], others, [at["the future"]["again"] for at in curve]]
        rows += [
            [trace, rule, *(f"{again:.1%}" for again in line)]
            for rule, line in zip(rules, found, strict=True)
        ]
    return _grid(rows)


def _rivals(result: Result) -> str:
    systems, found = result["settings"]["systems"], result["results"]
    names = ("cold", "hot", "fork", "known", "resumed", "killed", "loaded")
    rows = [["time to first token", *names]]
    kept = [
        [
            "bytes, rates",
            "a session on disk",
            "written a turn",
            "answers changed by a restart",
            "decode alone",
            "decode, 8 at once",
            "8 at once, with prefill",
            "start",
        ]
    ]
    for name, one in found.items():
        cannot = systems[name]["cannot"]
        rows.append([name, *(_beside_floor(one["times"].get(part)) for part in names)])
        sizes = [
            "\u2013" if part in cannot else f"{one[part] / 1024:,.0f} KiB" for part in ("stored", "written")
        ]
        rates = [f"{one['rates'][rate]:.0f} /s" for rate in ("decode 1", "decode 8", "whole 8")]
        changed = f"{one['changed']} of {len(one['rounds'])}"
        kept.append([name, *sizes, changed, *rates, _time(one["start"])])
    lacking = [
        f"* **{name}** could not be installed: {why}" for name, why in result["settings"]["lacking"].items()
    ]
    said = [f"* **{name}**: {_settings(of)}." for name, of in systems.items()]
    load = result["settings"]["load"][1]
    rounds = max(len(one["rounds"]) for one in found.values())
    note = f"{rounds} rounds; {load:.0f} programs wanted to run on average meanwhile."
    return "\n\n".join([_grid(rows), _grid(kept), "\n".join([*said, *lacking]), note])


def _beside_floor(time: dict[str, float] | None) -> str:
    if time is None:
        return "\u2013"
    beside = f" ({time['ratio']:.2f} x, {time['above'] * 1000:+,.0f} ms)" if "ratio" in time else ""
    return f"{time['seconds'] * 1000:,.0f} ms{beside}"


def _settings(system: dict[str, Any]) -> str:
    names = {"loaded": "under load", "stored": "a session on disk", "written": "written a turn"}
    why = "; ".join(f"no *{names[part]}*, because {reason}" for part, reason in system["cannot"].items())
    return system["settings"] + (f" ({why})" if why else "")


def _cold(result: Result) -> str:
    wanted, stated = result["settings"]["targets"]["cold / prefill"], result["settings"]["link of the target"]
    links = list(next(iter(result["results"].values()))["links"])
    rows = [["tokens", "bytes of the session", "prefilled", *links, f"{stated}, ratio"]]
    for tokens, found in result["results"].items():
        times = [_time(found["links"][link]) for link in links]
        size = f"{found['bytes of a session'] / 2**20:.1f} MiB"
        rows.append(
            [f"{int(tokens):,}", size, _time(found["prefill"]), *times, f"{found['ratios'][stated]:.2f}"]
        )
    rows.append(["target", "", "", *("" for _ in links), _sign(wanted)])
    return _grid(rows)


def _raylets(result: Result) -> str:
    found, settings = result["results"], result["settings"]
    steady, killed, added = found["steady"], found["killed"], found["added"]
    ratio = found["ratios"]["added, moved / ideal"]
    wanted = _sign(settings["targets"]["added, moved / ideal"])
    rows = [
        ["", "turns", "sessions that moved", "turns lost", "slowest turn"],
        [f"{settings['nodes']} nodes, {settings['turns']} turns each", *_told(steady, f"{steady['moved']}")],
        ["one node killed", *_told(killed, f"{killed['moved']}, of {killed['its own']} that it had")],
        [
            f"{settings['nodes']} nodes become {settings['nodes'] + 1}",
            *_told(
                added,
                f"{added['moved']}; of {settings['names']:,} names {ratio:.2f} of the ideal share ({wanted})",
            ),
        ],
        [f"{settings['clients']} clients at once in one session", *_told(found["crowded"], "")],
    ]
    return _grid(rows)


def _told(part: dict[str, Any], moved: str) -> list[str]:
    return [str(part["turns"]), moved, str(part["lost"]), f"{part['slowest']:.1f} s"]


def _cold_loss(result: Result) -> str:
    rows = [
        [
            "object store",
            "kills",
            "turns",
            "lost",
            "most at one kill",
            "of sessions",
            "most in the queue then",
        ]
    ]
    names = ("kills", "turns", "lost", "most lost", "most sessions", "most waiting")
    rows += [
        [link, *(str(found[name]) for name in names)] for link, found in result["results"]["links"].items()
    ]
    beyond = result["results"]["ratios"]["lost beyond the queue"]
    wanted = _sign(result["settings"]["targets"]["lost beyond the queue"])
    rows.append(["beyond the queue", "", "", f"{beyond} ({wanted})", "", "", ""])
    return _grid(rows)


def _fleet(result: Result) -> str:
    found, wanted = result["results"], result["settings"]["targets"]
    rows = [["nodes", "sessions that move", "least that can", "moved / least", "largest node / mean"]]
    for name, ring in found["ring"].items():
        ratios = [f"{ring[part]:.2f}" for part in ("moved / least", "largest node / mean")]
        rows.append([name, f"{ring['moved']:.2%}", f"{ring['least']:.2%}", *ratios])
    rows.append(["target", "", "", *(_sign(wanted[part]) for part in rows[0][3:])])
    bucket = found["bucket"]
    lines = "\n".join(f"- {name}: {value:,}" for name, value in bucket.items())
    return f"{_grid(rows)}\n\nIn the bucket, after a month:\n\n{lines}"


def _server(result: Result) -> str:
    found, targets = result["results"], result["settings"]["targets"]
    aims = result["settings"].get("aims", {})
    rows = [["", "in process", "HTTP", "median of the differences or ratios", "target", "aim"]]
    for name, compared in zip(found["medians"]["HTTP"], found["ratios"], strict=True):
        sides = [f"{found['medians'][side][name]:.3g}" for side in ("in process", "HTTP")]
        bounds = (_sign(which.get(compared, "")) for which in (targets, aims))
        rows.append([name, *sides, f"{found['ratios'][compared]:.3g}", *bounds])
    return _grid(rows)


def _server_load(result: Result) -> str:
    found, targets = result["results"], result["settings"]["targets"]
    rows = [["", "found", "target"]]
    rows += [[name, f"{found['ratios'][name]:.3g}", _sign(target)] for name, target in targets.items()]
    done, gone = (f"{found['requests'].get(name, 0):,}" for name in ("done", "gone"))
    said = f"{done} answers and {gone} clients that went away in {result['settings']['minutes']:g} minutes."
    return f"{_grid(rows)}\n\n{said}"


TABLES: dict[str, Callable[[Result], str]] = {
    "ttft": _ttft,
    "append_cost": _append_cost,
    "throughput": _throughput,
    "waiting": _waiting,
    "quality": _quality,
    "families": _families,
    "ecosystem": _ecosystem,
    "reliability": _reliability,
    "encryption": _encryption,
    "coordination": _coordination,
    "eviction": _eviction,
    "rivals": _rivals,
    "cold": _cold,
    "raylets": _raylets,
    "cold_loss": _cold_loss,
    "fleet": _fleet,
    "server": _server,
    "server_load": _server_load,
}
"""The benchmarks, in the order of the README and the pages."""


def _marked(name: str) -> str:
    return f"<!-- bench:{name} -->\n{table(name)}\n<!-- /bench -->"


def _origin(name: str, result: Result) -> str:
    machine, versions = result["machine"], result["versions"]
    return (
        f"`benchmarks/{name}.py` at {result['commit']}: {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['platform']}, MLX {versions['mlx']} on its {machine['device']}, mlx-lm {versions['mlx-lm']}, "
        f"Python {versions['python']}."
    )


def _grid(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    rule = ["---", *("--:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body))


def _quantity(name: str, value: float) -> str:
    if name == "hashes":
        return f"{value:.0f}"
    return f"{value / 1024:,.0f} KiB" if name.endswith("bytes") else _time(value)


def _time(seconds: float) -> str:
    return (
        f"{seconds:.1f} s"
        if seconds >= 10
        else f"{seconds * 1000:,.3g} ms"
        if seconds < 1
        else f"{seconds:.2f} s"
    )


def _sign(target: str) -> str:
    return target.replace("<=", "\u2264").replace(">=", "\u2265")


if __name__ == "__main__":
    main()
