import importlib.util

import numpy as np

from sb3_ppo_plus.env_states import overlapping_arrays


def test_with_the_names_of_numpy_1_overlaps_are_found_too(monkeypatch):
    byte_bounds = overlapping_arrays._byte_bounds
    monkeypatch.delattr(np.lib, "array_utils", raising=False)
    monkeypatch.setattr(np, "byte_bounds", byte_bounds, raising=False)
    spec = importlib.util.spec_from_file_location("of_numpy_1", overlapping_arrays.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    grid = np.arange(12.0).reshape(3, 4)
    (group,) = module.overlapping([grid, np.zeros(3), grid[::-1, 1]])
    views = module.views_of(group)
    assert [view.offset for view in views] == [0, 72]
    assert views[0].block.tobytes() == grid.tobytes()
