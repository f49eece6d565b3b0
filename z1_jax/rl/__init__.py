"""GRPO for flow-matching policies: sampler, tree, advantage, loss (pure) and the loop around them."""
