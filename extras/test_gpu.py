"""Tests of what only a GPU can show. Without one, all of them are skipped.

    python -m pytest -s extras/test_gpu.py        -s shows the measured times and memory

The model has random weights and the shape of Qwen2.5-0.5B, so nothing is downloaded."""

import contextlib
import copy
import functools
import math
import random
import signal
import statistics
import subprocess
import sys
import time
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

import gainrl
from extras import bench, cuda_graph
from extras.bench import DEVICE, milliseconds, read_peak, release_memory, reset_peak
from extras.common import read_jsonl

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

TOKENS = 512  # length of a completion
COPY_BYTES = 2 << 30


@pytest.fixture(scope="module")
def model():
    model = bench.random_model(bench.QWEN_05B)
    model.generation_config.eos_token_id = bench.END
    return model


@pytest.fixture(scope="module")
def prompts():
    """32 prompts with lengths as in GSM8K and a shared prefix."""
    rng = random.Random(0)
    lengths = [212] + [min(212, max(90, round(rng.gauss(137, 22)))) for _ in range(31)]
    prefix = rng.choices(range(bench.END), k=76)
    ids = [prefix + rng.choices(range(bench.END), k=length - 76) for length in lengths]
    return [gainrl.Prompt(row, 76, len(row) - 5) for row in ids]


@pytest.fixture
def generate(model, prompts):
    """A function that returns a Rollout and the generator's state after it. Without a seed, it
    decodes greedily and the state is None."""
    tokenizer = bench.word_tokenizer()

    def generate(group_size=1, seed=None, prompts=prompts, **settings):
        generator = None if seed is None else torch.Generator(DEVICE).manual_seed(seed)
        config = make_config(**settings)
        rollout = gainrl.generate(model, tokenizer, prompts, config, group_size, generator)
        return rollout, None if seed is None else generator.get_state()

    return generate


@pytest.fixture(autouse=True)
def start_clean():
    """The attention kernels that load_model selects, and no unused memory."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    release_memory()


@pytest.fixture
def memory_limit():
    """A function that limits this process's memory in bytes until the test ends."""
    total = torch.cuda.get_device_properties(0).total_memory
    yield lambda limit: torch.cuda.set_per_process_memory_fraction(limit / total)
    torch.cuda.set_per_process_memory_fraction(1.0)


def make_config(**settings):
    return gainrl.Config(**{"preset": "gsm8k", "max_new_tokens": TOKENS, **settings})


def random_rows(n_rows, prompt_tokens, completion_tokens):
    """ids and attention_mask of random rows, padded on the left by 0, 3, 6 ... tokens."""
    n_tokens = prompt_tokens + completion_tokens
    generator = torch.Generator(DEVICE).manual_seed(1)
    ids = torch.randint(bench.END, (n_rows, n_tokens), device=DEVICE, generator=generator)
    padding = 3 * torch.arange(n_rows, device=DEVICE)[:, None]
    return ids, torch.arange(n_tokens, device=DEVICE) >= padding


def logprobs_of(model, ids, attention_mask, length, temperature=1.0):
    """gainrl.completion_logprobs of rows that share no prompt."""
    prompt_index = torch.arange(len(ids), device=DEVICE)
    inputs = (ids, attention_mask, length, temperature, prompt_index)
    return gainrl.completion_logprobs(model, *inputs)


