"""Which elements of an array have memory of their own."""

import numpy as np
import pytest
import torch

from polyfuse.conformance.layouts import LAYOUTS, owned

SHARED = {(4, 1): (3, 4), (0, 1): (1, 4), (4, 0): (3, 1), (0, 0): (1, 1), (1, 3): (3, 4)}  # strides to what is owned


@pytest.mark.parametrize("strides", SHARED)
def test_what_is_written_to_the_owned_elements_is_written_to_all(strides):
    in_bytes = [4 * step for step in strides]
    array = np.lib.stride_tricks.as_strided(np.zeros(12, np.float32), (3, 4), in_bytes)
    tensor = torch.zeros(12).as_strided((3, 4), strides)
    for each in (array, tensor):
        part = owned(each)
        assert each[part].shape == SHARED[strides]
        each[part] = 7.0
        assert (np.asarray(each) == 7).all()


def test_the_layouts_of_cases_share_memory_only_where_they_are_expanded():
    made = {name: layout(np.ones((3, 3, 4), np.float32)) for name, layout in LAYOUTS.items()}
    sharing = {name for name, array in made.items() if array[owned(array)].size < array.size}
    assert sharing == {"expanded", "expanded_last"}


def test_an_array_without_dimensions_owns_its_element():
    assert owned(np.zeros(())) == owned(torch.zeros(())) == ()
