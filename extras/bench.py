"""How fast gainrl.py is, and what the angle adds: where the numbers of README come from.

    python bench_gainrl.py [score|step|memory|all]    speed and memory, beside the peers
    python bench_gainrl.py curricula                  five arms in five worlds, ten seeds each

In the tables of speed each line is the same work done by two programs in one process, in turns: the
medians, and the median and range of the ratio over the rounds. A peer that is not installed is
named as skipped. The same goes to runs/bench.json. On a GPU the shapes are Qwen2.5-0.5B's."""

import argparse
import copy
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path

import datasets
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

import gainrl

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# Qwen2.5-0.5B; on a CPU 10.7 million parameters, of which the head has as large a share.
LARGE = {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14}
LARGE |= {"num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151_936}
SMALL = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "intermediate_size": 1390, "vocab_size": 12_000}
STEP = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
STEP |= {"num_key_value_heads": 2, "intermediate_size": 352, "vocab_size": 64}


def seconds(work, *inputs):
    """Wall time of work(*inputs), with what it left running on the GPU."""
    began = time.perf_counter()
    work(*inputs)
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak(work, *inputs):
    """Bytes that work(*inputs) holds at most beyond those held before; None where nobody counts."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work(*inputs)
        return torch.cuda.max_memory_allocated() - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    reset.write_text("5")  # Linux: the peak of this process counts from now

    def kilobytes(name):
        return int(status.read_text().split(name)[1].split()[0])

    before = kilobytes("VmRSS:")
    work(*inputs)
    return 1024 * (kilobytes("VmHWM:") - before)


def compare(what, against, ours, theirs, unit="s", scale=1.0):
    """A line of the table from two lists of measurements, a round each."""
    ratios = sorted(b / a for a, b in zip(ours, theirs))
    row = {"what": what, "against": against, "unit": unit, "rounds": len(ratios)}
    row |= {"ours": scale * statistics.median(ours), "theirs": scale * statistics.median(theirs)}
    row |= {"ratio": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]}
    return row


def small_model(shape):
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**shape, tie_word_embeddings=True)
    return transformers.Qwen2ForCausalLM(config).to(DEVICE).eval()


# --- Scoring --------------------------------------------------------------------------------------
def one_by_one(model, prompts):
    """The plain way: each prompt alone through the whole model, and the T x T cosines."""
    found = []
    for ids, start, end in prompts:
        output = model(torch.tensor([ids], device=DEVICE), output_hidden_states=True)
        unit = F.normalize(output.hidden_states[-1][0].float(), dim=-1)
        cosines = unit @ unit.T
        intra, inter = cosines[start:end, start:end], cosines[start:end, :start]
        found.append((intra.mean() + inter.mean()).item())
    return torch.tensor(found)


def chat_tokenizer(texts):
    """A byte-level tokenizer with a chat template, trained on the texts: there is no network."""
    core = tokenizers.ByteLevelBPETokenizer()
    core.train_from_iterator(texts, 12_000, special_tokens=gainrl.SPECIAL, show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core._tokenizer)
    tokenizer.eos_token, tokenizer.chat_template = gainrl.SPECIAL[1], gainrl.CHATML
    return tokenizer


def bench_score(dataset, rounds=3):
    path = Path(dataset, "train.jsonl")
    if path.is_file():
        questions = [json.loads(line)["question"] for line in path.open()]
        questions, source = questions[: None if CUDA else 1000], "GSM8K's"
    else:
        print(f"no {path}: scoring the tiny world's questions instead of GSM8K's")
        rng = random.Random(0)
        questions = [gainrl.tiny_problem(rng)["question"] for _ in range(1000)]
        source = "the tiny world's"
    tokenizer, model = chat_tokenizer(questions), small_model(LARGE if CUDA else SMALL)
    config, prompts = gainrl.Config(preset="gsm8k"), gainrl.encode_prompts(tokenizer, questions)
    # A fifth of the questions is enough to time what takes the same for each.
    part, scoring = prompts[: len(prompts) // 5], (model, tokenizer, questions, config)
    with torch.no_grad():
        off = (gainrl.score_prompts(*scoring).angle[: len(part)] - one_by_one(model, part)).abs()
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(seconds(gainrl.score_prompts, *scoring) / len(prompts))
            theirs.append(seconds(one_by_one, model, part) / len(part))
    length = sum(p.end - p.start for p in prompts) / len(prompts)
    print(
        f"scored: {length:.0f} tokens after a prefix of {prompts[0].start}; off by {off.max():.0e}"
    )
    what = f"score {source} questions, each of {len(prompts)}"
    yield compare(what, "one prompt at a time, lm_head, T x T", ours, theirs, "ms", 1000)


# --- A step of GRPO -------------------------------------------------------------------------------
WORDS = [f"w{k}" for k in range(64)]
P, G, PROMPT, COMPLETION = 8, 8, 60, 48


def toy_reward(completions, **_):
    """Something to learn from: the share of even words."""
    return [
        sum(int(word[1:]) % 2 == 0 for word in text.split()) / COMPLETION for text in completions
    ]


def our_step(model, tokenizer, prompts):
    """A function that makes one step, as train() does."""
    shape = {"prompts_per_step": P, "completions_per_prompt": G, "micro_batch": P * G}
    config = gainrl.Config(preset="tiny", max_new_tokens=COMPLETION, **shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    generator = torch.Generator(DEVICE).manual_seed(0)
    prompts = [gainrl.Prompt(tokenizer(text)["input_ids"], 20, 55) for text in prompts]

    def step():
        done = gainrl.generate(model, tokenizer, prompts, config, G, generator)
        rewards = torch.tensor(toy_reward(done.texts)).view(P, G)
        advantages = gainrl.group_advantages(rewards).flatten().to(DEVICE)
        gainrl.grpo_update(model, None, optimizer, done, advantages, config)
        assert done.mask.sum() == P * G * COMPLETION

    return step


class Turns(transformers.TrainerCallback):
    """After each step of the trainer, one of ours: both timed."""

    def __init__(self, step):
        self.step, self.ours, self.theirs = step, [], []

    def on_step_begin(self, *_, **__):
        self.began = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.theirs.append(time.perf_counter() - self.began)
        self.ours.append(seconds(self.step))


def bench_step(rounds=12):
    if not importlib.util.find_spec("trl"):
        print("skipped: a step of GRPO beside TRL, which is not installed")
        return
    import trl

    words = {word: k for k, word in enumerate([*WORDS, "end", "pad"])}  # ids 64, 65: never sampled
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="pad"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="end", pad_token="pad"
    )
    rng = random.Random(0)
    prompts = [" ".join(rng.choices(WORDS, k=PROMPT)) for _ in range(P)]
    shape = {"per_device_train_batch_size": P * G, "num_generations": G, "beta": 0.0}
    shape |= {"max_completion_length": COMPLETION, "loss_type": "grpo", "max_steps": rounds + 2}
    plain = {"activation_checkpointing": False, "bf16": False, "use_cpu": not CUDA}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    for threads in (None,) if CUDA else (2, 1):
        torch.set_num_threads(threads or torch.get_num_threads())
        model = small_model(STEP)
        model.generation_config.eos_token_id = 64
        turns = Turns(our_step(copy.deepcopy(model), tokenizer, prompts))
        with tempfile.TemporaryDirectory() as folder:
            settings = trl.GRPOConfig(folder, learning_rate=1e-5, **shape, **plain, **quiet)
            data = datasets.Dataset.from_dict({"prompt": prompts})
            parts = {"processing_class": tokenizer, "callbacks": [turns]}
            trainer = trl.GRPOTrainer(model, toy_reward, settings, data, **parts)
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
        what = f"a step of GRPO, {P} x {G} completions"
        what += f", {threads} thread{'s' * (threads > 1)}" if threads else ""
        yield compare(what, f"TRL {trl.__version__}", turns.ours[2:], turns.theirs[2:], "ms", 1000)


# --- Memory ---------------------------------------------------------------------------------------
def pairwise(hidden, prefix_mask, question_mask):
    """C_intra and C_inter from the T x T matrix of cosines."""
    unit = F.normalize(hidden.float(), dim=-1)
    cosines = unit @ unit.transpose(1, 2)
    q, p = question_mask.float(), prefix_mask.float()
    intra = torch.einsum("bij,bi,bj->b", cosines, q, q) / q.sum(1) ** 2
    return intra, torch.einsum("bij,bi,bj->b", cosines, q, p) / (q.sum(1) * p.sum(1))


def bench_memory(rounds=5):
    for length in (128, 512, 2048, 8192):
        hidden = torch.randn(1, length, 896, device=DEVICE)
        question = (torch.arange(length, device=DEVICE) >= length // 2)[None]
        inputs, forms = (hidden, ~question, question), (gainrl.angle_concentration, pairwise)
        for form in forms:
            form(*inputs)
        times = [[seconds(form, *inputs) for form in forms] for _ in range(rounds)]
        what = f"angle_concentration, T = {length}"
        yield compare(what, "T x T matrix", *zip(*times), "ms", 1000)
        if CUDA:  # elsewhere memory that was freed before is taken again, uncounted
            held = [[peak(form, *inputs) for form in forms] for _ in range(rounds)]
            yield compare(what + ", memory", "T x T matrix", *zip(*held), "MB", 1e-6)
    shape = {**LARGE, "num_hidden_layers": 1}
    model, ids = small_model(shape), torch.randint(151_936, (16, 640), device=DEVICE)
    ids[:, :128] = ids[::8, :128].repeat_interleave(8, 0)  # two prompts, eight completions each
    mask = torch.ones_like(ids, dtype=torch.bool)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def logprobs():
        gainrl.completion_logprobs(model, ids, mask, 512, 1.0, 8).sum().backward()

    if held := peak(logprobs):
        row = {"what": "log-probs, 16 x 512 tokens, vocabulary 151,936", "unit": "GB"}
        row |= {"ours": held / 1e9, "against": "its float32 logits alone"}
        theirs = 16 * 512 * 151_936 * 4 / 1e9
        yield row | {"theirs": theirs, "ratio": theirs / row["ours"], "rounds": 1}


# --- Curricula: what does the angle add? ----------------------------------------------------------
WORLDS = {  # of make_tiny_world, from many useful groups to few; in `tied` length is difficulty
    "tied": {"distractors": 0},
    "apart": {},
    "rare": {"effort": 0.5},
    "scarce": {"effort": 0.3},
    "scarcest": {"effort": 0.2},
}
SCHEDULES = {
    "sigma x 0.5": {"sigma": gainrl.SIGMA / 2},
    "sigma x 2": {"sigma": gainrl.SIGMA * 2},
    "step x 0.5": {"curriculum_step": gainrl.STEP / 2},
    "step x 2": {"curriculum_step": gainrl.STEP * 2},
}
SCHEDULED = ("apart", "scarce")  # the mean arrives at the last rank in the first only
MEASURES = {  # with the digits to print
    "steps": ("steps to 90% of uniform's last greedy accuracy", 1),
    "area": ("mean greedy accuracy over the run", 3),
    "final": ("last greedy accuracy", 3),
}
RUN = {"prompts_per_step": 8, "steps": 24, "eval_every": 4, "eval_examples": 128}
QUICK = {"prompts_per_step": 4, "steps": 2, "eval_every": 1, "eval_examples": 16}


def in_silence(work, *inputs, **named):
    torch.set_num_threads(1)
    with open(os.devnull, "w") as void, redirect_stdout(void), redirect_stderr(void):
        return work(*inputs, **named)


def run_once(folder, world, settings):
    """The metrics of a run of the world. One that was stopped goes on."""
    shape = {"preset": "tiny", "model": str(world), "dataset": str(world), "checkpoint_every": 8}
    resume = str(folder) if folder.exists() else None
    config = gainrl.Config(**shape, **settings, run_dir=str(folder), resume=resume)
    in_silence(gainrl.train, config)
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def measure(rows, target):
    """Steps to the target (all of them if it was not reached), mean and last greedy accuracy."""
    steps, curve = zip(*((r["step"], r["eval_accuracy"]) for r in rows if "eval_accuracy" in r))
    reached, last = float(steps[-1]), (steps[0], curve[0])
    for step, accuracy in zip(steps, curve):
        if accuracy >= target:
            share = (target - last[1]) / (accuracy - last[1]) if accuracy > last[1] else 0.0
            reached = last[0] + share * (step - last[0])
            break
        last = step, accuracy
    area = sum((b + a) * (t - s) / 2 for s, t, a, b in zip(steps, steps[1:], curve, curve[1:]))
    return {"steps": reached, "area": area / steps[-1], "final": curve[-1]}


def bootstrap(statistic, *columns, draws=10_000):
    """The statistic of the columns, (seeds,) each, and its 95% interval over seeds drawn anew. It
    takes columns of (draws, seeds) and gives one value for each draw."""
    n = len(columns[0])
    rows = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(0))
    values = statistic(*(column[rows] for column in columns)).double()
    low, high = values.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return statistic(*(column[None] for column in columns)).item(), low, high


def mean(x):
    return x.mean(1)


def speedup(plain, ours):
    return plain.mean(1).clamp(min=1) / ours.mean(1).clamp(min=1)


def partial(x, y, given):
    """Spearman's correlation of x and y with that of both with `given` taken out."""
    r, a, b = (gainrl.spearman(*pair) for pair in ((x, y), (x, given), (y, given)))
    return (r - a * b) / math.sqrt(max((1 - a * a) * (1 - b * b), 1e-12))


