"""The table and the figure of benchmarks/benchmark.py."""

import statistics
from pathlib import Path

from benchmarks.model_files import OURS

BITS = {  # programs that are compared with each other: about equal bits per weight
    "16 bits": ["bf16", "llama.cpp F16", "transformers bf16"],
    "8 bits": ["int8", "llama.cpp Q8_0"],
    "5 bits": ["int4 g32", "llama.cpp Q4_1"],
    "4.5 bits": ["int4 g64", "llama.cpp Q4_0"],
}
TITLES = [
    *("shape", "program", "decode, tokens/s (range)", "of memory speed", "prefill, tokens/s"),
    *("rows 2 / 4 / 8 / 16 over 1", "token beside 1 / 2 busy processes over alone"),
]
COLORS = {"ours": "#d1495b", "llama.cpp": "#8d99ae", "transformers": "#c9cfd8"}
BAR_WIDTH = 0.25


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def format_spread(values: dict[str, float]) -> str:
    """A `spread` for the table."""
    return f"{values['median']:.1f} ({values['low']:.1f} to {values['high']:.1f})"


def program_lines(shape: str, label: str, figures: dict) -> list[list[str]]:
    """The cells of a program's lines: one, and one for each longer context."""
    name = f"**{label}**" if label in OURS else label

    def cells(shape: str, speeds: dict, rows: str, slowdown: str) -> list[str]:
        prefill = f"{speeds['prefill']['median']:.0f}"
        return [shape, name, format_spread(speeds["decode"]), f"{speeds['share']:.2f}", prefill, rows, slowdown]

    rows = " / ".join(f"{ratio:.2f}" for ratio in figures["rows over one"].values())
    beside = figures["beside others"]
    lines = [cells(shape, figures, rows, f"{beside['1']:.1f} / {beside['2']:.1f}" if beside else "")]
    lines += [cells(f"{shape} after {n:,} tokens", speeds, "", "") for n, speeds in figures["contexts"].items()]
    return lines


def markdown(results: list[dict]) -> str:
    """The table for BENCHMARKS.md."""
    lines = [TITLES, ["---"] * len(TITLES)]
    for result in results:
        for label, figures in result["programs"].items():
            lines += program_lines(result["shape"], label, figures)
        lines.append(["", "read bandwidth, GB/s", format_spread(result["read bandwidth"]), "", "", "", ""])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw_shape(axis, result: dict) -> None:
    """Draw the bars of one shape: the share of memory speed, by bits per weight."""
    ticks = []
    for center, (bits, labels) in enumerate(BITS.items()):
        present = [label for label in labels if label in result["programs"]]
        ticks.append(bits if present else "")
        for i, label in enumerate(present):
            program = "ours" if label in OURS else label.split()[0]
            value = result["programs"][label]["share"]
            x = center + (i - (len(present) - 1) / 2) * 1.1 * BAR_WIDTH
            axis.bar(x, value, BAR_WIDTH, color=COLORS[program], label=program)
            axis.text(x, value + 0.015, f"{value:.2f}", ha="center", fontsize=7.5, color="#333333")
    axis.set_xticks(range(len(BITS)), ticks, fontsize=9)
    axis.set_title(result["shape"], fontsize=11, loc="left")
    axis.axhline(1, color="#333333", linewidth=0.8, linestyle=":")
    axis.spines[["top", "right"]].set_visible(False)


def draw(results: list[dict], path: Path) -> None:
    """Draw the share of memory speed, ours beside the peers, a panel for each shape."""
    import matplotlib  # noqa: PLC0415  may be absent

    matplotlib.use("agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, (axes,) = pyplot.subplots(1, len(results), figsize=(4.2 * len(results), 3.4), sharey=True, squeeze=False)
    for axis, result in zip(axes, results, strict=True):
        draw_shape(axis, result)
    axes[0].set_ylabel("share of memory speed")
    axes[0].set_ylim(0, 1.12)
    handles = {}  # by program, because a program has many bars
    for axis in axes:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="upper right", ncols=3, frameon=False, fontsize=9)
    figure.suptitle("Decoding one token at a time: 1 is reading every weight once", fontsize=11, x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
