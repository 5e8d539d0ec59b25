"""Figures of benchmark results: `python bench/plots.py DIR ...`, DIR as bench/run.py wrote it. Reads CSV alone.

DIR/share_of_limit.png   how much of the limit each operation reaches: products by M, a line for each layer shape;
                         quantize and hadamard by shape, a mark for each backend
DIR/speedup_CASE.png     time of bfloat16 over time, by M, a panel for each layer shape and a line for each backend
                         (the paper's layer figure)
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

# Okabe and Ito's colours, distinct to every kind of colour vision; each comes with a marker of its own.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# In the order of legends. Those that share a look are never in one figure: one is a CPU's, the other a GPU's; or one is
# of a product, the other of rows.
LOOKS = {
    "quest": 0,
    "torch_bf16": 1,
    "torch_fp8": 2,
    "torch_fp32": 2,
    "quest_int8": 3,
    "quest_steps": 3,
    "torch_int8": 4,
    "torch_compile": 5,
    "torch_eager": 5,
    "paper_steps": 6,
    "copy": 7,
}
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "figure.dpi": 150,
}
Row = dict[str, str]


def read_cases(directory: Path) -> dict[str, list[Row]]:
    """Rows of every CASE.csv, by case. Raises ValueError for a file that bench/run.py did not write."""
    cases: dict[str, list[Row]] = {}
    for path in sorted(directory.glob("*.csv")):
        if path.stem == "peaks":
            continue
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        if rows and not {"case", "backend", "shape", "M", "N", "K", "time_us", "share_of_limit"} <= rows[0].keys():
            raise ValueError(f"plots: {path} is no result of bench/run.py: its columns are {', '.join(rows[0])}")
        if rows:
            cases[path.stem] = rows
    return cases


def is_product(rows: list[Row]) -> bool:
    return int(rows[0]["N"]) > 0


def layers_of(rows: list[Row]) -> list[tuple[int, int]]:
    """(N, K) in the order of the file."""
    return list(dict.fromkeys((int(row["N"]), int(row["K"])) for row in rows))


def backends_of(rows: list[Row]) -> list[str]:
    return [name for name in LOOKS if any(row["backend"] == name for row in rows)]


def look(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def machine_of(cases: dict[str, list[Row]]) -> str:
    row = next(iter(cases.values()))[0]
    return row["gpu"] or f"{row.get('cpu', 'CPU')}, {row.get('isa', '')}"


def ms_of(rows: list[Row]) -> list[int]:
    return sorted({int(row["M"]) for row in rows})


def lines(rows: list[Row], value: str, key: str) -> dict[str, tuple[list[int], list[float]]]:
    """By rows[key]: places on the axis of m_axis and the value, where there is one, by rising M."""
    ms = ms_of(rows)
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        if row[value]:
            points[row[key]].append((ms.index(int(row["M"])), float(row[value])))
    return {name: ([m for m, _ in sorted(at)], [v for _, v in sorted(at)]) for name, at in points.items()}


def m_axis(axis: Any, rows: list[Row]) -> None:
    """One place for each M, evenly: they are uneven even on a logarithmic axis, where labels would meet."""
    ms = ms_of(rows)
    axis.set_xticks(range(len(ms)), [f"{m // 1024}k" if m >= 1024 and m % 1024 == 0 else str(m) for m in ms])
    axis.set_xlabel("M (rows of the activation)")


def panels(count: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Any]]:
    rows = -(-count // columns)
    size = (max(width * columns, 5.0), height * rows + 0.8)  # room for title and legend
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.remove()
    return figure, flat[:count]


def shared_legend(figure: Figure, axes: list[Any], title: str | None = None) -> None:
    entries: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), title=title, loc="outside lower center", ncols=min(8, len(entries)))


def share_figure(products: dict[str, list[Row]], machine: str) -> Figure:
    columns = min(4, len(products))
    figure, axes = panels(len(products), columns, 3.6, 2.7, sharey=True)
    layers = list(dict.fromkeys(layer for rows in products.values() for layer in layers_of(rows)))
    for axis, (name, rows) in zip(axes, products.items(), strict=True):
        named = [row | {"layer": f"{row['N']} × {row['K']}"} for row in rows if row["backend"] == "quest"]
        series = lines(named, "share_of_limit", "layer")
        for i, (n, k) in enumerate(layers):
            if f"{n} × {k}" in series:
                axis.plot(*series[f"{n} × {k}"], label=f"{n} × {k}", markersize=4, **look(i))
        axis.axhline(1, color="#666666", linewidth=1)
        axis.set_title(name, fontsize=10)
        m_axis(axis, named)
    axes[0].set_ylim(bottom=0)
    for axis in axes[::columns]:
        axis.set_ylabel("share of the limit")
    shared_legend(figure, axes, "layer, N × K")
    figure.suptitle(f"quest: share of the limit (bytes and operations) that is reached\n{machine}")
    return figure


def row_share_figure(cases: dict[str, list[Row]], machine: str) -> Figure:
    def label(row: Row) -> str:
        return " ".join([row["shape"].replace("x", " × "), *row["dtype"].split(":")[1:]])

    labels = {name: list(dict.fromkeys(label(row) for row in rows)) for name, rows in cases.items()}
    figure, axes = panels(len(cases), len(cases), 5.2, 1.2 + 0.3 * max(map(len, labels.values())))
    for axis, (name, rows) in zip(axes, cases.items(), strict=True):
        for backend in backends_of(rows):
            mine = [row for row in rows if row["backend"] == backend]
            shares = [float(row["share_of_limit"]) for row in mine]
            places = [labels[name].index(label(row)) for row in mine]
            axis.plot(shares, places, linestyle="none", label=backend, **look(LOOKS[backend]))
        axis.axvline(1, color="#666666", linewidth=1)
        axis.set_yticks(range(len(labels[name])), labels[name])
        axis.set_ylim(len(labels[name]) - 0.5, -0.5)
        axis.set_xlim(left=0)
        axis.set_xlabel("share of the limit")
        axis.set_title(name, fontsize=10)
    shared_legend(figure, axes)
    figure.suptitle(f"Share of the time that the bytes need at copy speed\n{machine}")
    return figure


def speedup_figure(name: str, rows: list[Row], machine: str) -> Figure:
    layers = layers_of(rows)
    columns = min(4, len(layers))
    figure, axes = panels(len(layers), columns, 3.4, 2.7, sharey=True)
    for axis, (n, k) in zip(axes, layers, strict=True):
        mine = [row for row in rows if (int(row["N"]), int(row["K"])) == (n, k)]
        series = lines(mine, "x_bf16", "backend")
        for backend in backends_of(mine):
            if backend in series and backend != "torch_bf16":  # that one is the line at 1
                axis.plot(*series[backend], label=backend, markersize=4, **look(LOOKS[backend]))
        axis.axhline(1, color="#666666", linewidth=1)
        axis.set_title(f"N × K = {n} × {k}", fontsize=9)
        m_axis(axis, mine)
    axes[0].set_ylim(bottom=0)  # shared, and only now: it fixes the top as well
    for axis in axes[::columns]:
        axis.set_ylabel("speed-up over bf16")
    shared_legend(figure, axes)
    figure.suptitle(f"{name}: time of torch's bfloat16 layer over time\n{machine}")
    return figure


def plot(directory: Path) -> list[Path]:
    """Writes every figure that the results of a directory allow; returns their paths."""
    cases = read_cases(directory)
    if not cases:
        raise ValueError(f"plots: {directory} has no CSV of bench/run.py; run it with --out {directory} first")
    machine = machine_of(cases)
    products = {name: rows for name, rows in cases.items() if is_product(rows)}
    others = {name: rows for name, rows in cases.items() if not is_product(rows)}
    written = []
    with matplotlib.rc_context(STYLE):
        figures = {}
        if products:
            figures["share_of_limit"] = share_figure(products, machine)
        if others:
            figures["share_of_limit_rows"] = row_share_figure(others, machine)
        for name, rows in products.items():
            if any(row["x_bf16"] for row in rows):
                figures[f"speedup_{name}"] = speedup_figure(name, rows, machine)
        for name, figure in figures.items():
            written.append(directory / f"{name}.png")
            figure.savefig(written[-1])
            plt.close(figure)
    return written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="+", type=Path)
    for directory in parser.parse_args(arguments).directory:
        try:
            for path in plot(directory):
                print(f"wrote {path}")
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