def by_draw(statistic):
    """The statistic of single columns, for bootstrap."""
    return lambda *columns: torch.tensor([statistic(*rows) for rows in zip(*columns)])


def told(values, digits=2):
    """A value and its interval, as text."""
    return "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*values, d=digits)


@torch.no_grad()
def prompt_signals(model, tokenizer, problems):
    """What is known of each question: C after each layer, tokens, steps, sampled accuracy and the
    norm of its GRPO gradient, which is 0 for a group whose rewards are equal."""
    config, generator = gainrl.Config(preset="tiny"), torch.Generator().manual_seed(0)
    found = []
    for problem in problems:
        ids, start, end = problem["prompt"]
        states = model(torch.tensor([ids[:end]]), output_hidden_states=True).hidden_states
        before = torch.arange(end)[None] < start
        by_layer = [sum(gainrl.angle_concentration(h, before, ~before)).item() for h in states]
        done = gainrl.generate(model, tokenizer, [problem["prompt"]], config, 8, generator)
        rewards = torch.tensor([[gainrl.reward(t, problem["answer"]) for t in done.texts]])
        advantages, shape = gainrl.group_advantages(rewards)[0], (done.mask.shape[1], 1.0, 8)
        with torch.enable_grad():
            logprobs = gainrl.completion_logprobs(model, done.ids, done.attention_mask, *shape)
            loss, _ = gainrl.grpo_loss(logprobs, logprobs.detach(), advantages, done.mask)
            grads = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.stack([g.norm() for g in grads]).norm().item()
        steps, accuracy = problem["answer"].count("="), rewards.mean().item()
        found.append([end - start, steps, accuracy, norm, *by_layer])
    return torch.tensor(found).T.contiguous()


