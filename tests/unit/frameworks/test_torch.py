import numpy as np
import pytest

from flplatform.frameworks.torch import arrays_of, load_arrays

pytestmark = pytest.mark.torch


def network():
    import torch

    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))


def test_arrays_go_there_and_back():
    import torch

    first, second = network(), network()
    first.train()(torch.ones(4, 3))  # moves the batch norm's counters
    arrays = arrays_of(first)
    assert arrays["0.weight"].shape == (2, 3)
    assert arrays["0.weight"].dtype == np.float32
    assert arrays["1.num_batches_tracked"].shape == ()
    assert arrays["1.num_batches_tracked"].dtype == np.int64
    for array in arrays.values():
        array.flags.writeable = False  # as the platform hands them out
    load_arrays(second, arrays)
    for name, array in arrays_of(second).items():
        np.testing.assert_array_equal(array, arrays[name])


def test_arrays_are_copies():
    import torch

    module = network()
    arrays = arrays_of(module)
    before = arrays["0.bias"].copy()
    load_arrays(module, arrays)
    with torch.no_grad():
        module[0].bias.add_(1)
    np.testing.assert_array_equal(arrays["0.bias"], before)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("0.bias", None),
        ("2.bias", np.zeros(2, np.float32)),
        ("0.bias", np.zeros(3, np.float32)),
        ("0.bias", np.zeros(2)),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_loaded(name, array):
    module = network()
    before = arrays_of(module)
    arrays = {n: a + 1 for n, a in before.items() if n != name}
    if array is not None:
        arrays[name] = array
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_arrays(module, arrays)
    for n, a in arrays_of(module).items():
        np.testing.assert_array_equal(a, before[n])


def test_a_dtype_unknown_to_numpy_is_named():
    import torch

    module = torch.nn.Linear(2, 1)
    module.register_buffer("odd", torch.zeros(2, dtype=torch.float8_e4m3fn))
    with pytest.raises(ValueError, match=r"'odd' is torch\.float8_e4m3fn"):
        arrays_of(module)


def test_bfloat16_goes_both_ways():
    import torch

    module, other = (torch.nn.Linear(3, 2, dtype=torch.bfloat16) for _ in range(2))
    arrays = arrays_of(module)
    assert {array.dtype.name for array in arrays.values()} == {"bfloat16"}
    load_arrays(other, arrays)
    for one, same in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, same)


def test_state_that_is_no_tensor_is_named():
    import torch

    class Odd(torch.nn.Module):
        def get_extra_state(self):
            return {"step": 1}

    with pytest.raises(ValueError, match="'_extra_state' of the state dict is a dict"):
        arrays_of(Odd())
