"""Runs as one picture, finished or still running.

    python -m extras.plot RUN [RUN ...] [--out curves.png]

Four panels over the steps: greedy accuracy with its 95% band, the mean of the Gaussian, the share
of useful groups and the completion length. One colour a run; of what is noisy from step to step the
faint line is each step and the strong one a running mean."""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, no window
import matplotlib.pyplot as plt

WINDOW = 5  # steps in the running mean
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
PANELS = [  # key in metrics.jsonl, title, unit
    ("mean", "mean of the Gaussian", "rank"),
    ("useful_groups", "useful groups (rewards differ)", "share"),
    ("completion_length", "completion length", "tokens"),
]


def read_metrics(run):
    """The rows of RUN/metrics.jsonl: (evaluations, steps). ValueError if there are none."""
    path = Path(run, "metrics.jsonl")
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{run} is no run, or has no metrics yet ({error})") from error
    evaluations = [row for row in rows if "eval_accuracy" in row]
    steps = [row for row in rows if "accuracy" in row]
    if not rows:
        raise ValueError(f"{run} has no metrics yet")
    return evaluations, steps


def running_mean(values):
    """Each value's mean with the WINDOW - 1 values before it."""
    means = []
    for last in range(1, len(values) + 1):
        window = values[max(0, last - WINDOW) : last]
        means.append(sum(window) / len(window))
    return means


def draw(runs):
    """The figure of some run directories."""
    figure, grid = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    accuracy_panel, *other_panels = grid.flat
    accuracy_panel.set(title="greedy accuracy, 95% interval", xlabel="step", ylabel="share")
    accuracy_panel.set_ylim(0, 1)
    for panel, (key, title, unit) in zip(other_panels, PANELS):
        panel.set(title=title, xlabel="step", ylabel=unit)
    for number, run in enumerate(runs):
        colour = COLOURS[number % len(COLOURS)]
        evaluations, steps = read_metrics(run)
        at = [row["step"] for row in evaluations]
        accuracy = [row["eval_accuracy"] for row in evaluations]
        low = [row["eval_low"] for row in evaluations]
        high = [row["eval_high"] for row in evaluations]
        name = Path(run).resolve().name
        accuracy_panel.plot(at, accuracy, color=colour, marker="o", markersize=4, label=name)
        accuracy_panel.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        at = [row["step"] for row in steps]
        for panel, (key, title, unit) in zip(other_panels, PANELS):
            values = [row[key] for row in steps]
            if key == "mean":  # not noisy
                panel.plot(at, values, color=colour)
            else:
                panel.plot(at, values, color=colour, alpha=0.25, linewidth=1)
                panel.plot(at, running_mean(values), color=colour)
    for panel in grid.flat:
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    title = f"faint: each step; strong: mean of the last {WINDOW}"
    figure.legend(loc="outside lower center", ncols=min(len(runs), 4), frameon=False, title=title)
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(usage="python -m extras.plot RUN [RUN ...] [--out FILE]")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run directory")
    parser.add_argument(
        "--out", default="curves.png", help="picture to write (default: curves.png)"
    )
    options = parser.parse_args(argv)
    try:
        figure = draw(options.runs)
        figure.savefig(options.out, dpi=150)
    except (ValueError, OSError) as error:
        print(f"extras.plot: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