def signal_rows(world, trained, questions):
    """How C goes with length, and at equal length with difficulty and gradients: in the model that
    GRPO begins with, and in the one that it ends with. The questions are in no evaluation."""
    model, tokenizer = gainrl.load_model(str(world), torch.device("cpu"))
    problems = gainrl.load_problems(tokenizer, str(world), "test", 400)[-questions:]
    rows, first = [], None
    for when in ("before", "after"):
        if when == "after":
            state = torch.load(trained / "checkpoint" / "state.pt", weights_only=True)
            model.load_state_dict(state["model"])
        tokens, steps, accuracy, norm, *layers = prompt_signals(model, tokenizer, problems)
        c, given_length = layers[-1], by_draw(partial)
        row = {"world": world.name, "when": when, "C": c.mean().item()}
        row["change of C"] = "" if first is None else told(bootstrap(mean, c - first), 3)
        row["useful"] = ((accuracy > 0) & (accuracy < 1)).double().mean().item()
        row["accuracy"] = accuracy.mean().item()
        row["length"] = told(bootstrap(by_draw(gainrl.spearman), c, tokens, draws=1000))
        for name, x in (("steps", steps), ("accuracy", accuracy), ("gradient", norm)):
            row[f"{name} given length"] = told(bootstrap(given_length, c, x, tokens, draws=1000))
        cells = (bootstrap(given_length, x, steps, tokens, draws=1000) for x in layers)
        row["by layer"] = list(map(told, cells))
        rows.append(row)
        first = c
    return rows


