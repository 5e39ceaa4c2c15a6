"""The peaks of GPUs, by the names that their driver gives them."""

import pytest
import torch

from sdpo.train.throughput import peak


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_a_gpu_has_the_peak_of_its_name(name, teraflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak(torch.device("cuda")) == (teraflops and teraflops * 1e12)
