"""What the angle adds: five curricula in five tiny worlds, with ten seeds each.

    python -m extras.study                       330 runs, an hour or two on two cores
    python -m extras.study --seeds 2 --quick     the same tables in small, in minutes: no evidence
    python -m extras.study --reversed            the lowest C first, as a sixth curriculum

It prints the tables as Markdown and draws extras/figures/curricula.png and speedup.png (with
--quick, into runs/study-quick). STUDY.md says what they mean. Runs are kept in runs/study, a
directory each: after a stop, the same command continues; after a change of gainrl.py, remove it."""

import argparse
import itertools
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from tqdm import tqdm

import gainrl
from extras.bench import describe_machine

FIGURES = Path(__file__).parent / "figures"
WORLDS = {  # of make_tiny_world, from many useful groups to few; in `tied` length is difficulty
    "tied": {"distractors": 0},
    "apart": {},
    "rare": {"effort": 0.5},
    "scarce": {"effort": 0.3},
    "scarcest": {"effort": 0.2},
}
ARMS = ("angle", "angle-unbiased", "length", "shuffled", "uniform")
BASELINES = ("uniform", "length")  # what the arms are compared with
# Curricula that differ from `angle` in one setting only: these many times its default.
SCHEDULES = {
    "sigma x 0.5": ("sigma", 0.5),
    "sigma x 2": ("sigma", 2.0),
    "step x 0.5": ("curriculum_step", 0.5),
    "step x 2": ("curriculum_step", 2.0),
}
SCHEDULE_WORLDS = ("apart", "scarce")  # the mean arrives at the last rank in the first only
MEASURES = {  # of a run, with the digits to print
    "steps": ("steps to 90% of uniform's last greedy accuracy", 1),
    "area": ("mean greedy accuracy over the run", 3),
    "final": ("last greedy accuracy", 3),
}
STYLES = {  # color, line and marker: the last two tell the arms apart in grey too
    "uniform": ("black", "-", "o"),
    "shuffled": ("tab:gray", ":", "x"),
    "length": ("tab:orange", "--", "s"),
    "angle": ("tab:blue", "-", "^"),
    "angle-unbiased": ("tab:green", "-.", "v"),
    "reversed": ("tab:red", "--", "D"),
}
COMPLETIONS = 8  # of each prompt
LAST_RANK = gainrl.N_TRAIN - 1


# Sizes of the study. questions: those whose signals are measured in each world.
Size = namedtuple("Size", "prompts steps eval_every eval_examples questions warmup")
FULL = Size(prompts=8, steps=24, eval_every=4, eval_examples=128, questions=240, warmup=450)
QUICK = Size(prompts=4, steps=2, eval_every=1, eval_examples=16, questions=24, warmup=50)


# --- Statistics -----------------------------------------------------------------------------------


def bootstrap(statistic, *columns, draws=10_000):
    """(value, low, high): the statistic of the columns, and its 95% percentile interval.

    columns: tensors (n,), paired: entry k of each is of seed, or question, k. All are drawn anew
    with replacement, together. statistic: takes columns of shape (draws, n), gives (draws,)."""
    n = len(columns[0])
    value = statistic(*[column[None] for column in columns]).item()
    rows = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(0))
    drawn = statistic(*[column[rows] for column in columns]).double()
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return value, low, high


def mean(values):
    """(draws, n) to (draws,)."""
    return values.mean(1)


def speedup(uniform_steps, arm_steps):
    """How many times fewer steps an arm takes in the mean: (draws, n) each, to (draws,)."""
    return uniform_steps.mean(1).clamp(min=1) / arm_steps.mean(1).clamp(min=1)


def each_draw(statistic):
    """For `bootstrap`: a statistic of columns (n,) that gives a float, applied draw by draw."""

    def statistic_of_draws(*columns):
        return torch.tensor([statistic(*drawn) for drawn in zip(*columns)])

    return statistic_of_draws


