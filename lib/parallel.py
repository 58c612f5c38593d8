"""Several processes that train or generate together, started by torchrun, on processors or GPUs of one or several computers.

Without torchrun there is one process, and the functions here do nothing, except `in_threads`: it shares the work of one process
among its threads.
"""

import atexit
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import torch.distributed as dist

RANK = int(os.environ.get("RANK", 0))  # set by torchrun
N_RANKS = int(os.environ.get("WORLD_SIZE", 1))
IS_FIRST = RANK == 0  # the process that prints and writes
Item = TypeVar("Item")
Result = TypeVar("Result")


def start(device_name: str) -> torch.device:
    """Connect this process with the others and return its device; all processes except the first print nothing.

    device_name: "cpu", "cuda" (ValueError where there is none), or "auto" for a GPU where there is one.
    """
    has_gpu = torch.cuda.is_available()
    if device_name == "cuda" and not has_gpu:
        raise ValueError("DEVICE is cuda, but this torch sees no GPU; set it to auto or cpu")
    device = torch.device("cuda" if device_name == "auto" and has_gpu else device_name.replace("auto", "cpu"))
    if N_RANKS > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
        if not IS_FIRST:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (open until the process ends)
    return device


def shared(model: torch.nn.Module) -> torch.nn.Module:
    """The model, with gradients averaged over the processes."""
    return torch.nn.parallel.DistributedDataParallel(model) if N_RANKS > 1 else model


def mean_over(parts: list[tuple[int, dict[str, torch.Tensor]]]) -> dict[str, float]:
    """Average over batches and processes, weighted by batch size. One transfer from the device, at the end of an epoch."""
    names = list(parts[0][1])
    sizes = torch.tensor([size for size, _ in parts], dtype=torch.float64)
    values = torch.stack([torch.stack([values[name].double() for name in names]) for _, values in parts])
    sums = torch.cat([(sizes.to(values.device)[:, None] * values).sum(dim=0), sizes.sum().to(values.device)[None]])
    if N_RANKS > 1:
        dist.all_reduce(sums)
    *totals, n_rows = sums.tolist()
    return {name: total / n_rows for name, total in zip(names, totals)}


def in_turn(items: Iterator[Item], n_items: int) -> Iterator[Item]:
    """Items of all processes in order, on the first process; the others send theirs and yield nothing.

    items: of this process, which has the numbers RANK, RANK + N_RANKS, ... of all `n_items`.
    """
    for number in range(n_items):
        owner = number % N_RANKS
        if owner == RANK and IS_FIRST:
            yield next(items)
        elif owner == RANK:
            dist.send_object_list([next(items)], dst=0)
        elif IS_FIRST:
            received: list[Any] = [None]
            dist.recv_object_list(received, src=owner)
            yield received[0]


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], device: torch.device) -> Iterator[Result]:
    """Results of a function of each item, in order, computed on a CPU by as many threads as torch may use.

    Each item is computed by one thread, which loses less time than many threads for each operation of torch. At most two results
    per thread are waiting, so memory does not grow with the number of items.
    """
    n_threads = torch.get_num_threads()
    if n_threads == 1 or device.type != "cpu":
        yield from map(function, items)
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            waiting: deque[Future[Result]] = deque()
            for item in items:
                if len(waiting) == 2 * n_threads:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(function, item))
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(n_threads)
