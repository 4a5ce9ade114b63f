"""How much can a choice of questions gain, and how much of that does the angle get?

    python -m extras.study curricula           the tables and figures of STUDY.md, in a minute
    python -m extras.study curricula --rerun   first make the runs that are not stored yet
    python -m extras.study curricula --quick   a small study from scratch, in three minutes

`curricula` reads extras/runs.jsonl.xz, which has a line for each run. With --rerun it trains what
the file lacks: a tiny model in worlds where few groups are useful or length is no guide, on several
base models and with several seeds, and SmolLM2-135M on one-line sums. All runs take ten hours of
one CPU core. A stop loses a few minutes: the same command continues. STUDY.md explains the tables."""

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
from matplotlib.figure import Figure
from tqdm import tqdm

import gainrl
from extras import probe, smollm2
from extras.common import read_jsonl, run_command
from extras.probe import interval, with_interval
from extras.tiny_world import make_tiny_world

# Of the processes that train tiny models, so that CPUs of one maker round alike. Keeping freed
# memory saves a quarter of the time.
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
GROUP_SIZE = 8
SURPLUS = 6  # the oracles sample 6 times as many groups as they train on


def most_useful(rewards):
    """The indices of the most useful sixth (1 / SURPLUS) of the groups: those whose accuracy is
    nearest to one half. Flat groups come last. rewards: (groups, G)."""
    distance = (rewards.double().mean(1) - 0.5).abs()
    return distance.argsort(stable=True)[: len(rewards) // SURPLUS]


def first_useful(rewards):
    """The indices of the first useful groups, a sixth of all. Flat groups come last."""
    is_flat = rewards.amax(1) == rewards.amin(1)
    return is_flat.int().argsort(stable=True)[: len(rewards) // SURPLUS]


# curriculum: of its Config. signal: that of extras/probe.py by which it sorts the questions, highest
# first, instead of the curriculum's own. choose: which of its groups it trains on (None: all). That
# makes an oracle, because a curriculum must choose before the completions are sampled.
Arm = namedtuple("Arm", "curriculum signal choose", defaults=(None, None))
ARMS = {
    "uniform": Arm("uniform"),
    "shuffled": Arm("shuffled"),
    "length": Arm("length"),
    "angle": Arm("angle"),
    "entropy": Arm("angle", signal="entropy"),
    "perplexity": Arm("angle", signal="perplexity, lowest first"),
    "dynamic": Arm("uniform", choose=most_useful),
    "dynamic, any useful": Arm("uniform", choose=first_useful),
}
WORLDS = {  # options of make_tiny_world
    "scarcest": {"effort": 0.2},  # few groups are useful
    "level": {"effort": 0.2, "distractors": 0, "filler": 1},  # all questions are about equally long
    "crossed": {"effort": 0.2, "distractors": 0, "filler": 2},  # the longest need the fewest steps
    "opened": {"effort": 0.2, "opening": "The answer"},  # all completions start with these words
}
REAL = "arithmetic"  # not a tiny world: SmolLM2-135M and extras/arithmetic
# prompts: questions per batch. steps: batches per run. eval_every: batches between evaluations.
Setting = namedtuple("Setting", "world prompts steps eval_every")
# What is run in a setting. bases: base models. seeds: runs of each arm on each base model.
Part = namedtuple("Part", "arms rates bases seeds eval_examples")
TINY_ARMS = ("uniform", "shuffled", "length", "angle", "entropy", "dynamic")
REAL_ARMS = ("uniform", "shuffled", "length", "angle", "perplexity")
TINY = Part(TINY_ARMS, rates=(2e-4, 4e-4), bases=5, seeds=5, eval_examples=128)
PLAN = {
    Setting("scarcest", 8, 36, 4): TINY._replace(arms=(*TINY_ARMS, "dynamic, any useful")),
    Setting("scarcest", 4, 48, 6): TINY,
    Setting("level", 8, 36, 4): TINY,
    Setting("crossed", 8, 36, 4): TINY,
    Setting("opened", 8, 36, 4): TINY,
    Setting(REAL, 4, 30, 6): Part(REAL_ARMS, rates=(1e-5,), bases=1, seeds=6, eval_examples=128),
}
WORLD_SIZE = {"n_train": 2000, "n_test": 1000, "warmup": 450}
QUICK_PART = TINY._replace(rates=(2e-4,), bases=2, seeds=2, eval_examples=8)
QUICK_PLAN = {Setting(world, 4, 4, 1): QUICK_PART for world in ("scarcest", "opened")}
QUICK_SIZE = {"n_train": 300, "n_test": 150, "warmup": 30}

Run = namedtuple("Run", "setting arm rate base seed")


def runs_of(plan):
    """All runs, base model by base model and in it seed by seed. Settings advance together."""
    runs = []
    for setting, (arms, rates, bases, seeds, _) in plan.items():
        product = itertools.product(range(bases), range(seeds), rates, arms)
        ours = [Run(setting, arm, rate, base, seed) for base, seed, rate, arm in product]
        runs += [(number / len(ours), run) for number, run in enumerate(ours)]
    return [run for _, run in sorted(runs, key=lambda pair: pair[0])]


# --- One run --------------------------------------------------------------------------------------
World = namedtuple("World", "model problems scores")


def base_paths(folder, world, base):
    """The folders of a base model and of its questions."""
    if world == REAL:
        return str(smollm2.FOLDER), gainrl.ARITHMETIC
    return (str(folder / f"{world}-{base}"),) * 2


@cache
def load_world(model, dataset):
    """A base model, its training problems and their Scores."""
    model, tokenizer = gainrl.load_model(model, "cpu")
    problems = gainrl.load_problems(tokenizer, dataset, "train", longest=400)
    prompts = [problem["prompt"] for problem in problems]
    return World(model, problems, score_prompts(model, prompts))


@cache
def load_signals(model, dataset):
    """The signals of extras/probe.py for the training problems."""
    model, problems, _ = load_world(model, dataset)
    return probe.measure_signals(model, [problem["prompt"] for problem in problems])


def train_once(paths, setting, arm, rate, seed, eval_examples):
    """One run, as the dictionary that is stored. correct: right test answers at each evaluation. Of
    each update: groups, the right completions in each group that was trained on, as digits; the
    tokens of these groups; the norm of the gradient; mu; C."""
    curriculum, signal_name, choose = ARMS[arm]
    rewards, groups, tokens = [], [], []

    def note_rewards(batch):
        rewards.append(batch)
        return group_advantages(batch)

    def update_chosen_groups(model, reference, optimizer, rollout, advantages, config):
        kept = rewards[-1]
        if choose:
            chosen = choose(kept)
            kept = kept[chosen]
            rollout, advantages = keep_groups(rollout, advantages, chosen)
        groups.append("".join(f"{count:.0f}" for count in kept.sum(1).tolist()))
        tokens.append(rollout.completion_mask.sum().item())
        return grpo_update(model, reference, optimizer, rollout, advantages, config)

    def make_arm_curriculum(config, scores):
        if signal_name:  # changes only the order: the batch's mean C still moves the Gaussian
            scores = scores._replace(concentration=load_signals(*paths)[signal_name])
        return make_curriculum(config, scores)

    def evaluate_at_once(model, tokenizer, problems, config):
        """In one batch, which is faster than in batches of the size of the training batch."""
        larger = dataclasses.replace(config, prompts_per_step=len(problems), run_dir=None)
        return evaluate(model, tokenizer, problems, larger)

    preset = REAL if setting.world == REAL else "tiny"
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            **gainrl.PRESETS[preset],
            "preset": preset,
            "model": paths[0],
            "dataset": paths[1],
            "run_dir": f"{folder}/run",
            "curriculum": curriculum,
            "prompts_per_step": setting.prompts * (SURPLUS if choose else 1),
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
            group_advantages=note_rewards,
            grpo_update=update_chosen_groups,
            make_curriculum=make_arm_curriculum,
            evaluate=evaluate_at_once,
            score_prompts=lambda model, prompts: load_world(*paths).scores,  # computed once
        ):
            gainrl.train(gainrl.Config(**settings))
        rows = read_jsonl(Path(folder, "run/metrics.jsonl"))
    batches = [row for row in rows if "mean" in row]
    accuracies = [row["eval_accuracy"] for row in rows if "eval_accuracy" in row]
    return {
        "correct": [round(accuracy * eval_examples) for accuracy in accuracies],
        "groups": groups,
        "tokens": tokens,
        "grad_norm": [float(f"{row['grad_norm']:.3g}") for row in batches],
        "mean": [round(row["mean"]) for row in batches],
        "concentration": [round(row["concentration"], 3) for row in batches],
    }


# The originals, which train_once replaces in gainrl.
group_advantages, grpo_update = gainrl.group_advantages, gainrl.grpo_update
make_curriculum, evaluate = gainrl.make_curriculum, gainrl.evaluate
score_prompts = gainrl.score_prompts


def keep_groups(rollout, advantages, groups):
    """The groups with these indices: a Rollout without texts, and its advantages."""
    group_size = advantages.shape[1]
    rows = (groups[:, None] * group_size + torch.arange(group_size)).flatten()
    tensors = [rollout.ids[rows], rollout.attention_mask[rows], rollout.completion_mask[rows]]
    return gainrl.Rollout(*tensors, None, rollout.concentration), advantages[groups]


# --- Base models ----------------------------------------------------------------------------------


def measure_base(paths, options):
    """A hash of a base model, Spearman's correlations over its questions, and what extras/probe.py
    says of it: p, u_mean, the bound and the speeds at the start, with intervals."""
    model, dataset = paths
    if dataset == gainrl.ARITHMETIC:
        smollm2.unpack()
    else:
        make_tiny_world(model, **options)
    _, problems, scores = load_world(*paths)
    steps = torch.tensor([float(count_steps(problem["answer"])) for problem in problems])
    pairs = {
        "C and length": (scores.concentration, scores.tokens),
        "C and steps": (scores.concentration, steps),
        "length and steps": (scores.tokens, steps),
    }
    preset = REAL if dataset == gainrl.ARITHMETIC else "tiny"
    settings = {**gainrl.PRESETS[preset], "preset": preset, "model": model, "dataset": dataset}
    signals, rewards = probe.measure(gainrl.Config(**settings), 256)
    u = probe.strengths(rewards)
    starts = {name: probe.estimate(probe.first_speedup, x, u) for name, x in signals.items()}
    return {
        "model": hashlib.sha256(Path(model, "model.safetensors").read_bytes()).hexdigest()[:16],
        "spearman": {name: round(gainrl.spearman(*pair), 3) for name, pair in pairs.items()},
        "p": round((u > 0).double().mean().item(), 3),
        "u_mean": round(u[u > 0].mean().item(), 3),
        "bound": [round(value, 3) for value in probe.estimate(probe.bound, u)],
        "start": {name: [round(value, 3) for value in start] for name, start in starts.items()},
    }


def count_steps(answer):
    """The steps of a gold solution. In GSM8K each step is a line, and the answer is one more. In
    the tiny world each step is a sentence with an equals sign."""
    return answer.count("\n") or answer.count("=")


# --- The stored runs ------------------------------------------------------------------------------


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


def make_bases(store, pool, folder, missing, size):
    """Make the base models of the missing runs, and store their measurements. ValueError if this
    machine makes another model than that of the stored runs."""
    calls = {}
    for world, base in dict.fromkeys((run.setting.world, run.base) for run in missing):
        options = {**WORLDS.get(world, {}), **size, "seed": base}
        calls[world, base] = partial(measure_base, base_paths(folder, world, base), options)
    for key, row in in_parallel(pool, calls, "base models"):
        stored = store.bases.setdefault(key, row)
        store.save()
        if stored["model"] != row["model"]:
            raise ValueError(
                f"base model {key} differs from that of the runs in {store.path}, because CPUs "
                "round differently. To start a study of your own, move that file away"
            )


def make_runs(store, pool, folder, plan, missing):
    """Train the missing runs. Save every 20 runs and at the end."""
    calls = {}
    for run in missing:
        paths = base_paths(folder, run.setting.world, run.base)
        inputs = (run.setting, run.arm, run.rate, run.seed, plan[run.setting].eval_examples)
        calls[run] = partial(train_once, paths, *inputs)
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


# --- Measures of the runs -------------------------------------------------------------------------
# A measure is a tensor (..., bases, seeds). Entry [b, s] belongs to the run with seed s on base
# model b, for every arm of a setting.

# accuracy: greedy, (bases, seeds, evaluations). useful: the share p of useful groups in each batch.
# strength: the mean of u over all groups of the batch, which is u_mean p. Both (bases, seeds,
# updates).
Measures = namedtuple("Measures", "accuracy useful strength")
TARGETS = (0.5, 0.9)  # shares of the accuracy that `uniform` reaches


def measure_all(store, plan):
    """The Measures of each (setting, rate, arm)."""
    measures = {}
    for setting, part in plan.items():
        bases, seeds = complete_runs(store, setting, part)
        for rate, arm in itertools.product(part.rates, part.arms):
            runs = [
                [store.runs[Run(setting, arm, rate, base, seed)] for seed in seeds]
                for base in bases
            ]
            correct = torch.tensor([[run["correct"] for run in row] for row in runs])
            counts = [
                [[[*map(int, batch)] for batch in run["groups"]] for run in row] for row in runs
            ]
            share = torch.tensor(counts).double() / GROUP_SIZE
            u = 2 * (share * (1 - share)).sqrt()
            accuracy = correct.double() / part.eval_examples
            useful = (u > 0).double().mean(-1)
            measures[setting, rate, arm] = Measures(accuracy, useful, u.mean(-1))
    return measures


def complete_runs(store, setting, part):
    """The most base models and seeds that all arms of a setting have at all rates: two ranges."""
    missing = [run for run in runs_of({setting: part}) if run not in store.runs]
    complete = [
        min([run.seed for run in missing if run.base == base], default=part.seeds)
        for base in range(part.bases)
    ]
    sizes = [(n, min(complete[:n])) for n in range(1, part.bases + 1)]
    n_bases, n_seeds = max(sizes, key=math.prod)
    if n_seeds < 2:
        raise ValueError(f"{describe(setting)}: fewer than two seeds; --rerun makes the others")
    return range(n_bases), range(n_seeds)


def arrivals(measures, setting, rate, arm, target):
    """The updates that each run needs to reach the target on its base model, (bases, seeds). All
    updates if it doesn't, and then the second tensor has False. In the tiny worlds, the target is a
    share of the mean last accuracy of `uniform`; with the real model, whose accuracy isn't near 0
    at the start, a share of the rise to it."""
    accuracy = measures[setting, rate, "uniform"].accuracy
    first = accuracy[..., :1].mean(1) if setting.world == REAL else 0.0
    targets = first + target * (accuracy[..., -1:].mean(1) - first)
    accuracy = measures[setting, rate, arm].accuracy
    steps, reached = torch.zeros(2, *accuracy.shape[:2], dtype=torch.float64)
    for base, seed in itertools.product(*map(range, steps.shape)):
        points = list(range(0, setting.steps + 1, setting.eval_every))
        arrival = steps_to(targets[base].item(), points, accuracy[base, seed].tolist())
        steps[base, seed] = setting.steps if arrival is None else arrival
        reached[base, seed] = arrival is not None
    return steps, reached.bool()


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


# --- The rule: equal sums of u_mean sqrt(p) -------------------------------------------------------
# Two arms should be equally far when their sums of a rate of progress over the updates are equal.
# p and u_mean p are averaged over the seeds of a base model and WINDOW batches before the rate is
# computed, because the root of a noisy share is too small on average.
WINDOW = 4


def progress_by_rule(useful, strength):
    return (strength / useful.sqrt()).nan_to_num()


def progress_by_power(power):
    return lambda useful, strength: useful.pow(power)


def cumulative(rule, useful, strength):
    """The sums of the rate after 0, 1, ... updates: (..., bases, seeds, updates) to (..., bases,
    updates + 1)."""
    means = [x.mean(-2).unflatten(-1, (-1, WINDOW)).mean(-1) for x in (useful, strength)]
    rate = rule(*means).repeat_interleave(WINDOW, -1)
    return torch.nn.functional.pad(rate.cumsum(-1), (1, 0))


def predicted_logs(rule, slow_steps, slow_useful, slow_strength, fast_useful, fast_strength):
    """The logarithm of each base model's predicted speed-up of the fast arm over the slow one:
    (..., bases). It uses the slow arm's steps, and of both arms only the groups. An arm that is
    never far enough counts all its updates."""
    steps = slow_steps.mean(-1, keepdim=True)
    slow = cumulative(rule, slow_useful, slow_strength)
    fast = cumulative(rule, fast_useful, fast_strength)
    last = slow.shape[-1] - 1
    before = steps.floor().clamp(max=last - 1).long()
    rise = slow.gather(-1, before + 1) - slow.gather(-1, before)
    goal = slow.gather(-1, before) + (steps - before) * rise
    after = torch.searchsorted(fast.contiguous(), goal).clamp(1, last)
    rise = fast.gather(-1, after) - fast.gather(-1, after - 1)
    missing = goal - fast.gather(-1, after - 1)
    fast_steps = (after - 1 + (missing / rise).nan_to_num()).clamp(1, last)
    return (steps.clamp(min=1).log() - fast_steps.log()).squeeze(-1)


def log_error(rule, slow_steps, fast_steps, *groups):
    """The logarithm of measured / predicted speed-up, averaged over base models."""
    measured = log_speedups(slow_steps, fast_steps)
    return (measured - predicted_logs(rule, slow_steps, *groups)).mean(-1)


# --- Cells: one arm against another, at one rate, to one target -----------------------------------
# steps: of the slow and of the fast arm. groups: useful and strength of the slow arm, then of the
# fast one. sign: "" or, if more than a fifth of the runs of an arm never arrive, "<" (the fast arm),
# ">" (the slow one) or "?" (both): the speed-up is then only a bound.
Cell = namedtuple("Cell", "steps groups sign")


def cell(measures, setting, rate, arm, target, other="uniform"):
    """None if an arm was not run there."""
    if (setting, rate, arm) not in measures:
        return None
    ours, theirs = measures[setting, rate, arm], measures[setting, rate, other]
    steps, reached = zip(*[arrivals(measures, setting, rate, x, target) for x in (other, arm)])
    slow_fails, fast_fails = [arrived.double().mean() < 0.8 for arrived in reached]
    sign = "?" if slow_fails and fast_fails else ">" if slow_fails else "<" if fast_fails else ""
    groups = (theirs.useful, theirs.strength, ours.useful, ours.strength)
    return Cell(steps, groups, sign)


def cell_text(cell):
    """The speed-up with its interval, or as a bound."""
    if not cell:
        return ""
    value, low, high = bootstrap(speedup, *cell.steps)
    return with_interval(value, low, high) if not cell.sign else f"{cell.sign} {value:.2f}"


def mean_text(cells):
    """The geometric mean over cells with its interval. A bound if a cell is one."""
    if not all(cells):
        return ""
    n_bases = min(cell.steps[0].shape[0] for cell in cells)
    n_seeds = min(cell.steps[0].shape[1] for cell in cells)
    columns = [cell.steps[k][:n_bases, :n_seeds] for k in (0, 1) for cell in cells]
    value, low, high = bootstrap(mean_speedup, *columns)
    signs = {cell.sign for cell in cells} - {""}
    sign = "".join(signs) if len(signs) < 2 else "?"
    return f"{sign} {value:.2f}" if sign else with_interval(value, low, high)


# --- Tables: lists of rows, of which the first is the header --------------------------------------


def print_table(title, rows):
    """Print a table in Markdown."""
    lines = ["| " + " | ".join(str(entry) for entry in row) + " |" for row in rows]
    rule = "|---" * len(rows[0]) + "|"
    print("\n".join([title, "", lines[0], rule, *lines[1:]]), end="\n\n", flush=True)


def describe(setting):
    return f"{setting.world}, batches of {setting.prompts}"


def speedup_table(measures, plan, target):
    """The speed-ups over `uniform` at equal rates, and means over the tiny worlds."""
    arms = list(dict.fromkeys(arm for part in plan.values() for arm in part.arms))[1:]
    rows = [["setting", "rate", *arms]]
    for setting, part in plan.items():
        for rate in part.rates:
            cells = [cell(measures, setting, rate, arm, target) for arm in arms]
            rows.append([describe(setting), f"{rate:.0e}", *map(cell_text, cells)])
    tiny = {setting: part for setting, part in plan.items() if setting.world != REAL}
    keys = [(setting, rate) for setting, part in tiny.items() for rate in part.rates]
    for other in ("uniform", "shuffled", "angle"):
        texts = [
            mean_text([cell(measures, *key, arm, target, other) for key in keys]) for arm in arms
        ]
        rows.append([f"mean of the tiny worlds, over {other}", "", *texts])
    return rows


def run_table(measures):
    """By arm: which share of the runs arrives at each target, the last accuracy, and p and u_mean
    in each quarter of the runs."""
    heads = ["to 50%", "to 90%", "last accuracy", "p by quarter", "u_mean by quarter"]
    rows = [["setting", "rate", "arm", "runs", *heads]]
    for (setting, rate, arm), (accuracy, *groups) in measures.items():
        reached = [arrivals(measures, setting, rate, arm, target)[1] for target in TARGETS]
        shares = [f"{arrived.double().mean():.0%}" for arrived in reached]
        parts = [x.mean((0, 1)).tensor_split(4) for x in groups]
        p, strength = [torch.stack([part.mean() for part in quarter]) for quarter in parts]
        quarters = [" ".join(f"{x:.2f}" for x in values) for values in (p, strength / p)]
        row = [describe(setting), f"{rate:.0e}", arm, reached[0].numel(), *shares]
        rows.append([*row, f"{accuracy[..., -1].mean():.3f}", *quarters])
    return rows


def usable_cells(measures, target):
    """The cells of the tiny worlds over `uniform` that are no bounds: {(setting, rate, arm)}."""
    keys = [key for key in measures if key[2] != "uniform" and key[0].world != REAL]
    cells = {key: cell(measures, *key, target) for key in keys}
    return {key: found for key, found in cells.items() if not found.sign}


def error_table(measures, target):
    """The mean error of the rule and of its rivals, what chance alone would give (the mean distance
    of the resampled errors from the error itself), and how many intervals leave out 1."""
    cells = usable_cells(measures, target)
    logs = {key: log_speedups(*found.steps).mean(-1).item() for key, found in cells.items()}

    def errors(rule):
        return [log_error(rule, *found.steps, *found.groups).item() for found in cells.values()]

    def mean_error(values):
        return math.expm1(statistics.mean(map(abs, values)))

    power = min((k / 20 for k in range(31)), key=lambda k: mean_error(errors(progress_by_power(k))))
    rules = {
        "u_mean sqrt(p)": progress_by_rule,
        "sqrt(p)": progress_by_power(0.5),
        f"p^k, with the best k, {power:.2f}": progress_by_power(power),
    }
    rows = [["prediction", "mean error", "chance alone", "intervals without 1"]]
    for name, rule in rules.items():
        drawn = [
            resample(partial(log_error, rule), *found.steps, *found.groups, draws=1000)
            for found in cells.values()
        ]
        noise = [(x - error).abs().mean().item() for x, error in zip(drawn, errors(rule))]
        n_off = sum(low > 0 or high < 0 for low, high in map(interval, drawn))
        cells_of_row = [f"{mean_error(errors(rule)):.0%}", f"{mean_error(noise):.0%}"]
        rows.append([name, *cells_of_row, f"{n_off} of {len(cells)}"])
    constant = statistics.median(logs.values())
    error = mean_error([value - constant for value in logs.values()])
    rows.append([f"one constant, the best, {math.exp(constant):.2f}", f"{error:.0%}", "", ""])
    others = {
        key: [x for other, x in logs.items() if other[2] == key[2] and other[0] != key[0]]
        for key in logs
    }
    error = mean_error([logs[key] - statistics.mean(others[key] or [0.0]) for key in logs])
    rows.append(["the arm's mean in the other settings", f"{error:.0%}", "", ""])
    return rows


def oracle_table(measures):
    """Measured over predicted speed-ups of the oracles, by target."""
    rows = [["measured / predicted", "rate", "arm", *[f"{target:.0%}" for target in TARGETS]]]
    for key in measures:
        if key[2].startswith("dynamic"):
            texts = []
            for target in TARGETS:
                found = cell(measures, *key, target)
                error = partial(log_error, progress_by_rule)
                values = bootstrap(error, *found.steps, *found.groups, draws=2000)
                values = [math.exp(value) for value in values]
                texts.append(
                    with_interval(*values) if not found.sign else f"{found.sign} {values[0]:.2f}"
                )
            rows.append([describe(key[0]), f"{key[1]:.0e}", key[2], *texts])
    return rows


def placebo(measures, target):
    """(share, low, high): of the logarithm by which the fast half of one arm's seeds is faster than
    the slow half, on one base model, the share that the rule computes from their groups."""
    measured, predicted = [], []
    for setting, rate, arm in measures:
        if setting.world == REAL or arm.startswith("dynamic"):
            continue
        steps, _ = arrivals(measures, setting, rate, arm, target)
        _, useful, strength = measures[setting, rate, arm]
        half = steps.shape[1] // 2
        for base, order in enumerate(steps.argsort(dim=1)):
            fast, slow = order[:half], order[-half:]
            columns = [x[base : base + 1, k] for k in (slow, fast) for x in (useful, strength)]
            ours = [steps[base : base + 1, k] for k in (slow, fast)]
            measured.append(log_speedups(*ours).item())
            predicted.append(predicted_logs(progress_by_rule, ours[0], *columns).item())
    pairs = torch.tensor([measured, predicted]).double().T[:, None]

    def share(pairs):
        return pairs[..., 1].sum((-1, -2)) / pairs[..., 0].sum((-1, -2))

    return bootstrap(share, pairs, draws=2000)


def start_table(store, measures):
    """What the probe said of each base model before the runs, and what the runs did: the progress
    of an arm in its first WINDOW batches, by the rule, and its speed-up to the first target."""
    names = {"angle": "C", "length": "length, shortest first", "entropy": "entropy"}
    names["perplexity"] = "perplexity, lowest first"
    rows = [["setting", "rate", "base", "bound", "arm", "probe", "first batches", "to 50%"]]
    for setting, rate, arm in measures:
        if arm not in names:
            continue
        found = cell(measures, setting, rate, arm, TARGETS[0])
        for base in range(found.steps[0].shape[0]):
            said = store.bases[setting.world, base]
            groups = [x[base, :, :WINDOW].mean() for x in found.groups]
            first = progress_by_rule(*groups[2:]) / progress_by_rule(*groups[:2])
            steps = [x[base : base + 1] for x in found.steps]
            row = [describe(setting), f"{rate:.0e}", base, with_interval(*said["bound"]), arm]
            row += [with_interval(*said["start"][names[arm]]), f"{first:.2f}"]
            rows.append([*row, f"{speedup(*steps):.2f}"])
    return rows


# --- Figures --------------------------------------------------------------------------------------
STYLES = {  # color, line and marker, so that the arms also differ in black and white
    "uniform": ("black", "-", "o"),
    "shuffled": ("tab:gray", ":", "x"),
    "length": ("tab:orange", "--", "s"),
    "angle": ("tab:blue", "-", "^"),
    "entropy": ("tab:red", "-", "P"),
    "perplexity": ("tab:purple", "-.", "v"),
    "dynamic": ("tab:green", "-.", "D"),
}


def draw_curves(path, plan, measures, n_columns, banded):
    """The greedy accuracy over the updates: a panel for each setting, below it the next rate.
    banded: the arms that get 95% bootstrap intervals."""
    panels = [(setting, rate) for setting, part in plan.items() for rate in part.rates]
    n_rows = len(panels) // n_columns
    size = (3.1 * n_columns + 1.5, 2.9 * n_rows + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False, sharey=True)
    for axis, (setting, rate) in zip(axes.T.flat, panels):
        for arm in [arm for arm in plan[setting].arms if arm in STYLES]:
            accuracy = measures[setting, rate, arm].accuracy
            points = [
                bootstrap(partial(torch.mean, dim=(-1, -2)), point, draws=1000)
                for point in accuracy.unbind(-1)
            ]
            means, lows, highs = zip(*points)
            steps = range(0, setting.steps + 1, setting.eval_every)
            color, line, _ = STYLES[arm]
            axis.plot(steps, means, line, color=color, label=arm)
            if arm in banded:
                axis.fill_between(steps, lows, highs, color=color, alpha=0.12, linewidth=0)
        axis.set_title(f"{describe(setting)}, rate {rate:.0e}", fontsize=9)
        axis.set_xlabel("updates")
    for axis in axes[:, 0]:
        axis.set_ylabel("greedy accuracy")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    title = f"mean over base models and seeds; bands: 95% bootstrap intervals ({', '.join(banded)})"
    place = {"title": title, "title_fontsize": 9, "loc": "outside lower center"}
    figure.legend(handles, labels, ncols=min(6, len(labels)), fontsize=9, **place)
    figure.savefig(path, dpi=110)


def draw_rule(path, measures):
    """The measured speed-ups over those predicted by the rule, for each target."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots(1, len(TARGETS), sharey=True)
    for axis, target in zip(axes, TARGETS):
        axis.plot([0.4, 6], [0.4, 6], color="black", linewidth=0.8)
        for (_, rate, arm), found in usable_cells(measures, target).items():
            if arm not in STYLES:
                continue
            x = predicted_logs(progress_by_rule, found.steps[0], *found.groups).mean().exp()
            y, low, high = bootstrap(speedup, *found.steps, draws=2000)
            color, _, marker = STYLES[arm]
            filled = "full" if rate == TINY.rates[0] else "none"
            axis.plot([x, x], [low, high], color=color, linewidth=0.7)
            axis.plot(x, y, marker, color=color, fillstyle=filled, label=arm, linestyle="none")
        axis.set(title=f"to {target:.0%} of uniform's last accuracy", xscale="log", yscale="log")
        axis.set(xlabel="predicted from the groups", xlim=(0.45, 5), ylim=(0.45, 5))
        ticks = [0.5, 0.7, 1, 1.5, 2, 3]
        axis.set_xticks(ticks, ticks)
        axis.set_yticks(ticks, ticks)
        axis.minorticks_off()
    axes[0].set_ylabel("measured speed-up over uniform")
    handles, labels = axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    title = "speed-up with 95% bootstrap interval, axes logarithmic; hollow: rate 4e-4"
    figure.legend(unique.values(), unique, title=title, loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=110)


# --- The command ----------------------------------------------------------------------------------


def study_curricula(plan, size, path, folder, figures, rerun):
    """Make the runs that the file at `path` lacks, if `rerun`. Then print the tables and draw the
    figures. `folder` is for the worlds."""
    store, runs = Store(path), runs_of(plan)
    if rerun:
        missing = [run for run in runs if run not in store.runs]
        options = {"mp_context": get_context("spawn"), "initializer": ignore_ctrl_c}
        for is_real, environment in ((False, ENVIRONMENT), (True, {})):
            ours = [run for run in missing if (run.setting.world == REAL) == is_real]
            with patch.dict(os.environ, environment), ProcessPoolExecutor(**options) as pool:
                make_bases(store, pool, folder, ours, size)
                make_runs(store, pool, folder, plan, ours)
    n_missing = sum(run not in store.runs for run in runs)
    print(f"{len(store.runs)} runs in {path}, {n_missing} are missing", end="\n\n")
    measures = measure_all(store, plan)
    for target in TARGETS:
        share = f"{target:.0%}"
        print_table(f"Speed-ups to {share}", speedup_table(measures, plan, target))
        print_table(f"The rule and its rivals, to {share}", error_table(measures, target))
        text = with_interval(*placebo(measures, target))
        print(f"Placebo, to {share}: of the logarithm between fast and slow seeds: {text}\n")
    print_table("Oracles", oracle_table(measures))
    print_table("Runs", run_table(measures))
    print_table("At the start", start_table(store, measures))
    figures.mkdir(exist_ok=True)
    tiny = {setting: part for setting, part in plan.items() if setting.world != REAL}
    draw_curves(figures / "curricula.png", tiny, measures, len(tiny), ("uniform", "angle"))
    if real := {setting: part for setting, part in plan.items() if setting.world == REAL}:
        draw_curves(figures / "arithmetic_arms.png", real, measures, 1, REAL_ARMS)
    draw_rule(figures / "rule.png", measures)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m extras.study", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("command", choices=["curricula"], help="the tables and figures of STUDY.md")
    parser.add_argument("--rerun", action="store_true", help="first make the missing runs")
    parser.add_argument("--quick", action="store_true", help="small, from scratch, not evidence")
    args = parser.parse_args(argv)
    try:
        if args.quick:
            folder = Path("runs", "study-quick")
            store = folder / "runs.jsonl.xz"
            study_curricula(QUICK_PLAN, QUICK_SIZE, store, folder, figures=folder, rerun=True)
        else:
            folder = Path("runs", "study")
            study_curricula(PLAN, WORLD_SIZE, STORE, folder, figures=FIGURES, rerun=args.rerun)
    except (ValueError, OSError) as error:
        print(f"extras.study: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_command(main, "extras.study")
