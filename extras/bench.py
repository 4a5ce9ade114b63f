"""Compare the speed and memory of gainrl.py with those of other programs, and check it on a GPU.

    python -m extras.bench [score|step|memory|all] [--dataset DIR]
    python -m extras.bench gpu            14 checks; without a GPU, only those that need none

Each row of the table measures the same work, done by two programs in turns in one process. It has
the medians, and the median and the range of the ratio over the rounds. If TRL is not installed, its
rows are skipped with a note. On a GPU the models have the shape of Qwen2.5-0.5B, and on a CPU they
are smaller. All weights are random, so nothing is downloaded."""

import argparse
import contextlib
import copy
import ctypes
import functools
import gc
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import datasets
import tokenizers
import torch
import torch.nn.functional as F
import transformers

import gainrl
from extras import cuda_graph, tiny_world

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


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


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
    mean_tokens: (
        int | None
    )  # the end token has probability 1 / mean_tokens; None: it is never drawn
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


# --- Checks for a GPU -----------------------------------------------------------------------------
COPY_BYTES = 2 << 30
CHECK_TOKENS = 512 if CUDA else 24  # length of a completion


class Bench:
    """A random model with the shape of Qwen2.5-0.5B (on a CPU a small one) and 32 prompts with
    lengths as in GSM8K."""

    def __init__(self):
        self.shape = QWEN_05B if CUDA else STEP_MODEL
        self.model = random_model(self.shape)
        self.model.generation_config.eos_token_id = END
        self.tokenizer = word_tokenizer()
        rng = random.Random(0)
        lengths = [212] + [min(212, max(90, round(rng.gauss(137, 22)))) for _ in range(31)]
        prefix = rng.choices(range(END), k=76)
        self.prompts = []
        for length in lengths:
            ids = prefix + rng.choices(range(END), k=length - 76)
            self.prompts.append(gainrl.Prompt(ids, 76, length - 5))

    def config(self, **settings):
        return gainrl.Config(**{"preset": "gsm8k", "max_new_tokens": CHECK_TOKENS, **settings})

    def generate(self, group_size=1, seed=None, prompts=None, **settings):
        """A Rollout and the generator's state after it. Without a seed, greedy and None."""
        generator = None if seed is None else torch.Generator(DEVICE).manual_seed(seed)
        rollout = gainrl.generate(
            self.model,
            self.tokenizer,
            prompts or self.prompts,
            self.config(**settings),
            group_size,
            generator,
        )
        return rollout, None if seed is None else generator.get_state()

    def random_rows(self, n_rows, prompt_tokens, completion_tokens):
        """ids and attention_mask of random rows, padded on the left by 0, 3, 6 ... tokens."""
        n_tokens = prompt_tokens + completion_tokens
        generator = torch.Generator(DEVICE).manual_seed(1)
        ids = torch.randint(END, (n_rows, n_tokens), device=DEVICE, generator=generator)
        padding = 3 * torch.arange(n_rows, device=DEVICE)[:, None]
        return ids, torch.arange(n_tokens, device=DEVICE) >= padding

    def logprobs(self, ids, attention_mask, length, temperature=1.0):
        """gainrl.completion_logprobs of rows that share no prompt."""
        prompt_index = torch.arange(len(ids), device=DEVICE)
        inputs = (ids, attention_mask, length, temperature, prompt_index)
        return gainrl.completion_logprobs(self.model, *inputs)

    def gradient(self, logprobs):
        """The gradient of a weighted sum of log-probabilities as one vector. All weights differ, so
        that swapped tokens are noticed."""
        weights = torch.linspace(-1, 1, logprobs.numel(), device=DEVICE).view_as(logprobs)
        gradients = torch.autograd.grad((logprobs * weights).sum(), list(self.model.parameters()))
        return torch.cat([gradient.flatten() for gradient in gradients])


def in_float32():
    """A context without bfloat16."""
    return patch.object(gainrl, "mixed_precision", lambda device: contextlib.nullcontext())


def static_cache():
    """A context in which generate uses cuda_graph.decode on a CPU too."""
    return patch.object(gainrl, "decode", cuda_graph.decode)


def growing_cache():
    """A context in which generate uses gainrl.decode on a GPU too."""
    return patch.object(cuda_graph, "supports", lambda model, cache: False)


def without_graph():
    """A context in which cuda_graph.decode launches every step instead of replaying a graph."""
    return patch.object(cuda_graph, "capture", lambda step, *others: step)


def check_versions(bench):
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return True, f"compute capability {capability}, {memory:.1f} GiB, bfloat16 in hardware: {bf16}"


