"""Everything between raw episodes and model inputs: tokenizer, transforms, datasets."""
