import torch

from services.worker.engine.kernels.paged_kv import LayerShape, PagedKV, block_bytes

SHAPES = (LayerShape(2, 8, 8), LayerShape(1, 4, 6))


def test_a_block_is_one_run_of_bytes_that_holds_all_layers() -> None:
    kv = PagedKV(SHAPES, num_blocks=5, block_size=4, dtype=torch.float32, device=torch.device("cpu"))
    for number, layer in enumerate(kv.layers):
        layer.key[3] = 10 * number + 1
        layer.value[3] = 10 * number + 2
    runs = [2 * 4 * 8, 2 * 4 * 8, 1 * 4 * 4, 1 * 4 * 6]
    expected = [value for value, length in zip((1, 2, 11, 12), runs, strict=True) for _ in range(length)]
    assert kv.storage[3].is_contiguous()
    assert kv.storage[3].tolist() == expected
    assert kv.block_bytes == len(expected) * 4 == block_bytes(SHAPES, 4, torch.float32)
    assert not kv.storage[[0, 1, 2, 4]].any()


def test_layers_are_views_in_the_documented_shape() -> None:
    kv = PagedKV(SHAPES, num_blocks=5, block_size=4, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert kv.layers[1].key.shape == (5, 1, 4, 4)
    assert kv.layers[1].value.shape == (5, 1, 4, 6)
    assert kv.layers[1].value.dtype is torch.bfloat16
    assert kv.layers[1].value[2].is_contiguous()
