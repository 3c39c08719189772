"""BatchNorm's running statistics: the micro-batch is the unit, not the process."""

import torch
from torch import nn

from rsb_cluster.train.batchnorm import RunningStatistics


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))


def one_step(processes: int, micro_batches: list[torch.Tensor]) -> nn.Module:
    """A step of four virtual ranks on some processes, the collective done by hand; returns a model after it."""
    models = [network() for _ in range(processes)]
    statistics = [RunningStatistics(model, len(micro_batches)) for model in models]
    share = len(micro_batches) // processes
    packed = []
    for process, (model, stats) in enumerate(zip(models, statistics, strict=True)):
        model.train()
        stats.begin_step()
        for images in micro_batches[process * share : (process + 1) * share]:
            model(images)
            stats.end_micro_batch()
        packed.append(torch.zeros(stats.size))
        stats.pack(packed[-1])
    for stats in statistics:
        stats.end_step(torch.stack(packed).sum(0))
    return models[0]


def test_the_statistics_are_the_same_on_one_two_and_four_processes() -> None:
    torch.manual_seed(1)
    micro_batches = [torch.randn(6, 3, 8, 8) * (i + 1) for i in range(4)]
    found = {p: one_step(p, micro_batches).state_dict() for p in (1, 2, 4)}
    for processes in (2, 4):
        for name, value in found[1].items():
            torch.testing.assert_close(found[processes][name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_a_step_moves_them_by_the_average_of_its_micro_batches() -> None:
    torch.manual_seed(1)
    micro_batches = [torch.randn(6, 3, 8, 8) * (i + 1) for i in range(4)]
    norm = one_step(1, micro_batches)[1]
    convolution = network()[0]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
    means = torch.stack([convolution(images).mean((0, 2, 3)) for images in micro_batches])
    torch.testing.assert_close(norm.running_mean, 0.1 * means.mean(0), rtol=1e-5, atol=1e-6)
    assert norm.num_batches_tracked == 1


def test_a_network_without_batchnorm_needs_no_exchange() -> None:
    stats = RunningStatistics(nn.Linear(3, 2), 4)
    stats.begin_step()
    stats.end_micro_batch()
    stats.end_step(torch.zeros(0))
    assert stats.size == 0


def test_processes_that_share_a_virtual_rank_count_as_one() -> None:
    """Each of two has the statistics of the whole virtual rank, and the average is over virtual ranks."""
    torch.manual_seed(1)
    micro_batches = [torch.randn(6, 3, 8, 8) * (i + 1) for i in range(4)]
    models = [network() for _ in range(8)]
    statistics = [RunningStatistics(model, 4, parts=2) for model in models]
    total = torch.zeros(statistics[0].size)
    for process, (model, stats) in enumerate(zip(models, statistics, strict=True)):
        stats.begin_step()
        model.train()(micro_batches[process // 2])
        stats.end_micro_batch()
        packed = torch.zeros(stats.size)
        stats.pack(packed)
        total += packed
    statistics[0].end_step(total)
    for name, value in one_step(4, micro_batches).state_dict().items():
        torch.testing.assert_close(models[0].state_dict()[name], value, rtol=1e-6, atol=1e-7, msg=name)
