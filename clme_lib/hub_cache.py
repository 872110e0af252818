"""Whether a hub model is already in the Hugging Face cache (no network access)."""

from __future__ import annotations


def is_cached(model_id: str) -> bool:
    """True when the model's configuration is in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model_id, "config.json"), str)