def partial_spearman(x, y, given):
    """Spearman's correlation of x and y, (n,), with that of both with `given` taken out."""
    xy = gainrl.spearman(x, y)
    x_given = gainrl.spearman(x, given)
    y_given = gainrl.spearman(y, given)
    unexplained = (1 - x_given**2) * (1 - y_given**2)
    return (xy - x_given * y_given) / math.sqrt(max(unexplained, 1e-12))


def with_interval(value, low, high, digits=2):
    """+0.21 [+0.05, +0.35]: what bootstrap returns, as text."""
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def paired_difference(ours, theirs, digits):
    """The mean of ours - theirs, paired by seed, with its interval, as text."""
    return with_interval(*bootstrap(mean, ours - theirs), digits)


# --- One run, and what is measured of it ----------------------------------------------------------


def quietly(work, *inputs, **options):
    """work(*inputs, **options) in one thread, with nothing printed."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as void, redirect_stdout(void), redirect_stderr(void):
        return work(*inputs, **options)


def train_once(folder, world, size, settings):
    """The rows of metrics.jsonl of a run in `folder`. One that was stopped is continued."""
    started = (folder / "config.json").exists()
    common = {
        "model": str(world),
        "dataset": str(world),
        "prompts_per_step": size.prompts,
        "completions_per_prompt": COMPLETIONS,
        "steps": size.steps,
        "eval_every": size.eval_every,
        "eval_examples": size.eval_examples,
        "checkpoint_every": 8,
        "run_dir": str(folder),
        "resume": str(folder) if started else None,
    }
    config = gainrl.Config(**{**gainrl.PRESETS["tiny"], **common, **settings})
    quietly(gainrl.train, config)
    return gainrl.read_jsonl(folder / "metrics.jsonl")


def accuracy_curve(rows):
    """The steps at which a run was evaluated, and the greedy accuracy at each: two lists."""
    evaluations = [row for row in rows if "eval_accuracy" in row]
    steps = [row["step"] for row in evaluations]
    accuracies = [row["eval_accuracy"] for row in evaluations]
    return steps, accuracies


def steps_to(target, steps, accuracies):
    """The first step at which the curve, straight between its points, is at `target`. A curve that
    never gets there counts all its steps."""
    if accuracies[0] >= target:
        return float(steps[0])
    for k in range(1, len(steps)):
        if accuracies[k] >= target:
            rise = accuracies[k] - accuracies[k - 1]
            share = (target - accuracies[k - 1]) / rise
            return steps[k - 1] + share * (steps[k] - steps[k - 1])
    return float(steps[-1])


def measure(rows, target):
    """The MEASURES of a run: steps to the target, mean and last greedy accuracy."""
    steps, accuracies = accuracy_curve(rows)
    area = torch.trapezoid(torch.tensor(accuracies).double(), torch.tensor(steps).double())
    return {
        "steps": steps_to(target, steps, accuracies),
        "area": area.item() / steps[-1],
        "final": accuracies[-1],
    }


# --- The signal: what goes with C? ----------------------------------------------------------------
# Of n questions: tokens, steps of the solution, sampled accuracy, norm of the GRPO gradient, each
# (n,); layers: C of the embeddings and after each layer, (layers + 1, n); angle: the last of them.
Signals = namedtuple("Signals", "tokens steps accuracy gradient layers angle")


def measure_signals(model, tokenizer, problems):
    """The Signals of problems, as load_problems gives them; eight completions are sampled of each.
    The gradient of a group whose rewards are equal is 0."""
    config = gainrl.Config(**gainrl.PRESETS["tiny"])
    generator = torch.Generator().manual_seed(0)
    tokens, steps, accuracies, gradients, layers = [], [], [], [], []
    for problem in problems:
        prompt = problem["prompt"]
        tokens.append(float(prompt.end - prompt.start))
        steps.append(float(problem["answer"].count("=")))
        layers.append(angle_by_layer(model, prompt))
        accuracy, gradient = sample_group(model, tokenizer, problem, config, generator)
        accuracies.append(accuracy)
        gradients.append(gradient)
    layers = torch.tensor(layers).transpose(0, 1).contiguous()
    return Signals(
        torch.tensor(tokens),
        torch.tensor(steps),
        torch.tensor(accuracies),
        torch.tensor(gradients),
        layers,
        layers[-1],
    )


@torch.no_grad()
def angle_by_layer(model, prompt):
    """C of the embeddings and after each layer, the last after the final norm: floats."""
    ids = torch.tensor([prompt.ids[: prompt.end]])
    prefix_mask = torch.arange(prompt.end)[None] < prompt.start
    angles = []
    for hidden in model(ids, output_hidden_states=True).hidden_states:
        intra, inter = gainrl.angle_concentration(hidden, prefix_mask, ~prefix_mask)
        angles.append((intra + inter).item())
    return angles


def sample_group(model, tokenizer, problem, config, generator):
    """The accuracy of a group of completions, and the norm of the gradient of its GRPO loss."""
    prompts = [problem["prompt"]]
    rollout = gainrl.generate(model, tokenizer, prompts, config, COMPLETIONS, generator)
    rewards = gainrl.reward_rollout(rollout, [problem])
    logprobs = gainrl.completion_logprobs(
        model,
        rollout.ids,
        rollout.attention_mask,
        rollout.completion_mask.shape[1],
        config.temperature,
        prompt_index=torch.zeros(COMPLETIONS, dtype=torch.long),
    )
    advantages = gainrl.group_advantages(rewards).flatten()
    loss, _ = gainrl.grpo_loss(logprobs, logprobs.detach(), advantages, rollout.completion_mask)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norms = torch.stack([gradient.norm() for gradient in gradients])
    return rewards.mean().item(), norms.norm().item()


def describe_signals(world, trained, n_questions):
    """Two rows of the tables on the signal: in the base model of the world (a folder), and in the
    one that the run `trained` ended with. The questions are in no evaluation."""
    device = torch.device("cpu")
    base_model, tokenizer = gainrl.load_model(str(world), device)
    trained_model, _ = gainrl.load_model(str(trained / "model"), device)
    problems = gainrl.load_problems(tokenizer, str(world), "test", longest=400)[-n_questions:]
    before = measure_signals(base_model, tokenizer, problems)
    after = measure_signals(trained_model, tokenizer, problems)
    change = with_interval(*bootstrap(mean, after.angle - before.angle), digits=3)
    return [
        signal_row(world.name, "before", before, ""),
        signal_row(world.name, "after", after, change),
    ]


def signal_row(world, when, signals, change):
    """A row as a dict, by the heads of its columns; `by layer` goes to a table of its own, and
    `useful`, the share of groups whose rewards differ, to all tables."""

    def given_length(x, y):
        statistic = each_draw(partial_spearman)
        return with_interval(*bootstrap(statistic, x, y, signals.tokens, draws=1000))

    spearman = each_draw(gainrl.spearman)
    is_useful = (signals.accuracy > 0) & (signals.accuracy < 1)
    return {
        "world": world,
        "GRPO": when,
        "C": signals.angle.mean().item(),
        "change of C": change,
        "useful": is_useful.double().mean().item(),
        "accuracy": signals.accuracy.mean().item(),
        "length": with_interval(*bootstrap(spearman, signals.angle, signals.tokens, draws=1000)),
        "steps given length": given_length(signals.angle, signals.steps),
        "accuracy given length": given_length(signals.angle, signals.accuracy),
        "gradient given length": given_length(signals.angle, signals.gradient),
        "by layer": [given_length(layer, signals.steps) for layer in signals.layers],
    }


# --- All runs -------------------------------------------------------------------------------------


def plan_runs(arms, n_seeds):
    """The settings of each run, by (world, arm or schedule, seed)."""
    plan = {}
    for world, arm, seed in itertools.product(WORLDS, arms, range(n_seeds)):
        plan[world, arm, seed] = {"curriculum": arm, "seed": seed}
    defaults = gainrl.GaussianCurriculum(torch.zeros(gainrl.N_TRAIN), 1)
    default_ranks = {"sigma": defaults.sigma, "curriculum_step": defaults.step}
    for world, name, seed in itertools.product(SCHEDULE_WORLDS, SCHEDULES, range(n_seeds)):
        setting, factor = SCHEDULES[name]
        ranks = factor * default_ranks[setting]
        plan[world, name, seed] = {"curriculum": "angle", "seed": seed, setting: ranks}
    return plan


def run_all(folder, plan, size):
    """The metrics rows of all runs, by the keys of the plan, and the rows on the signals. A process
    for each core, one thread each."""
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        worlds = []
        for world, options in WORLDS.items():
            make_world = gainrl.make_tiny_world
            options = {**options, "warmup": size.warmup}
            worlds.append(pool.submit(quietly, make_world, folder / world, **options))
        for future in tqdm(worlds, desc="worlds"):
            future.result()

        futures = {}
        for (world, name, seed), settings in plan.items():
            run_dir = folder / f"{world}-{name}-{seed}".replace(" ", "-")
            futures[world, name, seed] = pool.submit(
                train_once, run_dir, folder / world, size, settings
            )
        runs = {}
        for key, future in tqdm(futures.items(), desc="runs"):
            runs[key] = future.result()

        signals = []
        for world in WORLDS:
            trained = folder / f"{world}-uniform-0"
            signals.append(
                pool.submit(quietly, describe_signals, folder / world, trained, size.questions)
            )
        signal_rows = []
        for future in tqdm(signals, desc="signals"):
            signal_rows += future.result()
    return runs, signal_rows


def measure_all(runs, n_seeds):
    """The target of each world, 90% of the mean accuracy that `uniform` ends with; and the MEASURES
    of all runs: (seeds,) float64 by (world, arm or schedule, measure)."""
    targets = {}
    for world in WORLDS:
        last = [accuracy_curve(runs[world, "uniform", seed])[1][-1] for seed in range(n_seeds)]
        targets[world] = 0.9 * statistics.mean(last)
    values = {}
    for (world, name, _), rows in runs.items():
        for what, value in measure(rows, targets[world]).items():
            values.setdefault((world, name, what), []).append(value)
    results = {key: torch.tensor(column).double() for key, column in values.items()}
    return targets, results


def bootstrap_speedups(results, arms):
    """(value, low, high) of the speed-up over `uniform`, by (world, arm)."""
    speedups = {}
    for world in WORLDS:
        uniform_steps = results[world, "uniform", "steps"]
        for arm in arms:
            if arm != "uniform":
                steps = results[world, arm, "steps"]
                speedups[world, arm] = bootstrap(speedup, uniform_steps, steps)
    return speedups


# --- Tables: lists of rows, the first of which are the heads --------------------------------------


def print_table(rows):
    """As Markdown."""
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    rule = "|---" * len(rows[0]) + "|"
    print("\n".join([lines[0], rule, *lines[1:]]), end="\n\n", flush=True)


def world_heads(useful):
    """The first cell of a world's row: its name and its share of useful groups before training."""
    return {world: f"{world} ({useful[world]:.2f})" for world in WORLDS}