def check_gradient_lengths(bench):
    """cuDNN's attention gives NaN gradients at some lengths (pytorch issue 196678)."""
    found = {True: [], False: []}
    for completion_tokens in (492, 364, 300, 121):  # 704 and 576 tokens fail, two others do not
        ids, attention_mask = bench.random_rows(4, 212, completion_tokens)
        for cudnn in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            logprobs = bench.logprobs(ids, attention_mask, completion_tokens)
            if not bench.gradient(logprobs).isfinite().all():
                found[cudnn].append(ids.shape[1])
    text = f"lengths with NaN: {found[False] or 'none'}; with cuDNN's attention: {found[True]}"
    return not found[False], text


def check_padding(bench):
    """Log-probabilities of a padded batch, and of each of its rows alone."""
    ids, attention_mask = bench.random_rows(4, 40, 24)
    differences = []
    for context in (in_float32(), contextlib.nullcontext()):
        with context, torch.no_grad():
            padded = bench.logprobs(ids, attention_mask, 24)
            for row in range(len(ids)):
                own_ids = ids[row, attention_mask[row]][None]
                alone = bench.logprobs(own_ids, torch.ones_like(own_ids), 24)
                differences.append((padded[row] - alone[0]).abs().max().item())
    exact, mixed = max(differences[:4]), max(differences[4:])
    text = f"largest difference {exact:.0e} in float32, {mixed:.0e} in mixed precision"
    return exact < 1e-3 and mixed < 0.1, text


def check_logprobs(bench):
    """completion_logprobs, and one float32 pass of the whole model without a cache."""
    ids, attention_mask = bench.random_rows(4, 40, 24)
    attention_mask[:] = True
    ours = bench.logprobs(ids, attention_mask, 24, temperature=0.8)
    table = (bench.model(input_ids=ids).logits.float() / 0.8).log_softmax(-1)
    plain = table[:, 39:-1].gather(2, ids[:, 40:, None]).squeeze(2)
    difference = (ours - plain).abs().mean().item()
    cosine = F.cosine_similarity(bench.gradient(ours), bench.gradient(plain), dim=0).item()
    text = f"mean difference {difference:.0e}, cosine of the gradients {cosine:.5f}"
    return difference < 0.02 and cosine > 0.99, text


def same_rollouts(bench, context, **inputs):
    """Whether the ids, the masks and the generator are the same with a static cache in a context
    and outside of it."""
    with static_cache():
        ours, our_state = bench.generate(**inputs)
        with context:
            other, other_state = bench.generate(**inputs)
    same = torch.equal(ours.ids, other.ids)
    same = same and torch.equal(ours.attention_mask, other.attention_mask)
    return same and (our_state is None or torch.equal(our_state, other_state))


