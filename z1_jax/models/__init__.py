"""π0.5: a SigLIP vision tower, a Gemma language model and a flow-matching action expert."""
