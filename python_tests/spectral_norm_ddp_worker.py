"""One of the processes of test_spectral_norm_ddp.py: python spectral_norm_ddp_worker.py RANK WORLD_SIZE FOLDER."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from sabmn_ext.nn import spectral_norm_layer
from sabmn_ext.nn.spectral_norm import spectral_norm_model


class Net(nn.Module):
    """Layers of 4 to 5 kB; the middle one is left out in every second step where ``skip``."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.skip, self.step = skip, 0
        self.first, self.second = nn.Conv2d(3, 8, 5, padding=2), nn.ConvTranspose2d(8, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.third, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 7, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        x = self.second(self.first(x).tanh()).tanh()
        if not self.skip or self.step % 2 == 0:
            x = x + self.middle(x)
        return self.last(self.third(x).tanh())


def make(skip: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return spectral_norm_model(Net(skip).double(), preserve_eval=False)


def train(network: nn.Module, rank: int, world_size: int) -> None:
    """Three steps, each process with its share of the batch."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9)
    for _ in range(3):
        x = torch.randn(4, 3, 6, 5, dtype=torch.float64, generator=generator)
        optimizer.zero_grad()
        network(x[rank::world_size]).square().mean().backward()
        optimizer.step()


def order_of_events(network: DistributedDataParallel) -> list[str]:
    """What a backward pass did, in order: layers whose output had its gradient, and buckets that were sent off."""
    model, events = network.module, []

    def allreduce(state: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
        names = {id(p): n.removesuffix(".parametrizations.weight.original") for n, p in model.named_parameters()}
        events.extend(f"sent {names[id(p)]}" for p in bucket.parameters())
        return allreduce_hook(None, bucket)

    network.register_comm_hook(None, allreduce)
    for name, layer in model.named_children():
        layer.register_forward_hook(
            lambda module, inputs, output, name=name: output.register_hook(lambda _: events.append(f"reached {name}"))
            and None
        )
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    for _ in range(3):  # DDP fits its buckets to the first backward pass
        events.clear()
        network(x).square().mean().backward()
    return events


def main(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    spectral_norm_layer.BUCKET_BYTES = 10_000
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    results: dict[str, Any] = {}
    for skip in (False, True):
        network = DistributedDataParallel(make(skip), find_unused_parameters=skip, bucket_cap_mb=0.008)
        train(network, rank, world_size)
        results[f"skip {skip}"] = network.module.state_dict()
    results["order"] = order_of_events(DistributedDataParallel(make(), bucket_cap_mb=0.008))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