def measure_table(what, results, arms, useful):
    """One of MEASURES: of each world the means of the arms, and their differences to BASELINES."""
    title, digits = MEASURES[what]
    rows = [["world (useful groups)", title, *arms]]
    for world, head in world_heads(useful).items():
        means = [f"{results[world, arm, what].mean():.{digits}f}" for arm in arms]
        rows.append([head, "mean", *means])
        for baseline in BASELINES:
            differences = []
            for arm in arms:
                ours, theirs = results[world, arm, what], results[world, baseline, what]
                same = arm == baseline
                differences.append("" if same else paired_difference(ours, theirs, digits))
            rows.append(["", f"minus {baseline}", *differences])
    return rows


def speedup_table(speedups, arms, useful):
    compared = [arm for arm in arms if arm != "uniform"]
    rows = [["world (useful groups)", *[f"speed-up of {arm}" for arm in compared]]]
    for world, head in world_heads(useful).items():
        cells = []
        for arm in compared:
            value, low, high = speedups[world, arm]
            cells.append(f"{value:.2f} [{low:.2f}, {high:.2f}]")
        rows.append([head, *cells])
    return rows


def signal_table(signal_rows):
    """How C goes with length, and at equal length with difficulty, accuracy and gradient."""
    heads = [head for head in signal_rows[0] if head != "by layer"]
    rows = [heads]
    for signal in signal_rows:
        cells = [signal[head] for head in heads]
        rows.append([f"{cell:.2f}" if isinstance(cell, float) else cell for cell in cells])
    return rows