def difference(ours, theirs, digits):
    """The mean paired difference over seeds, with its interval, as text."""
    return told(bootstrap(mean, ours - theirs), digits)


def table(*rows):
    """Rows of cells, the first the heads, as Markdown."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    print("\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]), end="\n\n", flush=True)


def schedule_lines(found, results, seeds):
    """What the width and the pace of the Gaussian change, and its arrival at the last rank."""
    yield "world", "schedule of angle", "arrives at step", "useful before", "after", *MEASURES
    for world, name in itertools.product(SCHEDULED, ("angle", *SCHEDULES)):
        arrivals, before, after = [], [], []
        for seed in range(seeds):
            rows = [row for row in found[world, name, seed] if "mean" in row]
            there = [row["step"] for row in rows if row["mean"] >= 1999]  # of 2,000 questions
            arrivals += there[:1]
            for row in rows:
                (after if row["step"] in there else before).append(row["useful_groups"])
        when = f"{statistics.mean(arrivals):.1f} ({len(arrivals)}/{seeds})" if arrivals else "never"
        shares = (f"{statistics.mean(part):.2f}" if part else "" for part in (before, after))
        cells = []
        for what, (_, digits) in MEASURES.items():
            ours, plain = results[world, name, what], results[world, "angle", what]
            cells.append(f"{ours.mean():.{digits}f}")
            if name != "angle":
                cells[-1] += f" ({difference(ours, plain, digits)})"
        yield world, name, when, *shares, *cells


STYLES = {  # line and marker tell the arms apart in grey too
    "uniform": ("black", "-", "o"),
    "shuffled": ("tab:gray", ":", "x"),
    "length": ("tab:orange", "--", "s"),
    "angle": ("tab:blue", "-", "^"),
    "angle-unbiased": ("tab:green", "-.", "v"),
}


def draw(folder, found, useful, speedups, reach, seeds, size):
    """figures/curricula.png, accuracy by completions, and figures/speedup.png, by useful groups."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(exist_ok=True)
    figure, axes = plt.subplots(
        1, len(WORLDS), figsize=(13, 3.6), sharey=True, layout="constrained"
    )
    for axis, world in zip(axes, WORLDS):
        for arm, (color, line, _) in STYLES.items():
            runs = [
                [
                    (r["step"], r["eval_accuracy"])
                    for r in found[world, arm, s]
                    if "eval_accuracy" in r
                ]
                for s in range(seeds)
            ]
            steps, curves = [step for step, _ in runs[0]], torch.tensor(runs)[..., 1].double()
            middle, low, high = zip(*(bootstrap(mean, column) for column in curves.T))
            completions = [size * step for step in steps]
            axis.plot(completions, middle, line, color=color, label=arm)
            axis.fill_between(completions, low, high, color=color, alpha=0.15, linewidth=0)
        axis.axhline(reach[world], color="black", linewidth=0.5)
        axis.set(title=f"{world}: {useful[world]:.0%} useful", xlabel="completions sampled")
    axes[0].set(ylabel="greedy accuracy on held-out questions", ylim=(0, 1))
    note = f"mean of {seeds} seeds and its 95% bootstrap interval; thin line: 90% of uniform's last"
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, title=note, loc="outside lower center", ncols=5)
    figure.savefig(folder / "curricula.png", dpi=110)
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    worlds = sorted(WORLDS, key=useful.get)
    for k, arm in enumerate(gainrl.CURRICULA[:-1]):
        color, _, marker = STYLES[arm]
        middle, low, high = torch.tensor([speedups[w, arm] for w in worlds]).T
        at = [position + 0.15 * (k - 1.5) for position in range(len(worlds))]
        bars = {"yerr": torch.stack([middle - low, high - middle]), "capsize": 3}
        axis.errorbar(at, middle, **bars, color=color, marker=marker, linestyle="none", label=arm)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.axhline(2.5, color="black", linewidth=0.8, linestyle=":")
    axis.text(-0.4, 2.53, "2.5x: the paper, on other models and data")
    axis.set_xticks(range(len(worlds)), [f"{w}\n{useful[w]:.0%}" for w in worlds])
    axis.set(xlabel="world, and its share of useful groups before training", ylim=(0.5, 2.75))
    axis.set(ylabel="speed-up over uniform, in steps")
    axis.legend(title=f"95% bootstrap interval, {seeds} seeds", ncols=2)
    figure.savefig(folder / "speedup.png", dpi=110)
    plt.close("all")


