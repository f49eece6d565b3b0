"""What settings of the models may be: names alone, so that a config can be checked without JAX."""

DTYPES = ("float32", "bfloat16")  # of the computation
REMAT = ("none", "dots", "full")  # see layers.REMAT_POLICIES
ATTENTION = ("einsum", "xla", "cudnn")
SCOPES = ("expert", "joint", "lora", "everything")  # what is trained
