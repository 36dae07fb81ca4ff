"""Hashes of tensors do not depend on how they lie in memory."""

import pytest
import torch
import xxhash

from moe.prints import print_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_elements_count_and_strides_do_not(dtype):
    whole = torch.arange(24.0).to(dtype).view(4, 6)
    for odd in (
        whole[::3, ::4],
        whole.t(),
        whole[1:2, ::6],
        whole[0, ::7],
        whole[:, 2:3].t(),
        whole[:0, 3],
        whole[2, 3],
    ):
        plain = torch.tensor(odd.tolist(), dtype=dtype).view(odd.shape)
        octets = bytes(plain.reshape(-1).view(torch.uint8).tolist())
        assert print_of(odd) == print_of(plain) == xxhash.xxh3_128_hexdigest(octets)
    assert print_of(whole[0], whole[1]) == print_of(whole[:2])
    assert print_of(whole[0]) != print_of(whole[1])
