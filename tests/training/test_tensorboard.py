import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from infini_attention.models import retrofit
from infini_attention.models.observe import Observation, gate_logits

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infini_attention.training.tensorboard import CELL, MemoryBoard, heat_map
from infini_attention.training.view import heat

LAYERS, HEADS = 3, 4


@pytest.fixture
def model() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": LAYERS}
    config = LlamaConfig(vocab_size=16, num_attention_heads=HEADS, num_key_value_heads=2, **sizes)
    return retrofit(LlamaForCausalLM(config), segment_length=8, gate_init=-1.0)


def train(model: Any, folder: Path, board: MemoryBoard) -> None:
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    ids = torch.randint(0, 16, (24,), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": ids, "labels": ids}] * 16
    Trainer(model=model, args=args, train_dataset=rows, callbacks=[board]).train()


def events(folder: Path) -> EventAccumulator:
    (file,) = folder.rglob("events.out.tfevents.*")
    return EventAccumulator(str(file.parent), size_guidance={"histograms": 0, "images": 0}).Reload()


def picture_of(event: Any) -> torch.Tensor:
    image = Image.open(io.BytesIO(event.encoded_image_string))
    return torch.tensor(list(image.tobytes())).view(image.height, image.width, 3)


def test_gates_and_shares_stand_beside_the_log_in_one_file(model: Any, tmp_path: Path) -> None:
    share = torch.linspace(0, 1, LAYERS * HEADS).view(LAYERS, HEADS)
    nothing = torch.zeros(LAYERS, 2)
    seen = Observation(share, share, nothing, nothing, nothing, 2.0, 2.1)
    train(model, tmp_path, MemoryBoard(lambda: seen))
    read = events(tmp_path)
    assert [event.step for event in read.Scalars("train/loss")] == [1, 2]
    assert [event.step for event in read.Histograms("memory/gates")] == [1, 2]
    last = read.Histograms("memory/gates")[-1].histogram_value
    gates = gate_logits(model).sigmoid()
    assert last.num == LAYERS * HEADS
    assert (last.min, last.max) == pytest.approx((gates.min().item(), gates.max().item()))
    assert set(read.Tags()["images"]) == {"memory/gates_by_head", "memory/share_by_head"}
    shown = picture_of(read.Images("memory/share_by_head")[-1])
    for layer in range(LAYERS):
        for head in range(HEADS):
            corner = shown[layer * CELL, head * CELL]
            assert corner.tolist() == heat(share[layer, head]).tolist()


def test_before_any_observation_there_are_the_gates_alone(model: Any, tmp_path: Path) -> None:
    train(model, tmp_path, MemoryBoard())
    assert events(tmp_path).Tags()["images"] == ["memory/gates_by_head"]


def test_the_folder_is_the_one_that_transformers_would_take(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    train(model, tmp_path / "output", MemoryBoard())
    assert events(tmp_path / "elsewhere").Scalars("train/loss")


def test_a_heat_map_has_a_scale_from_0_at_the_bottom_to_1(model: Any) -> None:
    picture = heat_map(torch.tensor([[0.0, 0.5], [1.0, 0.25]]))
    assert picture.dtype == torch.uint8
    assert picture.shape == (3, 2 * CELL, 3 * CELL + CELL // 2)
    assert picture[:, CELL, 0].tolist() == heat(torch.tensor(1.0)).tolist()
    assert picture[:, 0, -1].tolist() == heat(torch.tensor(1.0)).tolist()
    assert picture[:, -1, -1].tolist() == heat(torch.tensor(0.0)).tolist()
    assert bool((picture[:, :, 2 * CELL : 2 * CELL + CELL // 2] == 255).all())