def check_graph(bench):
    """Replayed steps, and the same steps launched one by one."""
    texts, all_same = [], True
    for name, inputs in (("greedy", {}), ("8 samples", {"group_size": 8, "seed": 5})):
        for max_new_tokens in (CHECK_TOKENS // 8, CHECK_TOKENS // 3):
            inputs["max_new_tokens"] = max_new_tokens
            same = same_rollouts(bench, without_graph(), **inputs)
            all_same = all_same and same
            texts.append(f"{name} x {max_new_tokens} {'equal' if same else 'DIFFERENT'}")
    again = same_rollouts(bench, contextlib.nullcontext(), group_size=2, seed=6, max_new_tokens=20)
    texts.append(f"two calls {'equal' if again else 'DIFFERENT'}")
    return all_same and again, ", ".join(texts)


def check_growing(bench):
    """A static and a growing cache, in float32. Their kernels differ, and so do the last digits."""
    inputs = {"group_size": 4, "seed": 7, "max_new_tokens": CHECK_TOKENS // 8}
    with in_float32():
        with static_cache():
            ours, _ = bench.generate(**inputs)
        with growing_cache():
            other, _ = bench.generate(**inputs)
    same = [ours == other for ours, other in zip(ours.texts, other.texts)]
    return sum(same) > 0.9 * len(same), f"{sum(same)} of {len(same)} completions equal"


def check_new_weights(bench):
    """generate uses the new weights after an optimizer step."""
    before, _ = bench.generate(seed=8, group_size=2, max_new_tokens=20)
    kept = bench.model.model.embed_tokens.weight.detach().clone()
    optimizer = torch.optim.SGD(bench.model.parameters(), lr=1.0)
    for parameter in bench.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    bench.model.model.embed_tokens.weight.grad = torch.randn_like(kept)
    optimizer.step()
    changed, _ = bench.generate(seed=8, group_size=2, max_new_tokens=20)
    with torch.no_grad():
        bench.model.model.embed_tokens.weight.copy_(kept)
    after, _ = bench.generate(seed=8, group_size=2, max_new_tokens=20)
    optimizer.zero_grad()
    passed = changed.texts != before.texts and after.texts == before.texts
    return passed, "new completions with new weights, the old ones with the old weights"


def check_memory_back(bench):
    """generate frees all its memory."""
    bench.generate(8, seed=1, max_new_tokens=20)
    release_memory()
    before = torch.cuda.memory_allocated()
    bench.generate(8, seed=1, max_new_tokens=20)
    release_memory()
    left = torch.cuda.memory_allocated() - before
    return left < 2**20, f"{left:,} bytes not freed"


def check_decode_speed(bench):
    """Milliseconds per token, and the share of the memory bandwidth that this uses."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    target.copy_(source)
    copy_ms = statistics.median(milliseconds(target.copy_, source) for _ in range(5))
    bandwidth = 2 * COPY_BYTES / copy_ms  # bytes per ms, read and written
    del source, target

    def ms_per_token(n_tokens):
        """From the difference between a long and a short call, which removes the prompt's time."""
        short = milliseconds(functools.partial(bench.generate, 8, 1, max_new_tokens=8))
        long = milliseconds(functools.partial(bench.generate, 8, 1, max_new_tokens=8 + n_tokens))
        return (long - short) / n_tokens

    n_rows = 8 * len(bench.prompts)
    replayed = ms_per_token(CHECK_TOKENS - 8)
    with without_graph():
        launched = ms_per_token(64)
    with growing_cache():
        grown = ms_per_token(64)
    config = bench.model.config
    head_width = config.hidden_size // config.num_attention_heads
    bytes_per_token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_width
    mean_length = statistics.mean(len(prompt.ids) for prompt in bench.prompts) + CHECK_TOKENS / 2
    n_weights = sum(parameter.numel() for parameter in bench.model.parameters())
    must_move = 2 * n_weights + n_rows * mean_length * bytes_per_token
    text = (
        f"{replayed:.2f} ms per token for {n_rows} rows ({1000 * n_rows / replayed:,.0f} "
        f"tokens/s); without a graph {launched:.2f} ms, with a growing cache {grown:.2f} ms; "
        f"weights and cache have {must_move / 1e9:.2f} GB, read at "
        f"{must_move / replayed / bandwidth:.0%} of the {bandwidth / 1e9:.2f} TB/s of a copy"
    )
    return replayed < launched, text


def run_step(bench, config):
    """One GRPO step with random rewards. Returns the seconds and the peaks in GiB of sampling and
    update, and the update's stats."""
    optimizer = torch.optim.AdamW(bench.model.parameters(), lr=1e-6, weight_decay=0.0)
    for parameter in bench.model.parameters():  # this first step allocates AdamW's moments
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    reference = copy.deepcopy(bench.model) if config.kl_coef else None
    generator = torch.Generator(DEVICE).manual_seed(2)
    rewards = torch.randint(2, (config.prompts_per_step, config.group_size))
    advantages = gainrl.group_advantages(rewards.float())
    seconds, peaks = [], []

    release_memory()
    reset_peak()
    began = time.perf_counter()
    rollout = gainrl.generate(
        bench.model, bench.tokenizer, bench.prompts, config, config.group_size, generator
    )
    torch.cuda.synchronize()
    seconds.append(time.perf_counter() - began)
    peaks.append(read_peak() / 2**30)

    reset_peak()
    began = time.perf_counter()
    stats = gainrl.grpo_update(bench.model, reference, optimizer, rollout, advantages, config)
    torch.cuda.synchronize()
    seconds.append(time.perf_counter() - began)
    peaks.append(read_peak() / 2**30)
    return seconds, peaks, stats


def check_full_step(bench):
    """A step with the defaults: 32 prompts, 8 completions of 512 tokens each, a KL term."""
    seconds, peaks, stats = run_step(bench, bench.config())
    finite = all(math.isfinite(value) for value in stats.values())
    text = (
        f"sampling {seconds[0]:.1f} s, update {seconds[1]:.1f} s; peaks {peaks[0]:.1f} and "
        f"{peaks[1]:.1f} GiB; gradient norm {stats['grad_norm']:.3g}"
    )
    return finite, text


def check_evaluation_memory(bench):
    """The peak memory of 256 greedy completions."""
    release_memory()
    reset_peak()
    bench.generate(prompts=bench.prompts * 8, max_new_tokens=64)
    return True, f"peak {read_peak() / 2**30:.1f} GiB, without AdamW's moments and a reference"


def check_cards(bench):
    """A step in the memory that is free on cards of 24 and 16 GB."""
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    texts, all_fit = [], True
    for gib, settings in ((23, {}), (15, {"micro_batch": 2, "kl_coef": 0.0})):
        release_memory()
        torch.cuda.set_per_process_memory_fraction(gib / total)
        try:
            _, peaks, _ = run_step(bench, bench.config(**settings))
            texts.append(f"{settings or 'defaults'} in {gib} GiB: peak {max(peaks):.1f}")
        except torch.OutOfMemoryError:
            all_fit = False
            texts.append(f"{settings or 'defaults'} in {gib} GiB: OUT OF MEMORY")
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    return all_fit, "; ".join(texts)


def check_resume(bench):
    """A killed and resumed run of the tiny preset draws the questions of a run without a kill."""
    command = [sys.executable, gainrl.__file__, "--device", DEVICE.type]
    start = [*command, "--preset", "tiny", "--steps", "6", "--eval-examples", "32", "--run-dir"]
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        subprocess.run([*start, str(whole)], check=True, capture_output=True)
        process = subprocess.Popen(
            [*start, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        metrics = killed / "metrics.jsonl"
        while process.poll() is None:
            if metrics.exists() and '"step": 2' in metrics.read_text():
                process.kill()
            time.sleep(0.05)
        was_killed = process.returncode == -signal.SIGKILL
        subprocess.run([*command, "--resume", str(killed)], check=True, capture_output=True)
        runs = [read_jsonl(run / "metrics.jsonl") for run in (whole, killed)]
    values = [[row["concentration"] for row in run if "concentration" in row] for run in runs]
    # A GPU may add in another order. Other questions would make a larger difference.
    difference = max(abs(a - b) for a, b in zip(*values))
    same = len(values[0]) == len(values[1]) == 6 and difference < 1e-3
    text = f"killed: {was_killed}, {len(values[1])} steps, largest difference in C {difference:.0e}"
    return was_killed and same, text


def check_out_of_memory(bench):
    """A run that is out of memory ends with status 2 and names the flag to lower."""
    bench.model = None
    release_memory()
    held = torch.cuda.memory_reserved() + (64 << 20)
    torch.cuda.set_per_process_memory_fraction(
        held / torch.cuda.get_device_properties(0).total_memory
    )
    message = io.StringIO()
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.redirect_stderr(message),
            contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())),
        ):
            flags = ["--preset", "tiny", "--prompts-per-step", "1000", "--eval-examples", "8"]
            status = gainrl.main([*flags, "--steps", "1", "--run-dir", str(Path(folder, "run"))])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    last_line = message.getvalue().strip().splitlines()[-1]
    return status == 2 and "--micro-batch" in last_line, f"status {status}: {last_line:.99}"


CHECKS = (  # title, function, and whether it needs a GPU
    ("hardware", check_versions, True),
    ("padding changes no log-probability", check_padding, False),
    ("log-probabilities and gradient equal those of one float32 pass", check_logprobs, False),
    ("static and growing cache give the same completions", check_growing, False),
    ("replayed and launched steps are equal", check_graph, True),
    ("new weights are used", check_new_weights, False),
    ("gradients are finite at lengths where cuDNN's are not", check_gradient_lengths, True),
    ("sampling frees its memory", check_memory_back, True),
    ("speed of sampling", check_decode_speed, True),
    ("memory of an evaluation", check_evaluation_memory, True),
    ("one full step", check_full_step, True),
    ("a step on cards of 24 and 16 GB", check_cards, True),
    ("tiny preset, killed and resumed", check_resume, True),
    ("out of memory", check_out_of_memory, True),
)


def check_gpu():
    """Run the CHECKS and print a line for each. Returns the exit status, 1 if a check failed."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # as load_model does
    bench = Bench()
    status = 0
    for title, function, needs_gpu in CHECKS:
        if needs_gpu and not CUDA:
            print(f"needs a GPU  {title}", flush=True)
            continue
        began = time.perf_counter()
        try:
            passed, text = function(bench)
        except Exception as error:  # noqa: BLE001, the other checks should still run
            passed, text = False, f"{error!r:.300}"
        torch.backends.cuda.enable_cudnn_sdp(False)
        status = status if passed else 1
        seconds = time.perf_counter() - began
        print(f"{'passed' if passed else 'FAILED'}  {title}: {text} [{seconds:.0f} s]", flush=True)
    return status


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
    choices = ("score", "step", "memory", "all", "gpu")
    parser.add_argument("what", nargs="?", default="all", choices=choices)
    parser.add_argument(
        "--dataset", help="folder whose train.jsonl is scored (default: the tiny world)"
    )
    args = parser.parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # TRL uses old names of transformers
    print(describe_machine(), flush=True)
    if args.what == "gpu":
        return check_gpu()
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
    sys.exit(main())
