"""Which GPU a rank takes, on machines that this one is not."""

import os
import socket

import pytest
import torch

from moe_trainer.config.errors import ConfigError
from moe_trainer.parallel.gpus import count_places, take_gpu


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine of two GPUs and eight ranks; the devices that were made current."""
    devices: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("WORLD_SIZE", "8")
    for name in ("NCCL_HOSTID", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that what `take_gpu` sets is gone after the test
        monkeypatch.delenv(name)
    monkeypatch.delenv("MOE_TRAINER_RANKS_PER_GPU", raising=False)
    return devices


def test_a_gpu_for_each_rank(taken: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert count_places() == 2
    assert [take_gpu()] == taken == [torch.device("cuda", 1)]
    assert "NCCL_HOSTID" not in os.environ and "NCCL_SOCKET_IFNAME" not in os.environ


def test_ranks_that_share_a_gpu_are_of_different_hosts(
    taken: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_TRAINER_RANKS_PER_GPU", "4")
    assert count_places() == 8
    hosts = []
    for rank in range(8):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("RANK", str(8 + rank))
        assert take_gpu() == taken[-1]
        hosts.append((taken[-1].index, os.environ["NCCL_HOSTID"]))
    assert len(set(hosts)) == 8 and [gpu for gpu, _ in hosts] == [0, 1] * 4
    assert {host.rpartition("-")[2] for _, host in hosts} == set(map(str, range(8, 16))), (
        "also where hosts have one name"
    )
    assert all(socket.gethostname() in host for _, host in hosts)
    assert os.environ["NCCL_SOCKET_IFNAME"] == "lo"
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    monkeypatch.setenv("WORLD_SIZE", "16")
    take_gpu()
    assert "NCCL_SOCKET_IFNAME" not in os.environ, "other hosts are not to be met there"


@pytest.mark.parametrize("text", ["0", "-1", "two", ""])
def test_no_number_of_ranks(taken: list[torch.device], monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MOE_TRAINER_RANKS_PER_GPU", text)
    with pytest.raises(ConfigError, match=f"MOE_TRAINER_RANKS_PER_GPU={text} must be a number of ranks"):
        count_places()
