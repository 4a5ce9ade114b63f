"""Draw runs, finished or still running.

    python -m extras.plot RUN [RUN ...] [--out curves.png]
    python -m extras.plot RUN --method [--out curves.png]

The first command compares runs in four panels: greedy accuracy with its 95% interval, the mean of
the Gaussian, the share of useful groups, and the completion length. Each run has its own color. In
the two noisy panels, the faint line shows each step and the strong line a running mean.

The second command explains the method with one run. It draws the cosines that C averages, for one
prompt in the shipped tiny model, then the Gaussian at five batches of the run, and the run's greedy
accuracy. The picture in the README is

    python -m extras.plot runs/tiny-angle-0 --method --out extras/figures/method.png"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from extras.common import read_jsonl, run_command

WINDOW = 5  # steps in the running mean
# The palette of Okabe and Ito, which color-blind readers can tell apart.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
LINE_STYLES = ["-", "--", ":", "-."]  # the second eight runs are dashed, and so on
PANELS = [  # key in metrics.jsonl, title, unit
    ("mean", "mean of the Gaussian", "rank"),
    ("useful_groups", "useful groups (rewards differ)", "share"),
    ("completion_length", "completion length", "tokens"),
]


def read_rows(run, name):
    """The rows of a .jsonl file in a run directory. ValueError if there are none."""
    try:
        rows = read_jsonl(Path(run, name))
    except (OSError, ValueError) as error:
        raise ValueError(f"{run}: cannot read {name} ({error})") from error
    if not rows:
        raise ValueError(f"{run}: {name} is empty")
    return rows


def read_metrics(run):
    """The rows of RUN/metrics.jsonl: (evaluations, steps)."""
    if Path(run, "config.json").exists() and not Path(run, "metrics.jsonl").exists():
        raise ValueError(f"{run}: no step is finished yet")
    rows = read_rows(run, "metrics.jsonl")
    evaluations = [row for row in rows if "eval_accuracy" in row]
    steps = [row for row in rows if "accuracy" in row]
    return evaluations, steps


def label_runs(runs):
    """{path: label} of the different directories among `runs`. A label is the shortest end of the
    path that no other path has: s0, or x/s0 and y/s0 if two directories are called s0."""
    paths = list(dict.fromkeys(Path(run).resolve() for run in runs))
    labels = {}
    for path in paths:
        others = [other.parts for other in paths if other != path]
        n = 1
        while path.parts[-n:] in [other[-n:] for other in others]:
            n += 1
        label = str(Path(*path.parts[-n:]))
        # matplotlib leaves labels that begin with an underscore out of legends.
        labels[path] = f"./{label}" if label.startswith("_") else label
    return labels


def running_mean(values):
    """The mean of each value and the WINDOW - 1 values before it."""
    means = []
    for last in range(1, len(values) + 1):
        window = values[max(0, last - WINDOW) : last]
        means.append(sum(window) / len(window))
    return means


def draw_accuracy(panel, evaluations, **style):
    at = [row["step"] for row in evaluations]
    accuracy = [row["eval_accuracy"] for row in evaluations]
    low = [row["eval_low"] for row in evaluations]
    high = [row["eval_high"] for row in evaluations]
    panel.plot(at, accuracy, marker="o", markersize=4, **style)
    panel.fill_between(at, low, high, color=style["color"], alpha=0.15, linewidth=0)
    panel.set_ylim(0, 1)


def draw(runs):
    """The figure that compares some run directories."""
    figure, grid = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    accuracy_panel, *other_panels = grid.flat
    accuracy_panel.set(title="greedy accuracy, 95% interval", xlabel="step", ylabel="share")
    for panel, (key, title, unit) in zip(other_panels, PANELS):
        panel.set(title=title, xlabel="step", ylabel=unit)
    labels = label_runs(runs)
    for number, (run, label) in enumerate(labels.items()):
        style = {"color": COLORS[number % len(COLORS)]}
        style["linestyle"] = LINE_STYLES[number // len(COLORS) % len(LINE_STYLES)]
        evaluations, steps = read_metrics(run)
        draw_accuracy(accuracy_panel, evaluations, label=label, **style)
        at = [row["step"] for row in steps]
        for panel, (key, title, unit) in zip(other_panels, PANELS):
            values = [row[key] for row in steps]
            if key == "mean":  # not noisy
                panel.plot(at, values, **style)
            else:
                panel.plot(at, values, alpha=0.25, linewidth=1, **style)
                panel.plot(at, running_mean(values), **style)
    for panel in grid.flat:
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    title = f"faint: each step; strong: mean of the last {WINDOW}"
    columns = min(len(labels), 4)
    legend = figure.legend(loc="outside lower center", ncols=columns, frameon=False, title=title)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a path may contain dollar signs
    return figure


def draw_method(run):
    """The figure that explains GAIN-RL with one run."""
    evaluations, steps = read_metrics(run)
    figure = plt.figure(figsize=(9, 6.4), layout="constrained", facecolor="white")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.15, 1], hspace=0.03)
    draw_cosines(top, top.subplots())
    ranks_panel, accuracy_panel = bottom.subplots(1, 2)
    draw_gaussians(ranks_panel, run, steps)
    draw_accuracy(accuracy_panel, evaluations, color=COLORS[0])
    accuracy_panel.set_title("3. Train with GRPO", loc="left", weight="bold", fontsize=11)
    accuracy_panel.set(xlabel="batch", ylabel="greedy accuracy, 95% interval")
    for panel in (ranks_panel, accuracy_panel):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def draw_cosines(figure, panel):
    """The cosines between the tokens of a question (rows) and those of its whole prompt (columns),
    for the shortest question of the shipped tiny world."""
    import torch  # here, because importing them takes seconds and draw() needs none
    import transformers

    import gainrl

    transformers.utils.logging.disable_progress_bar()

    model, tokenizer = gainrl.load_model(gainrl.TINY_WORLD, "cpu")
    problems = gainrl.load_problems(tokenizer, gainrl.TINY_WORLD, "train", 512)
    prompt = min((problem["prompt"] for problem in problems), key=lambda prompt: prompt.end)
    with torch.no_grad():
        hidden, _ = gainrl.run_backbone(model, torch.tensor([prompt.ids[: prompt.end]]))
    u = torch.nn.functional.normalize(hidden[0], dim=-1)
    cosines = u[prompt.start :] @ u.T
    inter = cosines[:, : prompt.start].mean().item()
    intra = cosines[:, prompt.start :].mean().item()

    image = panel.imshow(cosines.numpy(), aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1)
    words = tokenizer.convert_ids_to_tokens(prompt.ids[: prompt.end])
    panel.set_xticks(range(len(words)), words, rotation=90, fontsize=7)
    panel.set_yticks(range(len(words) - prompt.start), words[prompt.start :], fontsize=7)
    panel.tick_params(length=0)
    top, height = -0.5, len(cosines)
    for left, right, color, text in (
        (0, prompt.start, COLORS[2], f"prefix: mean cosine $C_{{inter}}$ = {inter:.2f}"),
        (prompt.start, prompt.end, COLORS[1], f"question: $C_{{intra}}$ = {intra:.2f}"),
    ):
        corner = (left - 0.5 + 0.1, top + 0.1)
        size = (right - left - 0.2, height - 0.2)
        panel.add_patch(plt.Rectangle(corner, *size, fill=False, color=color, linewidth=2.5))
        middle = (left + right - 1) / 2
        panel.text(middle, top - 0.4, text, ha="center", va="bottom", color=color, weight="bold")
    figure.suptitle(
        "1. Score each question: $C = C_{intra} + C_{inter}$ "
        f"= {intra:.2f} + {inter:.2f} = {intra + inter:.2f}",
        x=0.01,
        ha="left",
        weight="bold",
        fontsize=11,
    )
    panel.set_ylabel("the question's tokens")
    figure.colorbar(image, ax=panel, label="cosine", pad=0.01)


def draw_gaussians(panel, run, steps):
    """The probability of each rank at five batches, evenly spaced over the run."""
    import gainrl

    settings = json.loads(Path(run, "config.json").read_text())
    n_questions = len(read_rows(run, "scores.jsonl"))
    if not steps:
        raise ValueError(f"{run}: no step is finished yet")
    curriculum = gainrl.GaussianCurriculum(
        range(n_questions, 0, -1),
        batch_size=1,
        sigma=float("inf") if settings["curriculum"] == "uniform" else settings["sigma"],
    )
    picks = sorted({round(k * (len(steps) - 1) / 4) for k in range(5)})
    for number, pick in enumerate(picks):
        curriculum.mean = steps[pick]["mean"]
        color = plt.cm.viridis(0.9 * number / max(1, len(picks) - 1))
        label = f"batch {steps[pick]['step']}"
        panel.plot(curriculum.probabilities().numpy(), color=color, label=label, linewidth=2)
    title = "2. Draw batches from a moving Gaussian"
    panel.set_title(title, loc="left", weight="bold", fontsize=11)
    panel.set_xlabel(f"rank by C, from highest (0) to lowest ({n_questions - 1})")
    panel.set_ylabel("probability of a draw")
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False, fontsize=8)


def main(argv=None):
    parser = argparse.ArgumentParser(usage="python -m extras.plot RUN [RUN ...] [options]")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run directory")
    parser.add_argument("--method", action="store_true", help="explain the method with one run")
    parser.add_argument("--out", default="curves.png", help="file to write (default: curves.png)")
    options = parser.parse_args(argv)
    if options.method and len(options.runs) > 1:
        parser.error("--method draws one run")
    out = options.out if Path(options.out).suffix else f"{options.out}.png"
    try:
        figure = draw_method(*options.runs) if options.method else draw(options.runs)
        figure.savefig(out, dpi=150)
    except (ValueError, OSError) as error:
        print(f"extras.plot: {error}", file=sys.stderr)
        return 2
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    matplotlib.use("Agg")  # draws to a file, without a window
    run_command(main, "extras.plot")
