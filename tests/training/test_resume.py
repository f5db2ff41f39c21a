"""A run that is cut off goes on as if it had not been."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, os, signal, sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from infini_attention.models import retrofit
from infini_attention.training.arguments import InfiniTrainingArguments
from infini_attention.training.trainer import InfiniTrainer

torch.set_num_threads(1)
folder, carries = Path(sys.argv[1]), sys.argv[4] == "carry"
die_at, signal_at = int(sys.argv[2]), int(sys.argv[3])

class Windows(torch.utils.data.Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, index):
        ids = torch.randint(0, 64, (32,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids, "starts_document": torch.tensor(index % 12 < 2)}

class Write(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            with open(folder / "losses.jsonl", "a") as file:
                kept = {name: logs[name] for name in ("loss", "grad_norm", "learning_rate", "gate_mean")}
                file.write(json.dumps({"step": state.global_step} | kept) + "\\n")
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == die_at - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if state.global_step == signal_at - 1:
            os.kill(os.getpid(), signal.SIGTERM)

torch.manual_seed(0)
base = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                    num_attention_heads=4, num_key_value_heads=2))
model = retrofit(base, segment_length=8, gate_init=0.0, update_rule="delta")
args = InfiniTrainingArguments(
    output_dir=str(folder), max_steps=24, per_device_train_batch_size=2, logging_steps=1, save_steps=5,
    learning_rate=1e-2, warmup_steps=4, gate_warmup_steps=10, report_to="none", use_cpu=True,
    disable_tqdm=True, save_total_limit=2, repeat_ceiling=20.0, carry_memory=carries,
    least_segments=None if carries else 2,
)
trainer = InfiniTrainer(model=model, args=args, train_dataset=Windows())
trainer.add_callback(Write())
trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
print("stopped by", trainer.stopped_by)
"""


def run(folder: Path, *, die_at: int = 0, signal_at: int = 0, mode: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    arguments = [sys.executable, "-c", PROGRAM, str(folder), str(die_at), str(signal_at), mode]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)


def losses(folder: Path) -> dict[int, str]:
    """The last line that was logged for each step."""
    lines = (folder / "losses.jsonl").read_text().splitlines()
    return {json.loads(line)["step"]: line for line in lines}


@pytest.mark.parametrize("mode", ["carry", "draw"])
def test_a_killed_run_goes_on_with_the_same_losses_to_the_last_bit(tmp_path: Path, mode: str) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(whole, mode=mode).returncode == 0
    step = 7 + int.from_bytes(os.urandom(2)) % 18  # anywhere after the first checkpoint
    assert run(cut, die_at=step, mode=mode).returncode == -signal.SIGKILL, step
    *earlier, newest = sorted(cut.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if earlier:  # as if it had been killed while it wrote
        (newest / "manifest.json").unlink()
    ended = run(cut, mode=mode)
    assert ended.returncode == 0, ended.stderr
    assert losses(cut) == losses(whole), step
    assert len(losses(cut)) == 24
    assert {path.name for path in cut.glob("checkpoint-*")} == {"checkpoint-20", "checkpoint-24"}


def test_sigterm_saves_and_ends_in_peace(tmp_path: Path) -> None:
    ended = run(tmp_path, signal_at=13, mode="carry")
    assert ended.returncode == 0, ended.stderr
    assert "stopped by SIGTERM" in ended.stdout
    assert max(losses(tmp_path)) == 13
    assert (tmp_path / "checkpoint-13" / "manifest.json").exists()
    assert run(tmp_path, mode="carry").returncode == 0
    assert sorted(losses(tmp_path)) == list(range(1, 25))


def test_a_run_that_is_done_takes_no_step_more(tmp_path: Path) -> None:
    for _ in range(2):
        ended = run(tmp_path, mode="draw")
        assert ended.returncode == 0, ended.stderr
    assert max(losses(tmp_path)) == 24
