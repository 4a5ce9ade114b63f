"""Speed and memory of gainrl.py beside its peers: where the table in README comes from.

    python -m extras.bench [score|step|memory|all] [--dataset DIR]

Each line of the table is the same work done by two programs in one process, in turns: the medians,
and the median and range of the ratio over the rounds. A peer that is not installed is named as
skipped. The lines go to runs/bench.json as well. On a GPU the models have the shapes of
Qwen2.5-0.5B; on a CPU they are smaller. All weights are random: nothing is downloaded."""

import argparse
import copy
import functools
import importlib.metadata
import importlib.util
import json
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import datasets
import tokenizers
import torch
import torch.nn.functional as F
import transformers

import gainrl

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
OUTPUT = Path("runs", "bench.json")

QWEN_05B = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151_936,
}
SMALL_MODEL = {  # 10.7 million parameters, of which the head has as large a share as in QWEN_05B
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 1390,
    "vocab_size": 12_000,
}
STEP_MODEL = {  # for a step of GRPO
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 352,
    "vocab_size": 64,
}


# --- Measuring ------------------------------------------------------------------------------------


def milliseconds(work, *inputs):
    """Wall time of work(*inputs), with what it left running on the GPU."""
    began = time.perf_counter()
    work(*inputs)
    if CUDA:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)


def peak_bytes(work, *inputs):
    """Bytes that work(*inputs) holds at most beyond those held before; None where nobody counts:
    off Linux, and where this process may not reset its own peak."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work(*inputs)
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak of this process counts from now
    except OSError:
        return None
    before = process_bytes("VmRSS")
    work(*inputs)
    return process_bytes("VmHWM") - before


def process_bytes(field):
    """A field of Linux's record of this process: VmRSS, memory held now, or VmHWM, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {field}")