def layer_table(signal_rows):
    """The correlation of C and the number of steps at equal length, layer by layer."""
    n_layers = len(signal_rows[0]["by layer"]) - 1
    depths = ["embeddings", *[f"after layer {k}" for k in range(1, n_layers + 1)]]
    rows = [["C and steps given length", "GRPO", *depths]]
    for signal in signal_rows:
        rows.append([signal["world"], signal["GRPO"], *signal["by layer"]])
    return rows


def schedule_table(runs, results, n_seeds):
    """What width and pace of the Gaussian change: of each schedule when its mean arrives at the
    last rank, the share of useful groups before and after, and the MEASURES."""
    rows = [["world", "schedule of angle", "arrives at step", "useful before", "after", *MEASURES]]
    for world, name in itertools.product(SCHEDULE_WORLDS, ["angle", *SCHEDULES]):
        schedule_runs = [runs[world, name, seed] for seed in range(n_seeds)]
        cells = []
        for what, (_, digits) in MEASURES.items():
            ours, default = results[world, name, what], results[world, "angle", what]
            cell = f"{ours.mean():.{digits}f}"
            if name != "angle":
                cell += f" ({paired_difference(ours, default, digits)})"
            cells.append(cell)
        rows.append([world, name, *describe_arrival(schedule_runs), *cells])
    return rows