def run_all(folder, seeds, shape, questions, **warmup):
    """The metrics of all runs by (world, arm or schedule, seed), and the rows of all signals."""
    jobs = {
        (world, arm, seed): {"curriculum": arm, "seed": seed}
        for world in WORLDS
        for arm in gainrl.CURRICULA
        for seed in range(seeds)
    }
    jobs |= {
        (world, name, seed): {"curriculum": "angle", "seed": seed, **settings}
        for world in SCHEDULED
        for name, settings in SCHEDULES.items()
        for seed in range(seeds)
    }
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        made = [
            pool.submit(in_silence, gainrl.make_tiny_world, folder / world, **how, **warmup)
            for world, how in WORLDS.items()
        ]
        for future in tqdm(made, desc="worlds"):
            future.result()
        found = {}
        for (world, name, seed), settings in jobs.items():
            run = folder / f"{world}-{name}-{seed}".replace(" ", "-")
            future = pool.submit(run_once, run, folder / world, shape | settings)
            found[world, name, seed] = future
        found = {key: future.result() for key, future in tqdm(found.items(), desc="runs")}
        signals = []
        for world in WORLDS:
            work = in_silence, signal_rows, folder / world, folder / f"{world}-uniform-0", questions
            signals.append(pool.submit(*work))
        return found, [row for future in signals for row in future.result()]