def compare(what, peer, unit, ours, theirs):
    """A line of the table, from two lists of measurements in `unit`, one a round."""
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
    """A Qwen2 of this shape with random weights, the same ones in every call."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**shape, tie_word_embeddings=True)
    return transformers.Qwen2ForCausalLM(config).to(DEVICE).eval()


# --- Scoring, beside the plain way ----------------------------------------------------------------


def bench_score(folder=None, n_questions=None, rounds=3):
    """Score questions, beside the plain way on a fifth of them: ms a question.

    folder: its train.jsonl has the questions; None is the tiny world's. n_questions: the first
    ones; None is 1,000 on a CPU, and on a GPU all of a folder."""
    if n_questions is None and not (CUDA and folder):
        n_questions = 1000
    questions, owner = read_questions(folder, n_questions)
    tokenizer = train_chat_tokenizer(questions)
    model = random_model(QWEN_05B if CUDA else SMALL_MODEL)
    prompts = gainrl.encode_prompts(tokenizer, questions)
    fifth = prompts[: len(prompts) // 5]  # the plain way takes the same for each question

    # They must agree; and the first call, which is slower, is not timed.
    error = gainrl.score_prompts(model, prompts).angle[: len(fifth)]
    error -= score_one_by_one(model, fifth)
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(milliseconds(gainrl.score_prompts, model, prompts) / len(prompts))
        theirs.append(milliseconds(score_one_by_one, model, fifth) / len(fifth))

    length = statistics.mean(prompt.end - prompt.start for prompt in prompts)
    print(
        f"scored: {length:.0f} tokens after a prefix of {prompts[0].start}; "
        f"off by {error.abs().max():.0e}"
    )
    what = f"score {owner} questions, each of {len(prompts)}"
    return [compare(what, "one prompt at a time, lm_head, T x T", "ms", ours, theirs)]


def read_questions(folder, n_questions):
    """The first n_questions, and whose they are, in words for the table."""
    if folder is None:
        rng = random.Random(0)
        questions = [gainrl.tiny_problem(rng)["question"] for _ in range(n_questions)]
        return questions, "the tiny world's"
    rows = gainrl.read_jsonl(Path(folder, "train.jsonl"))[:n_questions]
    return [row["question"] for row in rows], Path(folder).resolve().name + "'s"


def train_chat_tokenizer(texts):
    """A byte-level tokenizer with a chat template, trained on the texts: there is no network."""
    core = tokenizers.ByteLevelBPETokenizer()
    special_tokens = [gainrl.PAD, gainrl.END, gainrl.BEGIN]
    core.train_from_iterator(texts, 12_000, special_tokens=special_tokens, show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core._tokenizer, eos_token=gainrl.END
    )
    tokenizer.chat_template = gainrl.CHAT_TEMPLATE
    return tokenizer


@torch.no_grad()
def score_one_by_one(model, prompts):
    """C of each Prompt the plain way: alone through the whole model, head and all, and then the
    T x T matrix of cosines. (N,) on the CPU."""
    angles = []
    for ids, start, end in prompts:
        output = model(torch.tensor([ids], device=DEVICE), output_hidden_states=True)
        unit = F.normalize(output.hidden_states[-1][0].float(), dim=-1)
        cosines = unit @ unit.T
        intra = cosines[start:end, start:end].mean()
        inter = cosines[start:end, :start].mean()
        angles.append((intra + inter).item())
    return torch.tensor(angles)


# --- A step of GRPO, beside TRL -------------------------------------------------------------------
WORDS = [f"w{k}" for k in range(64)]
P, G = 8, 8
PROMPT_TOKENS, COMPLETION_TOKENS = 60, 48


def bench_step(rounds=12):
    """A step of GRPO beside one of TRL's GRPOTrainer, on copies of one model: ms a step. On a CPU
    with two threads and with one."""
    if not importlib.util.find_spec("trl"):
        print("skipped: a step of GRPO beside TRL, which is not installed")
        return []
    if CUDA:
        return [compare_steps("", rounds)]
    lines = []
    usual_threads = torch.get_num_threads()
    for n_threads, suffix in ((2, ", 2 threads"), (1, ", 1 thread")):
        torch.set_num_threads(n_threads)
        lines.append(compare_steps(suffix, rounds))
    torch.set_num_threads(usual_threads)
    return lines


def compare_steps(suffix, rounds):
    """One line of the table. TRL trains, and after each of its steps we make one of ours."""
    rng = random.Random(0)
    questions = [" ".join(rng.choices(WORDS, k=PROMPT_TOKENS)) for _ in range(P)]
    tokenizer = word_tokenizer()
    model = random_model(STEP_MODEL)
    model.generation_config.eos_token_id = 64  # beyond the vocabulary: all completions are full
    warm_up = 2  # steps whose times are dropped
    turns = TakeTurns(make_our_step(copy.deepcopy(model), tokenizer, questions))
    train_with_trl(model, tokenizer, questions, turns, rounds + warm_up)
    what = f"a step of GRPO, {P} x {G} completions{suffix}"
    peer = f"TRL {importlib.metadata.version('trl')}"
    return compare(what, peer, "ms", turns.ours[warm_up:], turns.theirs[warm_up:])


def word_tokenizer():
    """A tokenizer of the 64 words, a token each, and of two more that are never sampled."""
    vocabulary = {word: k for k, word in enumerate([*WORDS, "end", "pad"])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="pad"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="end", pad_token="pad"
    )
    tokenizer.chat_template = gainrl.CHAT_TEMPLATE  # only to be asked how a turn ends
    return tokenizer


def share_of_even_words(completions, **columns):
    """A reward: something to learn from. TRL gives it all columns of the data by keyword."""
    shares = []
    for text in completions:
        even = [word for word in text.split() if int(word[1:]) % 2 == 0]
        shares.append(len(even) / COMPLETION_TOKENS)
    return shares


def make_our_step(model, tokenizer, questions):
    """A function that makes one step, as gainrl.train does."""
    settings = {
        "prompts_per_step": P,
        "completions_per_prompt": G,
        "micro_batch": P * G,
        "max_new_tokens": COMPLETION_TOKENS,
    }
    config = gainrl.Config(**{**gainrl.PRESETS["tiny"], **settings})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    generator = torch.Generator(DEVICE).manual_seed(0)
    # Where the question begins and ends among the tokens matters to nothing but C.
    prompts = [gainrl.Prompt(tokenizer(text)["input_ids"], 20, 55) for text in questions]

    def step():
        rollout = gainrl.generate(model, tokenizer, prompts, config, G, generator)
        rewards = torch.tensor(share_of_even_words(rollout.texts)).view(P, G)
        advantages = gainrl.group_advantages(rewards)
        gainrl.grpo_update(model, None, optimizer, rollout, advantages, config)
        assert rollout.completion_mask.sum() == P * G * COMPLETION_TOKENS

    return step


class TakeTurns(transformers.TrainerCallback):
    """After each step of the trainer, one of ours. `.ours` and `.theirs`: ms a step."""

    def __init__(self, our_step):
        self.our_step = our_step
        self.ours, self.theirs = [], []

    def on_step_begin(self, args, state, control, **details):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **details):
        if CUDA:
            torch.cuda.synchronize()
        self.theirs.append(1000 * (time.perf_counter() - self.began))
        self.ours.append(milliseconds(self.our_step))


def train_with_trl(model, tokenizer, questions, callback, steps):
    """TRL's GRPOTrainer on P questions with G completions each, in float32, without KL."""
    import trl

    with tempfile.TemporaryDirectory() as folder:
        settings = trl.GRPOConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=P * G,
            num_generations=G,
            max_completion_length=COMPLETION_TOKENS,
            learning_rate=1e-5,
            beta=0.0,
            loss_type="grpo",
            activation_checkpointing=False,
            bf16=False,
            use_cpu=not CUDA,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = trl.GRPOTrainer(
            model,
            share_of_even_words,
            settings,
            datasets.Dataset.from_dict({"prompt": questions}),
            processing_class=tokenizer,
            callbacks=[callback],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


# --- The angle without a T x T matrix, and the log-probs without all logits -----------------------
LENGTHS = (128, 512, 2048, 8192)


def bench_memory(rounds=5, lengths=LENGTHS):
    """angle_concentration beside the T x T matrix, ms and on a GPU MB; the log-probs' peak, GB."""
    lines = []
    for length in lengths:
        lines += compare_angles(length, rounds)
    return lines + compare_logits()


def compare_angles(length, rounds):
    """The lines on C of one row of `length` tokens, of which the second half is the question."""
    hidden = torch.randn(1, length, QWEN_05B["hidden_size"], device=DEVICE)
    question_mask = (torch.arange(length, device=DEVICE) >= length // 2)[None]
    inputs = (hidden, ~question_mask, question_mask)
    gainrl.angle_concentration(*inputs)  # the first call is slower
    angle_by_matrix(*inputs)

    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(milliseconds(gainrl.angle_concentration, *inputs))
        theirs.append(milliseconds(angle_by_matrix, *inputs))
    what = f"angle_concentration, T = {length}"
    lines = [compare(what, "T x T matrix", "ms", ours, theirs)]

    if CUDA:  # elsewhere memory that was freed before is taken again, uncounted
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(peak_bytes(gainrl.angle_concentration, *inputs) / 1e6)
            theirs.append(peak_bytes(angle_by_matrix, *inputs) / 1e6)
        lines.append(compare(what + ", memory", "T x T matrix", "MB", ours, theirs))
    return lines


def angle_by_matrix(hidden, prefix_mask, question_mask):
    """C_intra and C_inter, each (B,), from the T x T matrix of cosines."""
    unit = F.normalize(hidden.float(), dim=-1)
    cosines = unit @ unit.transpose(1, 2)
    in_question, in_prefix = question_mask.float(), prefix_mask.float()
    n_question, n_prefix = in_question.sum(1), in_prefix.sum(1)
    intra = torch.einsum("bij,bi,bj->b", cosines, in_question, in_question) / n_question**2
    inter = torch.einsum("bij,bi,bj->b", cosines, in_question, in_prefix) / (n_question * n_prefix)
    return intra, inter


def compare_logits():
    """The line on the peak of log-probs and their gradient above weights and gradients, beside the
    float32 logits alone: one layer of Qwen2.5-0.5B, two prompts, eight completions each."""
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
            model, ids, attention_mask, completion_tokens, temperature=1.0, rows_per_prompt=samples
        )
        logprobs.sum().backward()

    peak = peak_bytes(work)
    if peak is None:
        print("skipped: the memory of the log-probs, which this system does not count")
        return []
    logits = n_completions * completion_tokens * vocabulary * 4
    what = f"log-probs, {n_completions} x {completion_tokens} tokens, vocabulary {vocabulary:,}"
    return [compare(what, "its float32 logits alone", "GB", [peak / 1e9], [logits / 1e9])]


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
        "--dataset", help="folder whose train.jsonl is scored; default: the tiny world's questions"
    )
    args = parser.parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # between TRL and transformers
    machine = describe_machine()
    print(machine, flush=True)
    print("| what | against | ours | theirs | ratio (range) |")
    print("|---|---|---|---|---|", flush=True)

    benches = {
        "score": functools.partial(bench_score, args.dataset),
        "step": bench_step,
        "memory": bench_memory,
    }
    lines = []
    for name, bench in benches.items():
        if args.what in (name, "all"):
            new_lines = bench()
            for line in new_lines:
                print_line(line)
            lines += new_lines

    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps({"machine": machine, "rows": lines}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