def gradient_of(model, logprobs):
    """The gradient of a weighted sum of log-probabilities as one vector. All weights differ, so
    that swapped tokens are noticed."""
    weights = torch.linspace(-1, 1, logprobs.numel(), device=DEVICE).view_as(logprobs)
    gradients = torch.autograd.grad((logprobs * weights).sum(), list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def in_float32():
    """A context without bfloat16."""
    return patch.object(gainrl, "mixed_precision", lambda device: contextlib.nullcontext())


def growing_cache():
    """A context in which gainrl.decode writes the completions."""
    return patch.object(cuda_graph, "supports", lambda model, cache: False)


def without_graph():
    """A context in which cuda_graph.decode launches every step instead of replaying a graph."""
    return patch.object(cuda_graph, "capture", lambda step, *others: step)


def test_hardware():
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    print(f"\n{bench.describe_machine()}; {memory:.1f} GiB, bfloat16 in hardware: {bf16}")
    assert DEVICE.type == "cuda"


# --- Log-probabilities and gradients --------------------------------------------------------------


def test_padding_changes_no_log_probability(model):
    """Log-probabilities of a padded batch, and of each of its rows alone."""
    ids, attention_mask = random_rows(4, 40, 24)
    for context, largest in ((in_float32(), 1e-3), (contextlib.nullcontext(), 0.1)):
        with context, torch.no_grad():
            padded = logprobs_of(model, ids, attention_mask, 24)
            for row in range(len(ids)):
                own_ids = ids[row, attention_mask[row]][None]
                alone = logprobs_of(model, own_ids, torch.ones_like(own_ids), 24)
                assert (padded[row] - alone[0]).abs().max() < largest


def test_log_probabilities_and_gradient_are_those_of_one_float32_pass(model):
    """The oracle is a pass of the whole model without a cache."""
    ids, _ = random_rows(4, 40, 24)
    ours = logprobs_of(model, ids, torch.ones_like(ids), 24, temperature=0.8)
    table = (model(input_ids=ids).logits.float() / 0.8).log_softmax(-1)
    plain = table[:, 39:-1].gather(2, ids[:, 40:, None]).squeeze(2)
    difference = (ours - plain).abs().mean().item()
    gradients = [gradient_of(model, logprobs) for logprobs in (ours, plain)]
    cosine = F.cosine_similarity(*gradients, dim=0).item()
    print(f"\nmean difference {difference:.0e}, cosine of the gradients {cosine:.5f}")
    assert difference < 0.02 and cosine > 0.99


def test_gradients_are_finite_at_lengths_where_those_of_cudnn_are_not(model):
    """cuDNN's attention gives NaN gradients at some lengths (pytorch issue 196678)."""
    not_finite = {True: [], False: []}
    for completion_tokens in (492, 364, 300, 121):  # 704 and 576 tokens fail, two others do not
        ids, attention_mask = random_rows(4, 212, completion_tokens)
        for cudnn in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            logprobs = logprobs_of(model, ids, attention_mask, completion_tokens)
            if not gradient_of(model, logprobs).isfinite().all():
                not_finite[cudnn].append(ids.shape[1])
    print(f"\nlengths with NaN in cuDNN's attention: {not_finite[True]}")
    assert not not_finite[False]


# --- Sampling -------------------------------------------------------------------------------------


def test_static_and_growing_cache_give_the_same_completions(generate):
    """In float32. The kernels differ, and so do the last digits."""
    inputs = {"group_size": 4, "seed": 7, "max_new_tokens": TOKENS // 8}
    with in_float32():
        ours, _ = generate(**inputs)
        with growing_cache():
            other, _ = generate(**inputs)
    same = [ours == other for ours, other in zip(ours.texts, other.texts)]
    print(f"\n{sum(same)} of {len(same)} completions equal")
    assert sum(same) > 0.9 * len(same)


@pytest.mark.parametrize(
    "context, inputs",
    [
        (without_graph, {"max_new_tokens": TOKENS // 8}),
        (without_graph, {"max_new_tokens": TOKENS // 3}),
        (without_graph, {"group_size": 8, "seed": 5, "max_new_tokens": TOKENS // 8}),
        (without_graph, {"group_size": 8, "seed": 5, "max_new_tokens": TOKENS // 3}),
        (contextlib.nullcontext, {"group_size": 2, "seed": 6, "max_new_tokens": 20}),
    ],
)
def test_replayed_and_launched_steps_are_equal(generate, context, inputs):
    """The last case replays graphs in both calls."""
    ours, our_state = generate(**inputs)
    with context():
        other, other_state = generate(**inputs)
    assert torch.equal(ours.ids, other.ids)
    assert torch.equal(ours.attention_mask, other.attention_mask)
    assert our_state is None or torch.equal(our_state, other_state)


def test_sampling_uses_the_new_weights_after_an_optimizer_step(model, generate):
    inputs = {"seed": 8, "group_size": 2, "max_new_tokens": 20}
    before, _ = generate(**inputs)
    weight = model.model.embed_tokens.weight
    kept = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    optimizer.step()
    optimizer.zero_grad()
    changed, _ = generate(**inputs)
    with torch.no_grad():
        weight.copy_(kept)
    after, _ = generate(**inputs)
    assert changed.texts != before.texts and after.texts == before.texts


def test_sampling_frees_its_memory(generate):
    generate(8, seed=1, max_new_tokens=20)
    release_memory()
    before = torch.cuda.memory_allocated()
    generate(8, seed=1, max_new_tokens=20)
    release_memory()
    assert torch.cuda.memory_allocated() - before < 2**20


def test_the_graph_makes_sampling_faster(model, prompts, generate):
    """Prints milliseconds per token, and the share of the memory bandwidth that this uses."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    target.copy_(source)
    copy_ms = statistics.median(milliseconds(target.copy_, source) for _ in range(5))
    bandwidth = 2 * COPY_BYTES / copy_ms  # bytes per ms, read and written
    del source, target

    def ms_per_token(n_tokens):
        """From the difference between a long and a short call, which removes the prompt's time."""
        short = milliseconds(functools.partial(generate, 8, 1, max_new_tokens=8))
        long = milliseconds(functools.partial(generate, 8, 1, max_new_tokens=8 + n_tokens))
        return (long - short) / n_tokens

    replayed = ms_per_token(TOKENS - 8)
    with without_graph():
        launched = ms_per_token(64)
    with growing_cache():
        grown = ms_per_token(64)

    n_rows = 8 * len(prompts)
    config = model.config
    head_width = config.hidden_size // config.num_attention_heads
    bytes_per_token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_width
    mean_length = statistics.mean(len(prompt.ids) for prompt in prompts) + TOKENS / 2
    n_weights = sum(parameter.numel() for parameter in model.parameters())
    must_move = 2 * n_weights + n_rows * mean_length * bytes_per_token
    print(
        f"\n{replayed:.2f} ms per token for {n_rows} rows ({1000 * n_rows / replayed:,.0f} "
        f"tokens/s); without a graph {launched:.2f} ms, with a growing cache {grown:.2f} ms; "
        f"weights and cache have {must_move / 1e9:.2f} GB, read at "
        f"{must_move / replayed / bandwidth:.0%} of the {bandwidth / 1e9:.2f} TB/s of a copy"
    )
    assert replayed < launched


def test_memory_of_an_evaluation(prompts, generate):
    """Prints the peak of 256 greedy completions."""
    reset_peak()
    generate(prompts=prompts * 8, max_new_tokens=64)
    print(f"\npeak {read_peak() / 2**30:.1f} GiB, without AdamW's moments and a reference")


# --- A whole step ---------------------------------------------------------------------------------


def run_step(model, generate, **settings):
    """A GRPO step with random rewards. Returns the update's stats, and times and peaks as text."""
    config = make_config(**settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    for parameter in model.parameters():  # this first step allocates AdamW's moments
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    reference = copy.deepcopy(model) if config.kl_coef else None
    rewards = torch.randint(2, (config.prompts_per_step, config.group_size))
    advantages = gainrl.group_advantages(rewards.float())

    def measure(work, *inputs, **settings):
        """What work() returns, and its time and peak memory as text."""
        release_memory()
        reset_peak()
        began = time.perf_counter()
        result = work(*inputs, **settings)
        torch.cuda.synchronize()
        return result, f"{time.perf_counter() - began:.1f} s and {read_peak() / 2**30:.1f} GiB"

    (rollout, _), sampling = measure(generate, config.group_size, seed=2, **settings)
    inputs = (model, reference, optimizer, rollout, advantages, config)
    stats, update = measure(gainrl.grpo_update, *inputs)
    # If memory runs out, the update halves the micro-batch.
    return stats, f"sampling {sampling}, update {update} with --micro-batch {config.micro_batch}"


def test_a_full_step(model, generate):
    """With the defaults: 32 prompts, 8 completions of 512 tokens each, a KL term."""
    stats, text = run_step(model, generate)
    print(f"\n{text}; gradient norm {stats['grad_norm']:.3g}")
    assert all(math.isfinite(value) for value in stats.values())


@pytest.mark.parametrize("gib, settings", [(23, {}), (15, {"micro_batch": 2, "kl_coef": 0.0})])
def test_a_step_fits_cards_of_24_and_16_gb(model, generate, memory_limit, gib, settings):
    """In the memory that is free on them. The first case must halve its micro-batch to 8."""
    memory_limit(gib * 2**30)
    _, text = run_step(model, generate, **settings)
    print(f"\n{settings or 'defaults'} in {gib} GiB: {text}")


# --- Whole runs -----------------------------------------------------------------------------------


def test_a_killed_and_resumed_run_draws_the_questions_of_a_whole_one(tmp_path):
    command = [sys.executable, gainrl.__file__]
    start = [*command, "--preset", "tiny", "--device", DEVICE.type, "--steps", "6"]
    start += ["--eval-examples", "32", "--checkpoint-every", "1", "--run-dir"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*start, str(whole)], check=True, capture_output=True)
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen([*start, str(killed)], stdout=output, stderr=output)
    metrics = killed / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and '"step": 2' in metrics.read_text():
            process.kill()
        time.sleep(0.05)
    assert process.returncode == -signal.SIGKILL
    subprocess.run([*command, "--resume", str(killed)], check=True, capture_output=True)
    runs = [read_jsonl(run / "metrics.jsonl") for run in (whole, killed)]
    values = [[row["concentration"] for row in run if "concentration" in row] for run in runs]
    # A GPU may add in another order. Other questions would make a larger difference.
    assert len(values[0]) == 6 and values[1] == pytest.approx(values[0], abs=1e-3)


def test_out_of_memory_ends_with_status_2_and_names_the_flag_to_lower(
    generate, memory_limit, tmp_path, capsys
):
    generate(max_new_tokens=2)  # CUDA's libraries take their own memory now
    release_memory()
    memory_limit(torch.cuda.memory_reserved() + (64 << 20))
    flags = ["--preset", "tiny", "--prompts-per-step", "1000", "--eval-examples", "8"]
    assert gainrl.main([*flags, "--steps", "1", "--run-dir", str(tmp_path / "run")]) == 2
    assert "--prompts-per-step" in capsys.readouterr().err.strip().splitlines()[-1]
