"""The values that the models' settings may have: names alone, so that a config can be checked without JAX."""

DTYPES = ("float32", "bfloat16")  # of the computation
REMAT = ("none", "dots", "full")  # see layers.REMAT_POLICIES
ATTENTION = ("einsum", "xla", "cudnn")
ACTING = ("auto", "plain", "prepared")  # the form of the parameters that decisions read: see acting
SCOPES = ("expert", "joint", "lora", "everything")  # what is trained


def trains_vlm(scope: str, vlm_rank: int) -> bool:
    """Whether a scope trains the vision-language model, which makes prefix caches; `vlm_rank`: its adapters' rank."""
    return scope in ("joint", "everything") or (scope == "lora" and vlm_rank > 0)
