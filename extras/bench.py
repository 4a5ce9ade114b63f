"""Compare the speed and memory of gainrl.py with those of other programs.

    python -m extras.bench [score|step|memory|all] [--dataset DIR]

Each row of the table measures the same work, done by two programs in turns in one process. It has
the medians, and the median and the range of the ratio over the rounds. If TRL is not installed, its
rows are skipped with a note. On a GPU the models have the shape of Qwen2.5-0.5B, and on a CPU they
are smaller. All weights are random, so nothing is downloaded."""

import argparse
import copy
import ctypes
import functools
import gc
import importlib.metadata
import importlib.util
import math
import os
import platform
import random
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import datasets
import tokenizers
import torch
import torch.nn.functional as F
import transformers

import gainrl
from extras import tiny_world
from extras.common import read_jsonl, run_command

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")

QWEN_05B = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151_936,
}
SMALL_MODEL = {  # 10.7 million parameters; the share of the head is that of QWEN_05B
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 1390,
    "vocab_size": 12_000,
}
STEP_MODEL = {  # for a GRPO step on a CPU
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 352,
    "vocab_size": 66,
}


# --- Measuring ------------------------------------------------------------------------------------


def milliseconds(work, *inputs):
    """The wall time of work(*inputs), including the kernels that it started on the GPU."""
    began = time.perf_counter()
    work(*inputs)
    if CUDA:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)


def reset_peak():
    """Start measuring the peak memory. Returns the bytes held now, or None where the system does
    not measure it: outside Linux, or if this process may not reset its own peak."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return process_bytes("VmRSS")


def read_peak():
    """The most bytes held at once since reset_peak()."""
    return torch.cuda.max_memory_allocated() if CUDA else process_bytes("VmHWM")


def peak_bytes(work, *inputs):
    """The peak memory of work(*inputs) in bytes, above what was held before. None if reset_peak()
    gives None."""
    release_memory()
    before = reset_peak()
    work(*inputs)
    return None if before is None else read_peak() - before


def process_bytes(field):
    """This process's memory according to Linux: field VmRSS is the current one, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {field}")


def compare(what, peer, unit, ours, theirs):
    """A row of the table, from two lists of measurements in `unit`, one per round."""
    ratios = [their_value / our_value for our_value, their_value in zip(ours, theirs)]
    return {
        "what": what,
        "against": peer,
        "unit": unit,
        "rounds": len(ratios),
        "ours": statistics.median(ours),
        "theirs": statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
    }


