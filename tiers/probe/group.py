"""Gives an engine over several nodes the placement group that was made for it; loaded inside the engine."""

import os

GROUP = "ASSAY_PLACEMENT_GROUP"
"""Its id in Ray, in hexadecimal digits."""


def take_group() -> None:
    """Have vLLM's Ray executor find it, which looks for the group of the actor that it runs in, and runs in none.

    It would make a group of its own otherwise, and wait for GPUs that this one holds.
    """
    group = os.environ.get(GROUP)
    if group is None:
        return
    import ray.util
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup

    given = PlacementGroup(PlacementGroupID(bytes.fromhex(group)))
    ray.util.get_current_placement_group = lambda: given