def bench_curricula(seeds, quick):
    """Every arm in every world, with each seed: runs, tables and figures."""
    began, folder = time.perf_counter(), Path("runs", "curricula-quick" if quick else "curricula")
    if quick:
        shape, (found, signals) = QUICK, run_all(folder, seeds, QUICK, 24, warmup=50)
    else:
        shape, (found, signals) = RUN, run_all(folder, seeds, RUN, 240)
    useful = {row["world"]: row["useful"] for row in signals if row["when"] == "before"}
    heads = {world: f"{world} ({useful[world]:.2f})" for world in WORLDS}
    results, reach, arms = {}, {}, gainrl.CURRICULA
    for world in WORLDS:
        last = [measure(found[world, "uniform", s], 2.0)["final"] for s in range(seeds)]
        reach[world] = 0.9 * statistics.mean(last)
    for (world, arm, _), rows in found.items():
        for name, value in measure(rows, reach[world]).items():
            results.setdefault((world, arm, name), []).append(value)
    results = {key: torch.tensor(values).double() for key, values in results.items()}
    for name, (what, digits) in MEASURES.items():
        lines = [("world (useful groups)", what, *arms)]
        for world in WORLDS:
            values = [results[world, arm, name] for arm in arms]
            lines.append((heads[world], "mean", *(f"{v.mean():.{digits}f}" for v in values)))
            for base in ("uniform", "length"):
                other = results[world, base, name]
                cells = (difference(v, other, digits) for v in values)
                cells = ("" if arm == base else cell for arm, cell in zip(arms, cells))
                lines.append(("", f"minus {base}", *cells))
        table(*lines)
    speedups, lines = {}, [("world (useful groups)", *(f"speed-up of {a}" for a in arms[:-1]))]
    for world in WORLDS:
        steps = {arm: results[world, arm, "steps"] for arm in arms}
        for arm in arms[:-1]:
            speedups[world, arm] = bootstrap(speedup, steps["uniform"], steps[arm])
        cells = ("{:.2f} [{:.2f}, {:.2f}]".format(*speedups[world, arm]) for arm in arms[:-1])
        lines.append((heads[world], *cells))
    table(*lines)
    keys = [key for key in signals[0] if key not in ("world", "when", "by layer")]
    lines = []
    for row in signals:
        cells = (row[k] if isinstance(row[k], str) else f"{row[k]:.2f}" for k in keys)
        lines.append((row["world"], row["when"], *cells))
    table(("world", "GRPO", *keys), *lines)
    lines = [(row["world"], row["when"], *row["by layer"]) for row in signals]
    depths = [f"after layer {k}" if k else "embeddings" for k in range(len(lines[0]) - 2)]
    table(("C and steps given length", "GRPO", *depths), *lines)
    table(*schedule_lines(found, results, seeds))
    size = 8 * shape["prompts_per_step"]
    draw(folder if quick else Path("figures"), found, useful, speedups, reach, seeds, size)
    minutes = (time.perf_counter() - began) / 60
    print(f"{len(found)} runs of {size} x {shape['steps']} completions in {minutes:.0f} minutes")


