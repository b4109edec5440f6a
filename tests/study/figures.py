"""This file draws the study's SVGs: transparent, in colours that can be read on white and on black, no date inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

INK = "#808080"
COLOURS = ("#3b8fd9", "#e07b39", "#3fa66b", "#c25fb5", "#b59a2d", "#d9534f", "#7a7fd1", "#4aa8a8")
FAMILIES = ("grpo", "decoupled", "decoupled, log-linear", "cispo", "aipo", "gspo", "gspo, clip 0.2", "m2po")
STYLE: Any = {
    "svg.hashsalt": "slipstream",
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.transparent": True,
}


def save(figure: Figure, path: Path) -> None:
    """Write the SVG, the same bytes for the same numbers."""
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def draw_lag(study: dict[str, Any], path: Path) -> None:
    """Gain in quality against lag, a panel per regime; each with its own scale."""
    titles = {
        "gentle": "gentle: the default run's pace",
        "tuned": "tuned: best lr at lag 0",
        "stress": "stress: 4 × that",
    }
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 3, figsize=(10.5, 4.4), layout="constrained")
        for panel, (regime, title) in zip(panels, titles.items(), strict=True):
            arms = study["regimes"][regime]
            for colour, arm in zip(COLOURS, FAMILIES, strict=True):
                rows = arms[arm]["lags"]
                gains = [row["gain"] for row in rows.values()]
                dashed = {"ls": "--", "zorder": 3} if arm == "cispo" else {}  # decoupled lies beneath it
                panel.plot([gain[0] for gain in gains], color=colour, lw=1.8, marker="o", ms=3.5, label=arm, **dashed)
                ends = ([gain[end] for gain in gains] for end in (1, 2))
                panel.fill_between(range(len(gains)), *ends, color=colour, alpha=0.12, lw=0)
                panel.set_xticks(range(len(rows)), list(rows))
            base = 0.95 * arms[study["default"]]["lags"]["0"]["gain"][0]
            label = f"95 % of {study['default']} at lag 0"
            panel.axhline(base, color=INK, lw=1.2, ls=":", label=label)
            panel.set_title(title, fontsize=10)
            panel.set_xlabel("lag, policy versions")
            panel.set_ylim(bottom=0)
        panels[0].set_ylabel("gain in quality: exact mean pass rate")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9)
        save(figure, path)


def draw_teaching(study: dict[str, Any], path: Path) -> None:
    """Quality against tokens, a panel per setting."""
    arms = {
        "uniform": COLOURS[0],
        "band": COLOURS[1],
        "uniform, 4 answers first": COLOURS[2],
        "band, 4 answers first": COLOURS[3],
        "band from 0.05": COLOURS[4],
    }
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(study["table"]), figsize=(11.5, 3.9), layout="constrained")
        for panel, (setting, table) in zip(panels, study["table"].items(), strict=True):
            thousands = table["uniform"]["tokens"][0] / 1000
            for arm, colour in arms.items():
                _band(panel, thousands, table[arm]["curve"], colour, arm)
            end = table["uniform"]["curve"][-1][0]
            panel.axhline(end, color=INK, lw=1, ls=":")
            panel.set_title(setting, fontsize=10)
            panel.set_xlabel("sampled tokens, thousands")
        panels[0].set_ylabel("quality: exact mean pass rate")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(arms), fontsize=9)
        save(figure, path)


def _band(panel: Axes, width: float, curve: list[list[float]], colour: str, label: str) -> None:
    xs = [width * index / (len(curve) - 1) for index in range(len(curve))]
    panel.plot(xs, [point[0] for point in curve], color=colour, lw=1.8, label=label)
    panel.fill_between(xs, [point[1] for point in curve], [point[2] for point in curve], color=colour, alpha=0.18, lw=0)


def draw_real_model(study: dict[str, Any], path: Path) -> None:
    """Held-out accuracy against tokens: each run thin, the mean of an arm thick."""
    with plt.rc_context(STYLE):
        figure, panel = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
        for colour, (arm, found) in zip(COLOURS, study["arms"].items(), strict=False):
            for run in found["runs"]:
                tokens = [value / 1000 for value in run["tokens"]]
                panel.plot(
                    tokens,
                    [100 * value for value in run["accuracy"]],
                    color=colour,
                    lw=0.8,
                    alpha=0.6,
                    marker="o",
                    ms=2.5,
                )
            grid = [value / 1000 for value in found["grid_tokens"]]
            means = [100 * point[0] for point in found["curve"]]
            panel.plot(grid, means, color=colour, lw=2.4, label=f"{arm}, mean of {len(found['runs'])} runs")
        panel.axhline(100 * study["arms"]["uniform"]["final_accuracy"][0], color=INK, lw=1, ls=":")
        panel.set_xlabel("sampled tokens, thousands")
        panel.set_ylabel("held-out accuracy, % (greedy)")
        panel.legend(loc="lower right", fontsize=9)
        save(figure, path)
