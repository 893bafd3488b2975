"""How sure a mean over prompts is."""

import torch

RESAMPLES = 2000


def interval(by_prompt: list[torch.Tensor]) -> tuple[float, float]:
    """95% of the mean under resampling of prompts, whose tokens belong together."""
    sums = torch.stack([kl.sum() for kl in by_prompt])
    counts = torch.tensor([float(len(kl)) for kl in by_prompt])
    drawn = torch.randint(len(by_prompt), (RESAMPLES, len(by_prompt)), generator=torch.Generator().manual_seed(0))
    means = (sums[drawn].sum(1) / counts[drawn].sum(1)).sort().values
    return means[int(0.025 * RESAMPLES)].item(), means[int(0.975 * RESAMPLES)].item()