def random_model(shape):
    """A Qwen2 of this shape with random weights, the same in every call."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**shape, tie_word_embeddings=True)
    with DEVICE:
        return transformers.Qwen2ForCausalLM(config).eval()


# --- Scoring, compared with one prompt at a time --------------------------------------------------


def bench_score(folder=None, n_questions=None, rounds=3):
    """Score questions, and a fifth of them one by one: ms per question.

    folder: its train.jsonl has the questions; None is the tiny world. n_questions: how many of
    them; None is 1,000, or all on a GPU."""
    folder = Path(folder or gainrl.find_folder(gainrl.TINY_WORLD)).resolve()
    if n_questions is None and not CUDA:
        n_questions = 1000
    rows = read_jsonl(folder / "train.jsonl")[:n_questions]
    questions = [row["question"] for row in rows]
    tokenizer = train_chat_tokenizer(questions)
    model = random_model(QWEN_05B if CUDA else SMALL_MODEL)
    prompts = gainrl.encode_prompts(tokenizer, questions)
    fifth = prompts[: len(prompts) // 5]  # enough for the time per question

    # Both must agree. These first calls are slower and not timed.
    error = gainrl.score_prompts(model, prompts).concentration[: len(fifth)]
    error -= score_one_by_one(model, fifth)
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(milliseconds(gainrl.score_prompts, model, prompts) / len(prompts))
        theirs.append(milliseconds(score_one_by_one, model, fifth) / len(fifth))

    length = statistics.mean(prompt.end - prompt.start for prompt in prompts)
    print(
        f"questions of {length:.0f} tokens after a prefix of {prompts[0].start}; "
        f"largest difference in C: {error.abs().max():.0e}"
    )
    what = f"score a question, {len(prompts)} of {folder.name}"
    return [compare(what, "one prompt at a time, lm_head, T x T", "ms", ours, theirs)]


def train_chat_tokenizer(texts):
    """A byte-level tokenizer with a chat template, trained on the texts."""
    core = tokenizers.ByteLevelBPETokenizer()
    special_tokens = [tiny_world.PAD, tiny_world.END, tiny_world.BEGIN]
    core.train_from_iterator(texts, 12_000, special_tokens=special_tokens, show_progress=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core._tokenizer,
        eos_token=tiny_world.END,
        chat_template=tiny_world.CHAT_TEMPLATE,
    )


@torch.no_grad()
def score_one_by_one(model, prompts):
    """C of each Prompt, (N,) on the CPU, computed the obvious way: one prompt at a time through the
    whole model including the head, then the T x T matrix of cosines."""
    concentrations = []
    for ids, start, end in prompts:
        output = model(torch.tensor([ids], device=DEVICE), output_hidden_states=True)
        unit = F.normalize(output.hidden_states[-1][0].float(), dim=-1)
        cosines = unit @ unit.T
        intra = cosines[start:end, start:end].mean()
        inter = cosines[start:end, :start].mean()
        concentrations.append((intra + inter).item())
    return torch.tensor(concentrations)


# --- A GRPO step, compared with TRL ---------------------------------------------------------------
WORDS = [f"w{k}" for k in range(64)]
END, PAD = len(WORDS), len(WORDS) + 1  # the ids of two more tokens
GROUP_SIZE = 8


@dataclass
class Workload:
    """The work of a step: GROUP_SIZE completions of n_prompts prompts."""

    name: str
    n_prompts: int
    prompt_tokens: tuple  # shortest and longest prompt; lengths are drawn uniformly
    max_tokens: int  # length limit of a completion
    mean_tokens: int | None  # of a completion; None: the end token is never drawn
    n_flat: int  # prompts whose completions all have the same reward
    micro_batch: int
    rounds: int


# All completions have the full length and no group is flat, so neither program can save work.
FIXED = Workload("full completions", 8, (60, 60), 48, None, 0, 64, 12)
# Similar to GSM8K: geometric lengths, cut at 512, with mean 145. 4 of 10 groups are flat.
REAL = Workload("drawn lengths, 4 of 10 groups flat", 10, (90, 190), 512, 150, 4, 16, 4)
REAL_GPU = Workload("drawn lengths, 4 of 10 groups flat", 30, (90, 190), 512, 150, 12, 8, 3)


def bench_step():
    """A GRPO step and one of TRL's GRPOTrainer, on copies of one model: ms and GB. On a CPU with
    two threads and with one."""
    if not importlib.util.find_spec("trl"):
        print("skipped, because TRL is not installed: the GRPO step")
        return []
    if CUDA:
        return compare_steps(REAL_GPU, QWEN_05B, "")
    lines = []
    usual_threads = torch.get_num_threads()
    for n_threads, suffix in ((2, ", 2 threads"), (1, ", 1 thread")):
        torch.set_num_threads(n_threads)
        lines += compare_steps(FIXED, STEP_MODEL, suffix)
    torch.set_num_threads(2)
    lines += compare_steps(REAL, STEP_MODEL, ", 2 threads")
    torch.set_num_threads(usual_threads)
    return lines


def compare_steps(workload, shape, suffix):
    """Two rows of the table. TRL trains, and after each of its steps we make one of ours."""
    rng = random.Random(0)
    lengths = [rng.randint(*workload.prompt_tokens) for _ in range(workload.n_prompts)]
    questions = [" ".join(rng.choices(WORDS, k=length)) for length in lengths]
    reward = make_reward(questions[: workload.n_flat])
    tokenizer = word_tokenizer()
    model = random_model(shape)
    model.generation_config.eos_token_id = END
    # The logits of a random model are nearly equal. A bias sets the end token's probability and
    # excludes all tokens that are not words.
    bias = torch.zeros(shape["vocab_size"], device=DEVICE)
    bias[END:] = -math.inf
    if workload.mean_tokens:
        bias[END] = math.log(len(WORDS) / (workload.mean_tokens - 1))
    model.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    warm_up = 1  # steps that are not measured
    our_step = make_our_step(copy.deepcopy(model), tokenizer, questions, reward, workload)
    turns = TakeTurns(our_step, warm_up)
    train_with_trl(model, tokenizer, questions, reward, workload, turns)
    what = f"GRPO step, {workload.n_prompts} x {GROUP_SIZE} {workload.name}{suffix}"
    peer = f"TRL {importlib.metadata.version('trl')}"
    lines = [compare(what, peer, "ms", turns.our_times, turns.their_times)]
    if None not in turns.our_peaks:
        lines.append(compare(what + ", memory", peer, "GB", turns.our_peaks, turns.their_peaks))
    return lines


def word_tokenizer():
    """A tokenizer with a token for each of the 64 words, and END and PAD."""
    vocabulary = {word: k for k, word in enumerate([*WORDS, "end", "pad"])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="pad"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="end", pad_token="pad"
    )


def make_reward(flat_questions):
    """A reward function for TRL: 1 if the completion's first word has an even number, which happens
    half of the time. All completions of the flat questions get 0."""

    def begins_even(completions, prompts, **columns):
        rewards = []
        for text, question in zip(completions, prompts):
            first_word = text.split()[0] if text else "w1"
            is_even = int(first_word[1:]) % 2 == 0
            rewards.append(float(is_even and question not in flat_questions))
        return rewards

    return begins_even


def make_our_step(model, tokenizer, questions, reward, workload):
    """A function that makes one step as gainrl.train does."""
    settings = {
        "prompts_per_step": len(questions),
        "group_size": GROUP_SIZE,
        "micro_batch": workload.micro_batch,
        "max_new_tokens": workload.max_tokens,
    }
    config = gainrl.Config(**{**gainrl.PRESETS["tiny"], **settings})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    generator = torch.Generator(DEVICE).manual_seed(0)
    # The positions of the question matter only for C.
    prompts = [gainrl.Prompt(tokenizer(text)["input_ids"], 20, 55) for text in questions]
    prompt_of_row = [text for text in questions for _ in range(GROUP_SIZE)]

    def step():
        rollout = gainrl.generate(model, tokenizer, prompts, config, GROUP_SIZE, generator)
        rewards = torch.tensor(reward(rollout.texts, prompt_of_row)).view(-1, GROUP_SIZE)
        advantages = gainrl.group_advantages(rewards)
        gainrl.grpo_update(model, None, optimizer, rollout, advantages, config)

    return step


class TakeTurns(transformers.TrainerCallback):
    """Makes one of our steps after each step of TRL's trainer. The lists have one entry per step
    after the warm-up: the time in ms, and the peak memory in GB above what was held before."""

    def __init__(self, our_step, warm_up):
        self.our_step = our_step
        self.warm_up = warm_up
        self.our_times, self.their_times = [], []
        self.our_peaks, self.their_peaks = [], []

    def begin(self):
        release_memory()
        self.held = reset_peak()
        self.began = time.perf_counter()

    def end(self, times, peaks):
        if CUDA:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - self.began))
        peaks.append(None if self.held is None else (read_peak() - self.held) / 1e9)

    def on_step_begin(self, args, state, control, **details):
        self.begin()

    def on_step_end(self, args, state, control, **details):
        self.end(self.their_times, self.their_peaks)
        self.begin()
        self.our_step()
        self.end(self.our_times, self.our_peaks)

    def on_train_end(self, args, state, control, **details):
        for values in (self.our_times, self.their_times, self.our_peaks, self.their_peaks):
            del values[: self.warm_up]


def release_memory():
    """Return freed memory to the system. Otherwise the next peak would not count its reuse."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
    elif platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def train_with_trl(model, tokenizer, questions, reward, workload, turns):
    """Train on the questions with TRL's GRPOTrainer, without KL, in bfloat16 where we use it."""
    import trl

    n_rows = len(questions) * GROUP_SIZE
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.GRPOConfig(
            folder,
            max_steps=workload.rounds + turns.warm_up,
            per_device_train_batch_size=workload.micro_batch,
            gradient_accumulation_steps=n_rows // workload.micro_batch,
            num_generations=GROUP_SIZE,
            max_completion_length=workload.max_tokens,
            learning_rate=1e-5,
            beta=0.0,
            loss_type="grpo",
            activation_checkpointing=False,
            bf16=CUDA and torch.cuda.is_bf16_supported(including_emulation=False),
            use_cpu=not CUDA,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = trl.GRPOTrainer(
            model,
            reward,
            settings,
            datasets.Dataset.from_dict({"prompt": questions}),
            processing_class=tokenizer,
            callbacks=[turns],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


# --- C without a T x T matrix, and log-probabilities without all logits ---------------------------
LENGTHS = (128, 512, 2048, 8192)


def bench_memory(rounds=5, lengths=LENGTHS):
    """angle_concentration and the T x T matrix, ms; peak memory of the log-probabilities, GB."""
    return [compare_concentration(length, rounds) for length in lengths] + compare_logits()


def compare_concentration(length, rounds):
    """The table row for C of a prompt of `length` tokens, whose second half is the question."""
    hidden = torch.randn(1, length, QWEN_05B["hidden_size"], device=DEVICE)
    question_mask = (torch.arange(length, device=DEVICE) >= length // 2)[None]
    inputs = (hidden, ~question_mask, question_mask)
    gainrl.angle_concentration(*inputs)  # the first call is slower
    concentration_by_matrix(*inputs)

    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(milliseconds(gainrl.angle_concentration, *inputs))
        theirs.append(milliseconds(concentration_by_matrix, *inputs))
    return compare(f"angle_concentration, T = {length}", "T x T matrix", "ms", ours, theirs)


def concentration_by_matrix(hidden, prefix_mask, question_mask):
    """C_intra and C_inter from the T x T matrix of cosines, each (B,)."""
    unit = F.normalize(hidden.float(), dim=-1)
    cosines = unit @ unit.transpose(1, 2)
    in_question, in_prefix = question_mask.float(), prefix_mask.float()
    n_question, n_prefix = in_question.sum(1), in_prefix.sum(1)
    intra = torch.einsum("bij,bi,bj->b", cosines, in_question, in_question) / n_question**2
    inter = torch.einsum("bij,bi,bj->b", cosines, in_question, in_prefix) / (n_question * n_prefix)
    return intra, inter


def compare_logits():
    """The table row for the peak memory of the log-probabilities and their backward pass, above the
    weights and gradients, compared with the size of the float32 logits. The model is one layer of
    Qwen2.5-0.5B, with eight completions of each of two prompts."""
    samples, n_completions = 8, 16
    prompt_tokens, completion_tokens = 128, 512
    vocabulary = QWEN_05B["vocab_size"]
    model = random_model({**QWEN_05B, "num_hidden_layers": 1})
    ids = torch.randint(
        vocabulary, (n_completions, prompt_tokens + completion_tokens), device=DEVICE
    )
    prompts = ids[::samples, :prompt_tokens]
    ids[:, :prompt_tokens] = prompts.repeat_interleave(samples, dim=0)
    attention_mask = torch.ones_like(ids, dtype=torch.bool)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def work():
        logprobs = gainrl.completion_logprobs(
            model,
            ids,
            attention_mask,
            completion_tokens,
            1.0,
            torch.arange(n_completions, device=DEVICE) // samples,
        )
        logprobs.sum().backward()

    peak = peak_bytes(work)
    if peak is None:
        print("skipped, because this system does not measure it: the memory of log-probabilities")
        return []
    logits = n_completions * completion_tokens * vocabulary * 4
    what = f"log-probabilities, {n_completions} x {completion_tokens} tokens, "
    what += f"vocabulary {vocabulary:,}, memory"
    return [compare(what, "float32 logits alone", "GB", [peak / 1e9], [logits / 1e9])]


# --- The command line -----------------------------------------------------------------------------


def three_digits(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def print_line(line):
    ratio = f"{line['ratio']:.2f}"
    if line["rounds"] > 1:
        ratio += f" ({line['low']:.2f} to {line['high']:.2f})"
    ours = f"{three_digits(line['ours'])} {line['unit']}"
    theirs = f"{three_digits(line['theirs'])} {line['unit']}"
    print(f"| {line['what']} | {line['against']} | {ours} | {theirs} | {ratio} |", flush=True)


def describe_machine():
    machine = torch.cuda.get_device_name() if CUDA else f"CPU, {os.cpu_count()} cores"
    return f"{machine}; torch {torch.__version__}, transformers {transformers.__version__}"


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m extras.bench", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    choices = ("score", "step", "memory", "all")
    parser.add_argument("what", nargs="?", default="all", choices=choices)
    parser.add_argument(
        "--dataset", help="folder whose train.jsonl is scored (default: the tiny world)"
    )
    args = parser.parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # TRL uses old names of transformers
    print(describe_machine(), flush=True)
    print("| what | against | ours | theirs | ratio (range) |")
    print("|---|---|---|---|---|", flush=True)

    benches = {
        "score": functools.partial(bench_score, args.dataset),
        "step": bench_step,
        "memory": bench_memory,
    }
    for name, bench in benches.items():
        if args.what in (name, "all"):
            for line in bench():
                print_line(line)


if __name__ == "__main__":
    run_command(main, "extras.bench")
