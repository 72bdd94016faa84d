"""The tables of experiments/README.md, from the result files.

python -m experiments.tables    fills in what stands between <!-- table: NAME --> and <!-- end -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.results import RESULTS
from tqexport.truncation import FLOAT_BITS

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "experiments" / "README.md",)

Content = Mapping[str, Any]


def filled(text: str, folder: Path = RESULTS) -> str:
    """A document with each of its tables made anew."""

    def table(match: re.Match[str]) -> str:
        file, make = TABLES[match[1]]
        content = json.loads((folder / f"{file}.json").read_text(encoding="utf-8"))
        return f"<!-- table: {match[1]} -->\n\n{make(content)}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(spread: Content) -> str:
    return f"{spread['mean']:.1f} ± {spread['deviation']:.1f}"


def _widths(cells: Mapping[str, Content]) -> list[str]:
    return [f"{bits} bit{'s' * (bits != '1')}" for bits in cells]


def _dummy(content: Content) -> str:
    head = ["codes changed by shifting", *(f"{row['bits']}" for row in content["table"]["dorefa"])]
    names = {"truncquant": "floor (TruncQuant)", "dorefa": "round (ordinary)"}
    rows = [
        [name, *(f"{100 * row['changed']:.1f} %" for row in content["table"][quantizer])]
        for quantizer, name in names.items()
    ]
    return markdown(head, rows)


def _convergence(content: Content) -> str:
    table = dict(content["accuracy_percent"])
    alone = table.pop("float")[str(FLOAT_BITS)]
    first = next(iter(table.values()))
    rows = [["float", *[_cell(alone)], *[""] * (len(first) - 1)]]
    rows += [[way, *map(_cell, cells.values())] for way, cells in table.items()]
    return markdown([f"accuracy, %, {content['seeds']} seeds", *_widths(first)], rows)


def _robustness(content: Content) -> str:
    rows = [
        [f"{way}, {source}", *map(_cell, cells.values())]
        for way, sources in content["accuracy_percent"].items()
        for source, cells in sources.items()
        if source != "PyTorch"
    ]
    first = content["accuracy_percent"]["TruncQuant / truncated"]["ONNX"]
    return markdown([f"trained / deployed, file, {content['seeds']} seeds", *_widths(first)], rows)


def _integers(content: Content) -> str:
    first = next(iter(content["accuracy_percent"].values()))
    rows = [[way, *map(_cell, cells.values())] for way, cells in content["accuracy_percent"].items()]
    return markdown([f"accuracy, %, {content['seeds']} seeds", *_widths(first)], rows)


def _question(name: str) -> Callable[[Content], str]:
    def make(content: Content) -> str:
        ways = content["accuracy_percent"][name]
        quantised = next(deployed["quantised"] for deployed in ways.values() if "quantised" in deployed)
        head = [f"accuracy, %, {content['seeds']} seeds", "deployed", *_widths(quantised)]
        rows = []
        for title, deployed in ways.items():
            for how, cells in deployed.items():
                rows.append([title, how, *map(_cell, cells.values()), *[""] * (len(head) - 2 - len(cells))])
        return markdown(head, rows)

    return make


def _learned(network: str) -> Callable[[Content], str]:
    def make(content: Content) -> str:
        ways = dict(content["accuracy_percent"][network])
        alone = ways.pop("float")[str(FLOAT_BITS)]
        first = next(iter(ways.values()))
        rows = [["float", _cell(alone), *[""] * (len(first) - 1)]]
        rows += [[way, *map(_cell, cells.values())] for way, cells in ways.items()]
        return markdown([f"{network}, accuracy, %, {content['seeds']} seeds", *_widths(first)], rows)

    return make


def _ranges(content: Content) -> str:
    rows = [
        [network, name, f"{size:.2f}", _cell(content["gains_percent"][network][name])]
        for network, ranges in content["ranges"].items()
        for name, size in ranges.items()
    ]
    return markdown(["network", "activation", "range, seed 0", "points won at 2 bits without rounding it"], rows)


def _files(content: Content) -> str:
    files = content["files"] if "files" in content else content["accuracy_percent"]["files"]
    return markdown(
        ["exported", "ONNX", "TFLite"], ([name, said["ONNX"], said.get("TFLite", "")] for name, said in files.items())
    )


def _storage(content: Content) -> str:
    figures = next(iter(content["resnet50q"].values()))
    before, after = figures["float32_bytes"], figures["codes_bytes"]
    rows = [[kind, f"{before[kind]:,}", f"{after[kind]:,}"] for kind in before]
    return markdown(["tensors", "float32, bytes", "8-bit codes, bytes"], rows)


def _packed(content: Content) -> str:
    tables = content["resnet50q"]
    figures = next(iter(tables.values()))
    float32 = figures["float32_bytes"]["total"]
    sizes = dict(figures["total_bytes"])
    for name, table in tables.items():
        sizes[f"1, 2, 4 and 8 bits in one file, {name}"] = table["file_bytes_widths_1_2_4_8_in_one"]
    rows = [[name, f"{size:,}", f"{float32 / size:.2f}x"] for name, size in sizes.items()]
    rows += [[name, "", f"{times:.2f}x"] for name, times in content["if_more_were_coded"].items()]
    return markdown(["stored", "bytes", "smaller than float32"], [*rows, ["the paper", "", f"{content['paper']:.2f}x"]])


TABLES: dict[str, tuple[str, Callable[[Content], str]]] = {
    "dummy_tensor": ("dummy_tensor", _dummy),
    "convergence": ("convergence", _convergence),
    "robustness": ("robustness", _robustness),
    "integers": ("integers", _integers),
    "recipes": ("open_questions", _question("recipes")),
    "activations": ("open_questions", _question("activations")),
    "networks": ("open_questions", _question("networks")),
    "files": ("open_questions", _files),
    "learned_transformer": ("learned_ranges", _learned("transformer")),
    "learned_gru": ("learned_ranges", _learned("GRU")),
    "ranges": ("learned_ranges", _ranges),
    "learned_files": ("learned_ranges", _files),
    "storage": ("storage", _storage),
    "packed": ("storage", _packed),
}


def main() -> None:
    """Fill in both documents."""
    for document in DOCUMENTS:
        document.write_text(filled(document.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
