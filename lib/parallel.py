"""Several processes, started by torchrun, that work on one thing: on the processors of one computer, on GPUs, on many computers.

Started without torchrun there is one process, and nothing here does anything.
"""

import atexit
import os
import sys

import torch
import torch.distributed as dist

RANK = int(os.environ.get("RANK", 0))  # set by torchrun
N_RANKS = int(os.environ.get("WORLD_SIZE", 1))
IS_FIRST = RANK == 0  # the process that prints and writes


def pick_device(name: str) -> torch.device:
    """
    Raises
    ------
    ValueError
        If CUDA is asked for and is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("DEVICE is cuda, but this torch sees no GPU; set it to auto or cpu")
    return (
        torch.device(name, int(os.environ.get("LOCAL_RANK", 0)))
        if name == "cuda" and N_RANKS > 1
        else torch.device(name)
    )


def start(device_name: str) -> torch.device:
    """This process's device. Where there are other processes, meet them; all but the first fall silent."""
    device = pick_device(device_name)
    if N_RANKS > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
        if not IS_FIRST:
            sys.stdout = open(os.devnull, "w")
    return device


def wait() -> None:
    """Until all processes are here."""
    if N_RANKS > 1:
        dist.barrier()


def shared(model: torch.nn.Module) -> torch.nn.Module:
    """The model, its gradients averaged over the processes."""
    return torch.nn.parallel.DistributedDataParallel(model) if N_RANKS > 1 else model


def mean_over(parts: list[tuple[int, dict[str, torch.Tensor]]]) -> dict[str, float]:
    """Means of the batches' means over all processes, weighted by batch size; one transfer from the device, at the end of an epoch."""
    names = list(parts[0][1])
    sizes = torch.tensor([size for size, _ in parts], dtype=torch.float64)
    values = torch.stack([torch.stack([values[name].double() for name in names]) for _, values in parts])
    sums = torch.cat([(sizes.to(values.device)[:, None] * values).sum(dim=0), sizes.sum().to(values.device)[None]])
    if N_RANKS > 1:
        dist.all_reduce(sums)
    *sums, total = sums.tolist()
    return {name: value / total for name, value in zip(names, sums)}
