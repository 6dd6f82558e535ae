"""What each of two processes does in `test_distributed.py`: train under DDP, and sharded by FSDP2, then save.

accelerate launch --multi_gpu --num_processes 2 … launched.py FOLDER
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from datasets import load_from_disk
from datastore.fixtures import make_tokenizer
from tiny_training import CHUNK_SIZE, NEIGHBOR_SIZE, make_model, make_trainer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from retro_hf import retrofit
from retro_hf.datastore import RetroDatastore
from retro_hf.training import RetroDataCollator


BATCH, STEPS = 8, 3
TRAINING = {"max_steps": STEPS, "optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant"}
# By name: how a global batch of 8 is divided among two processes, and among micro-batches.
DDP = {
    "plain": {"per_device_train_batch_size": 4},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointed": {"per_device_train_batch_size": 4, "activation_checkpointing": True},
}
FSDP = ("whole", "adapter")


def load_world(folder: Path) -> SimpleNamespace:
    return SimpleNamespace(
        tokenizer=make_tokenizer(),
        datastore=RetroDatastore.load(folder / "store"),
        dataset=load_from_disk(folder / "windows"),
    )


def fsdp_model(kind: str, folder: Path):
    """A model of our own, or a RETROfit that is saved adapter-only."""
    if kind == "whole":
        return make_model()
    torch.manual_seed(1)
    model = retrofit(
        folder / "base", chunk_size=CHUNK_SIZE, neighbor_size=NEIGHBOR_SIZE, cross_attention_layers=[1, 3]
    )
    model.config.save_backbone = False
    return model


def fsdp_batches(world: SimpleNamespace) -> list[dict[str, torch.Tensor]]:
    """Global batches; one is of windows without a complete chunk, so that no rank may leave the encoder out."""
    collator = RetroDataCollator(world.tokenizer, world.datastore)
    long = [row for row in world.dataset if len(row["input_ids"]) == 32]
    short = [row for row in world.dataset if len(row["input_ids"]) < CHUNK_SIZE]
    rows = [long[:8], [*long[8:12], *(short * 4)[:4]], long[12:20]]
    return [[collator(part[:4]), collator(part[4:])] for part in rows]


def fsdp_steps(model, batches, ranks: range) -> list[float]:
    """Train on the parts of each batch that belong to `ranks`; the loss is that of the global batch."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for parts in batches:
        total = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
        # FSDP and DDP average over ranks, so each counts for all of them.
        loss = sum(model(**parts[rank], num_items_in_batch=total).loss for rank in ranks) * (2 // len(ranks))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    if len(ranks) == 1:
        for loss in losses:
            dist.all_reduce(loss)
    return [float(loss) / (2 // len(ranks)) for loss in losses]


def shard(model):
    """As `accelerate launch --use_fsdp --fsdp_version 2` does; it starts FSDP only where there is an accelerator."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    state = SimpleNamespace(fsdp_plugin=plugin)
    accelerator = SimpleNamespace(
        state=state, mixed_precision="no", is_main_process=dist.get_rank() == 0, device=torch.device("cpu")
    )
    return fsdp2_prepare_model(accelerator, model)


def main(folder: Path) -> None:
    world = load_world(folder)
    results = {}
    for name, settings in DDP.items():
        trainer, losses = make_trainer(make_model(), world, folder / "run" / name, **TRAINING, **settings)
        trainer.train()
        trainer.save_model(str(folder / "ddp" / name))
        results[name] = list(losses.values.values())
        assert trainer.args.world_size == 2
    rank = dist.get_rank()
    for kind in FSDP:
        model = shard(fsdp_model(kind, folder).train())
        results[f"fsdp {kind}"] = fsdp_steps(model, fsdp_batches(world), range(rank, rank + 1))
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:  # the others get nothing
            model.save_pretrained(folder / "fsdp" / kind, state_dict=whole)
        results[f"sharded {kind}"] = sorted(
            {type(m).__name__.removeprefix("FSDP") for m in model.modules() if isinstance(m, FSDPModule)}
        )
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
