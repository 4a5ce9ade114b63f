"""What the files of extras/ promise.

    python -m pytest -q extras/test_extras.py

The tests of train_trl.py need TRL (pip install trl==1.16.0) and are skipped without it."""

import importlib.util
import itertools
import json
import math
import os
import random
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch

import gainrl
from extras import bench, plot, study
from test_gainrl import bpe_tokenizer, random_model, read_rows

torch.set_num_threads(1)  # on busy cores, threads that wait spin
ROOT = Path(gainrl.__file__).resolve().parent
ROWS = [gainrl.tiny_problem(random.Random(k), distractors=k % 3) for k in range(40)]


@pytest.fixture(scope="session")
def tokenizer():
    return bpe_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer):
    return random_model(len(tokenizer))


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
        values = {"accuracy": 0.5, "mean": 3.0 * step, "useful_groups": 1 / step}
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
def test_what_is_no_run_is_refused_in_one_line(tmp_path, capsys, content):
    good, bad, out = write_run(tmp_path / "good", 2, 1), tmp_path / "bad", tmp_path / "curves.png"
    bad.mkdir()
    if content is not None:
        (bad / "metrics.jsonl").write_text(content)
    assert plot.main([good, str(bad), "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(bad) in line
    assert not out.exists()


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
    """In a process of its own: run train_trl.py as it is, on what makes it small (a random model, 40
    questions, SMALL, a reward that noise earns), and log each rank's draws, rows and updates. It
    also evaluates, rank 1 scores unlike rank 0, and the draw of number DIES_AT is the last."""
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

        def update(self, accuracy, angle):
            note("update", super().update(accuracy, angle), accuracy, angle)

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
        return scores._replace(angle=scores.angle.flip(0)) if rank else scores

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
    """Starts train_trl.py in a folder of that name."""
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
    """Four batches: on all ranks the same draws and the same mean, which each update has moved
    before the next draw; the ranks' rows are the drawn questions; the accuracy is that of all of
    them."""
    shared, *others = [[event for event in log if event[0] != "rows"] for log in logs]
    assert all(other == shared for other in others)
    assert [event[0] for event in shared] == ["draw", "update"] * 4
    rows = [[event[1:] for event in log if event[0] == "rows"] for log in logs]
    mean, accuracies = 0.0, set()
    for draw, update, *parts in zip(shared[::2], shared[1::2], *rows, strict=True):
        assert draw[1] == mean
        _, mean, accuracy, angle = update
        questions, right = ([*itertools.chain(*part)] for part in zip(*parts))
        assert questions == [ROWS[k]["question"] for k in draw[2] for _ in range(2)]
        assert accuracy == sum(right) / len(right)
        assert angle == pytest.approx(scores.angle[draw[2]].mean().item())
        accuracies.add(accuracy)
    assert mean > 0 and len(accuracies) > 1


@pytest.fixture
def scores(model, tokenizer):
    questions = [row["question"] for row in ROWS]
    return gainrl.score_prompts(model, gainrl.encode_prompts(tokenizer, questions))


def test_the_example_in_one_process_and_killed_and_resumed(in_trl, tmp_path, scores):
    """Killed at the fourth draw, so that the third, from after the checkpoint, is made again."""
    whole, killed = in_trl("whole"), in_trl("killed", DIES_AT="4")
    assert status(whole) == 0, (tmp_path / "whole" / "output.txt").read_text()
    assert status(killed) == -signal.SIGKILL
    assert status(in_trl("killed", "--resume")) == 0
    whole, killed = (read_rows(tmp_path / name / "log-0.jsonl") for name in ("whole", "killed"))
    check_curriculum(scores, whole)
    assert killed == whole[:10] + whole[6:]  # draw, rows, update; draw, ...


def test_the_example_in_two_processes_draws_the_same_on_both(in_trl, tmp_path, scores):
    """By the launcher that its docstring names. --multi_gpu makes several processes also on a CPU, where
    they talk over gloo; --cpu would make one."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    both = in_trl("both", launcher=[*launcher, "--main_process_port", "0"])
    assert status(both) == 0, (tmp_path / "both" / "output.txt").read_text()
    logs = [read_rows(tmp_path / "both" / f"log-{rank}.jsonl") for rank in (0, 1)]
    check_curriculum(scores, *logs)


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
    assert "the tiny world's questions, each of 20" in line["what"]
    assert float(printed.split("off by ")[1]) < 1e-5
    assert 0 < line["ours"] < 1000 and 0 < line["theirs"] < 1000


def test_the_angle_by_matrix_is_the_angle():
    torch.manual_seed(0)
    hidden = torch.randn(3, 20, 8)
    question_mask = torch.arange(20)[None] >= torch.tensor([5, 9, 19])[:, None]
    for ours, theirs in zip(
        gainrl.angle_concentration(hidden, ~question_mask, question_mask),
        bench.angle_by_matrix(hidden, ~question_mask, question_mask),
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
        if line["unit"] == "GB":  # where the system counts
            assert line["theirs"] == pytest.approx(16 * 512 * 1000 * 4 / 1e9)


@pytest.mark.skipif(bench.CUDA, reason="counts main memory")
def test_peak_memory_of_a_known_tensor():
    # In a process of its own: memory that was freed before is taken again, uncounted.
    code = "import torch; from extras.bench import peak_bytes as peak;"
    code += "print(peak(lambda: torch.ones(50_000_000)))"
    command = [sys.executable, "-W", "error", "-c", code]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stderr == ""
    if answer.stdout != "None\n":
        assert 195e6 < int(answer.stdout) < 215e6


@pytest.fixture
def seen(monkeypatch):
    """What gainrl's functions returned while a step ran beside TRL's, by their names."""
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


@pytest.mark.filterwarnings("ignore::FutureWarning")  # between TRL and transformers
def test_a_step_beside_trl_has_the_lengths_and_the_flat_groups_that_were_ordered(seen):
    workload = bench.Workload("small", 10, (30, 40), 40, 8, n_flat=4, micro_batch=16, rounds=2)
    lines = bench.compare_steps(workload, {**TINY_SHAPE, "vocab_size": 66}, "")
    assert [line["unit"] for line in lines] in (["ms", "GB"], ["ms"])  # where the system counts
    assert all(line["rounds"] == 2 and line["ratio"] > 0 for line in lines)
    lengths = torch.cat([rollout.completion_mask.sum(1) for rollout in seen["generate"]])
    # 240 lengths with a mean and a deviation of 8: their mean is within 4 deviations of its own.
    assert len(lengths) == 240
    assert lengths.double().mean().item() == pytest.approx(8, abs=4 * 8 / math.sqrt(240))
    for advantages in seen["group_advantages"]:
        assert (advantages[:4] == 0).all()
        assert (advantages[4:] != 0).double().mean() > 0.8  # eight of one kind by chance are rare


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_full_completions_are_full(seen):
    workload = bench.Workload("small", 2, (30, 30), 12, None, n_flat=0, micro_batch=16, rounds=1)
    bench.compare_steps(workload, {**TINY_SHAPE, "vocab_size": 66}, "")
    for rollout in seen["generate"]:
        assert rollout.completion_mask.shape == (16, 12) and rollout.completion_mask.all()


@pytest.mark.skipif(bench.CUDA, reason="looks at what is left to do without a GPU")
def test_the_checks_for_a_gpu_as_far_as_a_cpu_can_make_them(monkeypatch, capsys):
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
    monkeypatch.setattr(gainrl, "decode_in_place", fails)
    assert bench.main(["gpu"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("FAILED") == 3 and "no such kernel" in printed
    assert "passed  new weights are used" in printed


@pytest.mark.parametrize("module", [bench, study])
def test_the_commands_have_help(module, capsys):
    with pytest.raises(SystemExit):
        module.main(["--help"])
    assert f"python -m {module.__name__}" in capsys.readouterr().out


# --- study.py: statistics -------------------------------------------------------------------------
def test_the_bootstrap_interval_of_a_mean_is_near_the_normal_one():
    values = torch.randn(200, generator=torch.Generator().manual_seed(1)).double() + 3
    value, low, high = study.bootstrap(study.mean, values)
    half_width = 1.96 * values.std().item() / math.sqrt(200)
    assert value == pytest.approx(values.mean().item())
    assert low == pytest.approx(value - half_width, abs=0.1 * half_width)
    assert high == pytest.approx(value + half_width, abs=0.1 * half_width)


def test_the_bootstrap_keeps_columns_paired():
    values = torch.randn(50, generator=torch.Generator().manual_seed(1)).double()

    def mean_difference(x, y):
        return (x - y).mean(1)

    assert study.bootstrap(mean_difference, values + 2, values) == pytest.approx((2.0, 2.0, 2.0))


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
    assert study.partial_spearman(x, y, given) == pytest.approx(expected, abs=1e-9)
    assert abs(study.partial_spearman(x, y, given)) < abs(gainrl.spearman(x, y)) - 0.1


def test_what_the_given_explains_leaves_no_correlation():
    x = torch.arange(20).double()
    assert study.partial_spearman(x, x, x) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (0.1, 0.0),  # before the first step
        (0.3, 2.0),  # halfway up the first piece
        (0.4, 4.0),
        (0.6, 10.0),  # after a dip
        (1.0, 12.0),  # never: all its steps
    ],
)
def test_steps_to_a_target(target, expected):
    steps, accuracies = [0, 4, 8, 12], [0.2, 0.4, 0.3, 0.9]
    assert study.steps_to(target, steps, accuracies) == pytest.approx(expected)


def test_measures_of_a_run_by_hand():
    rows = [
        {"step": 0, "eval_accuracy": 0.0},
        {"step": 1, "accuracy": 0.5, "mean": 0.0, "useful_groups": 1.0},
        {"step": 4, "eval_accuracy": 0.4},
        {"step": 6, "eval_accuracy": 0.6},
    ]
    measures = study.measure(rows, target=0.5)
    area = (4 * 0.2 + 2 * 0.5) / 6
    assert measures == pytest.approx({"steps": 5.0, "area": area, "final": 0.6})


def test_arrival_at_the_last_rank():
    last = float(study.LAST_RANK)
    there = [
        {"step": 1, "mean": 0.0, "useful_groups": 1.0},
        {"step": 2, "mean": last, "useful_groups": 0.5},
        {"step": 2, "eval_accuracy": 0.5},
        {"step": 3, "mean": last, "useful_groups": 0.0},
    ]
    assert study.describe_arrival([there, there[:1]]) == ["2.0 (1/2)", "1.00", "0.25"]
    assert study.describe_arrival([there[:1]]) == ["never", "1.00", ""]


# --- study.py: runs, tables and figures -----------------------------------------------------------
def made_up_runs(plan):
    """Metrics as a run writes them, without a run: the arms differ in how fast they rise."""
    pace = {"angle": 0.3, "uniform": 0.1}
    runs = {}
    for world, name, seed in plan:
        rows = []
        for step in range(3):
            accuracy = min(1.0, pace.get(name, 0.2) * step + 0.02 * seed)
            rows.append({"step": step, "eval_accuracy": accuracy})
            rows.append({"step": step + 1, "mean": 100.0 * step, "useful_groups": 0.5})
        runs[world, name, seed] = rows
    return runs


def test_the_plan_has_every_arm_and_schedule_once():
    plan = study.plan_runs(study.ARMS, 10)
    assert len(plan) == 5 * 5 * 10 + 2 * 4 * 10
    defaults = gainrl.GaussianCurriculum(torch.zeros(gainrl.N_TRAIN), 1)
    assert plan["apart", "sigma x 2", 3]["sigma"] == 2 * defaults.sigma
    assert plan["scarce", "step x 0.5", 0]["curriculum_step"] == 0.5 * defaults.step
    assert all(settings["curriculum"] in gainrl.CURRICULA for settings in plan.values())


def test_tables_and_figures_of_made_up_runs(tmp_path, monkeypatch, capsys):
    signal = {"world": "", "GRPO": "before", "C": 0.5, "change of C": "", "useful": 0.25}
    signals = [{**signal, "world": world, "by layer": ["+0.10", "+0.20"]} for world in study.WORLDS]
    monkeypatch.setattr(study, "run_all", lambda folder, plan, size: (made_up_runs(plan), signals))
    arms = (*study.ARMS[:-1], "reversed", "uniform")
    study.study(2, study.QUICK, arms, tmp_path, figures=tmp_path)
    printed = capsys.readouterr().out
    # By hand: uniform ends at 0.20 and 0.22, so the target is 0.189. With seed 0 it is reached
    # after 1.89 steps by uniform and after 0.63 by angle; with seed 1 after 1.69 and 0.5633.
    assert "| tied (0.25) | mean | 0.6 | 0.9 | 0.9 | 0.9 | 0.9 | 1.8 |" in printed
    assert "|  | minus uniform | -1.2 [-1.3, -1.1] |" in printed
    assert "| tied (0.25) | 1.79 [" in printed  # times below one step count as one
    assert "| scarce | sigma x 2 | never | 0.50 |  |" in printed
    for name in ("curricula.png", "speedup.png"):
        assert (tmp_path / name).read_bytes()[1:4] == b"PNG"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "apart"
    gainrl.make_tiny_world(folder, warmup=20)
    return folder


def test_a_run_of_the_study_and_its_signals(world, tmp_path):
    size = study.Size(prompts=2, steps=1, eval_every=1, eval_examples=4, questions=4, warmup=20)
    run_dir = tmp_path / "run"
    settings = {"curriculum": "uniform", "seed": 0}
    rows = study.train_once(run_dir, world, size, settings)
    assert [row["step"] for row in rows if "eval_accuracy" in row] == [0, 1]
    assert study.train_once(run_dir, world, size, settings) == rows  # finished: nothing is redone

    before, after = study.describe_signals(world, run_dir, size.questions)
    assert list(before) == list(after)
    assert (before["GRPO"], after["GRPO"], before["change of C"]) == ("before", "after", "")
    assert len(before["by layer"]) == 4  # embeddings and three layers


def test_signals_of_questions(world):
    model, tokenizer = gainrl.load_model(str(world), torch.device("cpu"))
    problems = gainrl.load_problems(tokenizer, str(world), "test", longest=400)[:4]
    signals = study.measure_signals(model, tokenizer, problems)
    scores = gainrl.score_prompts(model, [problem["prompt"] for problem in problems])
    torch.testing.assert_close(signals.angle, scores.angle, rtol=0, atol=1e-5)
    assert signals.tokens.tolist() == scores.tokens.tolist()
    assert signals.layers.shape == (4, 4)
    is_flat = (signals.accuracy == 0) | (signals.accuracy == 1)
    assert (signals.gradient[is_flat] == 0).all() and (signals.gradient[~is_flat] > 0).all()
