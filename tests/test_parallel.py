"""Two processes under torchrun train the same model and generate the same cells as one process."""

import sys

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import CPU, STAGES, Workplace, simulated_dataset

from lib.data.counts import write_h5ad
from lib.parallel import in_threads

pytestmark = pytest.mark.slow
SMALL = "--hidden 16 --n-latent 4 --batch-size 64 --epochs 4 --learning-rate 0.01 --device cpu".split()
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def cells(path) -> Workplace:
    place = Workplace(path)
    place.data.mkdir(parents=True)
    for name, seed in (("train", 0), ("test", 1)):
        adata = simulated_dataset(seed=seed)
        adata.uns |= {"dataset": "simulated", "split_id": "s"}
        write_h5ad(adata, place.data / f"{name}.h5ad")
    return place


def history(place: Workplace, name: str) -> pd.DataFrame:
    return pd.read_csv(place.models / f"{name}_history.csv").drop(columns="seconds")


@pytest.mark.parametrize("options", [[], ["--memory-gb", "0"]], ids=["in memory", "from disk"])
def test_two_processes_train_the_gmvae_that_one_trains(tmp_path, options):
    one, two = cells(tmp_path / "one"), cells(tmp_path / "two")
    one.run(STAGES[3], *SMALL, *options)
    output = two.process(STAGES[3], *SMALL, *options, program=TORCHRUN)
    assert output.count("stage 3 wrote") == 1 and "2 processes" in output  # the second process is silent
    pd.testing.assert_frame_equal(history(one, "gmvae"), history(two, "gmvae"), rtol=2e-4)  # sums in another order


def test_two_processes_train_sctape(tmp_path):
    one, two = cells(tmp_path / "one"), cells(tmp_path / "two")
    options = "--epochs 6 --dropout 0 --platform-sd 0 --batch-size 50".split()  # no noise of a process's own
    for place in (one, two):
        place.run(STAGES[2], "--n-train-samples", "400", "--cells-per-sample", "200")
    one.run(STAGES[4], *options)
    two.process(STAGES[4], *options, program=TORCHRUN)
    pd.testing.assert_frame_equal(history(one, "sctape"), history(two, "sctape"), rtol=2e-3, atol=1e-5)


def test_generated_cells_do_not_depend_on_the_number_of_processes(tmp_path):
    place = cells(tmp_path / "place")
    place.run(STAGES[3], *SMALL)
    place.data.joinpath("wanted.csv").write_text("cell_type,n\ntype 0,300\ntype 1,400\ntype 2,500\n")
    options = ["--cell-counts", str(place.data / "wanted.csv"), "--device", "cpu", "--no-evaluate"]
    place.run(STAGES[5], *options, "--output", "one.h5ad")
    output = place.process(STAGES[5], *options, "--output", "two.h5ad", program=TORCHRUN)
    assert output.count("stage 5 wrote") == 1
    one, two = place.cells("one"), place.cells("two")
    assert one.shape == (1200, 60) and (one.X != two.X).nnz <= 2  # rounding may change a count
    pd.testing.assert_frame_equal(one.obs[["cell_type", "sample"]], two.obs[["cell_type", "sample"]])
    np.testing.assert_allclose(two.obs["library_size"], np.asarray(two.X.sum(axis=1)).ravel())
    assert not list(place.data.glob("*.npz"))


def test_threads_keep_the_order_and_work_only_a_little_ahead():
    n_threads, begun = torch.get_num_threads(), []

    def items():
        for number in range(1, 101):
            begun.append(number)
            yield number

    torch.set_num_threads(2)
    try:
        results = in_threads(lambda item: (item, torch.get_num_threads()), items(), CPU)
        for number, (item, threads) in enumerate(results, start=1):
            assert item == number and threads == 1
            assert len(begun) <= number + 4  # two results per thread wait
        assert number == 100 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(n_threads)