def show(row):
    spread = f" ({row['low']:.2f} to {row['high']:.2f})" if "low" in row else ""
    numbers = f"{row['ours']:.3g} {row['unit']} | {row['theirs']:.3g} {row['unit']}"
    print(
        f"| {row['what']} | {row['against']} | {numbers} | {row['ratio']:.2f}{spread} |", flush=True
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    choices = ("score", "step", "memory", "all", "curricula")
    parser.add_argument("what", nargs="?", default="all", choices=choices)
    parser.add_argument(
        "--dataset", default="../shared/gsm8k", help="folder of train.jsonl, for score"
    )
    parser.add_argument("--seeds", type=int, default=10, help="of curricula: runs of each arm")
    parser.add_argument(
        "--quick", action="store_true", help="curricula in small: numbers mean nothing"
    )
    args = parser.parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # between TRL and transformers
    machine = torch.cuda.get_device_name() if CUDA else f"CPU, {os.cpu_count()} cores"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    print(f"{machine}; {versions}", flush=True)
    if args.what == "curricula":
        return bench_curricula(args.seeds, args.quick)
    benches = {"score": lambda: bench_score(args.dataset), "step": bench_step}
    benches["memory"] = bench_memory
    print("| what | against | ours | theirs | ratio (range) |\n|---|---|---|---|---|")
    rows = []
    for name in benches if args.what == "all" else [args.what]:
        for row in benches[name]():
            rows.append(row)
            show(row)
    path = Path("runs", "bench.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
