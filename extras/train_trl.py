"""GAIN-RL in TRL's GRPOTrainer, for more than one GPU: our scores and our curriculum, TRL's engine.

    pip install trl==1.16.0
    accelerate launch --multi_gpu --num_processes 8 -m extras.train_trl
    accelerate launch --multi_gpu --num_machines 2 --num_processes 16 --machine_rank 0 \\
        --main_process_ip HOST0 --main_process_port 29500 -m extras.train_trl
        (and with --machine_rank 1 on the other host)

With --resume it continues from the last checkpoint, on a disk that all hosts see. A GPU brings 4
questions to the batch: TRL's 8 rows, times 4 micro-steps, by 8 completions each.

How the curriculum fits in. TRL draws ahead, but not past the end of an epoch; so an epoch is one
batch here (TRL's log counts it as one), and each update moves the mean before the next batch is
drawn. Every process draws with the same seed and moves by the same gathered accuracy, so all draw
the same questions. A killed run continues with the draws of one that was never stopped, if its
checkpoint lies between two batches: keep save_steps a multiple of num_iterations (1 here), and
steps_per_generation at its default.

The angle of a batch is the one scored before training, where gainrl.py measures it again under the
current weights: so the trainer never opens the weights, which ZeRO-3 and FSDP keep in pieces. In 20
steps of the tiny world the two differed by up to 0.010, and the means by up to 6 of 2,000 ranks.

Run by the tests, on CPUs with a tiny model: one process, two processes (DDP over gloo), an
evaluation between the steps, a kill and a resume. Never run: GPUs, several hosts, DeepSpeed, FSDP,
vLLM, and models too large for one GPU, on which each process scores the questions. For verl we only
read: its curriculum samplers (AbstractCurriculumSampler, data.sampler.class_path) exist up to
release 0.7.1 and were gone by 0.8.0."""

import sys

import torch
from accelerate.utils import broadcast
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

from gainrl import (
    GaussianCurriculum,
    build_messages,
    encode_prompts,
    load_model,
    reward,
    score_prompts,
)

MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
DATASET = "openai/gsm8k"


class OneBatchEpochs(GaussianCurriculum):
    """A sampler of rows, as TRL wants it: one epoch is one batch, each question repeated for its
    completions, and the batch once for each micro-step and iteration on it."""

    def __init__(self, angles, args):
        super().__init__(angles, args.generation_batch_size // args.num_generations)
        self.args = args

    def __iter__(self):
        self.batch = self.sample()
        rows = [index for index in self.batch for _ in range(self.args.num_generations)]
        yield from rows * (self.args.num_iterations * self.args.steps_per_generation)

    def __len__(self):
        args = self.args
        return args.generation_batch_size * args.num_iterations * args.steps_per_generation


class CurriculumTrainer(GRPOTrainer):
    """GRPOTrainer that draws from the curriculum, moves it by its rewards, and saves it."""

    def __init__(self, model, args, data, tokenizer, angles):
        super().__init__(model, correct, args, data, processing_class=tokenizer)
        self.angles = angles
        self.curriculum = OneBatchEpochs(angles, args)

    def _get_train_sampler(self, dataset=None):
        return self.curriculum

    def _calculate_rewards(self, *batch):
        rewards = super()._calculate_rewards(*batch)  # gathered: those of all processes
        if self.model.training:  # an evaluation moves nothing
            angle = self.angles[self.curriculum.batch].mean().item()
            self.curriculum.update(rewards.mean().item(), angle)
        return rewards

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:  # one process writes for all
            torch.save(self.curriculum.state_dict(), f"{output_dir}/curriculum.pt")

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        self.curriculum.load_state_dict(torch.load(f"{checkpoint}/curriculum.pt"))


def correct(completions, answer, **columns):
    """TRL's reward function: 1.0 or 0.0 for each completion."""
    return [reward(chat[0]["content"], gold) for chat, gold in zip(completions, answer)]


def main():
    args = GRPOConfig(
        output_dir="runs/trl",
        max_steps=200,
        save_steps=10,
        gradient_accumulation_steps=4,
        max_completion_length=512,
    )
    data = load_dataset(DATASET, "main", split="train")
    data = data.map(lambda row: {"prompt": build_messages(row["question"])})
    model, tokenizer = load_model(MODEL, args.device)
    scores = score_prompts(model, encode_prompts(tokenizer, data["question"]))
    angles = broadcast(scores.angle.to(args.device)).cpu()  # one order for all, to the last bit
    trainer = CurriculumTrainer(model, args, data, tokenizer, angles)
    trainer.train(resume_from_checkpoint="--resume" in sys.argv)


if __name__ == "__main__":
    main()
