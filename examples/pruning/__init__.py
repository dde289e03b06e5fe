"""What the pruning scripts share: networks, the training with a budget, the comparison before and after the cut."""