def describe_arrival(schedule_runs):
    """Three cells: the mean step at which the Gaussian's mean is at the last rank, and in how many
    runs it gets there; the share of useful groups before that, and from then on."""
    arrivals, before, after = [], [], []
    for rows in schedule_runs:
        steps_there = [row["step"] for row in rows if row.get("mean", 0) >= LAST_RANK]
        if steps_there:
            arrivals.append(steps_there[0])
        for row in rows:
            if "useful_groups" in row:
                is_there = row["step"] in steps_there
                (after if is_there else before).append(row["useful_groups"])
    when = "never"
    if arrivals:
        when = f"{statistics.mean(arrivals):.1f} ({len(arrivals)}/{len(schedule_runs)})"
    return [when, share_text(before), share_text(after)]


def share_text(shares):
    return f"{statistics.mean(shares):.2f}" if shares else ""


# --- Figures --------------------------------------------------------------------------------------


def pyplot():
    """matplotlib.pyplot without a screen. Only the figures need matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_curricula(path, runs, targets, useful, arms, n_seeds, batch_size):
    """Accuracy by completions sampled, a picture for each world."""
    plt = pyplot()
    figure, axes = plt.subplots(
        1, len(WORLDS), figsize=(13, 3.6), sharey=True, layout="constrained"
    )
    for axis, world in zip(axes, WORLDS):
        for arm in [name for name in STYLES if name in arms]:
            arm_runs = [runs[world, arm, seed] for seed in range(n_seeds)]
            draw_curve(axis, arm_runs, arm, batch_size)
        axis.axhline(targets[world], color="black", linewidth=0.5)
        axis.set(title=f"{world}: {useful[world]:.0%} useful", xlabel="completions sampled")
    axes[0].set(ylabel="greedy accuracy on held-out questions", ylim=(0, 1))
    handles, labels = axes[0].get_legend_handles_labels()
    title = f"mean of {n_seeds} seeds and its 95% bootstrap interval; "
    title += "thin line: 90% of uniform's last"
    figure.legend(handles, labels, title=title, loc="outside lower center", ncols=len(arms))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curve(axis, arm_runs, arm, batch_size):
    """The mean accuracy of the runs of an arm, with its interval as a band."""
    color, line, _ = STYLES[arm]
    steps, _ = accuracy_curve(arm_runs[0])
    accuracies = torch.tensor([accuracy_curve(rows)[1] for rows in arm_runs]).double()
    means, lows, highs = [], [], []
    for column in accuracies.unbind(1):
        value, low, high = bootstrap(mean, column)
        means.append(value)
        lows.append(low)
        highs.append(high)
    completions = [batch_size * step for step in steps]
    axis.plot(completions, means, line, color=color, label=arm)
    axis.fill_between(completions, lows, highs, color=color, alpha=0.15, linewidth=0)


def draw_speedup(path, speedups, useful, arms, n_seeds):
    """Speed-up over uniform draws, the worlds with fewest useful groups first."""
    plt = pyplot()
    worlds = sorted(WORLDS, key=useful.get)
    compared = [arm for arm in arms if arm != "uniform"]
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for k, arm in enumerate(compared):
        offset = 0.15 * (k - (len(compared) - 1) / 2)  # side by side
        for position, world in enumerate(worlds):
            value, low, high = speedups[world, arm]
            color, _, marker = STYLES[arm]
            axis.errorbar(
                position + offset,
                value,
                yerr=[[value - low], [high - value]],
                capsize=3,
                color=color,
                marker=marker,
                linestyle="none",
                label=arm if position == 0 else None,
            )
    axis.axhline(1, color="black", linewidth=0.8)
    axis.axhline(2.5, color="black", linewidth=0.8, linestyle=":")
    axis.text(-0.4, 2.53, "2.5x: the paper, on other models and data")
    axis.set_xticks(range(len(worlds)), [f"{world}\n{useful[world]:.0%}" for world in worlds])
    axis.set(xlabel="world, and its share of useful groups before training")
    axis.set(ylabel="speed-up over uniform, in steps", ylim=(0.5, 2.75))
    axis.legend(title=f"95% bootstrap interval, {n_seeds} seeds", ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# --- The command line -----------------------------------------------------------------------------


def study(n_seeds, size, arms, folder, figures):
    """Runs, tables and figures."""
    began = time.perf_counter()
    print(describe_machine(), flush=True)
    plan = plan_runs(arms, n_seeds)
    runs, signal_rows = run_all(folder, plan, size)
    targets, results = measure_all(runs, n_seeds)
    speedups = bootstrap_speedups(results, arms)
    useful = {row["world"]: row["useful"] for row in signal_rows if row["GRPO"] == "before"}

    for what in MEASURES:
        print_table(measure_table(what, results, arms, useful))
    print_table(speedup_table(speedups, arms, useful))
    print_table(signal_table(signal_rows))
    print_table(layer_table(signal_rows))
    print_table(schedule_table(runs, results, n_seeds))

    figures.mkdir(exist_ok=True)
    batch_size = size.prompts * COMPLETIONS
    draw_curricula(figures / "curricula.png", runs, targets, useful, arms, n_seeds, batch_size)
    draw_speedup(figures / "speedup.png", speedups, useful, arms, n_seeds)
    minutes = (time.perf_counter() - began) / 60
    print(f"{len(runs)} runs of {batch_size} x {size.steps} completions in {minutes:.0f} minutes")


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m extras.study", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--seeds", type=int, default=10, help="runs of each arm in each world")
    parser.add_argument("--quick", action="store_true", help="in small: the numbers mean nothing")
    parser.add_argument("--reversed", action="store_true", help="a sixth arm: lowest C first")
    args = parser.parse_args(argv)
    arms = ARMS
    if args.reversed:
        arms = (*ARMS[:-1], "reversed", ARMS[-1])
    if args.quick:
        folder = Path("runs", "study-quick")
        study(args.seeds, QUICK, arms, folder, figures=folder)
    else:
        study(args.seeds, FULL, arms, Path("runs", "study"), figures=FIGURES)


if __name__ == "__main__":
    sys.exit(main())
